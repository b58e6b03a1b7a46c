"""The check of prepared data: what it finds, and its exit status."""

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import main
import prepare.check
from data.clip_store import SPLITS, Clip, ClipStoreWriter, Event, read_store_table
from data_generator import load_table
from prepare.check import CheckReport, SplitReport, check_tables
from prepare.compress import compress_store
from settings import UserError, resolve

RATE, SAMPLES = 32000, 3200
LABELS = [f"sound {number}" for number in range(10)]


def sound(seed: int, samples: int = SAMPLES) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)


def clip(name: str, waveform: np.ndarray | int, *labels: int, split: str = "train", fold: int = 0) -> Clip:
    return Clip(name, sound(waveform) if isinstance(waveform, int) else waveform, labels, split=split, fold=fold)


def fine_clips() -> list[Clip]:
    """Every class in every split."""
    places = [(place, split, label) for place, split in enumerate(SPLITS) for label in range(10)]
    return [clip(f"{split}{label}.wav", 10 * place + label, label, split=split) for place, split, label in places]


def write(path: Path, clips: Sequence[Clip], labels: Sequence[str] = LABELS) -> Path:
    with ClipStoreWriter(path, clip_samples=SAMPLES, sample_rate=RATE, labels=labels, dataset_type="demo") as writer:
        for one in clips:
            writer.add(one)
    return path


