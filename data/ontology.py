"""AudioSet's ontology: which classes are kinds of which."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.labels import audioset_mids
from settings import UserError


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
