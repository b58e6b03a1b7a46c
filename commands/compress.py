"""python main.py compress: the stores of a data set as FLAC, in place and without loss."""

from pathlib import Path
from typing import Any

from data.clip_store import store_path
from data.files import sole_writer
from prepare.compress import compress_store
from settings import UserError, resolve


def run(given: dict[str, Any]) -> None:
    """Compress the store of dataset_type, or all files below hdf5s/waveforms of AudioSet, one after another."""
    settings = resolve(given)
    if settings.dataset_type == "audioset":
        paths = sorted((Path(settings.dataset_path) / "hdf5s" / "waveforms").rglob("*.h5"))
    else:
        paths = [store_path(settings.dataset_path, settings.dataset_type)]
    if not paths:
        raise UserError(f"There are no stores below {settings.dataset_path}/hdf5s/waveforms: set --dataset_path.")
    for path in paths:
        if not path.is_file():
            raise UserError(f"There is no file {path}: prepare the data set first, or set --dataset_path.")
        with sole_writer(path):
            before, after = compress_store(path)
        print(f"{path}: {before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB")
