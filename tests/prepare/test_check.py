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
from commands.check import run
from data.clip_store import Clip, ClipStoreWriter, read_store_table
from data_generator import load_table
from prepare.check import CheckReport, SplitReport, check_tables
from prepare.compress import compress_store
from settings import resolve

RATE, SAMPLES = 32000, 3200
LABELS = [f"sound {number}" for number in range(10)]
SPLITS = ("train", "validation", "test")


def sound(seed: int, samples: int = SAMPLES) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)


def fine_clips() -> list[Clip]:
    """Every class in every split."""
    return [
        Clip(f"{split}{label}.wav", sound(10 * place + label), [label], split=split)
        for place, split in enumerate(SPLITS)
        for label in range(10)
    ]


def write(path: Path, clips: Sequence[Clip], labels: Sequence[str] = LABELS, rate: int = RATE) -> Path:
    with ClipStoreWriter(path, clip_samples=SAMPLES, sample_rate=rate, labels=labels, dataset_type="demo") as writer:
        for clip in clips:
            writer.add(clip)
    return path


def check(path: Path, *, single_label: bool = False) -> CheckReport:
    table = read_store_table(path)
    tables = {split: table.select(table.split == split.encode()) for split in SPLITS}
    return check_tables(tables, sample_rate=RATE, single_label=single_label)


def status(given: dict[str, Any]) -> int:
    try:
        run(given)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


