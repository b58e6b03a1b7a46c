"""ESC-50's table and Speech Commands' lists: cut clips, the order of classes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from prepare.esc50 import LABELS
from prepare.scv2 import PUBLISHED_LABELS
from tests.prepare.raw_data import (
    classes,
    lengths,
    make_esc50,
    make_scv2,
    names,
    prepare,
    refused,
    write_broken,
    write_sound,
    write_text,
)  # fmt: skip


def test_esc50(tmp_path: Path) -> None:
    """Any format and rate; clips over 5 s are cut; files that are missing or no audio are reported."""
    flags = make_esc50(tmp_path)
    audio, meta = flags["raw"] / "audio", flags["raw"] / "meta" / "esc50.csv"
    write_sound(audio / "2.flac", seconds=4, rate=44100, channels=2)
    write_sound(audio / "3.ogg", seconds=6, rate=16000)
    extra = ["gone.wav", *write_broken(audio)]
    write_text(meta, meta.read_text() + "".join(f"{name},1,0,{LABELS[0]}\n" for name in extra))
    report, table = prepare("esc-50", tmp_path, rate=32000, **flags)
    assert sorted(name for name, _ in report.skipped) == sorted(["broken.wav", *extra])
    assert all(name in str(report) for name in extra)
    assert (table.labels, table.fold.tolist(), names(table)) == (LABELS[:4], [1, 3, 4], ["1.wav", "2.flac", "3.ogg"])
    assert classes(table) == [[LABELS[0]], [LABELS[2]], [LABELS[3]]]
    assert lengths(table) == [6400, 128000, 160000, 160000]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("filename,fold\na.wav,1\n", "target, category"),
        ("filename,fold,target,category\na.wav,1,0,cat\n", "line 2: class 0 'cat'"),
        ("filename,fold,target,category\na.wav,1,50,dog\n", "line 2: class 50"),
        ("filename,fold,target,category\na.wav,one,0,dog\n", "line 2: fold 'one'"),
        (None, "--raw"),
    ],
)
def test_wrong_esc50(tmp_path: Path, text: str | None, match: str) -> None:
    if text is not None:
        write_text(tmp_path / "meta" / "esc50.csv", text)
    refused(match, "esc-50", tmp_path, raw=tmp_path)


@pytest.fixture
def scv2(tmp_path: Path) -> dict[str, Any]:
    return make_scv2(tmp_path)


def test_scv2_splits_follow_the_lists(tmp_path: Path, scv2: dict[str, Any]) -> None:
    """Broken files, files in a list that no folder holds, and folders that are no words."""
    broken = write_broken(scv2["raw"] / "wow")
    write_text(scv2["raw"] / "wow" / "notes.txt", "no audio")
    tests = scv2["raw"] / "testing_list.txt"
    write_text(tests, f"{tests.read_text()}\nwow/gone.wav\n_background_noise_/a.wav\n")
    report, table = prepare("scv2", tmp_path, rate=16000, **scv2)
    assert table.labels == ["backward", "bed", "wow"]
    assert names(table) == [f"{word}/{name}.wav" for word in table.labels for name in "abc"]
    assert classes(table) == [[word] for word in table.labels for _ in "abc"]
    assert table.split.tolist() == [b"train", b"validation", b"test"] * 3
    unread = ["broken.wav", *broken, "gone.wav"]
    assert {name for name, _ in report.skipped} == {"_background_noise_/a.wav", *(f"wow/{name}" for name in unread)}
    assert "wow/gone.wav: It is in testing_list.txt" in str(report)


def test_scv2_clips_are_one_second_at_most(tmp_path: Path) -> None:
    flags = make_scv2(tmp_path, ("one",))
    write_sound(flags["raw"] / "one" / "a.wav", seconds=1.5, rate=44100)
    write_sound(flags["raw"] / "one" / "b.wav", seconds=0.5, rate=48000)
    assert lengths(prepare("scv2", tmp_path, rate=16000, **flags)[1]) == [16000, 8000, 3200, 16000]


def test_scv2_published_order(tmp_path: Path, scv2: dict[str, Any]) -> None:
    _, table = prepare("scv2", tmp_path, label_order="published", **scv2)
    assert table.labels == PUBLISHED_LABELS
    assert len(set(PUBLISHED_LABELS)) == 35
    for word, number in {"bed": 0, "wow": 1, "five": 2, "zero": 10, "four": 15, "stop": 25, "backward": 34}.items():
        assert PUBLISHED_LABELS[number] == word
    assert table.targets.argmax(axis=1).tolist() == [34] * 3 + [0] * 3 + [1] * 3
    write_sound(scv2["raw"] / "hello" / "a.wav")
    (tmp_path / "data" / "scv2.h5").unlink()
    refused("hello", "scv2", tmp_path, label_order="published", **scv2)
    refused("--label_order listing", "scv2", tmp_path, label_order="listing", **scv2)


def test_wrong_scv2(tmp_path: Path, scv2: dict[str, Any]) -> None:
    tests = scv2["raw"] / "testing_list.txt"
    write_text(tests, "wow/a.wav\nwow/b.wav\n")
    refused("testing_list.txt, line 2: wow/b.wav is in validation_list.txt", "scv2", tmp_path, **scv2)
    write_text(tests, "one\n")
    refused("line 1: 'one'", "scv2", tmp_path, **scv2)
    tests.unlink()
    refused("testing_list.txt", "scv2", tmp_path, **scv2)
    write_sound(tmp_path / "flat" / "a.wav")
    for folder in ("nothing", "flat"):
        refused(folder, "scv2", tmp_path, raw=tmp_path / folder)
