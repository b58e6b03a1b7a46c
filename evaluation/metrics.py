"""Clip-level metrics by name, with the number of classes and clips that each is taken over."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, Optional

import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from utils import d_prime


@dataclass(frozen=True)
class Interval:
    """A confidence interval, and how it was found: its level, and the number of resamples."""

    low: float
    high: float
    level: float
    resamples: int

    def __str__(self) -> str:
        return f"{self.low:.4f} to {self.high:.4f}"


@dataclass(frozen=True)
class Metric:
    """One named number. classes: how many classes it is taken over, of all_classes. interval: if asked for."""

    name: str
    value: float
    criterion: str
    clips: int
    classes: int
    all_classes: int
    interval: Optional[Interval] = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: None in their place."""
        return {**asdict(self), "value": self.value if np.isfinite(self.value) else None}


def tagging_metrics(scores: np.ndarray, targets: np.ndarray) -> list[Metric]:
    """mAP, mAUC and d' of (N, K) scores against (N, K) bool targets: macro means over the classes with positives.

    mAUC and d' also need a negative clip of the class. d' is taken from mAUC, as PANNs and AST report it. The value
    is NaN where no class qualifies.
    """
    clips, classes = targets.shape
    both = targets.any(axis=0) & ~targets.all(axis=0)
    ap = average_precisions(scores, targets)
    ap = ap[np.isfinite(ap)]
    auc = [roc_auc_score(targets[:, k], scores[:, k]) for k in np.flatnonzero(both)]
    mean_ap = float(np.mean(ap)) if len(ap) else float("nan")
    mean_auc = float(np.mean(auc)) if auc else float("nan")
    return [
        Metric("mAP", mean_ap, "macro average precision", clips, len(ap), classes),
        Metric("mAUC", mean_auc, "macro area under the ROC curve", clips, len(auc), classes),
        Metric("d_prime", d_prime(mean_auc), "sqrt(2) z(mAUC)", clips, len(auc), classes),
    ]


def average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(K,) of (N, K) scores against (N, K) bool targets; NaN for a class without positives."""
    found, positive = np.full(targets.shape[1], np.nan), np.flatnonzero(targets.any(axis=0))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy sorts without Python's lock
        found[positive] = list(threads.map(lambda k: average_precision_score(targets[:, k], scores[:, k]), positive))
    return found


@dataclass(frozen=True)
class ClassResults:
    """What a test of clips says of each of K classes. metric: average precision, or accuracy for one class a clip.

    clips: (K,) with the class; values: (K,) of the metric, NaN for a class without clips. confusion: (K, K) clips by
    true class (rows) and class of the highest score; None for several classes a clip.
    """

    labels: Sequence[str]
    metric: str
    clips: np.ndarray
    values: np.ndarray
    confusion: Optional[np.ndarray] = None


def class_results(
    task: Literal["multilabel", "single_label"], scores: np.ndarray, targets: np.ndarray, labels: Sequence[str]
) -> ClassResults:
    """The results of each class in (N, K) scores against (N, K) bool targets."""
    clips = targets.sum(axis=0)
    if task == "multilabel":
        return ClassResults(labels, "average precision", clips, average_precisions(scores, targets))
    counts = confusion_matrix(targets.argmax(axis=1), scores.argmax(axis=1), labels=np.arange(len(labels)))
    with np.errstate(invalid="ignore"):
        accuracy = counts.diagonal() / counts.sum(axis=1)
    return ClassResults(labels, "accuracy", counts.sum(axis=1), accuracy, counts)


def classification_metrics(scores: np.ndarray, targets: np.ndarray) -> list[Metric]:
    """Accuracy of (N, K) scores against (N, K) one-hot targets."""
    clips, classes = targets.shape
    if clips and (targets.sum(axis=1) != 1).any():
        warnings.warn("Some clips have no class or several: accuracy counts the first of them.", stacklevel=2)
    right = scores.argmax(axis=1) == targets.argmax(axis=1)
    value = float(right.mean()) if clips else float("nan")
    return [Metric("acc", value, "highest score is the class", clips, int(targets.any(axis=0).sum()), classes)]


def clip_metrics(task: Literal["multilabel", "single_label"], scores: np.ndarray, targets: np.ndarray) -> list[Metric]:
    """The metrics of a task; the first one is what checkpoints are chosen by."""
    return tagging_metrics(scores, targets) if task == "multilabel" else classification_metrics(scores, targets)


def frame_metric(scores: np.ndarray, targets: np.ndarray) -> Metric:
    """frame_mAP of (N, steps, K) scores against bool targets: macro mean over the classes that are on in some step."""
    classes = scores.shape[2]
    flat, truth = scores.reshape(-1, classes), targets.reshape(-1, classes)
    found = average_precisions(flat, truth)
    found = found[~np.isnan(found)]
    value = float(found.mean()) if len(found) else float("nan")
    return Metric(FRAME_METRIC, value, "macro average precision of steps", len(scores), len(found), classes)


MAIN_METRIC = {"multilabel": "mAP", "single_label": "acc"}
FRAME_METRIC = "frame_mAP"  # what trainings on event times are chosen by
