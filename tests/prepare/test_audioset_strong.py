"""AudioSet Strong: the official tables joined to the audio that is there."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile

from data.clip_store import STRONG, labelling
from prepare.audioset_strong import COLUMNS, choose_validation, name_classes, read_strong
from settings import UserError
from tests.prepare.raw_data import BARK, RATE, SPEECH, events, names, prepare, refused, write_sound, write_text

STRONG_ONLY, RARE = "/t/dd00099", "/m/zz_eval"  # not among the 527
IDS = ["b0RFKhbpFJA", "a_b-c_30000", "-0123456789", "videovideo1"]


def write_table(path: Path, *lines: tuple) -> Path:
    return write_text(path, "".join("\t".join(map(str, line)) + "\n" for line in (COLUMNS, *lines)))


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, Any]:
    """Three training segments with audio and one without; two to evaluate, one of them with other classes alone."""
    raw = tmp_path / "raw"
    write_sound(raw / f"Y{IDS[0]}.wav", 10.0, level=0.1)
    write_sound(raw / "deep" / f"{IDS[1]}_30000.flac", 10.0, level=0.2)  # the start in the name, in ms
    video = np.concatenate([np.full(20 * RATE, 0.9), np.full(10 * RATE, 0.3), np.full(5 * RATE, 0.9)])
    soundfile.write(raw / f"{IDS[3]}.wav", video, RATE)  # a whole video: 20 to 30 s is the segment
    write_sound(raw / "Yevalevaleva.wav", 4.0, level=0.4)
    write_sound(raw / "Yevalevalevb.wav", 10.0, level=0.5)
    strong = write_table(
        tmp_path / "audioset_train_strong.tsv",
        (f"{IDS[0]}_30000", 0.0, 1.5, SPEECH),
        (f"{IDS[1]}_30000", 2.0, 10.2, BARK),
        (f"{IDS[0]}_30000", 9.0, 10.0, STRONG_ONLY),
        (f"{IDS[2]}_0", 0.5, 1.0, SPEECH),
        (f"{IDS[3]}_20000", 3.0, 3.0, BARK),
        (f"{IDS[3]}_20000", 1.0, 4.0, SPEECH),
    )
    table = write_table(
        tmp_path / "audioset_eval_strong.tsv",
        ("evalevaleva_0", 3.0, 10.0, SPEECH),
        ("evalevaleva_0", 6.0, 10.0, BARK),
        ("evalevaleva_0", 0.0, 1.0, RARE),
        ("evalevalevb_0", 0.0, 1.0, RARE),
    )
    return {"raw": raw, "strong": str(strong), "table": table}


def test_tables_are_joined_to_the_audio(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Times, classes, cuts out of longer files, and everything that was left out is counted."""
    report, table = prepare("audioset-strong", tmp_path, **flags)
    assert table.labels == ["Bark", "Speech", STRONG_ONLY]  # in the order of their mids
    found = {name: sorted(mine) for name, mine in zip(names(table), events(table), strict=True)}
    assert found == {
        f"Y{IDS[0]}.wav": [(STRONG_ONLY, 9.0, 10.0), ("Speech", 0.0, 1.5)],
        f"Y{IDS[1]}.wav": [("Bark", 2.0, 10.0)],
        f"Y{IDS[3]}.wav": [("Speech", 1.0, 4.0)],
        "Yevalevaleva.wav": [("Speech", 3.0, 4.0)],  # the clip has 4 s
        "Yevalevalevb.wav": [],
    }
    splits = dict(zip(names(table), table.split.tolist(), strict=True))
    assert sorted(splits.values()) == [b"test", b"test", b"train", b"train", b"validation"]
    assert {name for name in splits if splits[name] == b"test"} == {"Yevalevaleva.wav", "Yevalevalevb.wav"}
    with h5py.File(report.path) as file:
        levels = dict(zip(names(table), np.round(file["waveform"][:, RATE] / 32767, 2).tolist(), strict=True))
        assert file["waveform"].shape == (5, 10 * RATE)
    assert levels == {f"Y{IDS[0]}.wav": 0.1, f"Y{IDS[1]}.wav": 0.2, f"Y{IDS[3]}.wav": 0.3} | {
        "Yevalevaleva.wav": 0.4, "Yevalevalevb.wav": 0.5
    }  # fmt: skip
    assert (labelling(table) == STRONG).all()
    assert (report.missing, report.events, report.empty_events) == ([f"Y{IDS[2]}.wav"], 5, 2)
    assert dict(report.unknown) == {RARE: 2}
    assert "5 clips of 6 segments" in str(report)
    assert f"2 events of 1 classes that only the evaluation table has were left out: {RARE}" in str(report)
    details = report.path.with_name("audioset-strong_report.csv").read_text().splitlines()
    assert f"Y{IDS[2]}.wav,missing," in details
    assert f"Y{IDS[3]}.wav,cut,20 to 30 s of 35.00 s" in details


