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
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Optional, get_args

import h5py
import numpy as np
import soundfile

from data.files import check_memory, whole_hdf5
from data.hdf5 import Columns, check_columns, open_hdf5, read_column, reading, texts
from settings import UserError

BLOCK_ROWS = 4096  # clips looked through at once: 2 MB of AudioSet's targets, which a processor's cache holds
UNREADABLE = -1  # index of a clip that could not be read, in evaluation
PANNS_SAMPLE_RATE = 32000  # of the files that PANNs' scripts pack, which do not name it
SPLITS = ("train", "validation", "test")
EVENT_COLUMNS = ("event_clip", "event_class", "event_onset", "event_offset")
COLUMNS: Columns = {  # of a store or an index: kinds of NumPy's dtypes, dimensions
    "waveform": ("i", 2), "waveform_flac": ("O", 1), "audio_name": ("SO", 1), "target": ("biuf", 2),
    "real_len": ("iu", 1), "fold": ("iu", 1), "split": ("SO", 1), "labelling": ("iu", 1), "hdf5_path": ("SO", 1),
    "index_in_hdf5": ("iu", 1), "event_clip": ("iu", 1), "event_class": ("iu", 1), "event_onset": ("f", 1),
    "event_offset": ("f", 1),
}  # fmt: skip
RATES = (1, 4_000_001)  # Hz that a store may have
LARGEST_FOLD = 127  # of int8
LEAST_SECONDS = 0.01  # of a clip, a segment and an event: one hop of the front-end; less is left by rounded times
END_TOLERANCE = 0.5  # seconds that an event may reach beyond the end of its clip, as annotations round
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
        self,
        path: Path,
        *,
        clip_samples: int,
        sample_rate: int,
        labels: Sequence[str],
        used_labels: bool = False,
        **attributes: str,
    ) -> None:
        """clip_samples: longest clip in samples. used_labels: whether a class that no clip has is left out at the end.

        attributes: dataset_type, task, source, licence.
        """
        self.used_labels = used_labels
        self.path = path
        self.clip_samples, self.labels = clip_samples, list(labels)
        self.attributes: dict[str, Any] = {"sample_rate": sample_rate, "labels": self.labels, **attributes}
        self.rows: list[tuple[str, int, int, str]] = []  # name, real_len, fold, split
        self.labelling: list[Optional[int]] = []
        self.targets: list[np.ndarray] = []
        self.events: list[tuple[int, int, float, float]] = []

    def __enter__(self) -> "ClipStoreWriter":
        with ExitStack() as stack:
            self.file, self.check = stack.enter_context(whole_hdf5(self.path))
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
        self.check()
        target = np.zeros(len(self.labels), dtype=bool)
        target[list(clip.labels)] = True
        self.targets.append(target)
        self.rows.append((clip.name, len(waveform), clip.fold, clip.split))
        self.labelling.append(clip.labelling)
        self.events += [(row, event.label, event.onset, event.offset) for event in clip.events]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Where the block ends with a UserError, the clips that it has added are dropped."""
        rows, events = len(self.rows), len(self.events)
        try:
            yield
        except UserError:
            for column in (self.rows, self.labelling, self.targets):
                del column[rows:]
            del self.events[events:]
            self.waveforms.resize(rows, axis=0)
            raise

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.stack.__exit__(kind, error, trace)

    def _finish(self, kind: Optional[type[BaseException]], *_: object) -> None:
        """The columns beside the waveforms, unless an error ends the writing."""
        if kind is not None:
            return
        targets = np.array(self.targets, dtype=bool).reshape(len(self.rows), len(self.labels))
        kept = np.flatnonzero(targets.any(axis=0) | (not self.used_labels))
        number = {int(old): new for new, old in enumerate(kept)}
        self.attributes["labels"] = self.labels = [self.labels[k] for k in kept]
        names, lengths, folds, splits = zip(*self.rows, strict=True) if self.rows else ((), (), (), ())
        self.file["audio_name"] = np.array([name.encode() for name in names], dtype="S")
        self.file["target"] = targets[:, kept]
        self.file["real_len"] = np.array(lengths, dtype=np.int32)
        self.file["fold"] = np.array(folds, dtype=np.int8)
        self.file["split"] = np.array([split.encode() for split in splits], dtype="S10")
        usual = STRONG if self.events else WEAK
        self.file["labelling"] = np.array([usual if x is None else x for x in self.labelling], dtype=np.int8)
        clips, labels, onsets, offsets = zip(*self.events, strict=True) if self.events else ((), (), (), ())
        self.file["event_clip"] = np.array(clips, dtype=np.int32)
        self.file["event_class"] = np.array([number[label] for label in labels], dtype=np.int16)
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

    def digest(self) -> str:
        """16 hexadecimal digits that change as `fingerprint`, and with the annotation: which clips have which events.

        Of several files, the events of all count, also of clips of other splits.
        """
        digest = hashlib.sha256(f"{self.fingerprint()} {self.task}".encode())
        columns = [(e.starts, e.label, e.onset, e.offset) for e in self.events]
        for array in (labelling(self), *itertools.chain(*columns)):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def same_classes(table: ClipTable) -> bool:
    """Whether all clips have the same classes: then a network has nothing to tell apart."""
    return set(table.targets.sum(axis=0).tolist()) <= {0, len(table)}


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
    if classes > np.iinfo(np.int16).max:
        raise ValueError(f"{classes} classes: they are sorted as int16, which counts {np.iinfo(np.int16).max}.")
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
    """Open a store or index for reading.

    Raises UserError where it is missing, damaged, lacks one of `keys`, or has columns of another kind or length.
    """
    if not path.is_file():
        raise UserError(
            f"There is no file {path}. Make it with `python main.py prepare --dataset_type ...`, or say with "
            f"--dataset_path where the prepared data lies."
        )
    file = open_hdf5(path)
    try:
        with reading(path):
            lacking = [key for key in keys if key not in file]
            if lacking:
                raise UserError(
                    f"{path} lacks {', '.join(lacking)}; it has {', '.join(file)}. It is no {'/'.join(keys)} file."
                )
            _check_layout(file)
    except BaseException:
        file.close()
        raise
    return file


def _check_layout(file: h5py.File) -> None:
    """Raise UserError for columns of another kind than this format's, or with another number of rows."""
    check_columns(file, COLUMNS, rows={})
    first = next((name for name in COLUMNS if name in file and not name.startswith("event_")), None)
    events = [name for name in COLUMNS if name.startswith("event_") and name in file]
    if first is not None:
        clips = dict.fromkeys(COLUMNS, file[first].shape[0])
        rows = clips | (dict.fromkeys(events, file[events[0]].shape[0]) if events else {})
        check_columns(file, COLUMNS, rows=rows)
    if events and len(events) != len(EVENT_COLUMNS):
        raise UserError(f"{file.filename} has {', '.join(events)} alone; events need {', '.join(EVENT_COLUMNS)}.")
    waveform = file.get("waveform")
    if waveform is not None and waveform.dtype.itemsize != 2:
        raise UserError(f"{file.filename}: waveform is {waveform.dtype}, where int16 is needed: prepare it again.")
    if "waveform_flac" in file and h5py.check_vlen_dtype(file["waveform_flac"].dtype) != np.uint8:
        raise UserError(f"{file.filename}: waveform_flac is no column of FLAC files in bytes: prepare it again.")


