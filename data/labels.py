"""Names of classes that files do not carry: PANNs' stores and the published checkpoints."""

import json
from pathlib import Path

AUDIOSET_CLASSES = 527
ASSETS = Path(__file__).parents[1] / "assets"


def published_labels(dataset_type: str, classes: int) -> list[str]:
    """Names in the order of the published checkpoints for a data set; `class 0`, ... where none are known."""
    if classes == AUDIOSET_CLASSES:
        return [entry["name"] for entry in _audioset()]
    files = {("esc-50", 50): "esc50_labels.json", ("scv2", 35): "scv2_published_labels.json"}
    if (dataset_type, classes) in files:
        return list(json.loads((ASSETS / files[dataset_type, classes]).read_text()))
    return [f"class {number}" for number in range(classes)]


def audioset_mids() -> list[str]:
    """AudioSet's ids of its 527 classes ("/m/09x0r"), in their order."""
    return [entry["mid"] for entry in _audioset()]


def _audioset() -> list[dict[str, str]]:
    return list(json.loads((ASSETS / "audioset_labels.json").read_text()))
