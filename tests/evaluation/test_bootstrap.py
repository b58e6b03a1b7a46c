"""Bootstrap intervals: weighted metrics against scikit-learn, intervals against theory, pairs against their signs."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from evaluation.bootstrap import (
    BLOCK,
    FEWEST_RESAMPLES,
    RankedClass,
    WeightedAccuracy,
    WeightedMeanAveragePrecision,
    bootstrap,
    bootstrap_values,
    draw_weights,
    paired_bootstrap,
    percentile_interval,
    with_interval,
)
from evaluation.metrics import classification_metrics, tagging_metrics
from settings import UserError


@pytest.mark.parametrize("different_scores", [3, 20, 10**9])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_weighted_average_precision_is_scikit_learns(different_scores: int, share: float) -> None:
    rng = np.random.default_rng(different_scores)
    scores = rng.integers(different_scores, size=200) / different_scores
    targets = rng.random(200) < share
    targets[7] = True
    weights = np.concatenate(list(draw_weights(200, 30, seed=1)), axis=1)
    found = RankedClass.rank(scores, targets).average_precision(weights)
    for value, weight in zip(found, weights.T, strict=True):
        if weight[targets].sum() == 0:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(average_precision_score(targets, scores, sample_weight=weight), abs=1e-12)


def test_mean_average_precision_is_without_classes_that_a_resample_lost() -> None:
    """Class 0 has one positive clip, class 1 is perfect, class 2 has no positives at all."""
    scores = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.5, 0.2, 0.5]])
    targets = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=bool)
    weights = np.array([[1, 1, 1], [0, 1, 2], [2, 1, 0], [0, 3, 0]], dtype=np.float32).T
    found = WeightedMeanAveragePrecision(scores, targets)(weights)
    np.testing.assert_allclose(found, [(1 / 3 + 1) / 2, np.nan, (2 / 3 + 1) / 2, np.nan])  # nan: no positive is left
    (mean_ap, *_) = tagging_metrics(scores, targets)
    assert mean_ap.value == pytest.approx(found[0])


def test_interval_of_a_mean_is_the_normal_one() -> None:
    """The 95 % interval of an accuracy of 0.8 over 2,500 clips is 0.8 +- 1.96 sqrt(0.16 / 2500)."""
    right = np.arange(2500) % 5 != 0
    interval = bootstrap(WeightedAccuracy(right), 2500, resamples=2000, seed=3)
    assert interval.low == pytest.approx(0.8 - 1.96 * 0.008, abs=0.0015)
    assert interval.high == pytest.approx(0.8 + 1.96 * 0.008, abs=0.0015)
    narrow = bootstrap(WeightedAccuracy(right), 2500, resamples=2000, level=0.5, seed=3)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * 0.008, abs=0.0015)
    assert (narrow.level, narrow.resamples) == (0.5, 2000)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    """60 samples of 200 clips with accuracy 0.7: the number of intervals that hold it is binomial(60, about 0.94)."""
    rng = np.random.default_rng(5)
    hit = 0
    for seed in range(60):
        interval = bootstrap(WeightedAccuracy(rng.random(200) < 0.7), 200, resamples=300, seed=seed)
        hit += interval.low <= 0.7 <= interval.high
    assert 50 <= hit <= 60


def test_resamples_depend_on_the_seed_alone() -> None:
    def first_clips(weights: np.ndarray) -> np.ndarray:
        assert weights.sum(axis=0).tolist() == [30.0] * weights.shape[1]
        return weights[:5]

    few = bootstrap_values(first_clips, 30, resamples=10, seed=1)
    many = bootstrap_values(first_clips, 30, resamples=BLOCK + 10, seed=1)
    assert many.shape == (5, BLOCK + 10)
    np.testing.assert_array_equal(few, many[:, :10])
    assert (bootstrap_values(first_clips, 30, resamples=10, seed=2) != few).any()


def test_pairs_find_a_difference_that_separate_intervals_hide() -> None:
    """The second system is right wherever the first is, and in some 3 % of the clips besides."""
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.7
    second = first | (rng.random(400) < 0.1)
    one, other = WeightedAccuracy(first), WeightedAccuracy(second)
    found = paired_bootstrap(other, one, 400, seed=1)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert 0 < found.interval.low < found.difference < found.interval.high
    assert found.p_value == pytest.approx(2 / 1001)
    swapped = paired_bootstrap(one, other, 400, seed=1)
    assert (swapped.difference, swapped.p_value) == (pytest.approx(-found.difference), found.p_value)
    assert bootstrap(one, 400, seed=1).high > bootstrap(other, 400, seed=1).low


def test_equal_systems_do_not_differ() -> None:
    right = np.arange(50) % 3 == 0
    found = paired_bootstrap(WeightedAccuracy(right), WeightedAccuracy(right), 50, seed=0)
    assert (found.difference, found.interval.low, found.interval.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    turned = WeightedAccuracy(np.roll(right, 1))  # equally often right, in other clips
    assert paired_bootstrap(WeightedAccuracy(right), turned, 50, seed=0).p_value > 0.3


def test_p_value_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(8)
    inside = []
    for seed in range(20):
        first, second = (WeightedAccuracy(rng.random(100) < share) for share in (0.6, 0.7))
        found = paired_bootstrap(first, second, 100, resamples=500, seed=seed)
        inside.append(found.interval.low <= 0 <= found.interval.high)
        if abs(found.p_value - 0.05) > 0.01:  # at the edge the two count one resample differently
            assert inside[-1] == (found.p_value > 0.05)
    assert 0 < sum(inside) < 20


def test_values_that_are_missing_and_mistakes() -> None:
    assert percentile_interval(np.array([np.nan, 1.0, 2.0, 3.0]), level=0.5).low == pytest.approx(1.5)
    assert np.isnan(percentile_interval(np.full(3, np.nan)).high)
    with pytest.raises(UserError, match="level = 95"):
        percentile_interval(np.ones(3), level=95)
    with pytest.raises(UserError, match="at least one clip"):
        bootstrap(WeightedAccuracy(np.zeros(0)), 0, seed=0)


def test_metrics_carry_their_intervals() -> None:
    rng = np.random.default_rng(1)
    targets = rng.random((80, 4)) < 0.3
    scores = rng.random((80, 4)) + 0.5 * targets
    mean_ap, mean_auc, d_prime = with_interval(tagging_metrics(scores, targets), scores, targets, seed=0)
    assert mean_ap.interval is not None
    assert 0 < mean_ap.interval.low < mean_ap.value < mean_ap.interval.high < 1
    assert (mean_ap.interval.level, mean_ap.interval.resamples) == (0.95, 1000)
    assert mean_ap.as_dict()["interval"].keys() == {"low", "high", "level", "resamples"}
    assert mean_auc.interval is d_prime.interval is None

    one_hot = np.eye(4, dtype=bool)[rng.integers(4, size=80)]
    (accuracy,) = with_interval(classification_metrics(scores, one_hot), scores, one_hot, seed=0)
    assert accuracy.interval is not None
    assert accuracy.interval.low <= accuracy.value <= accuracy.interval.high

    nothing = np.zeros((5, 2), dtype=bool)
    empty = with_interval(tagging_metrics(np.zeros((5, 2)), nothing), np.zeros((5, 2)), nothing, seed=0)
    assert [metric.interval for metric in empty] == [None, None, None]


def test_bias_of_average_precision_is_corrected() -> None:
    """60 classes of some 10 positives: the plain interval misses what was observed, the corrected one holds it."""
    rng = np.random.default_rng(0)
    targets = rng.random((1000, 60)) < 0.01
    scores = rng.normal(size=(1000, 60)) + 1.5 * targets
    (observed, *_) = with_interval(tagging_metrics(scores, targets), scores, targets, seed=0)
    plain = bootstrap(WeightedMeanAveragePrecision(scores, targets), 1000, resamples=1000, seed=0)
    assert observed.interval is not None
    assert observed.interval.low < observed.value < observed.interval.high < plain.high
    assert plain.low > observed.value
    width = observed.interval.high - observed.interval.low
    assert width == pytest.approx(plain.high - plain.low)


def test_very_many_clips_get_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = np.ones((100, 1), dtype=bool)
    precision = WeightedMeanAveragePrecision(np.arange(100.0)[:, None], targets)
    assert precision.affordable_resamples() == 1000
    monkeypatch.setattr("evaluation.bootstrap.MOST_ADDED", 200 * 500)
    assert precision.affordable_resamples() == 500
    monkeypatch.setattr("evaluation.bootstrap.MOST_ADDED", 1)
    assert precision.affordable_resamples() == FEWEST_RESAMPLES