class Waveforms:
    """The sound of an open store: int16 rows as they are, or a FLAC file in each row (prepare/compress.py)."""

    def __init__(self, file: h5py.File) -> None:
        self.rows: Optional[h5py.Dataset] = file.get("waveform")
        self.flac: Optional[h5py.Dataset] = file.get("waveform_flac")
        if self.rows is None and self.flac is None:
            raise UserError(f"{file.filename} has neither waveform nor waveform_flac: it is no clip store.")
        self.path = Path(file.filename)
        self.rate = read_rate(file) or PANNS_SAMPLE_RATE
        self.real_len = read_column(file, "real_len") if "real_len" in file else None
        if self.rows is not None:  # HDF5 takes a chunk at once
            check_memory(
                f"{file.filename}: a row of waveform", 2 * max(self.width, int(np.prod(self.rows.chunks or 1)))
            )

    @property
    def width(self) -> int:
        """Samples that a row has room for; 0 where sounds are compressed, which have each their own length."""
        return 0 if self.rows is None else int(self.rows.shape[1])

    def __len__(self) -> int:
        rows: Any = self.flac if self.rows is None else self.rows
        return len(rows)

    def read_into(self, row: int, waveform: np.ndarray) -> int:
        """Fill the beginning of (samples,) int16 with a clip, as much as fits; returns how many samples those are.

        Raises UserError where the row cannot be read.
        """
        if self.rows is None:
            sound = self.read(row)[: len(waveform)]
            waveform[: len(sound)] = sound
            return len(sound)
        length = int(self.real_len[row]) if self.real_len is not None else self.rows.shape[1]
        length = min(length, len(waveform))
        # What rows.read_direct does, at half its cost: it takes longer to describe a row than to read one.
        selected = self.rows.id.get_space()
        with reading(self.path):
            selected.select_hyperslab((row, 0), (1, length))
            self.rows.id.read(h5py.h5s.create_simple((length,)), selected, waveform[:length])
        return length

    def read(self, row: int) -> np.ndarray:
        """(samples,) int16 of a clip, whole. Raises UserError where it cannot be read."""
        with reading(self.path):
            if self.rows is not None:
                return self.rows[row, : None if self.real_len is None else int(self.real_len[row])]
            return self._decode(row)

    def _decode(self, row: int) -> np.ndarray:
        """(samples,) int16 of a row of FLAC, which must be as long as the store says before it takes memory."""
        assert self.flac is not None
        try:
            with soundfile.SoundFile(io.BytesIO(self.flac[row].tobytes())) as sound:
                length = sound.frames if self.real_len is None else int(self.real_len[row])
                if (sound.channels, sound.frames, sound.samplerate) != (1, length, self.rate):
                    raise UserError(
                        f"Row {row} holds {sound.channels} channels of {sound.frames} samples at {sound.samplerate} "
                        f"Hz, where the store says 1 of {length} at {self.rate} Hz: prepare it again."
                    )
                check_memory(f"{self.flac.file.filename}: row {row} of waveform_flac", 2 * length)
                samples = sound.read(dtype="int16")
        except soundfile.LibsndfileError as error:
            raise UserError(f"Row {row} is damaged: {error.error_string}") from None
        if len(samples) != length:
            raise UserError(f"Row {row} is damaged: {len(samples)} of its {length} samples can be decoded.")
        return samples