def test_names_and_order_of_the_classes(tmp_path: Path, flags: dict[str, Any]) -> None:
    display = write_text(
        tmp_path / "names.tsv", f"{STRONG_ONLY}\tTick, of a clock\n{RARE}\tNever\n{SPEECH}\tSpeech\n{BARK}\tBark\n"
    )
    _, table = prepare("audioset-strong", tmp_path, class_names=display, **flags)
    assert table.labels == ["Bark", "Speech", "Tick, of a clock"]  # as the published classes, by name
    assert table.targets.any(axis=0).all()
    write_text(display, f"{SPEECH}\tSpeech\n{BARK}\tSpeech\n")
    assert name_classes({SPEECH, BARK}, display) == ([BARK, SPEECH], [f"Speech ({BARK})", f"Speech ({SPEECH})"])
    with pytest.raises(UserError, match=f"lacks 1 of 3 classes: {STRONG_ONLY}"):
        name_classes({SPEECH, BARK, STRONG_ONLY}, display)
    with pytest.raises(UserError, match="line 1"):
        name_classes({SPEECH}, write_text(display, f"{SPEECH} Speech\n"))
    with pytest.raises(UserError, match=r"nothing\.tsv"):
        name_classes({SPEECH}, tmp_path / "nothing.tsv")


def test_validation_is_a_stratified_twentieth(tmp_path: Path) -> None:
    """5 % of the segments of a class, whole, from the seed; most stay where others come and go."""
    lines = [(f"video{n:06d}_0", 0.0, 1.0, SPEECH) for n in range(400)]
    lines += [(f"video{n:06d}_0", 2.0, 3.0, BARK) for n in range(0, 400, 4)]  # rarer: these are a group of their own
    segments = read_strong(write_table(tmp_path / "t.tsv", *lines))
    assert len(segments) == 400
    for seed in range(5):
        numbers = [int(ytid.removeprefix("video")) for ytid in choose_validation(segments, seed)]
        assert np.bincount([n % 4 == 0 for n in numbers]).tolist() == [15, 5]
    chosen = choose_validation(segments, 1)
    assert chosen == choose_validation(segments, 1)
    assert chosen != choose_validation(segments, 2)
    assert len(chosen & choose_validation(segments[20:], 1)) >= 15


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ([(f"{IDS[0]}_30000", 1.0, 0.5, SPEECH)], "line 2: .* 1.0 to 0.5"),
        ([(f"{IDS[0]}_30000", "x", 0.5, SPEECH)], "line 2: start_time_seconds 'x'"),
        ([(f"{IDS[0]}_30000", 0.0, "inf", SPEECH)], "line 2: .* 'inf'"),
        ([(f"{IDS[0]}_30000", 0.0, 0.5, "")], "line 2: .* of ''"),
        ([(IDS[0], 0.0, 0.5, SPEECH)], "line 2: 'b0RFKhbpFJA'"),
        ([(f"{IDS[0]}_30000", 0.0, 0.5)], "line 2: .* of ''"),
        ([(f"{IDS[0]}_0", 0, 1, SPEECH), (f"{IDS[0]}_10000", 0, 1, SPEECH)], f"{IDS[0]}_10000"),
        ([], "lists no events"),
    ],
)
def test_wrong_lines(tmp_path: Path, lines: list[tuple], match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_strong(write_table(tmp_path / "t.tsv", *lines))


def test_wrong_tables(tmp_path: Path, flags: dict[str, Any]) -> None:
    refused("both list", "audioset-strong", tmp_path, **{**flags, "table": Path(flags["strong"])})
    elsewhere = write_table(tmp_path / "e.tsv", ("elsewhere12_0", 0, 1, SPEECH))
    refused("None of the 1 clips .* Yelsewhere12_0", "audioset-strong", tmp_path, **{**flags, "strong": str(elsewhere)})
    refused("nothing.tsv", "audioset-strong", tmp_path, **{**flags, "strong": "nothing.tsv"})
    for text in (b"filename\tonset\n", b"\xff\xfe"):
        (tmp_path / "t.tsv").write_bytes(text)
        refused("t.tsv", "audioset-strong", tmp_path, **{**flags, "strong": str(tmp_path / "t.tsv")})
