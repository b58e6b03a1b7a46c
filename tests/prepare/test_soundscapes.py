"""Soundscapes of a bank: the truth fits the sound, no clip serves two splits, the same seed gives the same."""

import itertools
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

import main
from data.clip_store import (
    SPLITS,
    STRONG,
    UNLABELLED,
    WEAK,
    Clip,
    ClipStoreWriter,
    ClipTable,
    read_events,
    read_store_table,
)
from prepare.bank import choose_stretch, share_out, sounding_frames
from prepare.soundscapes import Mix, SoundscapeReport, prepare_soundscapes

RATE = 8000
LABELS = ["low", "never", "middle", "high"]  # no clip of the bank has the second
TONES = {0: 400.0, 2: 1000.0, 3: 2500.0}  # Hz of each class
LEAD, SOUND = 0.3, 0.8  # seconds: each clip is silent, sounds, and is silent again


def tone(frequency: float, seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def padded_tone(frequency: float) -> np.ndarray:
    return np.pad(tone(frequency, SOUND), round(LEAD * RATE))


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """4 folds; in each, every class has 3 clips of 2 recordings, named as ESC-50's; and two clips that cannot serve."""
    path = tmp_path / "bank.h5"
    with ClipStoreWriter(
        path, clip_samples=2 * RATE, sample_rate=RATE, labels=LABELS, dataset_type="esc-50", source="S", licence="L"
    ) as writer:
        for fold, label in itertools.product((1, 2, 3, 4), TONES):
            for recording, take in ((0, "A"), (0, "B"), (1, "A")):
                waveform = (32767 * padded_tone(TONES[label])).astype(np.int16)
                name = f"{fold}-{1000 * fold + 10 * label + recording}-{take}-{label}.wav"
                writer.add(Clip(name, waveform, [label], fold=fold))
        writer.add(Clip("1-1-A-0.wav", np.zeros(RATE, np.int16), [0], fold=1))
        writer.add(Clip("1-2-A-0.wav", np.full(RATE, 99, np.int16), [0, 2], fold=1))
    return path


def prepared(
    raw: Path, store: Path, *, seed: int = 0, clips: int = 20, mix: Mix | None = None, folds: str | None = None,
    backgrounds: Path | None = None,
) -> tuple[SoundscapeReport, ClipTable, np.ndarray]:  # fmt: skip
    """Report, table and (N, samples) float sound of a store of soundscapes."""
    report = prepare_soundscapes(
        raw, store, RATE, seed=seed, clips=clips, mix=mix or Mix(), folds=folds, backgrounds=backgrounds
    )
    with h5py.File(store) as file:
        return report, read_store_table(store), file["waveform"][:] / 32767


def used_by_split(store: Path) -> dict[str, set[str]]:
    """Split -> names of the clips of the bank that its events were cut from."""
    with h5py.File(store) as file:
        split = file["split"][:][file["event_clip"][:]]
        used = defaultdict(set)
        for one, name in zip(split, file["event_source"][:], strict=True):
            used[one.decode()].add(name.decode())
    return used


def test_truth_fits_the_sound(tmp_path: Path, bank: Path) -> None:
    """Alone, 50 dB above the noise: a class's tone is there from onset to offset, to 10 ms, and nowhere else."""
    report, table, sound = prepared(bank, tmp_path / "s.h5", mix=Mix(polyphony=1, snr=(50, 50)))
    assert table.labels == ["low", "middle", "high"]
    assert report.events == sum(map(len, read_events(tmp_path / "s.h5"))) > 20
    assert (report.clips, len(table)) == (20, 20)
    for waveform, events, target in zip(sound, read_events(tmp_path / "s.h5"), table.targets, strict=True):
        assert set(np.flatnonzero(target)) == {event.label for event in events}
        loud = np.abs(waveform) > 0.03 * np.abs(waveform).max()
        inside = np.zeros(len(waveform), dtype=bool)
        for event in events:
            first, last = round(event.onset * RATE), round(event.offset * RATE)
            inside[first:last] = True
            heard = np.flatnonzero(loud[first:last])
            assert heard[0] < 0.01 * RATE
            assert heard[-1] > last - first - 0.01 * RATE
            spectrum = np.abs(np.fft.rfft(waveform[first:last]))
            expected = list(TONES.values())[event.label]
            assert np.fft.rfftfreq(last - first, 1 / RATE)[spectrum.argmax()] == pytest.approx(expected, abs=10)
            assert event.offset - event.onset <= SOUND + 1e-6  # the bank's silence is not part of an event
        assert not loud[~inside].any()


def test_levels_are_those_above_the_background(tmp_path: Path, bank: Path) -> None:
    _, _, sound = prepared(bank, tmp_path / "s.h5", mix=Mix(polyphony=1, snr=(12, 12), event_seconds=(0.5, 0.5)))
    ratios = []
    for waveform, events in zip(sound, read_events(tmp_path / "s.h5"), strict=True):
        outside = np.ones(len(waveform), dtype=bool)
        power = 0.0
        for event in events:
            part = slice(round(event.onset * RATE), round(event.offset * RATE))
            outside[part] = False
            power += np.mean(waveform[part] ** 2) / len(events)
        ratios.append(10 * np.log10(power / np.mean(waveform[outside] ** 2) - 1))
    assert np.mean(ratios) == pytest.approx(12, abs=0.3)


@pytest.mark.parametrize("polyphony", [1, 2])
def test_polyphony_and_gaps(tmp_path: Path, bank: Path, polyphony: int) -> None:
    mix = Mix(polyphony=polyphony, event_seconds=(0.8, 0.8))
    prepared(bank, tmp_path / "s.h5", clips=40, mix=mix)
    most = 0
    for events in read_events(tmp_path / "s.h5"):
        assert events
        most = max([most, *(sum(e.onset <= event.onset < e.offset for e in events) for event in events)])
        for label in {event.label for event in events}:
            same = sorted((e.onset, e.offset) for e in events if e.label == label)
            assert all(after[0] - before[1] >= 0.5 for before, after in itertools.pairwise(same))
    assert most == polyphony


def test_same_seed_same_store(tmp_path: Path, bank: Path) -> None:
    """A soundscape depends on seed, split and number, not on how many there are."""
    stores = {}
    for name, seed, clips in (("a", 1, 20), ("b", 1, 20), ("c", 2, 20), ("more", 1, 30)):
        prepared(bank, tmp_path / f"{name}.h5", seed=seed, clips=clips)
        with h5py.File(tmp_path / f"{name}.h5") as file:
            stores[name] = {key: file[key][:] for key in file}
    for key, values in stores["a"].items():
        assert np.array_equal(values, stores["b"][key]), key
    assert not np.array_equal(stores["a"]["waveform"], stores["c"]["waveform"])
    assert np.array_equal(stores["a"]["waveform"][:14], stores["more"]["waveform"][:14])
    assert np.array_equal(stores["a"]["waveform"][14:17], stores["more"]["waveform"][21:24])


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        (None, {"train": {3, 4}, "validation": {2}, "test": {1}}),  # esc_fold = 1
        ("1,2/3/4", {"train": {1, 2}, "validation": {3}, "test": {4}}),
        ("1,2,3//4", {"train": {1, 2, 3}, "validation": {1, 2, 3}, "test": {4}}),
        ("1//3", {"train": {1}, "validation": {1}, "test": {3}}),
    ],
)
def test_no_clip_of_the_bank_serves_two_splits(
    tmp_path: Path, bank: Path, folds: str | None, expected: dict[str, set[int]]
) -> None:
    report, _, _ = prepared(bank, tmp_path / "s.h5", clips=100, folds=folds)
    recordings = {}
    for split, names in used_by_split(tmp_path / "s.h5").items():
        assert {int(name.split("-")[0]) for name in names} <= expected[split]
        assert len({name.split("-")[3] for name in names}) == 3  # all classes
        recordings[split] = {name.split("-")[1] for name in names}
    assert recordings.keys() == set(SPLITS)
    assert not recordings["train"] & recordings["validation"]
    assert not recordings["train"] & recordings["test"]
    assert dict(report.skipped) == {"1-1-A-0.wav": "It is silent.", "1-2-A-0.wav": "It has not exactly one class."}
    assert sum(report.foregrounds.values()) == 9 * len(set().union(*expected.values()))


