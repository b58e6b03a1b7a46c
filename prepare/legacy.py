"""Legacy files: the pickled .npy files of the published code -> clip store, without running code in a pickle.

A pickle is a program: it names functions and calls them. Here the few names that NumPy's arrays need are replaced by
small classes that only keep numbers, and every other name is refused. NumPy's own functions are not called either: a
pickled dtype with forged flags would make NumPy use any bytes as addresses of objects.
Source: https://docs.python.org/3/library/pickle.html#restricting-globals and numpy.lib.format.
"""

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Optional

import numpy as np

from data.clip_store import LARGEST_FOLD, SPLITS, Clip, ClipStoreWriter, Task
from prepare.report import PrepareReport
from settings import UserError
from utils import float32_to_int16

NAME_KEYS = ("name", "audio_name", "filename")
NUMBER_KINDS = "biuf"  # numpy's kinds of truth values, whole numbers and fractions
LARGEST_PEAK = 4.0  # resampling may overshoot 1 a little; a float waveform above this is not one in [-1, 1]


@dataclass(frozen=True)
class LegacyClip:
    """One clip of a file: waveform (samples,) of any numbers; target () class number, (K,) 0 or 1, or None."""

    name: str
    waveform: np.ndarray
    target: Optional[np.ndarray]


def import_legacy(
    paths: Sequence[Path],
    store: Path,
    *,
    sample_rate: int,
    labels: Sequence[str],
    dataset_type: str,
    splits: Optional[Sequence[str]] = None,
) -> PrepareReport:
    """Write the store of legacy files.

    A single file of several folds gives folds numbered from 1, as in esc50.csv (the published code counts from 0).
    Other files each need a name in `splits`: train, validation or test. sample_rate in Hz: the files have no record of
    it, so it must be the one they were made with. A clip without a target (DESED's) has no class in the store.
    Empty clips, and those with NaN or with float samples far outside [-1, 1], are skipped and reported. The files are
    held in memory whole. Raises UserError for a file that cannot be read, a class outside of `labels`, and splits
    that do not fit the files.
    """
    files = [read_legacy(path) for path in paths]
    places = _places(paths, files, splits)
    clips = [clip for groups in files for group in groups for clip in group]
    classes = [class_numbers(clip, len(labels)) for clip in clips]
    task: Task = "single_label" if all(len(found) == 1 for found in classes) else "multilabel"
    report = PrepareReport(store)
    with ClipStoreWriter(
        store, clip_samples=max([1, *(len(clip.waveform) for clip in clips)]), sample_rate=sample_rate, labels=labels,
        dataset_type=dataset_type, task=task, source=f"legacy files {', '.join(path.name for path in paths)}",
        licence="that of the data set",
    ) as writer:  # fmt: skip
        for clip, found, (fold, split) in zip(clips, classes, places, strict=True):
            try:
                writer.add(Clip(clip.name, to_int16(clip.waveform), found, fold=fold, split=split))
            except UserError as error:
                report.skipped.append((clip.name, str(error)))
                continue
            report.clips += 1
        if report.clips == 0:
            raise UserError(f"None of the {len(clips)} clips could be taken over.\n{report}")
    return report


def _places(
    paths: Sequence[Path], files: list[list[list[LegacyClip]]], splits: Optional[Sequence[str]]
) -> list[tuple[int, str]]:
    """(fold, split) of each clip of all files."""
    for path, folds in zip(paths, files, strict=True):
        if len(folds) > 1 and (splits is not None or len(paths) > 1):
            raise UserError(f"{path} holds {len(folds)} folds: import it alone, and without names of splits.")
    if splits is None and len(files) == 1 and len(files[0]) > 1:
        if len(files[0]) > LARGEST_FOLD:
            raise UserError(f"{paths[0]} holds {len(files[0])} folds; at most {LARGEST_FOLD} can be stored.")
        return [(number, "") for number, fold in enumerate(files[0], start=1) for _ in fold]
    given = list(splits or [])
    if len(given) != len(files) or any(split not in SPLITS for split in given):
        raise UserError(
            f"{len(files)} files hold no folds and need {len(files)} splits, each one of {', '.join(SPLITS)}; "
            f"{', '.join(given) or 'none'} given: say --legacy_splits, in the order of the files."
        )
    return [(0, split) for split, (clips,) in zip(given, files, strict=True) for _ in clips]


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """(samples,) numbers -> int16: fractions in [-1, 1] are scaled by 32767, whole numbers stay.

    Raises UserError for NaN, truth values, and samples outside of these ranges.
    """
    if waveform.dtype.kind == "f":
        if not np.isfinite(waveform).all():
            raise UserError("The waveform holds NaN or infinite samples.")
        peak = np.abs(waveform).max(initial=0)
        if peak > LARGEST_PEAK:
            raise UserError(f"The waveform has samples up to {peak:.4g}, float samples must lie in [-1, 1].")
        return float32_to_int16(waveform)
    limits = np.iinfo(np.int16)
    if waveform.dtype.kind == "b" or waveform.min(initial=0) < limits.min or waveform.max(initial=0) > limits.max:
        raise UserError(f"The waveform's samples ({waveform.dtype}) are neither fractions nor 16-bit numbers.")
    return waveform.astype(np.int16)


