"""Scores of a network's classes -> scores of a data set's classes, by named groups (the maximum of each).

A mapping is a JSON file: {"about": text, "classes": {NAME: {"from": [...], "threshold": 0.3, "why": text}, ...}}, where
a plain list may replace {"from": [...]}. The entries of "from" are names of the network's classes, AudioSet's ids
("/m/09x0r") or class numbers; about, threshold and why are optional. assets/ has `published` and `reviewed`, from
AudioSet's 527 classes to DESED's ten.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from settings import UserError

ASSETS = Path(__file__).parents[1] / "assets"
BLOCK_ROWS = 2048  # frames mapped at once: they fit into a processor's cache
ENTRIES = {"from", "threshold", "why"}
NAMED = {"published": ASSETS / "desed_published.json", "reviewed": ASSETS / "desed_reviewed.json"}


@dataclass(frozen=True)
class ClassMapping:
    """K groups of a network's S classes. thresholds: one for each group, if the mapping has them."""

    name: str
    labels: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    thresholds: Optional[tuple[float, ...]] = None

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """(..., S) scores of clips or frames -> (..., K): the highest of each group."""
        rows = scores.reshape(-1, scores.shape[-1])
        mapped = np.empty((len(rows), len(self.groups)), dtype=scores.dtype)
        for start in range(0, len(rows), BLOCK_ROWS):
            columns = rows[start : start + BLOCK_ROWS].T
            found = np.empty((len(self.groups), columns.shape[1]), dtype=scores.dtype)
            for highest, group in zip(found, self.groups, strict=True):
                highest[:] = columns[group[0]]
                for source in group[1:]:
                    np.maximum(highest, columns[source], out=highest)
            mapped[start : start + BLOCK_ROWS] = found.T
        return mapped.reshape(*scores.shape[:-1], len(self.groups))

    def in_order(self, labels: Sequence[str]) -> "ClassMapping":
        """The groups in the order of `labels`. Raises UserError where these are other classes."""
        if sorted(labels) != sorted(self.labels):
            raise UserError(
                f"The mapping {self.name} leads to the classes {', '.join(self.labels)}; the data has "
                f"{', '.join(labels)}. Give another one with --fl_audioset_mapping."
            )
        place = [self.labels.index(label) for label in labels]
        thresholds = None if self.thresholds is None else tuple(self.thresholds[k] for k in place)
        return ClassMapping(self.name, tuple(labels), tuple(self.groups[k] for k in place), thresholds)


def load_mapping(which: str, sources: Sequence[str], mids: Sequence[str] = ()) -> ClassMapping:
    """A mapping from the classes `sources`. which: published, reviewed, or a JSON file; mids: their AudioSet ids.

    Raises UserError, with their names, for unknown classes, empty groups, and a class in two groups.
    """
    places: dict[str | int, int] = {k: k for k in range(len(sources))}
    places.update({mid: k for k, mid in enumerate(mids)})
    places.update({name: k for k, name in enumerate(sources)})
    groups: dict[str, list[int]] = {}
    thresholds: dict[str, float] = {}
    for label, entry in _read(which).items():
        groups[label] = [_place(which, label, item, places) for item in entry["from"]]
        if "threshold" in entry:
            thresholds[label] = entry["threshold"]
    _check_overlaps(which, groups, sources)
    if thresholds and len(thresholds) < len(groups):
        raise UserError(f"The mapping {which} has no threshold for {', '.join(groups.keys() - thresholds.keys())}.")
    return ClassMapping(
        name=which,
        labels=tuple(groups),
        groups=tuple(tuple(group) for group in groups.values()),
        thresholds=tuple(thresholds.values()) or None,
    )


def _place(which: str, label: str, item: Any, places: Mapping[str | int, int]) -> int:
    if not isinstance(item, (str, int)) or isinstance(item, bool) or item not in places:
        raise UserError(
            f"The mapping {which}, {label}: {item!r} is no class of the network; give its classes by name, by "
            f"AudioSet's id, or by number, 0 to {sum(isinstance(key, int) for key in places) - 1}."
        )
    return places[item]


def _check_overlaps(which: str, groups: Mapping[str, Sequence[int]], sources: Sequence[str]) -> None:
    """Raise UserError for classes in two groups, or twice in one."""
    found: dict[int, str] = {}
    twice = []
    for label, group in groups.items():
        for source in group:
            if source in found:
                twice.append(f"{sources[source]!r} (in {found[source]} and {label})")
            found[source] = label
    if twice:
        raise UserError(f"The mapping {which} uses classes twice: {', '.join(twice)}.")


def _read(which: str) -> dict[str, dict[str, Any]]:
    """The classes of a mapping file, each as {"from": [...], ...}. Raises UserError for another kind of file."""
    path = NAMED.get(which, Path(which))
    if not path.is_file():
        raise UserError(f"There is no mapping {which}: give {', '.join(NAMED)}, or the path of a JSON file.")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(classes, dict) or not classes:
        raise UserError(f'{path} is no mapping: it needs {{"classes": {{NAME: {{"from": [...]}}}}}}.')
    return {str(label): _entry(which, label, entry) for label, entry in classes.items()}


def _entry(which: str, label: str, entry: Any) -> dict[str, Any]:
    entry = {"from": entry} if isinstance(entry, list) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("from"), list) or entry.keys() - ENTRIES:
        raise UserError(f"The mapping {which}, {label}: give from (a list), threshold and why; nothing else is known.")
    if not entry["from"]:
        raise UserError(f"The mapping {which}: the group of {label} is empty.")
    threshold = entry.get("threshold", 0.5)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise UserError(f"The mapping {which}, {label}: the threshold {threshold!r} must be a number from 0 to 1.")
    return entry