def test_bank_of_class_folders(tmp_path: Path) -> None:
    """Any rate and format; 70/15/15 % of the clips of each class."""
    raw = tmp_path / "bank"
    for label, number in itertools.product((0, 3), range(7)):
        path = raw / LABELS[label] / f"{number}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, padded_tone(TONES[label] / 2), 2 * RATE)
    (raw / "low" / "broken.wav").write_text("no sound")
    report, table, _ = prepared(raw, tmp_path / "s.h5", clips=40)
    assert table.labels == ["high", "low"]
    assert report.foregrounds == {"train": 10, "validation": 2, "test": 2}
    assert [name for name, _ in report.skipped] == ["low/broken.wav"]
    used = used_by_split(tmp_path / "s.h5")
    assert len(used["train"] | used["validation"] | used["test"]) == sum(map(len, used.values()))


def test_bank_with_splits_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "bank.h5"
    with ClipStoreWriter(path, clip_samples=2 * RATE, sample_rate=RATE, labels=LABELS) as writer:
        for split, label in (*((split, 0) for split in SPLITS), ("train", 2), ("test", 2)):
            waveform = (32767 * padded_tone(TONES[label])).astype(np.int16)
            writer.add(Clip(f"{split}{label}.wav", waveform, [label], split=split))
    report, _, _ = prepared(path, tmp_path / "s.h5")
    used = used_by_split(tmp_path / "s.h5")
    assert used == {"train": {"train0.wav", "train2.wav"}, "validation": {"validation0.wav"}, "test": used["test"]}
    assert "no clip of the bank for validation: middle" in str(report)
    with pytest.raises(ValueError, match="--bank_folds 1/2/3 is not allowed: the clips of this bank have no folds"):
        prepared(path, tmp_path / "s.h5", folds="1/2/3")


