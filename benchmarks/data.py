"""Reading clips, listing the clips of each class, drawing balanced epochs: against plain loops; stores and indexes.

    python benchmarks/data.py [--quick] [--json FILE]

The plain side is the published way, written anew from its description. Both sides take turns, so that a busy machine
slows both. A ratio is the median of the turns' ratios. Files are in the system's cache throughout. Linux only.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from benchmarks.data_stores import (
    CLASSES,
    CLIP_SAMPLES,
    Result,
    clip_names,
    compare,
    compare_flac,
    sparse_targets,
    time_full_index,
)
from data.clip_store import ClipTable, class_index
from data.samplers import BalancedSampler
from data_generator import load_table, load_training_data
from settings import Config, resolve
from utils import INT16_SCALE, int16_to_float32

BATCH_SIZE = 32


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    clips: int
    rows: int
    draws: int
    indexed: int
    turns: int


FULL = Size(clips=600, rows=200_000, draws=2_000_000, indexed=2_000_000, turns=5)
QUICK = Size(clips=96, rows=20_000, draws=200_000, indexed=100_000, turns=2)
FLAC_CLIPS = 96


# --- reading clips --------------------------------------------------------------------------------------------------


def write_index(path: Path, targets: np.ndarray, packed: Path) -> None:
    """An AudioSet index in PANNs' format, of the rows of one packed file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["audio_name"] = clip_names(0, len(targets))
        file["target"] = targets
        file["hdf5_path"] = np.full(len(targets), str(packed).encode(), dtype="S200")
        file["index_in_hdf5"] = np.arange(len(targets), dtype=np.int32)


def write_audioset(root: Path, clips: int, rng: np.random.Generator) -> None:
    """A packed file of noise in PANNs' format, and its index, as a data set of `clips` clips in `root`."""
    packed = root / "hdf5s" / "waveforms" / "balanced_train.h5"
    packed.parent.mkdir(parents=True)
    targets = sparse_targets(clips, rng)
    with h5py.File(packed, "w") as file:
        file["audio_name"] = clip_names(0, clips)
        file["target"] = targets
        waveforms = file.create_dataset("waveform", (clips, CLIP_SAMPLES), "int16")
        for row in range(clips):
            waveforms[row] = rng.integers(-3000, 3000, CLIP_SAMPLES, dtype=np.int16)
    write_index(root / "hdf5s" / "indexes" / "full_train.h5", targets, packed)


def audioset_settings(root: Path, workers: int) -> Config:
    given = {"dataset_type": "audioset", "dataset_path": str(root), "balanced_data": False, "num_workers": workers}
    return resolve({**given, "batch_size": BATCH_SIZE})


class PlainDataset(Dataset):
    """The published way: open the file for each clip, read its row, make it float32 on the CPU."""

    def __init__(self, table: ClipTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.table.row[index])
        with h5py.File(self.table.paths[self.table.path_number[index]], "r") as file:
            return {
                "audio_name": file["audio_name"][row].decode(),
                "waveform": file["waveform"][row].astype(np.float32) / np.float32(INT16_SCALE),
                "real_len": CLIP_SAMPLES,
                "target": file["target"][row].astype(np.float32),
            }


