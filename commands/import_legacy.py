"""python main.py import_legacy: the pickled .npy files of the published code -> clip store."""

from pathlib import Path
from typing import Any, Optional

from data.clip_store import store_path
from data.labels import published_labels
from prepare.legacy import import_legacy
from settings import UserError, resolve

DATASET_TYPES = ("esc-50", "scv2", "desed", "folder")  # those that are one store; AudioSet was never pickled


def run(given: dict[str, Any], legacy: list[str], legacy_splits: Optional[str] = None) -> None:
    """Write the store of dataset_type into dataset_path, with the published numbering of the classes.

    legacy: the .npy files; legacy_splits: train, validation or test for each of them, separated by commas.
    """
    settings = resolve(given)
    if settings.dataset_type not in DATASET_TYPES:
        raise UserError(
            f"import_legacy knows --dataset_type {', '.join(DATASET_TYPES)}; {settings.dataset_type} was given."
        )
    report = import_legacy(
        [Path(path) for path in legacy],
        store_path(settings.dataset_path, settings.dataset_type),
        sample_rate=settings.sample_rate,
        labels=published_labels(settings.dataset_type, settings.classes_num),
        dataset_type=settings.dataset_type,
        splits=None if legacy_splits is None else [split.strip() for split in legacy_splits.split(",")],
    )
    print(report)
