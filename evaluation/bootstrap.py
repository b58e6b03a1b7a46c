"""Confidence intervals by the bootstrap over clips: percentile intervals, and two systems compared in pairs.

A resample draws N of N clips with replacement. A statistic takes the number of times each clip was drawn, for a block
of resamples at once: weights (N, R), float32 with whole numbers, one column a resample. A metric made of sums over
clips is then a matrix product: with counts (N, M) per clip, such as true positives, `counts.T @ weights` are the sums
(M, R) of each resample. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13, 15, 16.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from evaluation.metrics import Interval, Metric
from settings import UserError

Task = Literal["multilabel", "single_label"]
Statistic = Callable[[np.ndarray], np.ndarray]  # weights (N, R) -> values (..., R), one or several for each resample

BLOCK = 64  # resamples at once: 20,000 clips have 5 MB of weights, which a processor's cache holds
RESAMPLES = 1000
FEWEST_RESAMPLES = 200
MOST_ADDED = 15e9  # weights to add for an interval of mAP; AudioSet's 20,000 clips need 7e9, some seconds


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same clips: the first minus the second, its interval, and the two-sided p value."""

    difference: float
    interval: Interval
    p_value: float


def draw_weights(clips: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (N, at most BLOCK) of weights; resample r of a seed is the same however many are drawn."""
    if clips < 1:
        raise UserError("A bootstrap over clips needs at least one clip: there is none.")
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        drawn = (rng.integers(clips, size=clips) for _ in range(min(BLOCK, resamples - start)))
        weights = [np.bincount(clip, minlength=clips) for clip in drawn]
        yield np.ascontiguousarray(np.stack(weights, axis=1), dtype=np.float32)


def bootstrap_values(statistic: Statistic, clips: int, *, resamples: int = RESAMPLES, seed: int) -> np.ndarray:
    """The values (..., resamples) of a statistic, in resamples of `clips` clips."""
    return np.concatenate([statistic(weights) for weights in draw_weights(clips, resamples, seed)], axis=-1)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """The middle `level` of (resamples,) values, without those that are NaN (resamples without a value).

    Raises UserError where the level does not lie between 0 and 1.
    """
    if not 0 < level < 1:
        raise UserError(f"level = {level} is not allowed: give a share between 0 and 1, such as 0.95.")
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Interval(float("nan"), float("nan"), level, len(values))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, len(values))


def bootstrap(
    statistic: Statistic,
    clips: int,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    correct_bias: bool = False,
    seed: int,
) -> Interval:
    """The percentile interval of a statistic of one value a resample, (N, R) -> (R,).

    correct_bias: move the interval by the bootstrap's estimate of bias, the observed value minus the mean of the
    resamples. Average precision needs it: a clip that is drawn twice takes two neighbouring ranks, so that resamples
    score higher than the clips they come from, the more the fewer positives a class has. (With 20 positives a class
    the plain interval can lie wholly above the observed value.)
    """
    values = bootstrap_values(statistic, clips, resamples=resamples, seed=seed)
    if correct_bias:
        values = values + (statistic(np.ones((clips, 1), dtype=np.float32))[0] - np.nanmean(values))
    return percentile_interval(values, level)


def paired_bootstrap(
    first: Statistic,
    second: Statistic,
    clips: int,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    correct_bias: bool = False,
    seed: int,
) -> Comparison:
    """Compare two systems, each scored on the same clips, by the difference first - second in the same resamples.

    The p value is twice the smaller share of differences on one side of zero, the observed one included (so that it
    is never 0), and at most 1. It agrees with the interval: where it is below 1 - level, zero lies outside.
    correct_bias: as bootstrap; two systems may have different biases, as one whose scores are all equal has none.
    """

    def difference(weights: np.ndarray) -> np.ndarray:
        return first(weights) - second(weights)

    observed = difference(np.ones((clips, 1), dtype=np.float32))
    values = bootstrap_values(difference, clips, resamples=resamples, seed=seed)
    if correct_bias:
        values = values + (observed[0] - np.nanmean(values))
    known = values[~np.isnan(values)]
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return Comparison(
        float(observed[0]), percentile_interval(values, level), min(1.0, float(2 * (tail + 1) / (len(known) + 1)))
    )


class WeightedAccuracy:
    """Accuracy as a statistic. right: (N,) bool, True where a clip's class was found."""

    def __init__(self, right: np.ndarray) -> None:
        self.right = right.astype(np.float32)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return (self.right @ weights).astype(np.float64) / len(self.right)  # a resample has N clips as well

    def affordable_resamples(self) -> int:
        return RESAMPLES


@dataclass(frozen=True)
class RankedClass:
    """The clips of one class in falling order of score, for average precision.

    A step is a score of at least one positive clip. drawn and positive are indicators (steps, N): of the clips that
    are added between the step before and this one, and of the step's positive clips.
    """

    drawn: csr_array
    positive: csr_array

    @classmethod
    def rank(cls, scores: np.ndarray, targets: np.ndarray) -> "RankedClass":
        """scores: (N,). targets: (N,) bool, with at least one True."""
        order = np.argsort(-scores, kind="stable").astype(np.int32)
        ranked = scores[order]
        last = np.append(ranked[1:] != ranked[:-1], True)  # of those with the same score: they share a threshold
        ends = np.flatnonzero(last) + 1
        count = np.add.reduceat(targets[order].astype(np.int64), np.append(0, ends[:-1]))  # positives of each score
        positive = order[targets[order]]
        return cls(
            _indicator(order, np.append(0, ends[count > 0]), len(order)),
            _indicator(positive, np.append(0, np.cumsum(count[count > 0])), len(order)),
        )

    @property
    def added(self) -> int:
        """The number of weights that a resample adds."""
        return self.drawn.nnz + self.positive.nnz

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """(N, R) weights -> (R,) average precision; NaN in a resample that holds no positive clip."""
        drawn = np.cumsum(self.drawn @ weights, axis=0, dtype=np.float64)  # (steps, R)
        found = (self.positive @ weights).astype(np.float64)
        true = np.cumsum(found, axis=0)
        precision = true / np.maximum(drawn, 1)  # where nothing was drawn yet, nothing was found
        with np.errstate(invalid="ignore"):
            return (found * precision).sum(axis=0) / true[-1]


class WeightedMeanAveragePrecision:
    """Macro average precision as a statistic, over the classes with positives in the resample.

    scores: (N, K). targets: (N, K) bool. Ties and weights count as in scikit-learn's average_precision_score with
    sample_weight; the tests compare with it.
    """

    def __init__(self, scores: np.ndarray, targets: np.ndarray) -> None:
        self.classes = [RankedClass.rank(scores[:, k], targets[:, k]) for k in np.flatnonzero(targets.any(axis=0))]

    def affordable_resamples(self) -> int:
        """RESAMPLES; fewer for very many clips, to stay within seconds, but at least FEWEST_RESAMPLES."""
        added = sum(ranked.added for ranked in self.classes)
        return int(np.clip(MOST_ADDED // max(added, 1), FEWEST_RESAMPLES, RESAMPLES))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return mean_of_known(np.array([ranked.average_precision(weights) for ranked in self.classes]))


ClipStatistic = WeightedAccuracy | WeightedMeanAveragePrecision


def clip_statistic(task: Task, scores: np.ndarray, targets: np.ndarray) -> ClipStatistic:
    """The main metric of a task as a statistic of (N, K) scores and (N, K) bool targets."""
    if task == "single_label":
        return WeightedAccuracy(scores.argmax(axis=1) == targets.argmax(axis=1))
    return WeightedMeanAveragePrecision(scores, targets)


class MeanStatistic:
    """The mean of several statistics of the same clips, as of the runs of several seeds."""

    def __init__(self, parts: Sequence[Statistic]) -> None:
        self.parts = parts

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return np.asarray(np.mean([part(weights) for part in self.parts], axis=0))


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """(K, R) -> (R,) means over the values that are not NaN; NaN where all are."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)


def with_interval(metrics: Sequence[Metric], scores: np.ndarray, targets: np.ndarray, *, seed: int) -> list[Metric]:
    """The metrics of (N, K) scores and (N, K) targets, mAP and accuracy with their 95 % bootstrap interval over clips.

    mAP's is corrected for bias. A metric without a value has no interval. With very many clips mAP has fewer resamples.
    """
    found: list[Metric] = []
    for metric in metrics:
        interval = None
        if metric.name == "mAP" and np.isfinite(metric.value):
            precision = WeightedMeanAveragePrecision(scores, targets)
            resamples = precision.affordable_resamples()
            moved = bootstrap(precision, len(scores), resamples=resamples, correct_bias=True, seed=seed)
            interval = replace(moved, low=max(moved.low, 0.0), high=min(moved.high, 1.0))
        elif metric.name == "acc" and np.isfinite(metric.value):
            right = WeightedAccuracy(scores.argmax(axis=1) == targets.argmax(axis=1))
            interval = bootstrap(right, len(scores), resamples=RESAMPLES, seed=seed)
        found.append(replace(metric, interval=interval))
    return found


def _indicator(clips: np.ndarray, starts: np.ndarray, count: int) -> csr_array:
    """The (rows, count) matrix whose row i has ones in the columns clips[starts[i]:starts[i + 1]]."""
    ones = np.ones(starts[-1], dtype=np.float32)
    return csr_array((ones, clips[: starts[-1]], starts.astype(np.int32)), shape=(len(starts) - 1, count))