def plain_loader(table: ClipTable, workers: int) -> DataLoader:
    return DataLoader(
        PlainDataset(table), BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def read_epoch(loader: Iterable[dict[str, Any]]) -> None:
    for _ in loader:
        pass


def read_epoch_as_float(loader: Iterable[dict[str, Any]]) -> None:
    for batch in loader:
        int16_to_float32(batch["waveform"])


def compare_loaders(root: Path, workers: int, target: float, turns: int) -> list[Result]:
    """One epoch of the training loader. Both loaders have run one epoch before, with workers that stay."""
    data = load_training_data(audioset_settings(root, workers), ("train",))
    plain, ours = plain_loader(data.tables["train"], workers), data.train_dataloader()
    read_epoch(plain)
    read_epoch(ours)
    name = f"loader, {workers} workers"
    return compare(
        lambda: read_epoch(plain),
        {
            f"{name}: int16 handed over": (lambda: read_epoch(ours), target),
            f"{name}: then made float32 on the CPU": (lambda: read_epoch_as_float(ours), None),
        },
        turns,
    )


def resident_mib(process: int) -> float:
    """Resident memory of a process in MiB."""
    (line,) = (x for x in Path(f"/proc/{process}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def memory_of_epochs(root: Path, workers: int, epochs: int = 3) -> dict[str, list[float]]:
    """MiB after each epoch, of this process and of each worker."""
    others = {child.pid for child in multiprocessing.active_children()}
    loader = load_training_data(audioset_settings(root, workers), ("train",)).train_dataloader()
    found: dict[str, list[float]] = {}
    for _ in range(epochs):
        read_epoch(loader)
        started = [c.pid for c in multiprocessing.active_children() if c.pid is not None and c.pid not in others]
        processes = {"this process": os.getpid(), **{f"worker {n}": pid for n, pid in enumerate(sorted(started))}}
        for name, process in processes.items():
            found.setdefault(f"{workers} workers, {name}", []).append(resident_mib(process))
    return found


# --- the clips of each class ----------------------------------------------------------------------------------------


def loop_over_rows(targets: Any) -> list[list[int]]:
    """The published way: row by row (of an array, or of a dataset in a file), each clip appended to its classes."""
    classes: list[list[int]] = [[] for _ in range(CLASSES)]
    for clip in range(len(targets)):
        for label in np.where(targets[clip])[0]:
            classes[label].append(clip)
    return classes


def loop_over_file(path: Path) -> list[list[int]]:
    with h5py.File(path, "r") as file:
        return loop_over_rows(file["target"])


def index_file(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with h5py.File(path, "r") as file:
        return class_index(file["target"][:])


def compare_save_idc(root: Path, rows: int, turns: int, rng: np.random.Generator) -> list[Result]:
    """The clips of each class from an index file, and from targets that are in memory."""
    packed = root / "hdf5s" / "waveforms" / "balanced_train.h5"
    index = root / "hdf5s" / "indexes" / "full_train.h5"
    targets = sparse_targets(rows, rng)
    write_index(index, targets, packed)
    settings = audioset_settings(root, 0)
    clips, starts, _ = index_file(index)
    assert [clips[a:b].tolist() for a, b in itertools.pairwise(starts)] == loop_over_rows(targets)
    from_file = {
        "save_idc: targets of the index file": (lambda: index_file(index), 200.0),
        "save_idc: whole table of the clips": (lambda: class_index(load_table(settings, "train").targets), None),
    }
    in_memory = {"save_idc: targets in memory": (lambda: class_index(targets), None)}
    return [
        *compare(lambda: loop_over_file(index), from_file, min(turns, 3)),
        *compare(lambda: loop_over_rows(targets), in_memory, turns),
    ]


# --- balanced epochs ------------------------------------------------------------------------------------------------


def draw_in_a_loop(classes: list[list[int]], draws: int) -> list[int]:
    """The published way: the classes in random order, one random clip of each, and again."""
    drawn: list[int] = []
    order = list(range(len(classes)))
    while len(drawn) < draws:
        random.shuffle(order)
        drawn += [random.choice(classes[label]) for label in order]
    return drawn[:draws]


def compare_balanced(draws: int, turns: int, rng: np.random.Generator) -> list[Result]:
    """An epoch of a table with as many clips as draws."""
    targets = sparse_targets(draws, rng)
    clips, starts, _ = class_index(targets)
    classes = [clips[start:stop].tolist() for start, stop in itertools.pairwise(starts)]
    sampler = BalancedSampler(targets, seed=1)
    del targets
    return compare(
        lambda: draw_in_a_loop(classes, draws),
        {
            "balanced epoch: drawn": (lambda: sampler.draw(np.random.default_rng(1)), 25.0),
            "balanced epoch: as Python numbers, one by one": (lambda: list(sampler), None),
        },
        turns,
    )


# --- report ---------------------------------------------------------------------------------------------------------


def print_results(results: list[Result], memory: dict[str, list[float]], stores: dict[str, float], size: Size) -> None:
    table = Table(
        title=f"{size.clips} clips of 10 s at 32 kHz, {size.rows:,} rows, {size.draws:,} draws, {CLASSES} classes",
        title_justify="left",
    )
    for column in ("", "plain (s)", "ours (s)", "ratio", "target"):
        table.add_column(column, justify="right" if column else "left")
    for r in results:
        target = f"{r.target:g}" if r.target else ""
        plain, ratio = ("", "") if r.ratio is None else (f"{r.plain_seconds:.4f}", f"{r.ratio:.3g}")
        table.add_row(r.name, plain, f"{r.our_seconds:.4f}", ratio, target)
    Console(width=120).print(table)
    for r in results:
        if r.name.startswith("loader") and r.plain_seconds:
            print(f"{r.name}: {size.clips / r.plain_seconds:,.0f} -> {size.clips / r.our_seconds:,.0f} clips/s")
    print_stores(next(r for r in results if r.name.startswith("store")), stores)
    print("Resident memory after each of three epochs, MiB:")
    for name, values in memory.items():
        print(f"  {name}: {', '.join(f'{value:.0f}' for value in values)}")


def print_stores(reading: Result, stores: dict[str, float]) -> None:
    """What a clip costs in a FLAC store and in one of int16."""
    for (name, mib), total in zip(stores.items(), (reading.plain_seconds, reading.our_seconds), strict=True):
        assert total is not None, "FLAC is compared with int16"
        share = f"{100 * mib / stores['int16']:.0f} % of int16"
        print(f"{name} store: {1000 * total / FLAC_CLIPS:.2f} ms a clip, {mib:.1f} MiB ({share}), {FLAC_CLIPS} clips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the data: to see whether it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_audioset(root, size.clips, rng)
        memory = {**memory_of_epochs(root, 0), **memory_of_epochs(root, 2)}
        results = compare_loaders(root, 0, 10.0, size.turns) + compare_loaders(root, 2, 3.5, size.turns)
        results += compare_save_idc(root, size.rows, size.turns, rng)
        flac, stores = compare_flac(root, FLAC_CLIPS, size.turns, rng)
        results += flac
    with tempfile.TemporaryDirectory() as folder:
        results += time_full_index(Path(folder), size.indexed, min(size.turns, 3), rng)
    results += compare_balanced(size.draws, size.turns, rng)
    print_results(results, memory, stores, size)
    if arguments.json:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        content = {"size": asdict(size), "machine": machine, "results": [asdict(r) for r in results]}
        content |= {"memory_mib": memory, "stores_mib": stores}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
