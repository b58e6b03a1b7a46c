"""Sounds that lie in rows of a table, as encoded files: HDF5 files of mp3, and data sets of Hugging Face on the disk.

A sound is named in one text, SOURCE: <file or folder>::<row>::<name of the clip, without ending>.
"""

import io
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Optional

import h5py
import numpy as np

from data.hdf5 import Columns, check_columns, open_hdf5, read_column, reading
from settings import UserError

SOURCE = re.compile(r"(?P<table>.+)::(?P<row>\d+)::(?P<stem>[^/]*)", re.DOTALL)
HDF5_ENDINGS = (".hdf", ".h5", ".hdf5")
MP3_COLUMNS: Columns = {"audio_name": ("SO", 1), "mp3": ("O", 1)}  # as PANNs' and PaSST's scripts pack them
STATE = "state.json"  # in the folder of a data set that `datasets` has saved
NAME_COLUMNS = ("filename", "file_name", "audio_name", "video_id", "ytid")  # where the audio itself has no path
INSTALL = "pip install datasets"
OPEN_TABLES = 4


def index_rows(raw: Path) -> Iterator[tuple[str, str]]:
    """(stem, source) of each sound in the tables that `raw` is, or that lie directly in it; none for other folders."""
    for table in _tables(raw):
        names = _names_of_datasets(table) if table.is_dir() else _names_of_hdf5(table)
        for row, name in enumerate(names):
            stem = PurePosixPath(name).stem if "." in name else PurePosixPath(name).name
            yield stem, f"{table}::{row}::{stem}"


def open_source(source: str) -> Path | BinaryIO:
    """The audio of a clip: the path of its file, or what a row of a table holds. Raises UserError for a damaged row."""
    match = SOURCE.fullmatch(source)
    if match is None:
        return Path(source)
    table, row = Path(match["table"]), int(match["row"])
    if table.is_dir():
        found = (_open_dataset(str(table))[row]["audio"] or {}).get("bytes")
        if not found:  # a path, which content of a file may not choose
            raise UserError(f"{source}: the row holds no sound, or its path alone: save the data set with it.")
        return io.BytesIO(found)
    with reading(table):
        return io.BytesIO(np.asarray(_open_mp3(str(table))["mp3"][row], dtype=np.uint8).tobytes())


def read_events(folder: Path) -> Iterator[tuple[str, list[tuple[str, float, float]]]]:
    """(stem, events: label, onset and offset in seconds) of each row of a data set of Hugging Face.

    Its column `events` has a list for each sound, of entries with onset, offset and event_label. Raises UserError, with
    the name, for other columns and values.
    """
    found = _open_dataset(str(folder))
    if "events" not in found.column_names:
        raise UserError(f"{folder} has the columns {', '.join(found.column_names)}, and no events.")
    for (stem, _), events in zip(index_rows(folder), found["events"], strict=True):
        if isinstance(events, dict):  # as older versions keep a list of entries
            events = [dict(zip(events, values, strict=True)) for values in zip(*events.values(), strict=True)]
        try:
            yield stem, [(str(e["event_label"]), float(e["onset"]), float(e["offset"])) for e in events or []]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder}, {stem}: {events!r:.200}: onset, offset and event_label are needed.") from None


def source_stem(source: str) -> str:
    """The name of a clip's audio without folder and ending."""
    match = SOURCE.fullmatch(source)
    return match["stem"] if match else Path(source).stem


def source_file(source: str) -> Path:
    """The file or folder that holds a clip's audio."""
    match = SOURCE.fullmatch(source)
    return Path(match["table"] if match else source)


def _tables(raw: Path) -> list[Path]:
    """The HDF5 files of mp3 and the folders of data sets that `raw` is or holds, in the order of their names."""
    if raw.is_file():
        return [raw] if raw.suffix.lower() in HDF5_ENDINGS else []
    if (raw / STATE).is_file():
        return [raw]
    files = [path for path in raw.glob("*") if path.suffix.lower() in HDF5_ENDINGS and path.is_file()]
    return sorted([*files, *(path.parent for path in raw.glob(f"*/{STATE}"))])


def _names_of_hdf5(path: Path) -> list[str]:
    """Raises UserError, with what it has, for a file without audio_name and mp3."""
    with _checked_hdf5(path) as file, reading(path):
        return [name.decode() if isinstance(name, bytes) else str(name) for name in read_column(file, "audio_name")]


@lru_cache(maxsize=OPEN_TABLES)
def _open_mp3(path: str) -> h5py.File:
    return _checked_hdf5(Path(path))


def _checked_hdf5(path: Path) -> h5py.File:
    file = open_hdf5(path)
    with reading(path):
        lacking = [name for name in MP3_COLUMNS if name not in file]
        if lacking:
            raise UserError(f"{path} lacks {', '.join(lacking)}; it has {', '.join(file)}: it holds no packed mp3.")
        check_columns(file, MP3_COLUMNS, rows=dict.fromkeys(MP3_COLUMNS, len(file["audio_name"])))
        if h5py.check_vlen_dtype(file["mp3"].dtype) != np.uint8:
            raise UserError(f"{path}: mp3 is {file['mp3'].dtype}, where files in bytes (uint8) are needed.")
    return file


@lru_cache(maxsize=OPEN_TABLES)
def _open_dataset(folder: str) -> Any:
    """A data set whose column audio is left encoded. Raises UserError without `datasets`, and for other columns."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{folder} is a data set of Hugging Face, which needs its library: {INSTALL}.") from None
    try:
        found = datasets.load_from_disk(folder)
        if "audio" not in found.column_names:
            raise UserError(f"{folder} has the columns {', '.join(found.column_names)}, and no audio.")
        return found.cast_column("audio", datasets.Audio(decode=False))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} cannot be read as a data set of Hugging Face: {error}") from None


def _names_of_datasets(folder: Path) -> list[str]:
    """The paths of the sounds, or, where they have none, a column of names. Raises UserError where neither is there."""
    found = _open_dataset(str(folder))
    chunks = found.data.column("audio").chunks  # without the sounds themselves
    paths: list[Optional[str]] = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
    if all(paths):
        return [str(path) for path in paths]
    column = next((name for name in NAME_COLUMNS if name in found.column_names), None)
    if column is None:
        raise UserError(f"{folder}: audio without path needs a column of names: {', '.join(NAME_COLUMNS)}.")
    return [str(name) for name in found[column]]