def check(path: Path, *, single_label: bool = False) -> CheckReport:
    table = read_store_table(path)
    tables = {split: table.select(table.split == split.encode()) for split in SPLITS}
    return check_tables(tables, sample_rate=RATE, single_label=single_label)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of fine clips."""
    return write(tmp_path / "demo.h5", fine_clips())


def status(store: Path, *words: str) -> int:
    """Exit status of the command for the data set in the folder of a store."""
    try:
        return main.main(["check", "--dataset_path", str(store.parent), *words])
    except SystemExit as done:
        return int(done.code or 0)


def test_fine_store(store: Path) -> None:
    report = check(store, single_label=True)
    assert (report.problems, report.warnings, report.repeated) == ([], [], 0)
    assert (report.sample_rate, report.size, report.labels) == (RATE, store.stat().st_size, LABELS)
    assert list(report.splits) == list(SPLITS)
    for found in report.splits.values():
        assert (found.per_class.tolist(), found.durations()) == ([1] * 10, (0.1, 0.1, 0.1))


@pytest.mark.parametrize("compressed", [False, True])
def test_odd_sounds(tmp_path: Path, compressed: bool) -> None:
    """Silent, clipped, short and repeated clips are found, at their limits."""
    quiet, loud, lowest = sound(1) // 9000 * 32, sound(2), sound(3)
    loud[:4] = lowest[:3] = -32768  # 0.1 % of 3200 samples are 3.2
    clips = [
        *fine_clips(),
        clip("zeros.wav", np.zeros(SAMPLES, np.int16), 0),
        clip("zeros too.wav", np.zeros(SAMPLES, np.int16), 0, split="test"),
        clip("quiet.wav", quiet, 1),
        clip("just above.wav", np.full(SAMPLES, 33, np.int16), 1),
        clip("clipped.wav", loud, 1),
        clip("loud.wav", lowest, 1),
        clip("short.wav", sound(4, 320), 1),
        clip("again.wav", sound(4, 320), 1),
    ]
    path = write(tmp_path / "a.h5", clips)
    if compressed:
        compress_store(path)
    report = check(path)
    train = report.splits["train"]
    assert train.names[train.silent].tolist() == [b"zeros.wav", b"quiet.wav"]
    assert train.names[train.clipped].tolist() == [b"clipped.wav"]
    assert train.durations() == (0.01, 0.1, 0.1)
    assert (report.repeated, report.problems, len(report.warnings)) == (2, [], 4)  # silence does not count as repeated
    for message, name in zip(report.warnings, ("quiet.wav", "clipped.wav", "zeros too.wav", "short.wav"), strict=True):
        assert name in message


def test_clips_in_two_splits(tmp_path: Path) -> None:
    twice = [clip("copy.wav", 3, 3, split="test"), clip("train5.wav", 99, 5, split="validation")]
    audio, name = check(write(tmp_path / "a.h5", [*fine_clips(), *twice])).problems
    assert "audio" in audio
    assert "train3.wav (train) = copy.wav (test)" in audio
    assert "id" in name
    assert "train5.wav (train) = train5.wav (validation)" in name


def test_classes(tmp_path: Path) -> None:
    clips = [one for one in fine_clips() if 7 not in one.labels and one.name != "train4.wav"]
    path = write(tmp_path / "a.h5", [*clips, clip("none.wav", 50), clip("two.wav", 51, 0, 1, split="test")])
    report = check(path)
    assert (report.problems, len(report.warnings)) == ([], 3)
    for message, name in zip(report.warnings, ("none.wav", "sound 7", "sound 4"), strict=True):
        assert name in message
    assert report.splits["test"].per_class.tolist() == [2, 2, 1, 1, 1, 1, 1, 0, 1, 1]
    without, several = check(path, single_label=True).problems
    assert "train: 1 of 9 clips (none.wav)" in without
    assert "test: 1 of 10 clips (two.wav)" in several


def test_empty_split(tmp_path: Path) -> None:
    report = check(write(tmp_path / "a.h5", [one for one in fine_clips() if one.split != "validation"]))
    assert (len(report.problems), report.splits["validation"].durations()) == (1, None)
    assert "validation" in report.problems[0]
    with pytest.raises(UserError, match="no split"):
        check_tables({}, sample_rate=RATE, single_label=False)


def replaced(file: h5py.File, key: str, values: np.ndarray) -> None:
    del file[key]
    file[key] = values


def damage_row(file: h5py.File) -> None:
    """Store the rows compressed, one of them with bytes that cannot be decompressed."""
    waveforms = file["waveform"][:]
    del file["waveform"]
    stored = file.create_dataset("waveform", waveforms.shape, "int16", chunks=(1, SAMPLES), compression="gzip")
    stored[:] = waveforms
    stored.id.write_direct_chunk((4, 0), b"no gzip")


def empty_row(file: h5py.File) -> None:
    file["real_len"][4] = 0


@pytest.mark.parametrize(
    ("damage", "split", "clips", "reason"),
    [
        (damage_row, "train", 1, "row 4"),
        (empty_row, "train", 1, "the clip is empty"),
    ],
)
def test_unreadable_rows(store: Path, damage: Callable[[h5py.File], None], split: str, clips: int, reason: str) -> None:
    with h5py.File(store, "r+") as file:
        damage(file)
    report = check(store)
    assert len(report.splits[split].unreadable) == np.isnan(report.splits[split].seconds).sum() == clips
    assert f"{split}: {clips} of 10 clips" in report.problems[0]
    assert reason in report.problems[0]


def test_events_after_the_end_of_their_clip(tmp_path: Path) -> None:
    ends = {"train3.wav": 0.7}
    late = [replace(one, events=[Event(one.labels[0], 0.05, ends.get(one.name, 0.1))]) for one in fine_clips()]
    (problem,) = check(write(tmp_path / "a.h5", late)).problems
    assert "train3.wav" in problem


def louder(wave: np.ndarray) -> np.ndarray:
    return (0.9 * wave).astype(np.int16)


def clicked(wave: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(wave)) == 100, 32767, wave).astype(np.int16)


@pytest.mark.parametrize(
    "change",
    [lambda wave: wave + (np.arange(len(wave)) == 100), louder, clicked, lambda wave: np.roll(wave, 1),
     lambda wave: np.append(wave[:-50], np.zeros(50)), lambda wave: -wave],
)  # fmt: skip
def test_nearly_the_same_audio_in_two_splits(tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    near = clip("near.wav", change(sound(3)).astype(np.int16), 3, split="test")
    report = check(write(tmp_path / "a.h5", [*fine_clips(), near]))
    assert report.problems == []
    assert ["train3.wav (train) ~ near.wav (test)" in warning for warning in report.warnings] == [True]


def assert_same_reports(one: CheckReport, other: CheckReport) -> None:
    for name in ("labels", "sample_rate", "size", "repeated", "problems", "warnings"):
        assert getattr(one, name) == getattr(other, name)
    assert list(one.splits) == list(other.splits)
    for split in one.splits:
        for field in fields(SplitReport):
            np.testing.assert_equal(getattr(one.splits[split], field.name), getattr(other.splits[split], field.name))


def test_any_number_of_processes_reports_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files, in an order that is not theirs, with a row that cannot be read and a file that does not exist."""
    extra = [clip("zeros.wav", np.zeros(SAMPLES, np.int16), 0), clip("copy.wav", 3, 3)]
    with h5py.File(write(tmp_path / "a.h5", [*fine_clips(), *extra]), "r+") as file:
        file["real_len"][4] = 0
    other = write(tmp_path / "b.h5", [clip(f"b{n}.wav", 100 + n, n % 10) for n in range(12)])
    first, second = read_store_table(tmp_path / "a.h5"), read_store_table(other)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("names", "targets", "row", "fold", "split")
    }
    joined = replace(
        first,
        paths=[*first.paths, other, tmp_path / "gone.h5"],
        path_number=np.repeat([0, 1, 2], [32, 9, 3]),
        labelling=None,
        events=[],
        **columns,
    )
    shuffled = np.random.default_rng(1).permutation(44)
    tables = {"train": joined.select(shuffled[:30]), "test": joined.select(shuffled[30:])}
    monkeypatch.setattr(prepare.check, "TASK_CLIPS", 4)
    read: list[int] = []
    one = check_tables(tables, sample_rate=RATE, single_label=True)
    two = check_tables(tables, sample_rate=RATE, single_label=True, processes=2, advance=read.append)
    assert_same_reports(one, two)
    assert (sum(read), max(read)) == (44, 4)
    assert len(two.splits["train"].unreadable) + len(two.splits["test"].unreadable) == 4
    assert any("gone.h5" in problem for problem in two.problems)
    monkeypatch.setattr(prepare.check, "TASK_CLIPS", 1000)
    assert_same_reports(one, check_tables(tables, sample_rate=RATE, single_label=True))


