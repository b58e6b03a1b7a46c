"""python main.py save_idc: which clips belong to each class."""

from pathlib import Path
from typing import Any

import numpy as np

from data_generator import load_table
from settings import resolve


def run(given: dict[str, Any]) -> None:
    """Write <dataset_path>/<dataset_type>_classes.npz for the training clips, and print the sizes of the classes.

    Class k has the clips clips[starts[k]:starts[k + 1]] (numbers of the training table), counts[k] of them.
    """
    settings = resolve(given)
    table = load_table(settings, "train")
    labels, clips = np.nonzero(table.targets.T)
    counts = np.bincount(labels, minlength=table.targets.shape[1])
    path = Path(settings.dataset_path) / f"{settings.dataset_type}_classes.npz"
    np.savez_compressed(
        path, clips=clips.astype(np.int32), starts=np.concatenate([[0], np.cumsum(counts)]), counts=counts
    )
    for label, count in zip(table.labels or range(len(counts)), counts.tolist(), strict=True):
        print(f"{count:8d}  {label}")
    print(f"{path}: {len(table)} clips, {(counts > 0).sum()} of {len(counts)} classes have clips")
