"""The demo and soundscapes of a bank: the truth fits the sound, no clip of a bank serves two splits."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile

from data.clip_store import SPLITS, STRONG, UNLABELLED, WEAK, Clip, ClipStoreWriter, ClipTable, labelling, read_events
from prepare.bank import choose_stretch, sounding_frames
from prepare.demo import EVENTS, synthesize_event
from prepare.soundscapes import SoundscapeReport
from tests.prepare.raw_data import RATE, events, prepare, refused, write_text

LABELS = ["low", "never", "middle", "high"]  # no clip of the bank has the second
TONES = {0: 400.0, 2: 1000.0, 3: 2500.0}  # Hz of each class
SOUND = 0.8  # seconds that a clip sounds, between 0.3 s of silence


def tone(frequency: float, seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def write_bank(path: Path, clips: Sequence[Clip]) -> Path:
    with ClipStoreWriter(path, clip_samples=2 * RATE, sample_rate=RATE, labels=LABELS, source="S", licence="L") as file:
        for clip in clips:
            file.add(clip)
    return path


def bank_clip(name: str, label: int, **place: Any) -> Clip:
    sound = np.pad(tone(TONES[label], SOUND), round(0.3 * RATE))
    return Clip(name, (32767 * sound).astype(np.int16), [label], **place)


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """4 folds; in each, every class has 3 clips of 2 recordings, named as ESC-50's; and two clips that cannot serve."""
    clips = [
        bank_clip(f"{fold}-{1000 * fold + 10 * label + recording}-{take}-{label}.wav", label, fold=fold)
        for fold, label, (recording, take) in itertools.product((1, 2, 3, 4), TONES, ((0, "A"), (0, "B"), (1, "A")))
    ]
    silent = Clip("1-1-A-0.wav", np.zeros(RATE, np.int16), [0], fold=1)
    double = Clip("1-2-A-0.wav", np.full(RATE, 99, np.int16), [0, 2], fold=1)
    return write_bank(tmp_path / "bank.h5", [*clips, silent, double])


def mixed(folder: Path, raw: Path, clips: int = 20, **flags: Any) -> tuple[SoundscapeReport, ClipTable, np.ndarray]:
    """Report, table and (N, samples) float sound of a store of soundscapes."""
    report, table = prepare("soundscapes", folder, raw=raw, clips=clips, **flags)
    with h5py.File(report.path) as file:
        return report, table, file["waveform"][:] / 32767


def used_by_split(table: ClipTable) -> dict[str, set[str]]:
    """Split -> names of the clips of the bank that its events were cut from."""
    with h5py.File(table.paths[0]) as file:
        split = file["split"][:][file["event_clip"][:]]
        used = defaultdict(set)
        for one, name in zip(split, file["event_source"][:], strict=True):
            used[one.decode()].add(name.decode())
    return used


def gaps(table: ClipTable) -> list[float]:
    """Seconds between events of one class in one clip."""
    found = []
    for clip in events(table):
        for label in {label for label, _, _ in clip}:
            same = sorted((onset, offset) for name, onset, offset in clip if name == label)
            found += [after[0] - before[1] for before, after in itertools.pairwise(same)]
    return found


def test_demo_is_true(tmp_path: Path) -> None:
    """Ten classes, 70/15/15 %, an event in every clip, gaps between events of one class; another seed sounds else."""
    _, table = prepare("demo", tmp_path, seed=3, clips=40)
    assert [int((table.split == split.encode()).sum()) for split in SPLITS] == [28, 6, 6]
    assert table.targets.any(axis=1).all()
    assert len(table.labels) == 10
    assert min(gaps(table)) >= 0.5 - 1 / RATE
    sounds = []
    for folder, seed in (("a", 3), ("b", 4)):
        with h5py.File(prepare("demo", tmp_path / folder, seed=seed, clips=10)[0].path) as file:
            sounds.append(file["waveform"][:])
    with h5py.File(table.paths[0]) as file:
        assert np.array_equal(sounds[0][:7], file["waveform"][:7])  # a larger data set contains a smaller one
    assert not np.array_equal(*sounds)
    refused("--clips 9", "demo", tmp_path / "c", clips=9)


@pytest.mark.parametrize("label", EVENTS)
def test_demo_events_sound(label: str) -> None:
    event = synthesize_event(label, 2.0, 16000, np.random.default_rng(0))
    assert event.shape == (32000,)
    assert np.sqrt(np.mean(event**2)) == pytest.approx(1, abs=1e-6)
    assert abs(event[0]) < 0.05