def class_numbers(clip: LegacyClip, classes: int) -> list[int]:
    """The classes of a clip, from its class number or its vector of 0 and 1. Raises UserError for any other target."""
    target = clip.target
    if target is None:
        return []
    if target.ndim == 0 and target.dtype.kind != "b":
        number = float(target)
        if number not in range(classes):
            raise UserError(f"{clip.name} has class {number:g}; the classes are 0 to {classes - 1}.")
        return [int(number)]
    if target.shape != (classes,) or not np.isin(target, (0, 1)).all():
        raise UserError(
            f"{clip.name} has a target of shape {target.shape} and type {target.dtype}; it must be a class number, or "
            f"{classes} values of 0 and 1, one for each class."
        )
    return np.flatnonzero(target).tolist()


def read_legacy(path: Path) -> list[list[LegacyClip]]:
    """The clips of a legacy file: one list for each of its folds, or a single list.

    The file holds a list of dicts, or a list of such lists (folds). A dict has a name (`name`, `audio_name` or
    `filename`), a `waveform` and, except in DESED, a `target`; other entries are ignored. Raises UserError where the
    file is missing, cut off, no .npy of objects or no such list, and where its pickle names other objects.
    """
    rows = _rows(_load(path))
    folds = [rows] if any(isinstance(row, dict) for row in rows) else [_rows(row) for row in rows]
    if not rows or not all(isinstance(entry, dict) for fold in folds for entry in fold):
        raise UserError(f"{path} holds no list of clips (dicts), and no list of such lists: it is no legacy file.")
    return [[_clip(entry, path) for entry in fold] for fold in folds]


def _load(path: Path) -> Any:
    """The content of the .npy file, with stand-ins for arrays and NumPy's scalars."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    with path.open("rb") as file:
        _read_header(file, path)
        try:
            return _Unpickler(file).load()
        except _RefusedError as error:
            raise UserError(f"{path} is refused and was not run: {error}.") from None
        except Exception as error:  # a damaged pickle may raise anything
            raise UserError(f"{path} cannot be read, it may be cut off or damaged: {error}") from None


def _read_header(file: BinaryIO, path: Path) -> None:
    """Read up to the beginning of the pickle. Raises UserError where there is none."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        dtype = read(file)[2]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no .npy file, or is cut off: {error}") from None
    if dtype != np.dtype(object):
        raise UserError(f"{path} is an array of {dtype}; a legacy file holds dicts, with name, waveform and target.")


