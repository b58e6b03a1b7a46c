"""Scores of recordings as a Parquet table, by pyarrow (an optional package).

Columns: file, duration (seconds), seconds_per_frame (0: no time axis), clipwise (K,), framewise (T, K), embedding (D,)
float32. The metadata of its schema have labels, the K classes as JSON.
"""

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.files import whole_file
from settings import UserError

VALUES_AT_ONCE = 2**24  # in memory, and in a row group: 64 MiB
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

    def table(block: list[tuple[dict[str, Any], np.ndarray]]) -> Any:
        entries = [entry for entry, _ in block]
        parts = [np.split(values, np.array([1, 1 + entry["frames"]]) * len(labels)) for entry, values in block]
        clipwise, framewise, embedding = zip(*parts, strict=True)
        edges = np.cumsum([0, *(entry["frames"] for entry in entries)]).astype(np.int32)
        inside = np.arange(edges[-1] + 1, dtype=np.int32) * len(labels)
        frames = pa.ListArray.from_arrays(edges, pa.ListArray.from_arrays(inside, np.concatenate(framewise)))
        columns = [pa.array([entry[name] for entry in entries]) for name in ("name", "duration", "seconds_per_frame")]
        return pa.Table.from_arrays([*columns, lists(clipwise), frames, lists(embedding)], schema=schema)

    with whole_file(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        block, size = list[tuple[dict[str, Any], np.ndarray]](), 0
        for row in rows:
            block.append(row)
            size += len(row[1])
            if size >= VALUES_AT_ONCE:
                writer.write_table(table(block))
                block, size = [], 0
        if block:
            writer.write_table(table(block))
