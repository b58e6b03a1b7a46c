"""python main.py create_index: index AudioSet's packed files."""

import sys
from pathlib import Path
from typing import Any

from prepare.audioset_index import create_indexes
from settings import resolve


def run(given: dict[str, Any], processes: int) -> None:
    """Write <dataset_path>/hdf5s/indexes/*.h5 and print how many clips each has. processes: files read at once."""
    root = Path(resolve({"dataset_type": "audioset", **given}).dataset_path)
    counts = create_indexes(root, processes)
    for partial in sorted((root / "hdf5s" / "waveforms").rglob("*.h5*.partial")):
        print(f"warning: {partial} is unfinished and in no index: run prepare again, then this.", file=sys.stderr)
    for path, clips in counts.items():
        print(f"{path}: {clips} clips")
