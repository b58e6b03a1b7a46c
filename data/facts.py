"""What prepared data say of themselves, so that nobody types it: number of classes, task, sample rate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, get_args

import h5py

from data.clip_store import Task, open_store, read_rate, store_path
from data.hdf5 import read_column, reading
from settings import UserError


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
