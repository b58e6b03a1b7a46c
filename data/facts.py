"""What prepared data say of themselves, so that nobody types it: number of classes, task, sample rate, loudness."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, get_args

import h5py

from data.clip_store import ClipTable, Task, open_store, read_rate, store_path
from data.files import read_json, write_json
from data.hdf5 import read_column, reading
from settings import Config, UserError

NORMALIZATION = "normalization.json"  # beside a store: what `normalize` has measured, by front-end and clips


def store_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """classes_num, task and data_rate of the prepared data that `values`, the settings, name; for settings.resolve.

    Empty where nothing is prepared, and where the file is damaged: the command that reads the clips reports it.
    """
    path = next((path for path in _places(values) if path.is_file()), None)
    if path is None:
        return {}
    try:
        with open_store(path, "target") as file, reading(path):
            facts = {
                "classes_num": file["target"].shape[1],
                "task": _task(file, values["dataset_type"]),
                "data_rate": read_rate(file),
            }
            return {name: value for name, value in facts.items() if value is not None}
    except UserError:
        return {}


def store_task(values: Mapping[str, Any]) -> dict[str, Any]:
    """The task alone: what data say of a checkpoint that is used, whose network has its own classes and rate."""
    return {name: value for name, value in store_facts(values).items() if name == "task"}


def _places(values: Mapping[str, Any]) -> list[Path]:
    """Files that say it, the first of those that are there. AudioSet: an index, or a packed file of the same name."""
    folder, kind = Path(values["dataset_path"]), values["dataset_type"]
    if kind != "audioset":
        return [store_path(folder, kind)]
    names = [f"{name}.h5" for name in (values["index_type"], "eval")]
    return [folder / "hdf5s" / part / name for name in names for part in ("indexes", "waveforms")]


def _task(file: h5py.File, dataset_type: str) -> Optional[Task]:
    """The task that a store says; in older ones it shows in clips that have one class each, and no event times."""
    if "task" in file.attrs:
        return next((task for task in get_args(Task) if task == file.attrs["task"]), None)
    single = dataset_type in ("esc-50", "scv2")  # where clips have several classes, that is a mistake for `check`
    if not (single or dataset_type == "folder") or len(file.get("event_clip", ())):
        return "multilabel"
    if (read_column(file, "target").sum(axis=1) == 1).all():
        return "single_label"
    return None if single else "multilabel"


def measured_as(settings: Config, frontend: str, table: ClipTable) -> dict[str, Any]:
    """What a log-mel spectrogram's mean and deviation depend on. table: the training clips."""
    return {
        "frontend": frontend,
        "clip_samples": settings.clip_samples,
        "short_clips": settings.short_clips,
        "clips": table.fingerprint(),
    }


def read_normalization(folder: str | Path, how: Mapping[str, Any]) -> Optional[tuple[float, float]]:
    """Mean and deviation that were measured so (measured_as); None where none were.

    Raises UserError for a damaged file.
    """
    path = Path(folder) / NORMALIZATION
    for entry in read_json(path, list) if path.is_file() else []:
        if isinstance(entry, dict) and how.items() <= entry.items():
            mean, deviation = entry.get("mean"), entry.get("deviation")
            if not (isinstance(mean, float) and isinstance(deviation, float) and deviation > 0):
                raise UserError(f"{path} is damaged: it has mean = {mean!r}, deviation = {deviation!r}. Remove it.")
            return mean, deviation
    return None


def write_normalization(folder: str | Path, how: Mapping[str, Any], **found: Any) -> Path:
    """Add what was measured, in place of what was measured so before; returns the file."""
    path = Path(folder) / NORMALIZATION
    entries = read_json(path, list) if path.is_file() else []
    kept = [entry for entry in entries if not (isinstance(entry, dict) and how.items() <= entry.items())]
    write_json(path, [*kept, {**how, **found}])
    return path