@pytest.fixture
def demo(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The path of a store that is yet to be written, and the settings that lead there."""
    return tmp_path / "data" / "demo.h5", {"dataset_type": "demo", "dataset_path": str(tmp_path / "data")}


def test_fine_store(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", fine_clips())
    report = check(path, single_label=True)
    assert (report.problems, report.warnings, report.repeated) == ([], [], 0)
    assert (report.sample_rate, report.size, report.labels) == (RATE, path.stat().st_size, LABELS)
    assert list(report.splits) == list(SPLITS)
    for found in report.splits.values():
        assert found.per_class.tolist() == [1] * 10
        assert found.durations() == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("compressed", [False, True])
def test_odd_sounds(tmp_path: Path, compressed: bool) -> None:
    """Silent, clipped, short and repeated clips are found, at their limits."""
    quiet, loud, lowest = sound(1) // 9000 * 32, sound(2), sound(3)
    loud[:4] = lowest[:3] = -32768  # 0.1 % of 3200 samples are 3.2
    clips = [
        *fine_clips(),
        Clip("zeros.wav", np.zeros(SAMPLES, np.int16), [0], split="train"),
        Clip("zeros too.wav", np.zeros(SAMPLES, np.int16), [0], split="test"),
        Clip("quiet.wav", quiet, [1], split="train"),
        Clip("just heard.wav", np.full(SAMPLES, 33, np.int16), [1], split="train"),
        Clip("clipped.wav", loud, [1], split="train"),
        Clip("loud.wav", lowest, [1], split="train"),
        Clip("short.wav", sound(4, 320), [1], split="train"),
        Clip("again.wav", sound(4, 320), [1], split="train"),
    ]
    path = write(tmp_path / "a.h5", clips)
    if compressed:
        compress_store(path)
    report = check(path)
    train = report.splits["train"]
    assert train.names[train.silent].tolist() == [b"zeros.wav", b"quiet.wav"]
    assert train.names[train.clipped].tolist() == [b"clipped.wav"]
    assert train.durations() == (0.01, 0.1, 0.1)
    assert report.repeated == 2  # silence is not counted as repeated audio
    assert report.problems == []
    assert [message.split(" (")[0] for message in report.warnings] == [
        "train: 2 of 17 clips",
        "train: 1 of 17 clips",
        "test: 1 of 11 clips",
        "the same audio in one split, 1 times: short.wav",
    ]


def test_clips_in_two_splits(tmp_path: Path) -> None:
    clips = [
        *fine_clips(),
        Clip("copy.wav", sound(3), [3], split="test"),
        Clip("train5.wav", sound(99), [5], split="validation"),
    ]
    report = check(write(tmp_path / "a.h5", clips))
    assert report.problems == [
        "the same audio in two splits, 1 times: train3.wav (train) = copy.wav (test).",
        "the same id in two splits, 1 times: train5.wav (train) = train5.wav (validation).",
    ]


def test_classes(tmp_path: Path) -> None:
    clips = [clip for clip in fine_clips() if 7 not in clip.labels and clip.name != "train4.wav"]
    clips += [Clip("none.wav", sound(50), [], split="train"), Clip("two.wav", sound(51), [0, 1], split="test")]
    path = write(tmp_path / "a.h5", clips)
    report = check(path)
    assert report.problems == []
    assert report.warnings == [
        "train: 1 of 9 clips (none.wav) without a class.",
        "1 of 10 classes without clips: sound 7.",
        "1 classes have clips to validate or test but none to train: sound 4.",
    ]
    assert report.splits["test"].per_class.tolist() == [2, 2, 1, 1, 1, 1, 1, 0, 1, 1]
    assert check(path, single_label=True).problems == [
        "train: 1 of 9 clips (none.wav) must have one class each (task = single_label).",
        "test: 1 of 10 clips (two.wav) must have one class each (task = single_label).",
    ]


def test_empty_split(tmp_path: Path) -> None:
    report = check(write(tmp_path / "a.h5", [clip for clip in fine_clips() if clip.split != "validation"]))
    assert report.problems == ["validation has no clips."]
    assert report.splits["validation"].durations() is None
    with pytest.raises(ValueError, match="no split to check"):
        check_tables({}, sample_rate=RATE, single_label=False)


def damage_row(file: h5py.File) -> None:
    """Store the rows compressed, one of them with bytes that cannot be decompressed."""
    waveforms = file["waveform"][:]
    del file["waveform"]
    stored = file.create_dataset("waveform", waveforms.shape, "int16", chunks=(1, SAMPLES), compression="gzip")
    stored[:] = waveforms
    stored.id.write_direct_chunk((4, 0), b"no gzip")


def shorten(file: h5py.File) -> None:
    waveforms = file["waveform"][:-1]
    del file["waveform"]
    file["waveform"] = waveforms


def empty(file: h5py.File) -> None:
    file["real_len"][4] = 0


def as_float(file: h5py.File) -> None:
    waveforms = file["waveform"][:].astype(np.float32)
    del file["waveform"]
    file["waveform"] = waveforms


@pytest.mark.parametrize(
    ("damage", "split", "clips", "reason"),
    [
        (damage_row, "train", 1, "row 4"),
        (shorten, "test", 1, "the file has 29 rows"),
        (empty, "train", 1, "the clip is empty"),
        (as_float, "train", 10, "waveform is float32"),
    ],
)
def test_unreadable_rows(
    tmp_path: Path, damage: Callable[[h5py.File], None], split: str, clips: int, reason: str
) -> None:
    path = write(tmp_path / "a.h5", fine_clips())
    with h5py.File(path, "r+") as file:
        damage(file)
    report = check(path)
    assert len(report.splits[split].unreadable) == clips
    assert report.problems[0].startswith(f"{split}: {clips} of 10 clips")
    assert reason in report.problems[0]
    assert np.isnan(report.splits[split].seconds).sum() == clips


def test_file_that_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", fine_clips())
    table = read_store_table(path)
    path.unlink()
    report = check_tables({"train": table}, sample_rate=RATE, single_label=False)
    assert len(report.splits["train"].unreadable) == 30
    assert "There is no file" in report.problems[0]
    assert report.size == 0


def assert_same_reports(one: CheckReport, other: CheckReport) -> None:
    for name in ("labels", "sample_rate", "size", "repeated", "problems", "warnings"):
        assert getattr(one, name) == getattr(other, name)
    assert list(one.splits) == list(other.splits)
    for split in one.splits:
        for field in fields(SplitReport):
            np.testing.assert_equal(getattr(one.splits[split], field.name), getattr(other.splits[split], field.name))


def test_any_number_of_processes_reports_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files, in an order that is not theirs, with a row that cannot be read and a file that is gone."""
    clips = [*fine_clips(), Clip("zeros.wav", np.zeros(SAMPLES, np.int16), [0]), Clip("copy.wav", sound(3), [3])]
    with h5py.File(write(tmp_path / "a.h5", clips), "r+") as file:
        file["real_len"][4] = 0
    other = write(tmp_path / "b.h5", [Clip(f"b{n}.wav", sound(100 + n), [n % 10]) for n in range(12)])
    first, second = read_store_table(tmp_path / "a.h5"), read_store_table(other)
    joined = replace(
        first,
        paths=[*first.paths, other, tmp_path / "gone.h5"],
        path_number=np.repeat([0, 1, 2], [32, 9, 3]),
        names=np.concatenate([first.names, second.names]),
        targets=np.concatenate([first.targets, second.targets]),
        row=np.concatenate([first.row, second.row]),
        fold=np.concatenate([first.fold, second.fold]),
        split=np.concatenate([first.split, second.split]),
        labelling=None,
        events=[],
    )
    shuffled = np.random.default_rng(1).permutation(44)
    tables = {"train": joined.select(shuffled[:30]), "test": joined.select(shuffled[30:])}
    monkeypatch.setattr(prepare.check, "TASK_CLIPS", 4)
    read: list[int] = []
    one = check_tables(tables, sample_rate=RATE, single_label=True)
    two = check_tables(tables, sample_rate=RATE, single_label=True, processes=2, advance=read.append)
    assert_same_reports(one, two)
    assert sum(read) == 44
    assert max(read) == 4
    assert len(two.splits["train"].unreadable) + len(two.splits["test"].unreadable) == 4
    assert two.problems
    monkeypatch.setattr(prepare.check, "TASK_CLIPS", 1000)
    assert_same_reports(one, check_tables(tables, sample_rate=RATE, single_label=True))


def end_process(*_: object) -> None:
    raise BrokenProcessPool


def test_process_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_store_table(write(tmp_path / "a.h5", fine_clips()))
    monkeypatch.setattr(prepare.check, "TASK_CLIPS", 10)
    monkeypatch.setattr(prepare.check.ProcessPoolExecutor, "map", end_process)
    with pytest.raises(ValueError, match=r"One of 2 processes .* try fewer"):
        check_tables({"train": table}, sample_rate=RATE, single_label=False, processes=2)
    with pytest.raises(ValueError, match="processes = 0 is not allowed"):
        check_tables({"train": table}, sample_rate=RATE, single_label=False, processes=0)


def test_bar_where_stderr_is_a_terminal(
    demo: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, given = demo
    write(path, fine_clips())
    assert status(given) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert status(given) == 0
    assert "100%" in capsys.readouterr().err


def test_command_on_a_fine_store(demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    path, given = demo
    write(path, fine_clips())
    assert status(given) == 0
    said = capsys.readouterr().out
    assert "No problems found." in said
    assert f"{RATE} Hz" in said
    for split in ("train", "validation", "test"):
        assert load_table(resolve(given), split).fingerprint() in said
    for label in LABELS:
        assert label in said


def test_command_with_the_paper_s_protocol(
    demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation is on the test clips, which are not taken for clips in two splits."""
    path, given = demo
    write(path, fine_clips())
    assert status({**given, "protocol": "paper"}) == 0
    assert "validation = test" in capsys.readouterr().out


def test_command_with_folds(demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    path, given = demo
    clips = [Clip(f"{n}.wav", sound(n), [n % 10], fold=1 + n // 10) for n in range(40)]
    write(path, clips)
    assert status({**given, "esc_fold": 4}) == 0
    assert "2, 3" in capsys.readouterr().out


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_targets(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        targets = file["target"][:-3]
        del file["target"]
        file["target"] = targets


def flatten_targets(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        targets = file["target"][:].argmax(axis=1)
        del file["target"]
        file["target"] = targets


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "There is no file"),
        (cut_off, "cannot be read as HDF5"),
        (lose_targets, "cannot be read"),
        (flatten_targets, "cannot be read"),
        (lambda path: write(path, [Clip("a.wav", sound(1), [0], split="train")], LABELS[:9]), "has 9 classes"),
        (lambda path: write(path, fine_clips()[:20]), "has no clips for test"),
        (lambda path: write(path, [*fine_clips(), Clip("a.wav", sound(0), [0], split="test")]), "the same audio in"),
    ],
)  # fmt: skip
def test_command_where_training_would_go_wrong(
    demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], said: str
) -> None:
    path, given = demo
    write(path, fine_clips())
    spoil(path)
    assert status(given) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert any(said in line for line in problems), problems
    assert len(problems) == len(set(problems))


def write_index(path: Path, names: list[bytes], targets: np.ndarray, waveforms: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["audio_name"], file["target"] = np.array(names), targets
        file["hdf5_path"] = np.array([waveforms.encode()] * len(names))
        file["index_in_hdf5"] = np.arange(len(names), dtype=np.int32)


def test_command_on_audioset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PANNs' files and indexes: fine first, then with the file of an index gone."""
    for name, first in (("train", 0), ("eval", 10)):
        path = tmp_path / "hdf5s" / "waveforms" / f"{name}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        names, targets = [f"Y{first + n}.wav".encode() for n in range(10)], np.eye(10, 527, dtype=bool)
        with h5py.File(path, "w") as file:
            file["audio_name"], file["target"] = np.array(names), targets
            file["waveform"] = np.stack([sound(first + n) for n in range(10)])
        index = tmp_path / "hdf5s" / "indexes" / f"{'full_train' if name == 'train' else name}.h5"
        write_index(index, names, targets, f"hdf5s/waveforms/{name}.h5")
    given = {"dataset_type": "audioset", "dataset_path": str(tmp_path)}
    assert status(given) == 0
    said = capsys.readouterr().out
    assert "517 of 527 classes without clips" in said
    (tmp_path / "hdf5s" / "waveforms" / "train.h5").unlink()
    assert status(given) == 1
    assert "problem: There is no file" in capsys.readouterr().out


def test_exit_status_of_the_command_line(demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = demo
    words = ["check", "--dataset_path", str(path.parent)]
    with pytest.raises(SystemExit, match=r"^1$"):
        main.main(words)
    assert "problem: There is no file" in capsys.readouterr().out
    write(path, fine_clips())
    assert main.main([*words, "--processes", "2"]) == 0
    assert main.main([*words, "--processes", "0"]) == 2
    assert "processes = 0 is not allowed" in capsys.readouterr().err
