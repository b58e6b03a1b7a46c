"""Thresholds, filter lengths and minimum durations for a metric, found on clips with known events.

Each class is searched for itself: a class's detections do not change what intersection and collar F1 say about another.
For each filter length the best of all thresholds is found exactly (sed_scores_eval follows every score at which a
detection appears or vanishes); at the best pair, minimum durations are then tried. PSDS looks at all thresholds: its
filter lengths are those with the largest area under the class's own PSD-ROC, and its thresholds and durations are the
best by intersection F1 at PSDS1's tolerances (0.7 and 0.7).
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Optional

import numpy as np
import pandas as pd
from sed_scores_eval import collar_based, intersection_based

from evaluation.detection import score_tables
from evaluation.event_tables import GroundTruth
from evaluation.postprocess import PostProcessing, detected_frames, truth_table
from evaluation.scores import Scores
from settings import UserError

Objective = Literal["intersection_f1", "collar_f1", "psds1"]
Tables = dict[str, pd.DataFrame]
Truth = dict[str, list[tuple[float, float, str]]]
FILTER_LENGTHS = (1, 3, 5, 7, 9, 11)  # steps of 312.5 ms: up to 3.4 s
MINIMUM_DURATIONS = (0.0, 0.4, 0.7, 1.0, 1.3, 2.0)  # seconds: between one, two, three, ... steps


@dataclass(frozen=True)
class Calibrated:
    """What was found, with the metric of each class before and after; NaN where a class has no true events."""

    post: PostProcessing
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class _Criterion:
    """F1 of each class at given thresholds, and the best F1 of each class over all thresholds, with that threshold."""

    f1: Callable[[Tables, Truth, dict[str, float]], dict[str, float]]
    best: Callable[[Tables, Truth], tuple[dict[str, float], dict[str, float]]]


def _intersection(tolerance: float) -> _Criterion:
    limits = {"dtc_threshold": tolerance, "gtc_threshold": tolerance}

    def best(tables: Tables, truth: Truth) -> tuple[dict[str, float], dict[str, float]]:
        found = intersection_based.best_fscore(tables, truth, **limits)
        return found[0], found[3]

    return _Criterion(lambda tables, truth, at: intersection_based.fscore(tables, truth, at, **limits)[0], best)


def _collar() -> _Criterion:
    limits = {"onset_collar": 0.2, "offset_collar": 0.2, "offset_collar_rate": 0.2}

    def best(tables: Tables, truth: Truth) -> tuple[dict[str, float], dict[str, float]]:
        found = collar_based.best_fscore(tables, truth, **limits)
        return found[0], found[3]

    return _Criterion(lambda tables, truth, at: collar_based.fscore(tables, truth, at, **limits)[0], best)


CRITERIA = {"intersection_f1": _intersection(0.5), "collar_f1": _collar(), "psds1": _intersection(0.7)}


def calibrate(scores: Scores, objective: Objective, start: Optional[PostProcessing] = None) -> Calibrated:
    """Search the post-processing of a score store that raises `objective` on its clips.

    start: what classes without true events keep; its gaps and interpolation are kept for all. Raises UserError where
    the store has no frame scores or no true events.
    """
    if scores.framewise is None or not scores.events or not any(scores.events):
        raise UserError("Calibration needs frame scores and true events: the clips must have times.")
    start = start or PostProcessing(tuple(scores.labels))
    durations = dict(zip(scores.names, scores.durations.tolist(), strict=True))
    truth = GroundTruth.build(truth_table(scores.names, scores.events, scores.labels), durations, scores.labels)
    search = _Search(scores, truth.by_clip(), truth.present, CRITERIA[objective], start)
    lengths = search.by_area() if objective == "psds1" else None
    post = search.minimum_durations(search.thresholds(lengths))
    split = scores.attributes.get("split", "unknown")
    post = replace(post, source=f"calibrated for {objective} on the {split} clips")
    measure = search.areas if objective == "psds1" else search.f1
    return Calibrated(post, _of_all(scores.labels, measure(start)), _of_all(scores.labels, measure(post)))


def _of_all(labels: list[str], values: dict[str, float]) -> dict[str, float]:
    return {label: float(values.get(label, float("nan"))) for label in labels}


@dataclass
class _Search:
    """Score tables and truth of the classes `present`, and one criterion."""

    scores: Scores
    truth: Truth
    present: list[str]
    criterion: _Criterion
    start: PostProcessing

    def tables(self, post: PostProcessing) -> Tables:
        """Filtered and interpolated scores, as sed_scores_eval has them."""
        assert self.scores.framewise is not None
        smoothed, step = post.smooth(
            self.scores.framewise, durations=self.scores.durations, seconds_per_frame=self.scores.seconds_per_frame
        )
        return self._as_tables(smoothed, step)

    def _as_tables(self, framewise: np.ndarray, step: float) -> Tables:
        place = [self.scores.labels.index(label) for label in self.present]
        return score_tables(
            framewise[:, :, place], names=self.scores.names, labels=self.present, durations=self.scores.durations,
            seconds_per_frame=step,
        )  # fmt: skip

    def f1(self, post: PostProcessing) -> dict[str, float]:
        """F1 of each class of the events that `post` decodes."""
        assert self.scores.framewise is not None
        found = post.decode(
            self.scores.framewise, names=self.scores.names, durations=self.scores.durations,
            seconds_per_frame=self.scores.seconds_per_frame,
        )  # fmt: skip
        step, frames = self.scores.seconds_per_frame / post.interpolation, self.scores.framewise.shape[1]
        active = detected_frames(
            found,
            names=self.scores.names,
            labels=post.labels,
            frames=frames * post.interpolation,
            seconds_per_frame=step,
        )
        return self.criterion.f1(self._as_tables(active, step), self.truth, dict.fromkeys(self.present, 0.5))

    def areas(self, post: PostProcessing) -> dict[str, float]:
        """Normalized area under the PSD-ROC of each class (PSDS1's tolerances, up to 100 false alarms an hour)."""
        durations = dict(zip(self.scores.names, self.scores.durations.tolist(), strict=True))
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
            _, by_class, *_ = intersection_based.psds(
                self.tables(post), self.truth, durations, dtc_threshold=0.7, gtc_threshold=0.7, cttc_threshold=None,
                alpha_ct=0.0, alpha_st=0.0, max_efpr=100.0,
            )  # fmt: skip
        return by_class

    def by_area(self) -> dict[str, int]:
        """The filter length of each class that gives it the largest area; the shorter one of equals."""
        best: dict[str, tuple[float, int]] = {}
        for length in FILTER_LENGTHS:
            areas = self.areas(self._with_filter(length))
            for label in self.present:
                if label not in best or areas[label] > best[label][0]:
                    best[label] = areas[label], length
        return {label: length for label, (_, length) in best.items()}

    def thresholds(self, lengths: Optional[dict[str, int]]) -> PostProcessing:
        """The best threshold of each class and, unless they are given, its filter length; the shorter of equals."""
        best: dict[str, tuple[float, float, int]] = {}
        for length in FILTER_LENGTHS if lengths is None else sorted(set(lengths.values())):
            f1, at = self.criterion.best(self.tables(self._with_filter(length)), self.truth)
            for label in self.present:
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
            f1 = self.f1(replace(post, minimum_duration=(seconds,)))
            for label in self.present:
                if label not in best or f1[label] > best[label][0]:
                    best[label] = f1[label], seconds
        durations = zip(post.labels, post.minimum_duration, strict=True)
        return replace(post, minimum_duration=tuple(best[k][1] if k in best else old for k, old in durations))

    def _with_filter(self, length: int) -> PostProcessing:
        return replace(self.start, median_filter=(length,))