def test_process_that_ends(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end_process(*_: object) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(prepare.check, "TASK_CLIPS", 10)
    monkeypatch.setattr(prepare.check.ProcessPoolExecutor, "map", end_process)
    for processes, match in ((2, "One of 2 processes"), (0, "processes = 0")):
        with pytest.raises(UserError, match=match):
            check_tables({"train": read_store_table(store)}, sample_rate=RATE, single_label=False, processes=processes)


def test_command(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables on stdout; a bar on stderr, where that is a terminal; the protocol of the paper; wrong processes."""
    assert status(store) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for split in SPLITS:
        table = load_table(resolve({"dataset_path": str(store.parent)}), split)  # type: ignore[arg-type]
        assert table.fingerprint() in printed.out
    assert all(
        word in printed.out
        for word in ("No problems found.", f"{RATE} Hz", *LABELS, "test has 10 clips", "0.26", str(store.parent))
    )
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert status(store, "--processes", "2") == 0
    assert "100%" in capsys.readouterr().err
    assert status(store, "--protocol", "paper") == 0  # test clips that validate are not clips in two splits
    assert "validation = test" in capsys.readouterr().out
    assert status(store, "--processes", "0") == 2


def test_command_with_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "demo.h5", [clip(f"{n}.wav", n, n % 10, split="", fold=1 + n // 10) for n in range(40)])
    assert status(path, "--esc_fold", "4") == 0
    assert "2, 3" in capsys.readouterr().out


def change_targets(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with h5py.File(path, "r+") as file:
        replaced(file, "target", change(file["target"][:]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "There is no file"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be read as HDF5"),
        (lambda path: change_targets(path, lambda targets: targets[:-3]), "target has 27 rows"),
        (lambda path: change_targets(path, lambda targets: targets.argmax(axis=1)), "target is int64"),
        (
            lambda path: write(
                path, [clip(f"{s}{n}", 9 * n + p, 0, split=s) for p, s in enumerate(SPLITS) for n in range(3)]
            ),
            "sound 0",
        ),
        (lambda path: write(path, fine_clips()[:20]), "test"),
        (lambda path: write(path, [*fine_clips(), clip("a.wav", 0, 0, split="test")]), "a.wav"),
    ],
)
def test_command_where_training_would_go_wrong(
    store: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(store)
    assert status(store) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert any(message in line for line in problems), problems
    assert len(problems) == len(set(problems))


def test_command_on_audioset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PANNs' files and indexes; then with a file of an index deleted."""
    for folder in ("waveforms", "indexes"):
        (tmp_path / "hdf5s" / folder).mkdir(parents=True)
    for name, index, first in (("train", "full_train", 0), ("eval", "eval", 10)):
        columns = {"audio_name": np.array([f"Y{first + n}.wav".encode() for n in range(10)])}
        columns["target"] = np.eye(10, 527, dtype=bool)
        with h5py.File(tmp_path / "hdf5s" / "waveforms" / f"{name}.h5", "w") as file:
            file.update({**columns, "waveform": np.stack([sound(first + n) for n in range(10)])})
        with h5py.File(tmp_path / "hdf5s" / "indexes" / f"{index}.h5", "w") as file:
            path = f"hdf5s/waveforms/{name}.h5".encode()
            file.update({**columns, "hdf5_path": np.array([path] * 10), "index_in_hdf5": np.arange(10)})
    words = (tmp_path / "store", "--dataset_type", "audioset")
    assert status(*words) == 0
    assert "517 of 527 classes" in capsys.readouterr().out
    (tmp_path / "hdf5s" / "waveforms" / "train.h5").unlink()
    assert status(*words) == 1
    assert "train.h5" in capsys.readouterr().out
