"""AudioSet Strong: the official tables joined to the audio that is there."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

import main
from data.clip_store import STRONG, ClipTable, read_events, read_store_table
from prepare.audioset_strong import (
    COLUMNS,
    StrongReport,
    choose_validation,
    name_classes,
    prepare_audioset_strong,
    read_strong,
)

RATE = 8000
SPEECH, BARK, STRONG_ONLY, RARE = "/m/09x0r", "/m/05tny_", "/t/dd00099", "/m/zz_eval"  # the last two are not in the 527
IDS = ["b0RFKhbpFJA", "a_b-c_30000", "-0123456789", "videovideo1"]


def write_table(path: Path, lines: list[tuple[str, float, float, str]]) -> Path:
    rows = ["\t".join(COLUMNS), *("\t".join(map(str, line)) for line in lines)]
    path.write_text("\n".join(rows) + "\n")
    return path


def write_sound(path: Path, seconds: float, level: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * RATE), level), RATE)


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    """Three training segments with audio and one without; two to evaluate, one of them with other classes alone."""
    raw = tmp_path / "raw"
    write_sound(raw / f"Y{IDS[0]}.wav", 10.0, 0.1)
    write_sound(raw / "deep" / f"{IDS[1]}_30000.flac", 10.0, 0.2)  # the start in the name, in ms
    video = np.concatenate([np.full(20 * RATE, 0.9), np.full(10 * RATE, 0.3), np.full(5 * RATE, 0.9)])
    soundfile.write(raw / f"{IDS[3]}.wav", video, RATE)  # a whole video: 20 to 30 s is the segment
    write_sound(raw / "Yevalevaleva.wav", 4.0, 0.4)
    write_sound(raw / "Yevalevalevb.wav", 10.0, 0.5)
    train = write_table(
        tmp_path / "audioset_train_strong.tsv",
        [
            (f"{IDS[0]}_30000", 0.0, 1.5, SPEECH),
            (f"{IDS[1]}_30000", 2.0, 10.2, BARK),
            (f"{IDS[0]}_30000", 9.0, 10.0, STRONG_ONLY),
            (f"{IDS[2]}_0", 0.5, 1.0, SPEECH),
            (f"{IDS[3]}_20000", 3.0, 3.0, BARK),
            (f"{IDS[3]}_20000", 1.0, 4.0, SPEECH),
        ],
    )
    test = write_table(
        tmp_path / "audioset_eval_strong.tsv",
        [
            ("evalevaleva_0", 3.0, 10.0, SPEECH),
            ("evalevaleva_0", 6.0, 10.0, BARK),
            ("evalevaleva_0", 0.0, 1.0, RARE),
            ("evalevalevb_0", 0.0, 1.0, RARE),
        ],
    )
    return train, test


def prepare(tmp_path: Path, tables: tuple[Path, Path], **more: Path) -> tuple[StrongReport, ClipTable]:
    store = tmp_path / "audioset-strong.h5"
    report = prepare_audioset_strong(tmp_path / "raw", store, RATE, *tables, seed=0, **more)
    return report, read_store_table(store)


def test_tables_are_joined_to_the_audio(tmp_path: Path, tables: tuple[Path, Path]) -> None:
    """Times, classes, cuts out of longer files, and everything that was left out is counted."""
    report, table = prepare(tmp_path, tables)
    assert table.labels == ["Bark", "Speech", STRONG_ONLY]  # in the order of their mids
    names = [name.decode() for name in table.names]
    assert sorted(names) == sorted(f"Y{ytid}.wav" for ytid in (IDS[0], IDS[1], IDS[3], "evalevaleva", "evalevalevb"))
    splits = dict(zip(names, table.split.tolist(), strict=True))
    assert sorted(splits.values()) == [b"test", b"test", b"train", b"train", b"validation"]
    assert {name for name in names if splits[name] == b"test"} == {"Yevalevaleva.wav", "Yevalevalevb.wav"}
    events = dict(zip(names, read_events(tmp_path / "audioset-strong.h5"), strict=True))
    found = {name: sorted((table.labels[e.label], e.onset, e.offset) for e in mine) for name, mine in events.items()}
    assert found == {
        f"Y{IDS[0]}.wav": [(STRONG_ONLY, 9.0, 10.0), ("Speech", 0.0, 1.5)],
        f"Y{IDS[1]}.wav": [("Bark", 2.0, 10.0)],
        f"Y{IDS[3]}.wav": [("Speech", 1.0, 4.0)],
        "Yevalevaleva.wav": [("Speech", 3.0, 4.0)],  # the clip has 4 s
        "Yevalevalevb.wav": [],
    }
    with h5py.File(tmp_path / "audioset-strong.h5") as file:
        levels = dict(zip(names, np.round(file["waveform"][:, RATE] / 32767, 2).tolist(), strict=True))
        assert file["waveform"].shape == (5, 10 * RATE)
    assert levels == {
        f"Y{IDS[0]}.wav": 0.1, f"Y{IDS[1]}.wav": 0.2, f"Y{IDS[3]}.wav": 0.3, "Yevalevaleva.wav": 0.4,
        "Yevalevalevb.wav": 0.5,
    }  # fmt: skip
    assert table.labelling is not None
    assert (table.labelling == STRONG).all()
    for name, target in zip(names, table.targets, strict=True):
        assert set(np.flatnonzero(target)) == {event.label for event in events[name]}
    assert (report.missing, report.events, report.empty_events) == ([f"Y{IDS[2]}.wav"], 5, 2)
    assert dict(report.unknown) == {RARE: 2}
    text = str(report)
    assert "5 clips of 6 segments" in text
    assert f"2 events of 1 classes that only the evaluation table has were left out: {RARE}" in text
    details = (tmp_path / "audioset-strong_report.csv").read_text().splitlines()
    assert f"Y{IDS[2]}.wav,missing," in details
    assert f"Y{IDS[3]}.wav,cut,20 to 30 s of 35.00 s" in details


def test_names_and_order_of_the_classes(tmp_path: Path, tables: tuple[Path, Path]) -> None:
    names = tmp_path / "mid_to_display_name.tsv"
    names.write_text(f"{STRONG_ONLY}\tTick, of a clock\n{RARE}\tNever\n{SPEECH}\tSpeech\n{BARK}\tBark\n")
    _, table = prepare(tmp_path, tables, class_names=names)
    assert table.labels == ["Tick, of a clock", "Speech", "Bark"]
    assert {table.labels[k] for k in np.flatnonzero(table.targets.any(axis=0))} == set(table.labels)
    names.write_text(f"{SPEECH}\tSpeech\n{BARK}\tSpeech\n")
    assert name_classes({SPEECH, BARK}, names) == ([SPEECH, BARK], [f"Speech ({SPEECH})", f"Speech ({BARK})"])
    with pytest.raises(ValueError, match=f"lacks 1 of 3 classes: {STRONG_ONLY}"):
        prepare(tmp_path, tables, class_names=names)
    names.write_text(f"{SPEECH} Speech\n")
    with pytest.raises(ValueError, match=r"line 1: .*; a mid, a tab and a name are needed"):
        prepare(tmp_path, tables, class_names=names)
    with pytest.raises(ValueError, match=r"--class_names must be mid_to_display_name.tsv"):
        prepare(tmp_path, tables, class_names=tmp_path / "nothing.tsv")


def test_validation_is_a_stratified_twentieth(tmp_path: Path) -> None:
    """5 % of the segments of a class, whole, from the seed; most stay where others come and go."""
    lines = [(f"video{n:06d}_0", 0.0, 1.0, SPEECH) for n in range(400)]
    lines += [(f"video{n:06d}_0", 2.0, 3.0, BARK) for n in range(0, 400, 4)]  # rarer: these are a group of their own
    segments = read_strong(write_table(tmp_path / "t.tsv", lines))
    assert len(segments) == 400
    for seed in range(5):
        numbers = [int(ytid.removeprefix("video")) for ytid in choose_validation(segments, seed)]
        assert np.bincount([n % 4 == 0 for n in numbers]).tolist() == [15, 5]
    chosen = choose_validation(segments, 1)
    assert chosen == choose_validation(segments, 1)
    assert chosen != choose_validation(segments, 2)
    assert len(chosen & choose_validation(segments[20:], 1)) >= 15


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((f"{IDS[0]}_30000", 1.0, 0.5, SPEECH), "line 2: an event from '1.0' to '0.5' s"),
        ((f"{IDS[0]}_30000", "x", 0.5, SPEECH), "line 2: an event from 'x' to '0.5' s"),
        ((f"{IDS[0]}_30000", 0.0, "inf", SPEECH), "line 2: an event from"),
        ((f"{IDS[0]}_30000", 0.0, 0.5, ""), "rising seconds and a mid are needed"),
        ((IDS[0], 0.0, 0.5, SPEECH), "line 2: 'b0RFKhbpFJA' is no segment_id, as b0RFKhbpFJA_30000"),
        ((f"{IDS[0]}_30000", 0.0, 0.5), "line 2: 3 columns; there must be 4"),
    ],
)
def test_wrong_lines(tmp_path: Path, line: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_strong(write_table(tmp_path / "t.tsv", [line]))


def test_wrong_tables(tmp_path: Path, tables: tuple[Path, Path]) -> None:
    train, _ = tables
    with pytest.raises(ValueError, match=r"both list (b0|a_|-0|vi).*: a clip must not be trained and tested"):
        prepare(tmp_path, (train, train))
    twice = write_table(tmp_path / "t.tsv", [(f"{IDS[0]}_0", 0, 1, SPEECH), (f"{IDS[0]}_10000", 0, 1, SPEECH)])
    with pytest.raises(ValueError, match=f"{IDS[0]}_10000 is the second segment of its video"):
        read_strong(twice)
    elsewhere = write_table(tmp_path / "t.tsv", [("elsewhere12_0", 0, 1, SPEECH)])
    with pytest.raises(ValueError, match=r"None of the 1 clips of .* which has 5 audio files .*Yelsewhere12.wav"):
        prepare(tmp_path, (elsewhere, elsewhere.with_name("audioset_eval_strong.tsv")))
    with pytest.raises(ValueError, match="lists no events"):
        read_strong(write_table(tmp_path / "t.tsv", []))
    (tmp_path / "t.tsv").write_text("filename\tonset\n")
    with pytest.raises(ValueError, match="must begin with segment_id, start_time_seconds"):
        read_strong(tmp_path / "t.tsv")
    with pytest.raises(ValueError, match=r"There is no .*: give audioset_train_strong.tsv"):
        read_strong(tmp_path / "nothing.tsv")
    assert not list(tmp_path.glob("audioset-strong.h5*"))


def test_command(
    tmp_path: Path, tables: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["prepare", "--dataset_type", "audioset-strong", "--raw", "raw", "--sample_rate", str(RATE)]
    assert main.main([*words, "--strong", str(tables[0]), "--table", str(tables[1])]) == 0
    train = "Train on the times: python main.py train --dataset_type audioset-strong --classes_num 3"
    assert f"{train} --loss_type frame_bce\n" in capsys.readouterr().out
    assert main.main(words) == 2
    assert "needs --strong, the TSV of the training segments" in capsys.readouterr().err