def test_weak_and_unlabelled_shares(tmp_path: Path, bank: Path) -> None:
    """The sound stays the same; of weak clips the classes are kept, of unlabelled ones nothing; test clips have all."""
    _, known, sound = prepared(bank, tmp_path / "known.h5")
    _, partly, same = prepared(bank, tmp_path / "s.h5", mix=Mix(weak_share=0.5, unlabelled_share=0.25))
    assert np.array_equal(sound, same)
    assert partly.labelling is not None
    assert partly.labelling.tolist() == [STRONG] * 3 + [WEAK] * 7 + [UNLABELLED] * 4 + [STRONG] * 6
    for number, (before, after) in enumerate(
        zip(read_events(tmp_path / "known.h5"), read_events(tmp_path / "s.h5"), strict=True)
    ):
        assert after == (before if partly.labelling[number] == STRONG else [])
    expected = np.where(partly.labelling[:, None] == UNLABELLED, False, known.targets)
    assert np.array_equal(partly.targets, expected)


def test_backgrounds_serve_one_split_each(tmp_path: Path, bank: Path) -> None:
    """Recordings of one tone each, of which short ones are repeated: the loudest tone says which is heard."""
    folder = tmp_path / "backgrounds"
    folder.mkdir()
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", 0.1 * tone(300.0 + 200 * number, (3, 12)[number % 2]), RATE)
    (folder / "broken.wav").write_text("no sound")
    report, table, sound = prepared(bank, tmp_path / "s.h5", clips=40, mix=Mix(snr=(-40, -40)), backgrounds=folder)
    assert next(name for name, _ in report.skipped) == "broken.wav"
    heard = defaultdict(set)
    for split, waveform in zip(table.split, sound, strict=True):
        heard[split].add(round((np.abs(np.fft.rfft(waveform)).argmax() / 10 - 300) / 200))
    assert sorted(len(numbers) for numbers in heard.values()) == [1, 1, 2]
    assert set().union(*heard.values()) == {0, 1, 2, 3}
    for path in folder.glob("[01].wav"):
        path.unlink()
    with pytest.raises(ValueError, match="has 2 audio files that can be read: --backgrounds needs 3"):
        prepared(bank, tmp_path / "s.h5", backgrounds=folder)


