"""Detected against true events: counts for each clip and class, and F1 and error rate from them.

The counts of a clip do not depend on other clips: a bootstrap over clips counts once and then only adds.
The criteria are those of psds_eval (intersection) and sed_scores_eval (collar, segment); the tests compare with both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from evaluation.bootstrap import mean_of_known
from evaluation.event_tables import EventSet, GroundTruth

COLLAR_SECONDS = 0.2
OFFSET_SHARE = 0.2  # of the true event: the collar of its offset, where it is longer
TIME_DECIMALS = 6  # to which sed_scores_eval rounds before it compares times
SEGMENT_SECONDS = 1.0
ALL = slice(None)


@dataclass(frozen=True)
class ClipCounts:
    """Counts (N, K) for each clip and class: true positives (found), false positives, and positives.

    unit: what is counted (events, segments, clips). errors: (N,) substitutions, deletions and insertions over all
    classes together, for segments only.
    """

    unit: str
    found: np.ndarray
    false: np.ndarray
    positive: np.ndarray
    errors: Optional[np.ndarray] = None


Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def f1_of(found: np.ndarray, false: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN); NaN without positives."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(positive > 0, 2 * found / (found + false + positive), np.nan)


def error_rate_of(found: np.ndarray, false: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(FN + FP) / positives: deletions and insertions; NaN without positives."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(positive > 0, (positive - found + false) / positive, np.nan)


class CountStatistic:
    """A formula of counts, as a statistic of the bootstrap: weights (N, R) -> (2 + K, R).

    The rows are the macro value (the mean of the classes that have positives), the micro value (of the summed counts
    of all classes) and that of each class.
    """

    def __init__(self, counts: ClipCounts, formula: Formula) -> None:
        self.formula = formula
        self.errors = None if counts.errors is None else counts.errors.astype(np.float32)
        self.counts = [part.T.astype(np.float32) for part in (counts.found, counts.false, counts.positive)]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        sums = [(part @ weights).astype(np.float64) for part in self.counts]
        by_class = self.formula(*sums)
        micro = self.formula(*(part.sum(axis=0) for part in sums))
        if self.errors is not None and self.formula is error_rate_of:
            positive = sums[2].sum(axis=0)
            micro = np.where(positive > 0, self.errors @ weights / np.maximum(positive, 1), np.nan)
        return np.concatenate([mean_of_known(by_class)[None], micro[None], by_class])


def intersection_counts(detected: EventSet, truth: GroundTruth, share: float) -> ClipCounts:
    """Intersection criterion (Bilen et al., A Framework for the Robust Evaluation of Sound Event Detection, 2020).

    share: of both criteria, DTC and GTC. A detection is relevant where true events of its class cover at least this
    share of it. A true event is found where relevant detections cover at least this share of it. A detection that is
    not relevant is false, unless it lies wholly outside its clip: psds_eval counts only what intersects the recording.
    A relevant detection whose event is not covered enough is neither. psds_eval's cross-trigger criterion (CTTC)
    changes none of these counts.
    """
    true = truth.events
    pairs = overlaps(detected, true, len(truth.labels))
    shared = np.minimum(detected.offset[pairs.first], true.offset[pairs.second])
    shared = shared - np.maximum(detected.onset[pairs.first], true.onset[pairs.second])
    precision = shared / (detected.offset - detected.onset)[pairs.first]
    relevant = _sums(precision, pairs.first, len(detected)) >= share
    counted = relevant[pairs.first]
    coverage = shared[counted] / (true.offset - true.onset)[pairs.second[counted]]
    found = _sums(coverage, pairs.second[counted], len(true)) >= share
    false = ~relevant & (detected.onset < truth.durations[detected.clip]) & (detected.offset > 0)
    return ClipCounts("events", _count(true, truth, found), _count(detected, truth, false), _count(true, truth))


def collar_counts(
    detected: EventSet,
    truth: GroundTruth,
    *,
    offsets: bool = True,
    collar: float = COLLAR_SECONDS,
    true: Optional[EventSet] = None,
) -> ClipCounts:
    """Collar criterion (Mesaros, Heittola and Virtanen, Metrics for Polyphonic Sound Event Detection, 2016).

    A detection fits a true event of its class in its clip where the onsets lie at most `collar` seconds apart, and,
    with `offsets`, the offsets at most `collar` or OFFSET_SHARE of the true event, whichever is more. true: the true
    events, None for those of `truth`, of which overlapping ones are joined (sed_eval joins none). Of all ways to
    pair them, each used once, one with the most pairs is taken, as in sed_scores_eval (a maximum bipartite matching,
    not the first that fits).
    """
    true = truth.events if true is None else true
    pairs = same_class_pairs(detected, true, len(truth.labels))
    fits = _within(detected.onset[pairs.first] - true.onset[pairs.second], collar)
    if offsets:
        collars = np.maximum(collar, OFFSET_SHARE * (true.offset - true.onset)[pairs.second])
        fits &= _within(detected.offset[pairs.first] - true.offset[pairs.second], collars)
    first, second = pairs.first[fits], pairs.second[fits]
    # One graph for all clips and classes: no edge joins two of them, so that each is matched by itself.
    graph = csr_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(len(detected), len(true)))
    matched = maximum_bipartite_matching(graph, perm_type="column") >= 0 if graph.nnz else np.zeros(len(detected), bool)
    return ClipCounts(
        "events", _count(detected, truth, matched), _count(detected, truth, ~matched), _count(true, truth)
    )


def segment_counts(detected: EventSet, truth: GroundTruth) -> ClipCounts:
    """Segment criterion (Mesaros, Heittola and Virtanen, 2016): segments of 1 s, the last one of a clip may be shorter.

    A class is active in a segment that one of its events reaches into. Segments that begin after a clip's end do not
    count. Over all classes the errors of a segment are max(true, detected) - right ones: a wrong class in place of a
    missed one is one substitution, not an insertion and a deletion.
    """
    classes = len(truth.labels)
    segments = np.ceil(truth.durations / SEGMENT_SECONDS).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(segments)])
    rounded = EventSet(
        detected.clip, detected.label, detected.onset.round(TIME_DECIMALS), detected.offset.round(TIME_DECIMALS)
    )  # as in sed_scores_eval, which rounds the times of detections but not of true events
    on, wanted = (_active_segments(events, segments, starts, classes) for events in (rounded, truth.events))
    right = np.intersect1d(on, wanted, assume_unique=True)
    clip = np.repeat(np.arange(len(segments)), segments)

    def tally(active: np.ndarray) -> np.ndarray:
        cell = clip[active // classes] * classes + active % classes
        return np.bincount(cell, minlength=len(segments) * classes).reshape(-1, classes)

    by_segment = [np.bincount(active // classes, minlength=starts[-1]) for active in (on, wanted, right)]
    errors = np.maximum(by_segment[0], by_segment[1]) - by_segment[2]
    found = tally(right)
    return ClipCounts(
        "segments", found, tally(on) - found, tally(wanted), np.bincount(clip, weights=errors, minlength=len(segments))
    )


def clip_counts(detected: EventSet, truth: GroundTruth) -> ClipCounts:
    """Tagging by events: a clip has the classes of which it has at least one event."""
    on, wanted = (_count(events, truth) > 0 for events in (detected, truth.events))
    return ClipCounts("clips", (on & wanted).astype(int), (on & ~wanted).astype(int), wanted.astype(int))


@dataclass(frozen=True)
class Pairs:
    """P pairs of events, by their place in the first set (P,) and in the second (P,)."""

    first: np.ndarray
    second: np.ndarray


def same_class_pairs(first: EventSet, second: EventSet, classes: int) -> Pairs:
    """All pairs of events of the same clip and class."""
    key, other = first.clip * classes + first.label, second.clip * classes + second.label
    order = np.argsort(other, kind="stable")
    begin = np.searchsorted(other[order], key, side="left")
    count = np.searchsorted(other[order], key, side="right") - begin
    mine = np.repeat(np.arange(len(first)), count)
    within = np.arange(len(mine)) - np.repeat(np.cumsum(count) - count, count)
    return Pairs(mine, order[np.repeat(begin, count) + within])


def overlaps(first: EventSet, second: EventSet, classes: int) -> Pairs:
    """The pairs of events of the same clip and class that share more than a moment."""
    pairs = same_class_pairs(first, second, classes)
    shared = (first.onset[pairs.first] < second.offset[pairs.second]) & (
        second.onset[pairs.second] < first.offset[pairs.first]
    )
    return Pairs(pairs.first[shared], pairs.second[shared])


def _sums(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(groups,) sums, by pandas as in psds_eval: it compensates rounding, which decides sums that meet a criterion."""
    return pd.Series(values).groupby(group).sum().reindex(range(groups), fill_value=0.0).to_numpy()


def _within(difference: np.ndarray, collar: float | np.ndarray) -> np.ndarray:
    return np.round(np.abs(difference) - collar, TIME_DECIMALS) <= 0


def _active_segments(events: EventSet, segments: np.ndarray, starts: np.ndarray, classes: int) -> np.ndarray:
    """Sorted numbers segment * classes + class of the active ones; segments are numbered through all clips."""
    limit = segments[events.clip]
    first = np.minimum(np.floor(events.onset / SEGMENT_SECONDS).astype(np.int64), limit)
    length = np.minimum(np.ceil(events.offset / SEGMENT_SECONDS).astype(np.int64), limit) - first
    event = np.repeat(np.arange(len(events)), length)
    within = np.arange(len(event)) - np.repeat(np.cumsum(length) - length, length)
    return np.unique((starts[events.clip[event]] + first[event] + within) * classes + events.label[event])


def _count(events: EventSet, truth: GroundTruth, chosen: np.ndarray | slice = ALL) -> np.ndarray:
    """(N, K) numbers of the chosen events."""
    clips, classes = len(truth.names), len(truth.labels)
    cell = events.clip[chosen] * classes + events.label[chosen]
    return np.bincount(cell, minlength=clips * classes).reshape(clips, classes)
