"""Thresholds, filter lengths and minimum durations that maximize a metric on clips with known events.

Each class is searched by itself: a class's detections do not change another's intersection and collar F1. For each
filter length the best of all thresholds is found exactly (sed_scores_eval follows every score at which a detection
appears or vanishes); at the best pair, minimum durations are then tried. PSDS covers all thresholds: its filter lengths
are those with the largest area under the class's own PSD-ROC, and its thresholds and durations are the best by
intersection F1 at PSDS1's tolerances (0.7 and 0.7).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Optional

import numpy as np
import pandas as pd
from sed_scores_eval import collar_based, intersection_based

from evaluation.event_metrics import (
    COLLAR_SECONDS,
    OFFSET_SHARE,
    ClipCounts,
    collar_counts,
    f1_of,
    intersection_counts,
)
from evaluation.event_tables import EventSet, GroundTruth
from evaluation.postprocess import PostProcessing
from evaluation.psds import PSDS1, PsdsFromScores
from evaluation.score_tables import score_tables
from evaluation.scores import Scores
from evaluation.systems import truth_of_scores

Objective = Literal["intersection_f1", "collar_f1", "psds1"]
# Of a median filter: 1, 3, ..., 11 frames of 312.5 ms, 1, 3, 7, 13, 23, ..., 85 frames of 40 ms.
FILTER_SECONDS = (0.0, 0.12, 0.28, 0.5, 0.94, 1.56, 2.19, 2.81, 3.44)
MINIMUM_DURATIONS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.3, 2.0)  # seconds; those shorter than a frame are not tried


@dataclass(frozen=True)
class Calibrated:
    """The post-processing found, and the metric of each class before and after; NaN for one without true events."""

    post: PostProcessing
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class _Criterion:
    """counts: of detected events. best: of all thresholds, (F1, precision, recall, threshold, ...) by class."""

    counts: Callable[[EventSet, GroundTruth], ClipCounts]
    best: Callable[..., tuple[Any, ...]]


def _intersection(share: float) -> _Criterion:
    return _Criterion(
        partial(intersection_counts, share=share),
        partial(intersection_based.best_fscore, dtc_threshold=share, gtc_threshold=share),
    )


_COLLAR = partial(
    collar_based.best_fscore,
    onset_collar=COLLAR_SECONDS,
    offset_collar=COLLAR_SECONDS,
    offset_collar_rate=OFFSET_SHARE,
)
CRITERIA: dict[Objective, _Criterion] = {
    "intersection_f1": _intersection(0.5),
    "collar_f1": _Criterion(collar_counts, _COLLAR),
    "psds1": _intersection(PSDS1.dtc),
}


def calibrate(scores: Scores, objective: Objective, start: Optional[PostProcessing] = None) -> Calibrated:
    """Search the post-processing of a score store that maximizes `objective` on its clips.

    start: the values of classes without true events, and for all classes maximum_gap and interpolation. Raises
    UserError for a store without frame scores or true events.
    """
    scores.frame_scores()  # first: a store without them has no events either
    start = start or PostProcessing(tuple(scores.labels))
    search = _Search(scores, truth_of_scores(scores), CRITERIA[objective], start)
    lengths = search.by_area() if objective == "psds1" else None
    post = search.minimum_durations(search.thresholds(lengths))
    split = scores.attributes.get("split", "unknown")
    post = replace(post, source=f"calibrated for {objective} on the {split} clips")
    measure = search.areas if objective == "psds1" else search.f1
    return Calibrated(post, _of_all(scores.labels, measure(start)), _of_all(scores.labels, measure(post)))


def filter_lengths(seconds_per_frame: float) -> list[int]:
    """The odd numbers of frames that come nearest to FILTER_SECONDS, each once."""
    frames = [2 * round((seconds / seconds_per_frame - 1) / 2) + 1 for seconds in FILTER_SECONDS]
    return sorted({max(length, 1) for length in frames})


def _of_all(labels: list[str], values: dict[str, float]) -> dict[str, float]:
    return {label: float(values.get(label, float("nan"))) for label in labels}


@dataclass
class _Search:
    """Scores, ground truth, and the criterion of the search."""

    scores: Scores
    truth: GroundTruth
    criterion: _Criterion
    start: PostProcessing

    def tables(self, post: PostProcessing) -> dict[str, pd.DataFrame]:
        """Filtered and interpolated scores of the classes with true events, for sed_scores_eval."""
        smoothed, step = self.scores.smooth(post)
        present = [self.scores.labels.index(label) for label in self.truth.present]
        return score_tables(
            smoothed[:, :, present], names=self.scores.names, labels=self.truth.present,
            durations=self.scores.durations, seconds_per_frame=step,
        )  # fmt: skip

    def f1(self, post: PostProcessing) -> dict[str, float]:
        """F1 of each class for the events that `post` decodes; NaN for one without true events."""
        counts = self.criterion.counts(self.truth.index(self.scores.decode(post)), self.truth)
        values = f1_of(*(part.sum(axis=0) for part in (counts.found, counts.false, counts.positive)))
        return dict(zip(self.truth.labels, values.tolist(), strict=True))

    def areas(self, post: PostProcessing) -> dict[str, float]:
        """Normalized area under the PSD-ROC of each class with true events (PSDS1's tolerances)."""
        return PsdsFromScores(self.tables(post), self.truth, PSDS1).result().per_class

    def by_area(self) -> dict[str, int]:
        """The filter length of each class with the largest area; the shorter one of equals."""
        best: dict[str, tuple[float, int]] = {}
        for length in filter_lengths(self.scores.seconds_per_frame):
            areas = self.areas(self._with_filter(length))
            for label in self.truth.present:
                if label not in best or areas[label] > best[label][0]:
                    best[label] = areas[label], length
        return {label: length for label, (_, length) in best.items()}

    def thresholds(self, lengths: Optional[dict[str, int]]) -> PostProcessing:
        """The best threshold of each class and, unless `lengths` has it, its filter length; the shorter of equals."""
        best: dict[str, tuple[float, float, int]] = {}
        for length in (
            filter_lengths(self.scores.seconds_per_frame) if lengths is None else sorted(set(lengths.values()))
        ):
            f1, _, _, at, *_ = self.criterion.best(self.tables(self._with_filter(length)), self.truth.by_clip())
            for label in self.truth.present:
                wanted = lengths is None or lengths[label] == length
                if wanted and np.isfinite(at[label]) and (label not in best or f1[label] > best[label][0]):
                    best[label] = f1[label], at[label], length
        kept = zip(self.start.labels, self.start.thresholds, self.start.median_filter, strict=True)
        chosen = [best[label][1:] if label in best else (threshold, length) for label, threshold, length in kept]
        return replace(
            self.start, thresholds=tuple(pair[0] for pair in chosen), median_filter=tuple(pair[1] for pair in chosen)
        )

    def minimum_durations(self, post: PostProcessing) -> PostProcessing:
        """The best of MINIMUM_DURATIONS for each class; the shorter of equals."""
        best: dict[str, tuple[float, float]] = {}
        for seconds in MINIMUM_DURATIONS:
            if 0 < seconds < self.scores.seconds_per_frame:
                continue
            f1 = self.f1(replace(post, minimum_duration=(seconds,)))
            for label in self.truth.present:
                if label not in best or f1[label] > best[label][0]:
                    best[label] = f1[label], seconds
        durations = zip(post.labels, post.minimum_duration, strict=True)
        return replace(post, minimum_duration=tuple(best[k][1] if k in best else old for k, old in durations))

    def _with_filter(self, length: int) -> PostProcessing:
        return replace(self.start, median_filter=(length,))
