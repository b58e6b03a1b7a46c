"""The clip store: one HDF5 file of clips with their classes, events and split. Writer and reader of the one format.

Datasets: audio_name (N,) bytes, waveform (N, samples) int16 = float x 32767 (or waveform_flac (N,), a FLAC file in
each row, see prepare/compress.py), target (N, K) bool, and, beyond what PANNs' AudioSet files have: real_len (N,) int32
samples, fold (N,) int8 or split (N,) bytes, labelling (N,) int8 (the annotation of a clip: STRONG, WEAK or UNLABELLED),
and the table of events event_clip (E,) int32, event_class (E,) int16, event_onset (E,) and event_offset (E,) float64
seconds.
Attributes: sample_rate in Hz, labels (K names), dataset_type, source, licence, and task (single_label or multilabel;
older stores have none). A file of PANNs has none of these additions and is a valid store.
"""

import hashlib
import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Optional

import h5py
import numpy as np
import soundfile

from data.files import whole_file
from settings import UserError

BLOCK_ROWS = 4096  # clips looked through at once: 2 MB of AudioSet's targets, which a processor's cache holds
UNREADABLE = -1  # index of a clip that could not be read, in evaluation
PANNS_SAMPLE_RATE = 32000  # of the files that PANNs' scripts pack, which do not name it
SPLITS = ("train", "validation", "test")
LARGEST_FOLD = 127  # of int8
FLAC_SAMPLES = 2**28  # the most that a compressed row without real_len is decoded to
# Annotation of a clip: none; its classes; all its events with their times (perhaps no event).
UNLABELLED, WEAK, STRONG = 0, 1, 2
Task = Literal["single_label", "multilabel"]  # exactly one class a clip, or any number


@dataclass(frozen=True)
class Event:
    """One sound: class index, onset and offset in seconds from the clip's start."""

    label: int
    onset: float
    offset: float


@dataclass(frozen=True)
class Clip:
    """What an adapter gives the writer. waveform: (samples,) int16; labels: class indexes that are present."""

    name: str
    waveform: np.ndarray
    labels: Sequence[int]
    fold: int = 0
    split: str = ""
    events: Sequence[Event] = ()
    labelling: Optional[int] = None  # None: STRONG in a store with events, WEAK in one without


class ClipStoreWriter:
    """Writes a store under a temporary name; it takes its own name when the `with` block ends without an error."""

    def __init__(
        self, path: Path, *, clip_samples: int, sample_rate: int, labels: Sequence[str], **attributes: str
    ) -> None:
        """clip_samples: longest clip in samples. attributes: dataset_type, task, source, licence."""
        self.path = path
        self.clip_samples, self.labels = clip_samples, list(labels)
        self.attributes: dict[str, Any] = {"sample_rate": sample_rate, "labels": self.labels, **attributes}
        self.rows: list[tuple[str, int, int, str]] = []  # name, real_len, fold, split
        self.labelling: list[Optional[int]] = []
        self.targets: list[np.ndarray] = []
        self.events: list[tuple[int, int, float, float]] = []

    def __enter__(self) -> "ClipStoreWriter":
        with ExitStack() as stack:
            self.file = stack.enter_context(h5py.File(stack.enter_context(whole_file(self.path)), "w"))
            stack.push(self._finish)
            samples = self.clip_samples
            self.waveforms = self.file.create_dataset(
                "waveform", (0, samples), "int16", maxshape=(None, samples), chunks=(1, samples)
            )
            self.stack = stack.pop_all()
        return self

    def add(self, clip: Clip) -> None:
        """Append a clip; a longer one than clip_samples is cut. Raises UserError for an empty or mislabelled one."""
        waveform = clip.waveform[: self.clip_samples]
        if len(waveform) == 0:
            raise UserError(f"{clip.name} holds no samples.")
        if any(not 0 <= label < len(self.labels) for label in clip.labels):
            raise UserError(f"{clip.name} has class {max(clip.labels)}; the classes are 0 to {len(self.labels) - 1}.")
        row = len(self.rows)
        self.waveforms.resize(row + 1, axis=0)
        self.waveforms[row, : len(waveform)] = waveform
        target = np.zeros(len(self.labels), dtype=bool)
        target[list(clip.labels)] = True
        self.targets.append(target)
        self.rows.append((clip.name, len(waveform), clip.fold, clip.split))
        self.labelling.append(clip.labelling)
        self.events += [(row, event.label, event.onset, event.offset) for event in clip.events]

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.stack.__exit__(kind, error, trace)

    def _finish(self, kind: Optional[type[BaseException]], *_: object) -> None:
        """The columns beside the waveforms, unless an error ends the writing."""
        if kind is not None:
            return
        names, lengths, folds, splits = zip(*self.rows, strict=True) if self.rows else ((), (), (), ())
        self.file["audio_name"] = np.array([name.encode() for name in names], dtype="S")
        self.file["target"] = np.array(self.targets, dtype=bool).reshape(len(names), len(self.labels))
        self.file["real_len"] = np.array(lengths, dtype=np.int32)
        self.file["fold"] = np.array(folds, dtype=np.int8)
        self.file["split"] = np.array([split.encode() for split in splits], dtype="S10")
        usual = STRONG if self.events else WEAK
        self.file["labelling"] = np.array([usual if x is None else x for x in self.labelling], dtype=np.int8)
        clips, labels, onsets, offsets = zip(*self.events, strict=True) if self.events else ((), (), (), ())
        self.file["event_clip"] = np.array(clips, dtype=np.int32)
        self.file["event_class"] = np.array(labels, dtype=np.int16)
        self.file["event_onset"] = np.array(onsets, dtype=np.float64)
        self.file["event_offset"] = np.array(offsets, dtype=np.float64)
        self.file.attrs.update(self.attributes)


