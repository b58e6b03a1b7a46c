"""HDF5 files that others may have made: damaged or crafted ones are refused by name, before they take memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.files import check_memory
from settings import UserError

# What h5py and NumPy raise on damaged content.
DAMAGED = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError, ArithmeticError)
MOST_OBJECTS = 100  # in the root of a file: those of this project have 12 at most

Columns = Mapping[str, tuple[str, int]]  # name: kinds of NumPy's dtypes that are allowed, number of dimensions


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what h5py raises on damaged content into a UserError. In the block a file is read, and nothing else done."""
    try:
        yield
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"{path} cannot be read as HDF5; it may be cut off or damaged: make it again. ({error})"
        ) from None


def open_hdf5(path: Path) -> h5py.File:
    """Open a file for reading, without a cache of chunks: rows are read once, at random.

    Raises UserError where it is no HDF5, and where something in its root is a link, or a data set whose values lie in
    other files (external, virtual): content of a file never names other files to read.
    """
    with reading(path):
        file = h5py.File(path, "r", rdcc_nbytes=0)
        try:
            if len(file) > MOST_OBJECTS:
                raise UserError(f"{path} has {len(file)} objects in its root: it is no file of this project.")
            for name in file:
                if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                    raise UserError(f"{path}: {name} is a link, which is not followed. Make the file again.")
                found = file[name]
                if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
                    raise UserError(f"{path}: {name} lies in other files, which are not read. Make the file again.")
        except BaseException:
            file.close()
            raise
    return file


def check_columns(file: h5py.File, columns: Columns, *, rows: Mapping[str, int]) -> None:
    """Raise UserError where a column that is there is no data set of its kind and dimensions, or has other rows.

    rows: the number of rows of each column, as far as it is known.
    """
    for name, (kinds, dimensions) in columns.items():
        if name not in file:
            continue
        found = file[name]
        if not isinstance(found, h5py.Dataset) or found.dtype.kind not in kinds or len(found.shape) != dimensions:
            what = f"{found.dtype} {found.shape}" if isinstance(found, h5py.Dataset) else "no data set"
            raise UserError(
                f"{file.filename}: {name} is {what}, where {KINDS[kinds]} of {dimensions} dimensions are needed."
            )
        if found.shape[0] != rows.get(name, found.shape[0]):
            raise UserError(f"{file.filename}: {name} has {found.shape[0]} rows; there must be {rows[name]}.")


KINDS = {"SO": "texts", "biuf": "numbers", "iu": "whole numbers", "f": "float numbers", "i": "int16 samples",
         "O": "files in bytes"}  # fmt: skip


def read_column(file: h5py.File, name: str) -> np.ndarray:
    """A whole column. Raises UserError where it would take too much memory, or was never written in full."""
    column = file[name]
    check_memory(f"{file.filename}: {name}", column.size * column.dtype.itemsize)
    check_written(file, name)
    return column[:]


def check_written(file: h5py.File, name: str) -> None:
    """Raise UserError where a data set declares more values than the file holds: HDF5 would read zeros for them."""
    column = file[name]
    held, declared = column.id.get_storage_size(), column.size * column.dtype.itemsize
    compressed = column.id.get_create_plist().get_nfilters() > 0
    if declared and held < (1 if compressed else declared):
        raise UserError(
            f"{file.filename}: {name} declares {declared:,} bytes and the file holds {held:,}: it is not complete. "
            f"Make it again."
        )


def texts(values: Any) -> list[str]:
    """The texts of an attribute. Raises UserError where it holds anything else."""
    found = [value.decode() if isinstance(value, bytes) else value for value in np.atleast_1d(values).tolist()]
    if not all(isinstance(value, str) for value in found):
        raise UserError(f"{found} are no texts.")
    return found