def test_truth_fits_the_sound(tmp_path: Path, bank: Path) -> None:
    """Alone, 50 dB above the noise: a class's tone is there from onset to offset, to 10 ms, and nowhere else."""
    report, table, sound = mixed(tmp_path, bank, polyphony=1, snr="50,50")
    assert table.labels == ["low", "middle", "high"]
    truth = read_events(report.path)
    assert report.events == sum(map(len, truth)) > 20
    for waveform, mine, target in zip(sound, truth, table.targets, strict=True):
        assert set(np.flatnonzero(target)) == {event.label for event in mine}
        loud = np.abs(waveform) > 0.03 * np.abs(waveform).max()
        inside = np.zeros(len(waveform), dtype=bool)
        for event in mine:
            first, last = round(event.onset * RATE), round(event.offset * RATE)
            inside[first:last] = True
            sounding = np.flatnonzero(loud[first:last])
            assert sounding[0] < 0.01 * RATE
            assert sounding[-1] > last - first - 0.01 * RATE
            spectrum = np.abs(np.fft.rfft(waveform[first:last]))
            expected = list(TONES.values())[event.label]
            assert np.fft.rfftfreq(last - first, 1 / RATE)[spectrum.argmax()] == pytest.approx(expected, abs=10)
            assert event.offset - event.onset <= SOUND + 1e-6  # the bank's silence is not part of an event
        assert not loud[~inside].any()


def test_levels_are_those_above_the_background(tmp_path: Path, bank: Path) -> None:
    report, _, sound = mixed(tmp_path, bank, polyphony=1, snr="12,12", event_seconds="0.5,0.5")
    ratios = []
    for waveform, mine in zip(sound, read_events(report.path), strict=True):
        outside = np.ones(len(waveform), dtype=bool)
        power = 0.0
        for event in mine:
            part = slice(round(event.onset * RATE), round(event.offset * RATE))
            outside[part] = False
            power += np.mean(waveform[part] ** 2) / len(mine)
        ratios.append(10 * np.log10(power / np.mean(waveform[outside] ** 2) - 1))
    assert np.mean(ratios) == pytest.approx(12, abs=0.3)


@pytest.mark.parametrize("polyphony", [1, 2])
def test_polyphony_and_gaps(tmp_path: Path, bank: Path, polyphony: int) -> None:
    _, table, _ = mixed(tmp_path, bank, clips=40, polyphony=polyphony, event_seconds="0.8,0.8")
    truth = events(table)
    most = max(sum(one[1] <= event[1] < one[2] for one in clip) for clip in truth for event in clip)
    assert (most, min(map(len, truth)) > 0, min(gaps(table)) >= 0.5 - 1e-6) == (polyphony, True, True)


def test_a_larger_data_set_contains_a_smaller_one(tmp_path: Path, bank: Path) -> None:
    """A soundscape depends on seed, split and number, not on how many there are."""
    _, _, sound = mixed(tmp_path / "a", bank, seed=1)
    _, _, more = mixed(tmp_path / "b", bank, seed=1, clips=30)
    assert np.array_equal(sound[:14], more[:14])
    assert np.array_equal(sound[14:17], more[21:24])
    assert not np.array_equal(sound, mixed(tmp_path / "c", bank, seed=2)[2])


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
    report, table, _ = mixed(tmp_path, bank, clips=60, bank_folds=folds)
    recordings = {}
    for split, used in used_by_split(table).items():
        assert {int(name.split("-")[0]) for name in used} <= expected[split]
        assert len({name.split("-")[3] for name in used}) == 3  # all classes
        recordings[split] = {name.split("-")[1] for name in used}
    assert recordings.keys() == set(SPLITS)
    assert not recordings["train"] & recordings["validation"]
    assert not recordings["train"] & recordings["test"]
    assert dict(report.skipped) == {"1-1-A-0.wav": "It is silent.", "1-2-A-0.wav": "It has not exactly one class."}
    assert sum(report.foregrounds.values()) == 9 * len(set().union(*expected.values()))
    assert (table.attributes["source"].endswith("from: S"), table.attributes["licence"]) == (True, "L")


def test_bank_of_class_folders(tmp_path: Path) -> None:
    """Any rate and format; 70/15/15 % of the clips of each class."""
    raw = tmp_path / "bank"
    for label, number in itertools.product((0, 3), range(7)):
        (raw / LABELS[label]).mkdir(parents=True, exist_ok=True)
        soundfile.write(raw / LABELS[label] / f"{number}.flac", np.pad(tone(TONES[label] / 2, SOUND), 2400), 2 * RATE)
    write_text(raw / "low" / "broken.wav", "no sound")
    report, table, _ = mixed(tmp_path, raw, clips=40)
    assert table.labels == ["high", "low"]
    assert report.foregrounds == {"train": 10, "validation": 2, "test": 2}
    assert [name for name, _ in report.skipped] == ["low/broken.wav"]
    used = used_by_split(table)
    assert len(used["train"] | used["validation"] | used["test"]) == sum(map(len, used.values()))


