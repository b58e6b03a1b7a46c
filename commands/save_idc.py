"""python main.py save_idc: which clips belong to each class."""

from pathlib import Path
from typing import Any

import numpy as np

from data.clip_store import class_index
from data.facts import store_facts
from data.files import whole_file
from data.names import shown
from data_generator import load_table
from settings import resolve


def run(given: dict[str, Any]) -> None:
    """Write <dataset_path>/<dataset_type>_classes.npz for the training clips, and print the sizes of the classes.

    Class k has the clips clips[starts[k]:starts[k + 1]] (numbers of the training table), counts[k] of them.
    """
    settings = resolve(given, facts=store_facts)
    table = load_table(settings, "train")
    clips, starts, counts = class_index(table.targets)
    path = Path(settings.dataset_path) / f"{settings.dataset_type}_classes.npz"
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, clips=clips, starts=starts, counts=counts)
    for label, count in zip(table.labels or map(str, range(len(counts))), counts.tolist(), strict=True):
        print(f"{count:8d}  {shown(label)}")
    print(f"{path}: {len(table)} clips, {(counts > 0).sum()} of {len(counts)} classes have clips")
