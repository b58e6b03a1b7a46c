"""Names of classes: the lists in assets/, for the data sets and for files that carry no names."""

import json
from pathlib import Path

AUDIOSET_CLASSES = 527
ASSETS = Path(__file__).parents[1] / "assets"
PUBLISHED = {("esc-50", 50): "esc50_labels.json", ("scv2", 35): "scv2_published_labels.json"}


def read_labels(name: str) -> list[str]:
    """The names of classes in a list of assets/, in its order."""
    return list(json.loads((ASSETS / name).read_text()))


def published_labels(dataset_type: str, classes: int) -> list[str]:
    """Names in the order of the published checkpoints for a data set; `class 0`, ... where none are known."""
    if classes == AUDIOSET_CLASSES:
        return [entry["name"] for entry in audioset_classes()]
    if (dataset_type, classes) in PUBLISHED:
        return read_labels(PUBLISHED[dataset_type, classes])
    return [f"class {number}" for number in range(classes)]


def audioset_mids() -> list[str]:
    """AudioSet's ids of its 527 classes ("/m/09x0r"), in their order."""
    return [entry["mid"] for entry in audioset_classes()]


def audioset_classes() -> list[dict[str, str]]:
    """AudioSet's 527 classes in their order, each with mid and name."""
    return list(json.loads((ASSETS / "audioset_labels.json").read_text()))