def test_stretches_begin_and_end_sounding() -> None:
    """Of random patterns: no quiet of over 0.5 s inside, and the length asked for where the sound allows it."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        sounding = np.repeat(rng.random(12) < 0.5, rng.integers(5, 80, 12))
        if not sounding.any():
            continue
        first, last = choose_stretch(sounding, 0.3, 1.0, rng)
        part = np.flatnonzero(sounding[first:last])
        assert (part[0], part[-1]) == (0, last - first - 1)
        assert np.diff(part).max(initial=0) <= 50
        assert last - first <= 100
    assert choose_stretch(np.ones(400, dtype=bool), 1.0, 1.0, rng)[1] <= 400
    lengths = [np.diff(choose_stretch(np.ones(400, dtype=bool), 0.5, 2.0, rng))[0] for _ in range(200)]
    assert 50 <= min(lengths) < 60
    assert 190 < max(lengths) <= 200


def test_sounding_frames() -> None:
    sound = np.concatenate([np.zeros(800), tone(500, 0.5), 0.02 * tone(500, 0.5), np.zeros(37)])
    assert np.flatnonzero(sounding_frames(sound, RATE)).tolist() == list(range(10, 60))
    assert not sounding_frames(np.zeros(800), RATE).any()


def test_share_out_keeps_sources_together() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        sources = [f"r{number}" for number in rng.integers(0, 30, 120)]
        labels = np.array([int(source[1:]) % 3 for source in sources])
        splits = share_out(sources, labels, {"train": 0.7, "validation": 0.15, "test": 0.15}, seed)
        assert all(len({s for s, name in zip(splits, sources, strict=True) if name == one}) == 1 for one in sources)
        for label in range(3):
            shares = [np.mean(splits[labels == label] == split) for split in SPLITS]
            assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.15)
            assert min(shares) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"polyphony": 0}, "--polyphony 0 is not allowed"),
        ({"snr": (24.0, 6.0)}, "--snr 24,6 is not allowed"),
        ({"event_seconds": (0.5, 11.0)}, "--event_seconds 0.5,11 is not allowed.* from 0.01 to 10 s"),
        ({"weak_share": 0.7, "unlabelled_share": 0.4}, "--weak_share 0.7 and --unlabelled_share 0.4 are not allowed"),
    ],
)
def test_wrong_mixes(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix(**values)


@pytest.mark.parametrize("folds", ["1,2/3", "1,2/3/5", "1,2/2/3", "/1/2", "1/2/", "a/b/c"])
def test_wrong_folds(tmp_path: Path, bank: Path, folds: str) -> None:
    with pytest.raises(ValueError, match=f"--bank_folds '{folds}' is not allowed: give the folds .* out of 1, 2, 3, 4"):
        prepared(bank, tmp_path / "s.h5", folds=folds)
    assert not list(tmp_path.glob("s.h5*"))


def test_wrong_banks(tmp_path: Path, bank: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no .*nothing: --raw must be the bank"):
        prepared(tmp_path / "nothing", tmp_path / "s.h5")
    with pytest.raises(ValueError, match="--clips 9 is not allowed"):
        prepared(bank, tmp_path / "s.h5", clips=9)
    silent = tmp_path / "silent.h5"
    with ClipStoreWriter(silent, clip_samples=RATE, sample_rate=RATE, labels=["a"]) as writer:
        writer.add(Clip("a.wav", np.zeros(RATE, np.int16), [0]))
    with pytest.raises(ValueError, match=r"no clip that sounds(.|\n)*a.wav: It is silent"):
        prepared(silent, tmp_path / "s.h5")


def test_command(
    tmp_path: Path, bank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flags arrive, and the commands that train are printed."""
    monkeypatch.chdir(tmp_path)
    words = ["prepare", "--dataset_type", "soundscapes", "--raw", str(bank), "--sample_rate", str(RATE)]
    assert main.main([*words, "--clips", "10", "--bank_folds", "1,2,3//4", "--snr", "50,50", "--polyphony", "1"]) == 0
    train = "python main.py train --dataset_type soundscapes --classes_num 3"
    assert f"3 classes. Train: {train}\nTrain on the times: {train} --loss_type frame_bce\n" in capsys.readouterr().out
    assert main.main([*words, "--clips", "10", "--event_seconds", "0.1,0.2", "--weak_share", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert f"Train: {train}\nTrain on the times: {train} --loss_type weak_strong_bce\n" in printed
    events = itertools.chain(*read_events(tmp_path / "workspace" / "data" / "soundscapes" / "soundscapes.h5"))
    assert max(event.offset - event.onset for event in events) <= 0.2 + 1e-6
    assert main.main([*words, "--snr", "6"]) == 2
    assert "--snr 6 is not allowed: give two numbers" in capsys.readouterr().err