def read_store_table(path: Path) -> ClipTable:
    """The table of one store: all its clips, in the order of the file.

    Raises UserError where the file is missing or damaged, or holds what no store may (check_store).
    """
    with open_store(path, "audio_name", "target") as file, reading(path):
        waveforms = Waveforms(file)  # a file of anything else is refused
        names = _names(file)
        count = len(names)
        attributes = {key: str(file.attrs[key]) for key in ("dataset_type", "source", "licence") if key in file.attrs}
        table = ClipTable(
            paths=[path],
            names=names,
            targets=_targets(file),
            path_number=np.zeros(count, dtype=np.int64),
            row=np.arange(count),
            fold=read_column(file, "fold") if "fold" in file else np.zeros(count, dtype=np.int8),
            split=read_column(file, "split").astype("S10") if "split" in file else np.zeros(count, dtype="S10"),
            labels=texts(file.attrs.get("labels", [])),
            sample_rate=read_rate(file),
            task=file.attrs.get("task"),
            attributes=attributes,
            labelling=_read_labelling(file, count),
        )
        fault = next(_faults(table, waveforms, file), None)
        if fault:
            raise UserError(f"{path} is no valid clip store: {fault}. Prepare it again.")
        return replace(table, events=[_read_event_table(file, count)])


def read_rate(file: h5py.File) -> Optional[int]:
    """Hz of a store; None where it does not say. Raises UserError for anything but a whole number of Hz."""
    rate = file.attrs.get("sample_rate")
    if rate is not None and not (np.ndim(rate) == 0 and np.isreal(rate) and rate in range(*RATES)):
        raise UserError(
            f"{file.filename}: sample_rate is {rate}, where a whole number of Hz is needed: prepare it again."
        )
    return None if rate is None else int(rate)


def _names(file: h5py.File) -> np.ndarray:
    """(N,) bytes. Raises UserError where one is no UTF-8."""
    names = read_column(file, "audio_name").astype("S")
    try:
        b"\n".join(names.tolist()).decode()
    except UnicodeDecodeError:
        raise UserError(f"{file.filename}: a name in audio_name is no text in UTF-8.") from None
    return names