def test_bank_with_splits_keeps_them(tmp_path: Path) -> None:
    places = (*((split, 0) for split in SPLITS), ("train", 2), ("test", 2))
    path = write_bank(tmp_path / "bank.h5", [bank_clip(f"{split}{k}.wav", k, split=split) for split, k in places])
    report, table, _ = mixed(tmp_path, path)
    used = used_by_split(table)
    assert used == {"train": {"train0.wav", "train2.wav"}, "validation": {"validation0.wav"}, "test": used["test"]}
    assert "no clip of the bank for validation: middle" in str(report)
    refused("--bank_folds 1/2/3", "soundscapes", tmp_path / "b", raw=path, bank_folds="1/2/3")


def test_weak_and_unlabelled_shares(tmp_path: Path, bank: Path) -> None:
    """The sound stays the same; weak clips keep their classes, unlabelled ones nothing; test clips have all."""
    _, known, sound = mixed(tmp_path / "a", bank)
    _, partly, same = mixed(tmp_path / "b", bank, weak_share=0.5, unlabelled_share=0.25)
    assert np.array_equal(sound, same)
    annotation = labelling(partly)
    assert annotation.tolist() == [STRONG] * 3 + [WEAK] * 7 + [UNLABELLED] * 4 + [STRONG] * 6
    truth = [mine if one == STRONG else [] for mine, one in zip(events(known), annotation, strict=True)]
    assert events(partly) == truth
    assert np.array_equal(partly.targets, np.where(annotation[:, None] == UNLABELLED, False, known.targets))


def test_backgrounds_serve_one_split_each(tmp_path: Path, bank: Path) -> None:
    """Recordings of one tone each, of which short ones are repeated: the loudest tone says which it is."""
    folder = tmp_path / "backgrounds"
    write_text(folder / "broken.wav", "no sound")
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", 0.1 * tone(300.0 + 200 * number, (3, 12)[number % 2]), RATE)
    report, table, sound = mixed(tmp_path, bank, clips=40, snr="-40,-40", backgrounds=folder)
    assert report.skipped[0][0] == "broken.wav"
    found = defaultdict(set)
    for split, waveform in zip(table.split, sound, strict=True):
        found[split].add(round((np.abs(np.fft.rfft(waveform)).argmax() / 10 - 300) / 200))
    assert sorted(len(numbers) for numbers in found.values()) == [1, 1, 2]
    assert set().union(*found.values()) == {0, 1, 2, 3}
    for path in folder.glob("[01].wav"):
        path.unlink()
    refused("2 audio files .* --backgrounds", "soundscapes", tmp_path / "b", raw=bank, backgrounds=folder)


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
    lengths = [np.diff(choose_stretch(np.ones(400, dtype=bool), 0.5, 2.0, rng))[0] for _ in range(200)]
    assert 50 <= min(lengths) < 60
    assert 190 < max(lengths) <= 200


def test_sounding_frames() -> None:
    sound = np.concatenate([np.zeros(800), tone(500, 0.5), 0.02 * tone(500, 0.5), np.zeros(37)])
    assert np.flatnonzero(sounding_frames(sound, RATE)).tolist() == list(range(10, 60))
    assert not sounding_frames(np.zeros(800), RATE).any()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"polyphony": 0}, "--polyphony 0"),
        ({"snr": "24,6"}, "--snr 24,6"),
        ({"snr": "6"}, "--snr 6"),
        ({"event_seconds": "0.5,11"}, "--event_seconds 0.5,11"),
        ({"weak_share": 0.7, "unlabelled_share": 0.4}, "--weak_share 0.7 and --unlabelled_share 0.4"),
        ({"clips": 9}, "--clips 9"),
        *(
            ({"bank_folds": folds}, "--bank_folds")
            for folds in ("1,2/3", "1,2/3/5", "1,2/2/3", "/1/2", "1/2/", "a/b/c")
        ),
    ],
)
def test_wrong_flags(tmp_path: Path, bank: Path, flags: dict[str, Any], match: str) -> None:
    refused(match, "soundscapes", tmp_path, raw=bank, **flags)


def test_wrong_banks(tmp_path: Path) -> None:
    refused("nothing: --raw", "soundscapes", tmp_path, raw=tmp_path / "nothing")
    silent = write_bank(tmp_path / "silent.h5", [Clip("a.wav", np.zeros(RATE, np.int16), [0])])
    refused(r"(.|\n)*a.wav: It is silent", "soundscapes", tmp_path, raw=silent)
    refused("has no clips", "soundscapes", tmp_path, raw=write_bank(tmp_path / "none.h5", []))
    one = write_bank(tmp_path / "one.h5", [bank_clip("a.wav", 0)])
    refused("no clip for validation", "soundscapes", tmp_path, raw=one)
    two = write_bank(tmp_path / "two.h5", [bank_clip(f"{fold}.wav", 0, fold=fold) for fold in (1, 2)])
    refused("esc_fold = 1 must be among three", "soundscapes", tmp_path, raw=two)
