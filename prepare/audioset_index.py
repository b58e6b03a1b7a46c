"""Indexes of AudioSet's packed files: python main.py create_index --dataset_path FOLDER (that of hdf5s/).

An index has a row for each clip: audio_name, target, hdf5_path (relative to the folder) and index_in_hdf5, as PANNs'
have. data.clip_store.read_index_table reads it.
"""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.clip_store import PANNS_SAMPLE_RATE, open_store
from data.files import whole_hdf5
from data.workers import end_with_parent
from settings import UserError

INDEXES = {  # index: the groups of files that it joins, in order
    "balanced_train": ("balanced_train",),
    "unbalanced_train": ("unbalanced_train",),
    "full_train": ("balanced_train", "unbalanced_train"),
    "eval": ("eval",),
}
TRAINING = ("balanced_train", "unbalanced_train")
CHUNK_CLIPS = 1024


@dataclass(frozen=True)
class Source:
    """A file of waveforms: its group, place, number of clips and classes, longest name in bytes, rate in Hz."""

    group: str
    path: Path
    relative: str
    clips: int
    classes: int
    name_bytes: int
    sample_rate: int


def find_sources(root: Path) -> list[Source]:
    """The waveform files below `root`: balanced, unbalanced parts by number, evaluation.

    Raises UserError where there is none to train on, one is cut off, or they differ in classes or rate.
    """
    waveforms = root / "hdf5s" / "waveforms"
    parts = (waveforms / "unbalanced_train").glob("*.h5")
    files = [
        ("balanced_train", waveforms / "balanced_train.h5"),
        *(("unbalanced_train", path) for path in sorted(parts, key=lambda path: (len(path.name), path.name))),
        ("eval", waveforms / "eval.h5"),
    ]
    sources = [inspect_source(group, path, root) for group, path in files if path.is_file()]
    if not any(source.group in TRAINING for source in sources):
        raise UserError(
            f"{waveforms} has neither balanced_train.h5 nor unbalanced_train/*.h5: --dataset_path must be the folder "
            f"that holds hdf5s/, packed by `python main.py prepare --dataset_type audioset` or by PANNs' scripts."
        )
    for source in sources:
        for what in ("classes", "sample_rate"):
            first, found = getattr(sources[0], what), getattr(source, what)
            if first != found:
                raise UserError(
                    f"{source.path} has {what} = {found}, {sources[0].path} has {first}: one of them belongs to "
                    f"another data set; prepare it again, or move it away."
                )
    return sources


def inspect_source(group: str, path: Path, root: Path) -> Source:
    """Read the head of a file of waveforms. Raises UserError where it is cut off or inconsistent."""
    with open_store(path, "audio_name", "target") as file:
        names, targets = file["audio_name"], file["target"]
        counts = {key: len(file[key]) for key in ("audio_name", "target", "waveform") if key in file}
        if len(set(counts.values())) != 1 or targets.ndim != 2 or names.dtype.kind != "S":
            raise UserError(
                f"{path} is no file of clips: audio_name must be bytes, target (clips, classes), and all of one "
                f"length; found are {counts}. Prepare it again."
            )
        return Source(
            group, path, path.relative_to(root).as_posix(), len(names), targets.shape[1], names.dtype.itemsize,
            int(file.attrs.get("sample_rate", PANNS_SAMPLE_RATE)),
        )  # fmt: skip


def read_columns(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """audio_name (N,) bytes and target (N, K) bool of a file. Raises UserError where they cannot be read."""
    with open_store(path, "audio_name", "target") as file:
        try:
            return file["audio_name"][:], file["target"][:].astype(bool)
        except OSError as error:
            raise UserError(f"{path} is damaged: prepare it again. ({error})") from None


def read_ahead(paths: Sequence[Path], processes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """read_columns of each path, in order. `processes` of them are read, and in memory, at once."""
    if min(processes, len(paths)) <= 1:
        yield from map(read_columns, paths)
        return
    workers = min(processes, len(paths))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        running: deque = deque()
        for path in paths:
            running.append(pool.submit(read_columns, path))
            if len(running) == processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


@contextmanager
def writing(path: Path, sources: Sequence[Source]) -> Iterator[h5py.File]:
    """An index of 0 clips to append to, which is whole or not there when the `with` block ends."""
    columns: dict[str, tuple[str, tuple[int, ...]]] = {
        "audio_name": (f"S{max(source.name_bytes for source in sources)}", ()),
        "target": ("bool", (sources[0].classes,)),
        "hdf5_path": (f"S{max(len(source.relative.encode()) for source in sources)}", ()),
        "index_in_hdf5": ("int32", ()),
    }
    with whole_hdf5(path) as (file, _):
        for name, (dtype, shape) in columns.items():  # gzip: zeros and repeated paths all but vanish
            file.create_dataset(
                name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(CHUNK_CLIPS, *shape),
                compression="gzip", compression_opts=1,
            )  # fmt: skip
        file.attrs["sample_rate"] = sources[0].sample_rate
        file.attrs["task"] = "multilabel"
        yield file


def append(index: h5py.File, source: Source, names: np.ndarray, targets: np.ndarray) -> None:
    """Add the clips of one file to an index."""
    columns: dict[str, Any] = {
        "audio_name": names,
        "target": targets,
        "hdf5_path": np.array([source.relative.encode()] * len(names), dtype=index["hdf5_path"].dtype),
        "index_in_hdf5": np.arange(len(names), dtype=np.int32),
    }
    start = len(index["audio_name"])
    for name, values in columns.items():
        index[name].resize(start + len(names), axis=0)
        index[name][start:] = values


def create_indexes(root: Path, processes: int) -> dict[Path, int]:
    """Write hdf5s/indexes/{balanced_train,unbalanced_train,full_train,eval}.h5, those for which there are files.

    Each file of waveforms is read once, and only its names and targets. Returns the number of clips of each index.
    Raises UserError as find_sources does.
    """
    sources = find_sources(root)
    with ExitStack() as stack:
        indexes: dict[str, h5py.File] = {}
        counts: dict[Path, int] = {}
        for name, groups in INDEXES.items():
            members = [source for source in sources if source.group in groups]
            if members:
                path = root / "hdf5s" / "indexes" / f"{name}.h5"
                indexes[name] = stack.enter_context(writing(path, members))
                counts[path] = sum(source.clips for source in members)
        columns = read_ahead([source.path for source in sources], processes)
        for source, (names, targets) in zip(sources, columns, strict=True):
            for name, index in indexes.items():
                if source.group in INDEXES[name]:
                    append(index, source, names, targets)
    return counts
