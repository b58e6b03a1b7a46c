"""Adapters: the demo from its seed, ESC-50 from a folder of any audio."""

import csv
import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

import main
from data.audio import read_audio
from data.clip_store import Waveforms, open_store, read_events, read_store_table
from prepare.demo import CLIP_SECONDS, EVENTS, LABELS, prepare_demo, synthesize_event
from prepare.esc50 import LABELS as ESC50_LABELS
from prepare.esc50 import prepare_esc50


def test_demo_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_demo(tmp_path / f"{name}.h5", sample_rate=8000, seed=seed, clips=10)
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b, h5py.File(tmp_path / "c.h5") as c:
        for key in a:
            assert np.array_equal(a[key][:], b[key][:]), key
        assert not np.array_equal(a["waveform"][:], c["waveform"][:])


def test_demo_labels_are_true(tmp_path: Path) -> None:
    """Splits, classes and times agree, and events of one class do not touch."""
    report = prepare_demo(tmp_path / "demo.h5", sample_rate=8000, seed=3, clips=40)
    table = read_store_table(tmp_path / "demo.h5")
    assert report.clips == len(table) == 40
    assert {split: (table.split == split).sum() for split in (b"train", b"validation", b"test")} == {
        b"train": 28,
        b"validation": 6,
        b"test": 6,
    }
    assert len(LABELS) >= 8
    for target, events in zip(table.targets, read_events(tmp_path / "demo.h5"), strict=True):
        assert events
        assert set(np.flatnonzero(target)) == {event.label for event in events}
        for event in events:
            assert 0 <= event.onset < event.offset <= CLIP_SECONDS
        for label in {event.label for event in events}:
            same = sorted((e.onset, e.offset) for e in events if e.label == label)
            assert all(first[1] < second[0] for first, second in itertools.pairwise(same))


@pytest.mark.parametrize("label", EVENTS)
def test_demo_events_sound(label: str) -> None:
    event = synthesize_event(label, 2.0, 16000, np.random.default_rng(0))
    assert event.shape == (32000,)
    assert np.sqrt(np.mean(event**2)) == pytest.approx(1, abs=1e-6)
    assert abs(event[0]) < 0.05


def test_demo_needs_enough_clips(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 10"):
        prepare_demo(tmp_path / "demo.h5", sample_rate=8000, seed=1, clips=3)


def make_esc50(folder: Path, seconds: tuple[float, ...] = (5, 5, 4, 6), rate: int = 44100) -> None:
    """A folder like ESC-50: one clip a fold, in several formats and lengths, and three files that are none."""
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(seconds):
        suffix = ("wav", "flac", "ogg", "mp3")[number % 4]
        name = f"{number + 1}-clip.{suffix}"
        sound = 0.1 * rng.standard_normal((int(length * rate), 1 + number % 2))
        soundfile.write(folder / "audio" / name, sound, rate)
        rows.append((name, number + 1, number, ESC50_LABELS[number]))
    (folder / "audio" / "text.wav").write_text("this is no sound")
    soundfile.write(folder / "audio" / "empty.wav", np.zeros(0), rate)
    rows += [(name, 1, 0, ESC50_LABELS[0]) for name in ("text.wav", "empty.wav", "missing.wav")]
    with (folder / "meta" / "esc50.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "fold", "target", "category"), *rows])


def test_esc50(tmp_path: Path) -> None:
    make_esc50(tmp_path / "raw")
    report = prepare_esc50(tmp_path / "raw", tmp_path / "esc.h5", sample_rate=32000)
    assert [name for name, _ in report.skipped] == ["text.wav", "empty.wav", "missing.wav"]
    assert "text.wav" in str(report)
    table = read_store_table(tmp_path / "esc.h5")
    assert (len(table), table.labels, table.fold.tolist()) == (4, ESC50_LABELS, [1, 2, 3, 4])
    with h5py.File(tmp_path / "esc.h5") as file:
        assert file["waveform"].shape == (4, 160000)
        lengths = file["real_len"][:].tolist()
    assert lengths[0] == lengths[1] == lengths[3] == 160000
    assert abs(lengths[2] - 128000) < 2500  # 4 s, and what a lossy format adds


def test_esc50_refuses_a_wrong_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--raw must be the folder"):
        prepare_esc50(tmp_path, tmp_path / "esc.h5", 32000)
    (tmp_path / "meta").mkdir()
    table = tmp_path / "meta" / "esc50.csv"
    table.write_text("filename,fold\na.wav,1\n")
    with pytest.raises(ValueError, match="lacks the columns target, category"):
        prepare_esc50(tmp_path, tmp_path / "esc.h5", 32000)
    table.write_text("filename,fold,target,category\na.wav,1,0,cat\n")
    with pytest.raises(ValueError, match="line 2: class 0 'cat'"):
        prepare_esc50(tmp_path, tmp_path / "esc.h5", 32000)
    table.write_text("filename,fold,target,category\na.wav,one,0,dog\n")
    with pytest.raises(ValueError, match="line 2: fold 'one'"):
        prepare_esc50(tmp_path, tmp_path / "esc.h5", 32000)


def test_audio_is_resampled_and_mixed_down(tmp_path: Path) -> None:
    t = np.arange(44100) / 44100
    soundfile.write(tmp_path / "a.wav", np.stack([np.sin(2 * np.pi * 440 * t), 0 * t], axis=1) * 0.8, 44100)
    found = read_audio(tmp_path / "a.wav", 16000)
    assert found.shape == (16000,)
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=1e-3)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="NaN"):
        read_audio(tmp_path / "nan.wav", 16000)


def test_long_recordings_are_cut_with_their_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    soundfile.write(raw / "a.wav", np.arange(20000) / 32768, 8000, subtype="PCM_16")  # 2.5 s that say where they are
    table = tmp_path / "events.tsv"
    table.write_text(
        "filename\tonset\toffset\tevent_label\tsplit\na.wav\t0.5\t1.25\towl\ttrain\na.wav\t2.1\t2.4\tbee\ttrain\n"
    )
    words = ["prepare", "--dataset_type", "folder", "--raw", str(raw), "--table", str(table), "--sample_rate", "8000"]
    words += ["--dataset_path", str(tmp_path / "data"), "--clip_samples", "8000"]
    assert main.main(words) == 0
    assert "1 clips are longer than 1 s, up to 2.5 s" in capsys.readouterr().out
    assert main.main([*words, "--segment_seconds", "1"]) == 0
    assert "are longer" not in capsys.readouterr().out
    store = read_store_table(tmp_path / "data" / "folder.h5")
    assert [name.decode() for name in store.names] == ["a.wav#t=0,1", "a.wav#t=1,2", "a.wav#t=2,2.5"]
    events = [[(e.label, round(e.onset, 6), round(e.offset, 6)) for e in clip] for clip in read_events(store.paths[0])]
    assert events == [[(1, 0.5, 1.0)], [(1, 0.0, 0.25)], [(0, 0.1, 0.4)]]
    assert store.targets.tolist() == [[False, True], [False, True], [True, False]]
    assert (store.split == b"train").all()
    with open_store(store.paths[0]) as file:
        sound = Waveforms(file)
        assert [len(sound.read(row)) for row in range(3)] == [8000, 8000, 4000]
        assert abs(int(sound.read(1)[0]) - 8000) <= 1
    table.write_text("filename\tlabel\na.wav\towl\n")
    assert main.main([*words, "--segment_seconds", "1"]) == 2
    assert "--segment_seconds 1 needs a table of events" in capsys.readouterr().err