@dataclass(frozen=True)
class EventTable:
    """All events of a store, sorted by clip: those of row r are starts[r] to starts[r + 1]."""

    starts: np.ndarray  # (rows + 1,) int64
    label: np.ndarray  # (E,) int64: class
    onset: np.ndarray  # (E,) float64 seconds
    offset: np.ndarray  # (E,)

    def of(self, row: int) -> slice:
        """Where the events of a row stand."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))


@dataclass(frozen=True)
class ClipTable:
    """Which clips there are and where they lie: everything about a data set but the sound itself.

    All arrays have one entry a clip. labels may be empty (PANNs' files), and so may events, which has one table a path.
    """

    paths: list[Path]
    names: np.ndarray  # (N,) bytes
    targets: np.ndarray  # (N, K) bool
    path_number: np.ndarray  # (N,) int: which of `paths`
    row: np.ndarray  # (N,) int: which row of that file
    fold: np.ndarray  # (N,) int, 0 without folds
    split: np.ndarray  # (N,) bytes, b"" without splits
    labels: list[str] = field(default_factory=list)
    sample_rate: Optional[int] = None  # None: the files do not say (PANNs' hold 32 kHz)
    task: Optional[Task] = None  # None: the files do not say
    attributes: dict[str, str] = field(default_factory=dict)
    labelling: Optional[np.ndarray] = None  # (N,) int8: STRONG, WEAK or UNLABELLED; None: all WEAK
    events: list[EventTable] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def waveform_rate(self) -> int:
        """Samples per second of the stored waveforms."""
        return self.sample_rate or PANNS_SAMPLE_RATE

    def select(self, wanted: np.ndarray) -> "ClipTable":
        """The clips that `wanted` picks: an (N,) bool array, or clip numbers in the order they shall have."""
        columns = ["names", "targets", "path_number", "row", "fold", "split"]
        columns += ["labelling"] if self.labelling is not None else []
        return replace(self, **{name: getattr(self, name)[wanted] for name in columns})

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the clips' names, places, classes and rate, not with the sound."""
        digest = hashlib.sha256(f"{self.sample_rate} {self.labels}".encode())
        for array in (self.names, self.targets, self.row):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def labelling(table: ClipTable) -> np.ndarray:
    """(N,) annotation of each clip: STRONG, WEAK or UNLABELLED."""
    return np.full(len(table), WEAK, dtype=np.int8) if table.labelling is None else table.labelling


def store_path(dataset_path: str | Path, dataset_type: str) -> Path:
    """Where the one store of a prepared data set lies (AudioSet has many: see read_index_table)."""
    return Path(dataset_path) / f"{dataset_type}.h5"


def class_index(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The clips of each class: (N, K) bool targets -> clips (P,) int32, starts (K + 1,) and counts (K,) int64.

    Class k has the clips clips[starts[k]:starts[k + 1]], in ascending order. K is at most 32,767.
    """
    rows, classes = targets.shape
    assert classes <= np.iinfo(np.int16).max, "classes are sorted as int16"
    clips, labels = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int16)]
    for start in range(0, rows, BLOCK_ROWS):
        place = np.flatnonzero(targets[start : start + BLOCK_ROWS]).astype(np.int32)
        row = place // np.int32(classes)
        labels.append((place - row * np.int32(classes)).astype(np.int16))
        clips.append(row + np.int32(start))
    label = np.concatenate(labels)
    counts = np.bincount(label, minlength=classes)
    order = np.argsort(label, kind="stable")  # of int16: a radix sort, which keeps the clips of a class in order
    return np.concatenate(clips)[order], np.concatenate([[0], np.cumsum(counts)]), counts


def open_store(path: Path, *keys: str) -> h5py.File:
    """Open a store or index for reading. Raises UserError where it is missing, cut off, or lacks one of `keys`."""
    if not path.is_file():
        raise UserError(
            f"There is no file {path}. Make it with `python main.py prepare --dataset_type ...`, or say with "
            f"--dataset_path where the prepared data lies."
        )
    try:
        file = h5py.File(path, "r", rdcc_nbytes=0)  # rows are read once, at random: a cache would only copy them
    except OSError as error:
        raise UserError(f"{path} cannot be read as HDF5; it may be cut off: prepare it again. ({error})") from None
    lacking = [key for key in keys if key not in file]
    if lacking:
        found = ", ".join(file)
        file.close()
        raise UserError(f"{path} lacks {', '.join(lacking)}; it has {found}. It is no {'/'.join(keys)} file.")
    return file


class Waveforms:
    """The sound of an open store: int16 rows as they are, or a FLAC file in each row (prepare/compress.py)."""

    def __init__(self, file: h5py.File) -> None:
        self.rows: Optional[h5py.Dataset] = file.get("waveform")
        self.flac: Optional[h5py.Dataset] = file.get("waveform_flac")
        if self.rows is None and self.flac is None:
            raise UserError(f"{file.filename} has neither waveform nor waveform_flac: it is no clip store.")
        self.real_len = file["real_len"][:] if "real_len" in file else None

    @property
    def width(self) -> int:
        """Samples that a row has room for; 0 where sounds are compressed, which have each their own length."""
        return 0 if self.rows is None else int(self.rows.shape[1])

    def __len__(self) -> int:
        rows: Any = self.flac if self.rows is None else self.rows
        return len(rows)

    def read_into(self, row: int, waveform: np.ndarray) -> int:
        """Fill the beginning of (samples,) int16 with a clip, as much as fits; returns how many samples those are.

        Raises UserError or OSError where the row cannot be read.
        """
        if self.rows is None:
            sound = self.read(row)[: len(waveform)]
            waveform[: len(sound)] = sound
            return len(sound)
        length = int(self.real_len[row]) if self.real_len is not None else self.rows.shape[1]
        length = min(length, len(waveform))
        # What rows.read_direct does, at half its cost: it takes longer to describe a row than to read one.
        selected = self.rows.id.get_space()
        selected.select_hyperslab((row, 0), (1, length))
        self.rows.id.read(h5py.h5s.create_simple((length,)), selected, waveform[:length])
        return length

    def read(self, row: int) -> np.ndarray:
        """(samples,) int16 of a clip, whole. Raises UserError or OSError where it cannot be read."""
        if self.rows is not None:
            return self.rows[row, : None if self.real_len is None else int(self.real_len[row])]
        assert self.flac is not None
        most = FLAC_SAMPLES if self.real_len is None else int(self.real_len[row])
        try:
            with soundfile.SoundFile(io.BytesIO(self.flac[row].tobytes())) as file:
                if file.channels != 1:
                    raise UserError(f"Row {row} is damaged: it has {file.channels} channels in place of one.")
                sound = file.read(min(most + 1, file.frames), dtype="int16")
        except soundfile.LibsndfileError as error:
            raise UserError(f"Row {row} is damaged: {error.error_string}") from None
        if len(sound) > most or (self.real_len is not None and len(sound) < most):
            raise UserError(f"Row {row} is damaged: its sound has another length than real_len, {most} samples.")
        return sound


def read_store_table(path: Path) -> ClipTable:
    """The table of one store: all its clips, in the order of the file."""
    with open_store(path, "audio_name", "target") as file:
        Waveforms(file)  # a file of anything else is refused
        count = len(file["audio_name"])
        attributes = {key: str(file.attrs[key]) for key in ("dataset_type", "source", "licence") if key in file.attrs}
        return ClipTable(
            paths=[path],
            names=file["audio_name"][:],
            targets=file["target"][:].astype(bool),
            path_number=np.zeros(count, dtype=np.int64),
            row=np.arange(count),
            fold=file["fold"][:] if "fold" in file else np.zeros(count, dtype=np.int8),
            split=file["split"][:] if "split" in file else np.zeros(count, dtype="S10"),
            labels=[str(label) for label in file.attrs.get("labels", [])],
            sample_rate=int(file.attrs["sample_rate"]) if "sample_rate" in file.attrs else None,
            task=file.attrs.get("task"),
            attributes=attributes,
            labelling=_read_labelling(file, count),
            events=[_read_event_table(file, count)],
        )


def _read_labelling(file: h5py.File, count: int) -> np.ndarray:
    """(N,) annotation of each clip; without the column STRONG in a store with events, WEAK in one without."""
    if "labelling" in file:
        return file["labelling"][:]
    return np.full(count, STRONG if len(file.get("event_clip", ())) else WEAK, dtype=np.int8)


def _read_event_table(file: h5py.File, count: int) -> EventTable:
    names = ("event_clip", "event_class", "event_onset", "event_offset")
    clip, label, onset, offset = (file[name][:] if name in file else np.zeros(0) for name in names)
    order = np.argsort(clip, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(clip.astype(np.int64), minlength=count))])
    return EventTable(starts, label[order].astype(np.int64), onset[order], offset[order])


def read_index_table(path: Path, root: Path) -> ClipTable:
    """The table of an AudioSet index: audio_name, target, hdf5_path and index_in_hdf5, as PANNs' scripts write it.

    Paths in the index are taken from `root` where they are relative or no longer exist.
    """
    with open_store(path, "audio_name", "target", "hdf5_path", "index_in_hdf5") as file:
        unique, path_number = _numbered(file["hdf5_path"][:])
        names, targets, row = file["audio_name"][:], file["target"][:].astype(bool), file["index_in_hdf5"][:]
        sample_rate = int(file.attrs["sample_rate"]) if "sample_rate" in file.attrs else None
        task = file.attrs.get("task")
    return ClipTable(
        paths=[_relocate(Path(name.decode()), root) for name in unique],
        names=names,
        targets=targets,
        path_number=path_number,
        row=row.astype(np.int64),
        fold=np.zeros(len(names), dtype=np.int8),
        split=np.zeros(len(names), dtype="S10"),
        sample_rate=sample_rate,
        task=task,
    )


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) -> its different values, and (N,) which of them each is. Fast where equal values follow one another."""
    heads = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))[: len(values)]
    unique, number = np.unique(values[heads], return_inverse=True)
    return unique, np.repeat(number, np.diff(np.append(heads, len(values))))


def _relocate(path: Path, root: Path) -> Path:
    """Where a file of an index lies now: as written, or below `root` from its hdf5s/ folder on."""
    if path.is_absolute() and path.is_file():
        return path
    parts = path.parts
    return root.joinpath(*parts[parts.index("hdf5s") :]) if "hdf5s" in parts else root / path


def read_events(path: Path) -> list[list[Event]]:
    """The events of each clip of a store, in the order of the file; empty lists where the store has no times."""
    with open_store(path, "audio_name") as file:
        events: list[list[Event]] = [[] for _ in range(len(file["audio_name"]))]
        if "event_clip" in file:
            columns = (file[f"event_{name}"][:].tolist() for name in ("clip", "class", "onset", "offset"))
            for clip, label, onset, offset in zip(*columns, strict=True):
                events[clip].append(Event(label, onset, offset))
        return events
