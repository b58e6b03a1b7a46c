"""Scores of recordings as a Parquet table, by pyarrow (an optional package).

Columns: file, duration (seconds), seconds_per_frame (0: no time axis), clipwise (K,), framewise (T, K), embedding (D,)
float32. The metadata of its schema have labels, the K classes as JSON.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.files import whole_file
from settings import UserError

RECORDINGS_AT_ONCE = 256  # in memory, and in a row group
INSTALL = "pip install pyarrow"


def check_parquet(said: str) -> None:
    """Raise UserError that begins with `said`, the flag with its value, where pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise UserError(f"{said} needs pyarrow: {INSTALL}.")


def write_parquet(path: Path, labels: Sequence[str], rows: Iterable[tuple[dict[str, Any], np.ndarray]]) -> None:
    """Write a table, whole or not at all.

    rows: a recording's name, duration, frames (T) and seconds_per_frame, and the float32 values of clipwise, framewise
    and embedding, one behind the other.
    """
    import pyarrow as pa
    from pyarrow import parquet

    number = pa.float32()
    schema = pa.schema(
        {
            "file": pa.string(), "duration": pa.float64(), "seconds_per_frame": pa.float64(),
            "clipwise": pa.list_(number), "framewise": pa.list_(pa.list_(number)), "embedding": pa.list_(number),
        },
        metadata={"labels": json.dumps(list(labels))},
    )  # fmt: skip

    def lists(arrays: Sequence[np.ndarray]) -> Any:
        edges = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
        return pa.ListArray.from_arrays(edges, np.concatenate(arrays))

    rows = iter(rows)
    with whole_file(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        while block := list(itertools.islice(rows, RECORDINGS_AT_ONCE)):
            entries = [entry for entry, _ in block]
            parts = [np.split(values, np.array([1, 1 + entry["frames"]]) * len(labels)) for entry, values in block]
            clipwise, framewise, embedding = zip(*parts, strict=True)
            frames = np.cumsum([0, *(entry["frames"] for entry in entries)]).astype(np.int32)
            every = np.concatenate(framewise)
            of_each = pa.ListArray.from_arrays(np.arange(frames[-1] + 1, dtype=np.int32) * len(labels), every)
            columns = [
                pa.array([entry[name] for entry in entries]) for name in ("name", "duration", "seconds_per_frame")
            ]
            columns += [lists(clipwise), pa.ListArray.from_arrays(frames, of_each), lists(embedding)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
