"""Names of classes: the lists in assets/, for the data sets and for files that carry no names; AudioSet's ontology."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from settings import UserError

AUDIOSET_CLASSES = 527
ASSETS = Path(__file__).parents[1] / "assets"
PUBLISHED = {("esc-50", 50): "esc50_labels.json", ("scv2", 35): "scv2_published_labels.json"}
AUDIOSET_STRONG_CLASSES = 447  # of its training events


def read_labels(name: str) -> list[str]:
    """The names of classes in a list of assets/, in its order."""
    return list(json.loads((ASSETS / name).read_text()))


def published_labels(dataset_type: str, classes: int) -> list[str]:
    """Names in the order of the published checkpoints for a data set; `class 0`, ... where none are known."""
    if classes == AUDIOSET_CLASSES:
        return [entry["name"] for entry in audioset_classes()]
    if classes == AUDIOSET_STRONG_CLASSES:
        return read_labels("audioset_strong_labels.json")
    if (dataset_type, classes) in PUBLISHED:
        return read_labels(PUBLISHED[dataset_type, classes])
    return [f"class {number}" for number in range(classes)]


def audioset_mids() -> list[str]:
    """AudioSet's ids of its 527 classes ("/m/09x0r"), in their order."""
    return [entry["mid"] for entry in audioset_classes()]


def audioset_classes() -> list[dict[str, str]]:
    """AudioSet's 527 classes in their order, each with mid and name."""
    return list(json.loads((ASSETS / "audioset_labels.json").read_text()))


def weak_class_precision() -> np.ndarray:
    """(527,) average precision of the 77 classes that trained networks find hardest, infinity for the others.

    Li et al., AudioTagging Done Right, Interspeech 2022: of a network with mAP 0.449, among the 100 worst classes of
    both this and one that was trained on the balanced set.
    """
    precision = np.full(AUDIOSET_CLASSES, np.inf)
    for number, value in json.loads((ASSETS / "audioset_weak_classes.json").read_text()).items():
        precision[int(number)] = value
    return precision


@dataclass(frozen=True)
class Ontology:
    """Ancestors and children among the 527 classes, also across entries of the ontology that are no classes.

    ancestors: (527, 527) bool, [k, a] where a is an ancestor of k. children: the class numbers below each class.
    """

    ancestors: np.ndarray
    children: list[list[int]]


def read_ontology(path: Path) -> Ontology:
    """Read ontology.json, a list of {id, name, child_ids, ...}. Raises UserError where the file is none."""
    if not path.is_file():
        raise UserError(f"There is no {path}: class_map_path must be AudioSet's ontology.json.")
    try:
        below = {entry["id"]: list(entry["child_ids"]) for entry in json.loads(path.read_text())}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no AudioSet ontology, a list of entries with id and child_ids: {error!r}") from None
    number = {mid: index for index, mid in enumerate(audioset_mids())}
    ancestors = np.zeros((len(number), len(number)), dtype=bool)
    for mid, index in number.items():
        for descendant in _descendants(mid, below):
            if descendant in number:
                ancestors[number[descendant], index] = True
    children = [sorted({number[found] for found in _nearest_classes(mid, below, set(number))}) for mid in number]
    return Ontology(ancestors, children)


def _descendants(mid: str, below: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(below.get(mid, []))
    while waiting:
        entry = waiting.pop()
        if entry not in found:
            found.add(entry)
            waiting += below.get(entry, [])
    return found


def _nearest_classes(mid: str, below: dict[str, list[str]], classes: set[str]) -> set[str]:
    """The classes right below an entry; an entry that is no class counts as its own children."""
    found: set[str] = set()
    for entry in below.get(mid, []):
        found |= {entry} if entry in classes else _nearest_classes(entry, below, classes)
    return found
