"""DESED's sets side by side: strong, weak and unlabelled training clips, validation and test in one store."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import main
from data.clip_store import STRONG, UNLABELLED, WEAK, labelling
from prepare.desed import LABELS
from tests.prepare import raw_data

WEAK_HEAD = "filename\tevent_labels\n"


@pytest.fixture
def desed(tmp_path: Path) -> dict[str, Any]:
    return raw_data.make_desed(tmp_path)


def test_sets_lie_side_by_side(tmp_path: Path, desed: dict[str, Any]) -> None:
    """Two clips are named 1.wav: each set gets the one of its folders, and both are named by their paths."""
    report, table = raw_data.prepare("desed", tmp_path, **desed)
    assert [name for name, _ in report.skipped] == ["broken.wav"]
    assert (table.labels, LABELS[0], LABELS[8:]) == (LABELS, "Speech", ["Dog", "Vacuum_cleaner"])
    assert raw_data.names(table) == [
        "train/synthetic/soundscapes/1.wav", "2.wav", "real.wav", "validation/synthetic/soundscapes/1.wav", "e.wav",
        "w1.wav", "w2.wav", "deeper/u2.wav", "u1.wav",
    ]  # fmt: skip
    assert labelling(table).tolist() == [STRONG] * 5 + [WEAK] * 2 + [UNLABELLED] * 2
    assert table.split.tolist() == [b"train"] * 3 + [b"validation", b"test"] + [b"train"] * 4
    assert raw_data.classes(table) == [
        ["Dog"], [], ["Speech", "Cat"], ["Blender"], ["Dog"], ["Speech", "Dog"], ["Cat"], [], [],
    ]  # fmt: skip
    assert raw_data.events(table) == [
        [("Dog", 0, 0.1)], [], [("Speech", 0.05, 0.2), ("Cat", 0.1, 0.2)], [("Blender", 0, 0.2)], [("Dog", 0.1, 0.2)],
        [], [], [], [],
    ]  # fmt: skip
    with h5py.File(report.path) as file:
        assert np.round(file["waveform"][:, 0] / 327.67).tolist() == [1, 2, 3, 8, 9, 4, 5, 7, 6]


def test_clips_are_kept_whole(tmp_path: Path) -> None:
    """Longer than 10 s, of any rate and channels, in deeper folders; broken and missing files are reported."""
    raw = tmp_path / "raw"
    raw_data.write_sound(raw / "a.wav", seconds=1.0, rate=44100, channels=2)
    raw_data.write_sound(raw / "long.wav", seconds=11.0, rate=4000)
    raw_data.write_sound(raw / "eval" / "public" / "quiet.wav", seconds=0.5)
    lines = "a.wav\t0.1\t0.4\tDog\na.wav\t0.2\t1.3\tSpeech\nlong.wav\t10.5\t11.0\tVacuum_cleaner\nquiet.wav\t\t\t\n"
    lines += "gone.wav\t0\t1\tCat\n" + "".join(f"{name}\t\t\t\n" for name in raw_data.write_broken(raw))
    report, table = raw_data.prepare(
        "desed", tmp_path, raw=raw, table=raw_data.write_text(tmp_path / "t.tsv", raw_data.EVENTS + lines)
    )
    assert {name for name, _ in report.skipped} == {"gone.wav", "empty.wav", "text.mp3", "nan.wav"}
    assert raw_data.names(table) == ["a.wav", "long.wav", "quiet.wav"]
    assert raw_data.lengths(table) == [raw_data.RATE, 11 * raw_data.RATE, raw_data.RATE // 2, 11 * raw_data.RATE]
    assert raw_data.events(table) == [[("Dog", 0.1, 0.4), ("Speech", 0.2, 1.0)], [("Vacuum_cleaner", 10.5, 11.0)], []]


def test_a_clip_is_taken_once_with_its_strongest_annotation(tmp_path: Path, desed: dict[str, Any]) -> None:
    """The unlabelled folder may hold the other sets; a weak table may name a strong clip."""
    raw_data.write_text(desed["weak"], f"{WEAK_HEAD}w1.wav\tDog\nreal.wav\tSpeech\n")
    _, table = raw_data.prepare("desed", tmp_path, **{**desed, "unlabelled": desed["raw"] / "train"})
    known = dict(zip([name.split("/")[-1] for name in raw_data.names(table)], labelling(table).tolist(), strict=True))
    assert known == {
        "1.wav": STRONG, "2.wav": STRONG, "real.wav": STRONG, "e.wav": STRONG, "w1.wav": WEAK, "w2.wav": UNLABELLED,
        "u1.wav": UNLABELLED, "u2.wav": UNLABELLED,
    }  # fmt: skip
    assert len(table) == len(set(raw_data.names(table))) == 9


@pytest.mark.parametrize(
    ("flag", "text", "match"),
    [
        ("table", f"{raw_data.EVENTS}real.wav\t\t\t\n", r"real.wav .* \(train\) .* \(test\)"),
        ("table", f"{raw_data.EVENTS}e.wav\t0.1\t0.2\tDog\neval/e.wav\t\t\t\n", "e.wav in .* as eval/e.wav"),
        ("table", f"{raw_data.EVENTS}e.wav\t0\t0.1\tdog\n", "eval.tsv, line 2: 'dog'"),
        ("weak", "filename\tlabel\nw1.wav\tDog\n", "weak.tsv lacks the columns event_labels"),
        ("weak", f"{WEAK_HEAD}w1.wav\tDog\nw2.wav\tDog,dog\n", "weak.tsv, line 3: 'dog'"),
        ("weak", f"{WEAK_HEAD}w1.wav\t\n", "weak.tsv, line 2: ''"),
        ("weak", f"{WEAK_HEAD}\tDog\n", "weak.tsv, line 2: the filename"),
    ],
)
def test_wrong_tables(tmp_path: Path, desed: dict[str, Any], flag: str, text: str, match: str) -> None:
    raw_data.write_text(desed[flag], text)
    raw_data.refused(match, "desed", tmp_path, **desed)


def test_wrong_sets(tmp_path: Path, desed: dict[str, Any]) -> None:
    (desed["raw"] / "empty").mkdir()
    for folder, match in (("nowhere", "--unlabelled"), ("empty", "empty has no audio")):
        raw_data.refused(match, "desed", tmp_path, **{**desed, "unlabelled": Path(folder)})
    del desed["table"]
    raw_data.refused(r"1.wav .* \(validation\).* \(train\)", "desed", tmp_path, **{**desed, "unlabelled": desed["raw"]})
    raw_data.refused("--table, --strong", "desed", tmp_path, raw=desed["raw"], unlabelled=desed["unlabelled"])


def test_the_commands_to_train(
    tmp_path: Path, desed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which loss can learn depends on the annotation of the training clips."""
    monkeypatch.chdir(tmp_path)

    def losses(*flags: str) -> list[str]:
        words = [word for flag in flags for word in (f"--{flag}", str(desed[flag]))]
        about = ["--dataset_type", "desed", "--overwrite", "--sample_rate", str(raw_data.RATE)]
        assert main.main(["prepare", *about, *words]) in (0, 1)  # broken.wav is among those to test on
        commands = [line.partition("python main.py ")[2] for line in capsys.readouterr().out.splitlines()]
        return [line.partition("--loss_type ")[2] or "of clips" for line in commands if line.startswith("train")]

    assert losses("raw", "strong") == ["of clips", "frame_bce"]
    assert losses("raw", "strong", "weak") == ["of clips", "weak_strong_bce"]
    assert losses("raw", "strong", "weak", "unlabelled", "table") == ["weak_strong_bce"]
    assert losses("raw", "weak", "unlabelled", "table") == ["weak_strong_bce"]
    assert losses("raw", "table") == ["of clips"]
