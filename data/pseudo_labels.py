"""The file of a teacher's frame logits: what `teach` writes and training with teacher_path reads.

Datasets: filenames (N,) text, strong_logits (N, K, T) float16, logits of K classes in T equal steps that cover a clip.
Attributes: labels (K names), step_seconds, clip_seconds, and source (names and SHA-256 of the checkpoints). The
ensemble logits that Schmid et al. publish for AudioSet Strong (Effective Pre-Training of Audio Transformers for Sound
Event Detection, ICASSP 2025, arXiv 2409.09546) have the two datasets alone, 447 classes by 250 steps of 40 ms.
Their classes are in the alphabetical order of AudioSet Strong's names (PretrainedSED, data_util/audioset_classes.py).
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

import h5py
import numpy as np

from data.files import AUDIO_SUFFIXES, check_memory, whole_hdf5
from data.hdf5 import check_written, open_hdf5, reading, texts
from settings import UserError

PUBLISHED_CLASSES = 447  # of the published logits, and the first and last of them
PUBLISHED_ENDS = ("Accelerating, revving, vroom", "Zipper (clothing)")
PUBLISHED_SECONDS = 10.0  # length of a clip where a file does not say it
NAME_BLOCK = 65536  # names that are read at once
ENDINGS = tuple(suffix.encode() for suffix in AUDIO_SUFFIXES)
LARGEST = float(np.finfo(np.float16).max)


class TeacherWriter:
    """Writes such a file clip by clip under a temporary name; it takes its own when the `with` block ends well.

    A file that has this name already is replaced then.
    """

    def __init__(self, path: Path, *, labels: Sequence[str], steps: int, clip_seconds: float, source: str) -> None:
        self.path = path
        self.shape = (len(labels), steps)
        self.clips = 0
        self.attributes: dict[str, Any] = {
            "labels": list(labels),
            "step_seconds": clip_seconds / steps,
            "clip_seconds": clip_seconds,
            "source": source,
        }

    def __enter__(self) -> "TeacherWriter":
        with ExitStack() as stack:
            self.file, self.check = stack.enter_context(whole_hdf5(self.path))
            self.file.attrs.update(self.attributes)
            text = h5py.string_dtype()
            self.names = self.file.create_dataset("filenames", (0,), text, maxshape=(None,), chunks=(1024,))
            self.logits = self.file.create_dataset(
                "strong_logits", (0, *self.shape), "float16", maxshape=(None, *self.shape), chunks=(1, *self.shape)
            )
            self.stack = stack.pop_all()
        return self

    def add(self, names: Sequence[str], logits: np.ndarray) -> None:
        """Append clips: n names and their (n, K, T) logits, cut to the range of float16. Raises UserError for NaN."""
        assert logits.shape == (len(names), *self.shape), f"{logits.shape} is not {(len(names), *self.shape)}"
        broken = np.isnan(logits).any(axis=(1, 2))
        if broken.any():
            raise UserError(
                f"The logits of {names[int(broken.argmax())]} are no numbers: use precision 32, or an earlier "
                f"checkpoint of this training."
            )
        start, self.clips = self.clips, self.clips + len(names)
        self.names.resize(self.clips, axis=0)
        self.logits.resize(self.clips, axis=0)
        self.names[start:] = np.array(names, dtype=object)
        self.logits[start:] = logits.clip(-LARGEST, LARGEST).astype(np.float16)
        self.check()

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.stack.__exit__(kind, error, trace)


class TeacherLogits:
    """A teacher's frame logits, for the classes of a network in their order.

    labels: the K classes of the network. The file may know more classes, or have them in another order: they are found
    by name. A file without names must have K of them. classes, steps: K and T of what `read` gives; step_seconds: the
    length of a step. Each process opens the file for itself when it first reads. Raises UserError where the file is
    missing or cut off, where it is another file, and where its classes are others than the network's.
    """

    def __init__(self, path: str | Path, labels: Sequence[str]) -> None:
        self.path, self.classes = Path(path), len(labels)
        self._file: Optional[h5py.File] = None
        self._process = os.getpid()
        with self._opened() as file, reading(self.path):
            self._check(file)
            self.clips, count, self.steps = file["strong_logits"].shape
            known = texts(file.attrs["labels"]) if "labels" in file.attrs else None
            seconds = float(file.attrs.get("clip_seconds", PUBLISHED_SECONDS))
            self.step_seconds = float(file.attrs.get("step_seconds", seconds / self.steps))
            check_memory(f"{file.filename}: a clip of strong_logits", 2 * count * self.steps)
            check_written(file, "strong_logits")
        self._columns = self._place_classes(list(labels), known, count)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _opened(self) -> h5py.File:
        if not self.path.is_file():
            raise UserError(
                f"There is no file {self.path}: teacher_path names a teacher's frame logits, which `python main.py "
                f"teach` writes."
            )
        return open_hdf5(self.path)

    def _check(self, file: h5py.File) -> None:
        """Raise UserError where a file has not the layout of a teacher's logits."""
        lacking = [name for name in ("filenames", "strong_logits") if name not in file]
        if lacking:
            raise UserError(
                f"{self.path} lacks {', '.join(lacking)}; it has {', '.join(file) or 'nothing'}. It is no file of a "
                f"teacher's frame logits, as `python main.py teach` writes it."
            )
        names, logits = file["filenames"], file["strong_logits"]
        if logits.dtype != np.float16 or logits.ndim != 3 or names.shape != logits.shape[:1] or 0 in logits.shape:
            raise UserError(
                f"{self.path}: strong_logits is {logits.dtype} {logits.shape} with {names.shape} filenames, where "
                f"float16 (clips, classes, steps), none of them 0, and a name for each clip are needed."
            )

    def _place_classes(self, labels: list[str], known: Optional[list[str]], count: int) -> Optional[np.ndarray]:
        """(K,) where the network's classes stand among the file's `count`; None: as they come. Raises UserError."""
        if known is None:
            return self._guess_places(labels, count)
        if len(known) != count:
            raise UserError(f"{self.path} is damaged: it has {len(known)} labels for {count} classes.")
        if known == labels:
            return None
        number = {label: k for k, label in enumerate(known)}
        lacking = [label for label in labels if label not in number]
        if lacking:
            raise UserError(
                f"{self.path} lacks {len(lacking)} of the network's {len(labels)} classes ({', '.join(lacking[:5])}"
                f"{', ...' if len(lacking) > 5 else ''}); its {count} are {', '.join(known[:5])}, .... Let a teacher "
                f"with the network's classes write it."
            )
        return np.array([number[label] for label in labels])

    def _guess_places(self, labels: list[str], count: int) -> Optional[np.ndarray]:
        """As _place_classes, of a file that does not name its classes."""
        if count != len(labels):
            raise UserError(
                f"{self.path} has {count} classes, which it does not name, and the network {len(labels)}: they cannot "
                f"be matched. Give a file of a teacher with the network's classes."
            )
        published = count == PUBLISHED_CLASSES
        order = sorted(labels) if published else labels
        if published and (order[0], order[-1]) != PUBLISHED_ENDS:
            raise UserError(
                f"{self.path} does not name its {count} classes. They should be AudioSet Strong's, in alphabetical "
                f"order from {PUBLISHED_ENDS[0]} to {PUBLISHED_ENDS[1]}, but the network's are called from {order[0]} "
                f"to {order[-1]}: prepare the data with AudioSet's names of the classes."
            )
        warnings.warn(
            f"{self.path} does not name its {count} classes: they are taken for the network's, in "
            f"{'alphabetical order' if published else 'the order of the network'}, from {order[0]} to {order[-1]}.",
            stacklevel=4,
        )
        return None if order == labels else np.array([order.index(label) for label in labels])

    def rows(self, names: Sequence[str | bytes] | np.ndarray) -> np.ndarray:
        """(n,) int64: where the clips of these names stand in the file, -1 for those that it does not have.

        A clip is found by its name; else by the name without the audio file's ending, then where one side has no
        folder. Raises UserError where several clips could be meant.
        """
        wanted, place = np.unique(_as_bytes(names), return_inverse=True)
        given, row = np.unique(self._names(), return_index=True)
        found = np.full(len(wanted), -1, dtype=np.int64)
        for ours, theirs in ((_whole, _whole), (_stem, _stem), (_stem, _bare), (_bare, _stem)):
            left = np.flatnonzero(found < 0)
            if len(left):
                found[left] = self._pair(wanted[left], given, ours, theirs)
        return np.where(found < 0, -1, row[found])[place]

    def _pair(self, wanted: np.ndarray, given: np.ndarray, ours: "Key", theirs: "Key") -> np.ndarray:
        """(n,) which of `given` has the key of each of `wanted`, -1: none. Raises UserError where it is not one."""
        sought, keys = _keys(wanted, ours), _keys(given, theirs)
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        first, last = (np.searchsorted(ranked, sought, side=side) for side in ("left", "right"))
        several = np.flatnonzero(last - first > 1)
        if len(several):
            clip, candidates = several[0], given[order[first[several[0]] : last[several[0]]]]
            raise UserError(self._ambiguous(wanted[clip : clip + 1], candidates))
        found = np.where(last > first, order[np.minimum(first, len(order) - 1)], -1)
        taken, counts = np.unique(found[found >= 0], return_counts=True)
        if (counts > 1).any():
            entry = taken[counts.argmax()]
            raise UserError(self._ambiguous(wanted[found == entry], given[entry : entry + 1]))
        return found

    def _ambiguous(self, wanted: np.ndarray, given: np.ndarray) -> str:
        clips, entries = (" and ".join(name.decode() for name in names[:2].tolist()) for names in (wanted, given))
        return (
            f"{clips} of the data and {entries} of {self.path} could be the same clip, and it is not clear which: let "
            f"`python main.py teach` write the file for this data, with its names."
        )

    def check_covers(self, names: Sequence[str | bytes] | np.ndarray) -> float:
        """Share of the clips of these names that the file has. Raises UserError where it has none of them."""
        found = self.rows(names) >= 0
        if not found.any():
            known = ", ".join(name.decode() for name in self._names(limit=2).tolist())
            raise UserError(
                f"None of the {len(names)} clips, such as {_as_bytes(names[:1])[0].decode()}, is among the "
                f"{self.clips} names of {self.path}, such as {known}: let `python main.py teach` write a file for them."
            )
        return float(found.mean())

    def _names(self, limit: Optional[int] = None) -> np.ndarray:
        """(N,) bytes: the names in the file, or the first `limit` of them."""
        with self._opened() as file:
            count = self.clips if limit is None else min(limit, self.clips)
            starts = range(0, count, NAME_BLOCK)
            return np.concatenate([_as_bytes(file["filenames"][s : min(s + NAME_BLOCK, count)]) for s in starts])

    def read(self, row: int) -> np.ndarray:
        """(K, T) float16 logits of the clip in a row of the file. Raises UserError where it cannot be read."""
        if self._file is None or self._process != os.getpid():  # a forked worker: its parent's handle is not its own
            self._file, self._process = self._opened(), os.getpid()
        try:
            logits = self._file["strong_logits"][row]
        except OSError as error:
            raise UserError(f"{self.path}: row {row} is damaged. ({error})") from None
        if not np.isfinite(logits).all():
            raise UserError(f"{self.path}: row {row} holds NaN or infinite logits: let the teacher write it again.")
        return logits if self._columns is None else logits[self._columns]


Key = Callable[[bytes], bytes]


def _whole(name: bytes) -> bytes:
    return name


def _stem(name: bytes) -> bytes:
    """A name without the ending of an audio file; other dots belong to the name."""
    return name.rpartition(b".")[0] if name.lower().endswith(ENDINGS) else name


def _bare(name: bytes) -> bytes:
    """A name without its ending and its folders."""
    return _stem(name).rpartition(b"/")[2]


def _keys(names: np.ndarray, key: Key) -> np.ndarray:
    return names if key is _whole else np.array([key(name) for name in names.tolist()], dtype="S")


def _as_bytes(names: Sequence[str | bytes] | np.ndarray) -> np.ndarray:
    """Names as an array of fixed-length bytes, which takes a tenth of the memory of as many objects."""
    if isinstance(names, np.ndarray) and names.dtype.kind == "S":
        return names
    return np.array([name.encode() if isinstance(name, str) else name for name in names], dtype="S")