def _rows(value: Any) -> list[Any]:
    """The entries of a list or an array of objects, an array's rows as lists; anything else is its own only entry."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, _Array) or value.objects is None or len(value.shape) not in (1, 2):
        return [value]
    if len(value.shape) == 1:
        return value.objects
    rows, columns = value.shape
    return [value.objects[row * columns : (row + 1) * columns] for row in range(rows)]


def _clip(entry: dict[Any, Any], path: Path) -> LegacyClip:
    key = next((key for key in NAME_KEYS if key in entry), None)
    if key is None or "waveform" not in entry:
        raise UserError(
            f"{path} holds an entry with {', '.join(map(str, entry)) or 'nothing'}; a clip needs waveform and one of "
            f"{', '.join(NAME_KEYS)}."
        )
    name = _plain(entry[key])
    if not isinstance(name, str):
        raise UserError(f"{path}: the name of a clip must be text; {type(name).__name__} was found.")
    target = _numbers(entry["target"], f"{path}: target of {name}") if "target" in entry else None
    waveform = _numbers(entry["waveform"], f"{path}: waveform of {name}")
    if waveform.size != max(waveform.shape, default=0):
        raise UserError(f"{path}: the waveform of {name} has the shape {waveform.shape}; it must be one channel.")
    return LegacyClip(name, waveform.ravel(), target)


def _numbers(value: Any, place: str) -> np.ndarray:
    """An array of numbers from an array, a list or a number."""
    items = value.objects if isinstance(value, _Array) and value.objects is not None else value
    plain = [_plain(item) for item in items] if isinstance(items, (list, tuple)) else _plain(items)
    try:
        numbers = np.asarray(plain)
    except ValueError:  # lists of unequal lengths
        numbers = np.asarray(None)
    if numbers.dtype.kind not in NUMBER_KINDS:
        raise UserError(f"{place} must be numbers; {type(plain).__name__} of {numbers.dtype} was found.")
    return numbers


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, (_Scalar, _Array)) else value


class _RefusedError(Exception):
    """The pickle names something that is not admitted."""


class _StandIn:
    """Base of the objects that a pickle may name. A state is refused: by default pickle would set any attribute.

    A pickle can also make an object without calling __init__: the attributes have their empty values in the class.
    """

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"it changes a {type(self).__name__.strip('_').lower()}")


class _Ndarray(_StandIn):
    """numpy.ndarray, which a pickle names as an argument and never calls."""

    def __init__(self, *_: Any) -> None:
        raise _RefusedError("it calls numpy.ndarray")


class _Bytes(_StandIn):
    """_codecs.encode, by which pickles of protocol 2 write bytes."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding != "latin1":
            raise _RefusedError(f"it encodes text as {encoding}")
        return text.encode("latin1")


class _Dtype(_StandIn):
    """numpy.dtype of numbers, text or bytes, or of objects (plain is None)."""

    plain: Optional[np.dtype] = None

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in ("O", "O4", "O8"):
            self.plain = np.dtype(str(code))
        if self.plain is not None and self.plain.kind not in NUMBER_KINDS + "US":
            raise _RefusedError(f"it holds an array of {code}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *_ = state  # for the admitted dtypes the rest follows from the code
        if self.plain is not None:
            self.plain = self.plain.newbyteorder(order)

    def array(self, shape: tuple[int, ...], data: bytes, *, fortran: bool) -> np.ndarray:
        """The numbers in `data`. Raises TypeError where they are too few."""
        if self.plain is None:
            raise _RefusedError("it takes bytes for objects")
        return np.ndarray(shape, self.plain, data, order="F" if fortran else "C")


class _Scalar(_StandIn):
    """numpy's scalar: a number or a text."""

    value: Any = None

    def __init__(self, dtype: _Dtype, data: bytes) -> None:
        self.value = dtype.array((), data, fortran=False).item()


class _Array(_StandIn):
    """numpy's _reconstruct, which makes an empty array; its state then brings the content.

    Of numbers: value. Of objects: objects, shape.
    """

    value: Optional[np.ndarray] = None
    objects: Optional[list[Any]] = None
    shape: tuple[int, ...] = ()

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if kind is not _Ndarray:
            raise _RefusedError(f"it makes an array of the kind {kind}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, fortran, content = state
        if dtype.plain is not None:
            self.value = dtype.array(self.shape, content, fortran=bool(fortran))
        elif isinstance(content, list) and len(content) == math.prod(self.shape):
            self.objects = content
        else:
            raise _RefusedError("it holds an array of objects without the objects")


_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
ADMITTED: dict[tuple[str, str], Any] = {
    **{(module, "_reconstruct"): _Array for module in _NUMPY_CORE},
    **{(module, "scalar"): _Scalar for module in _NUMPY_CORE},
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    """Reads a pickle in which only the names in ADMITTED may occur."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise _RefusedError(
                f"it names {module}.{name}; only arrays, numbers, text, lists, tuples, sets and dicts are admitted"
            )
        return ADMITTED[module, name]

    def persistent_load(self, identifier: Any) -> NoReturn:
        raise _RefusedError("it refers to something outside of the file")