def _targets(file: h5py.File) -> np.ndarray:
    """(N, K) bool. Raises UserError for other numbers than 0 and 1."""
    targets = read_column(file, "target")
    if targets.dtype != bool and not np.isin(targets, (0, 1)).all():
        raise UserError(f"{file.filename}: target holds other numbers than 0 and 1.")
    return targets.astype(bool)


def _faults(table: ClipTable, waveforms: Waveforms, file: h5py.File) -> Iterator[str]:
    """What is wrong in the values of a store, most important first; each relies on those before."""
    rows, classes = table.targets.shape
    if len(waveforms) != rows:
        yield f"its sound has {len(waveforms)} rows, and there are {rows} clips"
    if table.labels and len(table.labels) != classes:
        yield f"labels names {len(table.labels)} classes, and target has {classes}"
    if len(set(table.labels)) != len(table.labels) or not all(map(str.strip, table.labels)):
        yield f"labels has an empty name, or one twice: {table.labels[:5]}"
    if table.task not in (None, *get_args(Task)):
        yield f"task is {table.task!r}, where {' or '.join(get_args(Task))} is needed"
    lengths = np.zeros(0) if waveforms.real_len is None else waveforms.real_len
    for row in np.flatnonzero((lengths < 0) | (lengths > (waveforms.width or np.inf)))[:1]:
        yield f"real_len of row {row} is {lengths[row]}, and rows have room for {waveforms.width} samples"
    known = table.labelling if table.labelling is not None else np.zeros(0)
    if not np.isin(known, (UNLABELLED, WEAK, STRONG)).all():
        yield f"labelling must be {UNLABELLED}, {WEAK} or {STRONG}, and is up to {known.max()}"
    if (table.fold < 0).any():
        yield f"fold must be 0 or more, and is {table.fold.min()}"
    strange = set(np.unique(table.split).tolist()) - {b"", *(split.encode() for split in SPLITS)}
    if strange:
        yield f"split must be {', '.join(SPLITS)}, and is {min(strange).decode(errors='replace')!r}"
    if "event_clip" in file:
        yield from _event_faults(table, *(read_column(file, name) for name in EVENT_COLUMNS))


def _event_faults(
    table: ClipTable, clip: np.ndarray, label: np.ndarray, onset: np.ndarray, offset: np.ndarray
) -> Iterator[str]:
    """What is wrong in the events: (E,) row of the clip, class, onset and offset in seconds."""

    def first(what: str, wrong: np.ndarray) -> Iterator[str]:
        for event in np.flatnonzero(wrong)[:1]:
            yield (
                f"{wrong.sum()} of {len(clip)} events {what}, as the one of clip {clip[event]}, class {label[event]}, "
                f"from {onset[event]:g} to {offset[event]:g} s"
            )

    rows, classes = table.targets.shape
    yield from first("belong to a clip that is not there", (clip < 0) | (clip >= rows))
    yield from first("have a class that is not there", (label < 0) | (label >= classes))
    times = np.isfinite(onset) & np.isfinite(offset) & (onset >= 0) & (onset <= offset)
    yield from first("are not in order, 0 <= onset <= offset", ~times)


def _read_labelling(file: h5py.File, count: int) -> np.ndarray:
    """(N,) annotation of each clip; without the column STRONG in a store with events, WEAK in one without."""
    if "labelling" in file:
        return read_column(file, "labelling")
    return np.full(count, STRONG if len(file.get("event_clip", ())) else WEAK, dtype=np.int8)


def _read_event_table(file: h5py.File, count: int) -> EventTable:
    clip, label, onset, offset = (read_column(file, name) if name in file else np.zeros(0) for name in EVENT_COLUMNS)
    order = np.argsort(clip, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(clip.astype(np.int64), minlength=count))])
    return EventTable(starts, label[order].astype(np.int64), onset[order], offset[order])


def read_index_table(path: Path, root: Path) -> ClipTable:
    """The table of an AudioSet index: audio_name, target, hdf5_path and index_in_hdf5, as PANNs' scripts write it.

    Paths in the index are taken from `root` where they are relative or no longer exist.
    """
    with open_store(path, "audio_name", "target", "hdf5_path", "index_in_hdf5") as file, reading(path):
        unique, path_number = _numbered(read_column(file, "hdf5_path").astype("S"))
        names, targets, row = _names(file), _targets(file), read_column(file, "index_in_hdf5")
        sample_rate, task = read_rate(file), file.attrs.get("task")
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
