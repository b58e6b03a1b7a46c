"""Metrics put together: by hand, their counts and intervals, notes, and two systems compared."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sed_scores_eval import collar_based

from evaluation.bootstrap import draw_weights
from evaluation.detection import DetectionMetric, Measured, System, compare, measure, with_intervals
from evaluation.event_tables import GroundTruth
from evaluation.postprocess import PostProcessing
from evaluation.score_tables import score_tables
from settings import UserError
from tests.evaluation.examples import events, measured, score_store

CLIPS = 30
LABELS = ["cat", "dog", "owl"]  # owl is never true


@pytest.fixture(scope="module")
def truth() -> GroundTruth:
    """A cat from 1 to 3 s and a dog from 5 to 6 s in each clip of 10 s."""
    rows = [row for c in range(CLIPS) for row in ((f"{c}", 1.0, 3.0, "cat"), (f"{c}", 5.0, 6.0, "dog"))]
    return GroundTruth.build(events(*rows), {f"{c}": 10.0 for c in range(CLIPS)}, LABELS)


def system(cats: int, dogs: int, owls: int = 0) -> System:
    """Finds the cat in the first `cats` clips, the dog in the first `dogs`, and owls where there are none."""
    rows = [(f"{c}", 1.0, 3.0, "cat") for c in range(cats)] + [(f"{c}", 5.0, 6.0, "dog") for c in range(dogs)]
    return System(events(*rows, *((f"{c}", 8.0, 9.0, "owl") for c in range(owls))))


def by_name(found: list[Measured], name: str) -> Measured:
    return next(each for each in found if each.metric.name == name)


def f1(found: int, false: int, positive: int) -> float:
    return 2 * found / (found + false + positive)


def test_scores_by_hand() -> None:
    """Truth 2-4 s. A detection 2.5-4.5 s: covers 75 % both ways (found at 0.7), but begins 500 ms late (no collar)."""
    framewise = np.zeros((2, 20, 1))
    framewise[0, 5:9], framewise[1, 2:4] = 1, 1
    found = measured(
        score_store(framewise, [[(0, 2.0, 4.0)], [(0, 1.0, 2.0)]], labels="a", step=0.5), PostProcessing(("a",))
    )
    assert found["intersection F1"].macro == found["intersection F1 0.7"].macro == found["PSDS1"].macro == 1.0
    assert found["collar F1"].macro == pytest.approx(0.5)  # one of two detections, one of two events


def test_every_metric_has_name_criterion_and_tool(truth: GroundTruth) -> None:
    found = measure(truth, system(20, 10, owls=5))
    about = [(each.metric.name, each.metric.criterion, each.metric.tool) for each in found]
    assert len(set(about)) == len(about) == 12
    assert all(name and criterion and tool for name, criterion, tool in about)
    collar = by_name(found, "collar F1").metric
    assert collar.per_class == pytest.approx(
        {"cat": f1(20, 0, 30), "dog": f1(10, 0, 30), "owl": float("nan")}, nan_ok=True
    )
    assert collar.macro == pytest.approx((f1(20, 0, 30) + f1(10, 0, 30)) / 2)  # without owl
    assert collar.micro == pytest.approx(f1(30, 5, 60))  # with its false positives
    assert vars(collar.counts["cat"]) == {
        "true_positives": 20, "false_positives": 0, "false_negatives": 10, "positives": 30,
    }  # fmt: skip
    segments = by_name(found, "segment error rate").metric
    assert segments.macro == pytest.approx((20 / 60 + 20 / 30) / 2)  # 10 missed cats of 2 segments, 20 missed dogs of 1
    assert segments.micro == pytest.approx((20 + 20 + 5) / 90)
    assert segments.unit == "segments"

    metrics = with_intervals(found, CLIPS, resamples=30, seed=1)
    content = json.loads(json.dumps([metric.as_dict() for metric in metrics], allow_nan=False))
    assert content[0]["per_class"]["owl"] is None
    assert set(content[0]["intervals"]) == {"macro", "micro", "cat", "dog"}
    assert content[8]["curve"]["rates"] == [pytest.approx(0.5 - 1 / 6)]  # mean less deviation of 2/3 and 1/3
    assert set(content[8]["class_curves"]) == {"cat", "dog"}
    assert not any(metric.intervals for metric in with_intervals(found, CLIPS, resamples=0, seed=1))


def test_intervals_are_of_the_resampled_clips(truth: GroundTruth) -> None:
    """The values of a resample, counted anew: the number of drawn clips with a cat that was found."""
    found = by_name(measure(truth, system(20, 10)), "clip F1")
    assert found.statistic is not None
    weights = next(draw_weights(CLIPS, 40, seed=3))
    cats = [f1(int(w[:20].sum()), 0, CLIPS) for w in weights.T]
    np.testing.assert_allclose(found.statistic(weights)[found.rows.index("cat")], cats)
    (metric,) = with_intervals([found], CLIPS, resamples=40, seed=3)
    interval = metric.intervals["cat"]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(cats, [0.025, 0.975])))
    assert metric.interval is metric.intervals["macro"]
    fewer = replace(found, resamples=25)  # of a metric that costs much
    assert with_intervals([fewer], CLIPS, resamples=40, seed=3)[0].intervals["macro"].resamples == 25


def test_comparison_of_two_systems(truth: GroundTruth) -> None:
    first, second = measure(truth, system(30, 30)), measure(truth, system(10, 30))
    compared = {(c.name, c.value): c for c in compare(first, second, CLIPS, resamples=200, seed=1)}
    assert not [name for name, _ in compared if name.startswith("PSDS")]  # a single operating point has no resamples
    clip = compared["clip F1", "macro"]
    assert (clip.first, clip.second) == (1.0, pytest.approx((f1(10, 0, 30) + 1) / 2))
    assert clip.comparison.difference == pytest.approx(clip.first - clip.second)
    assert clip.comparison.interval.low > 0
    assert clip.comparison.p_value < 0.05
    json.dumps(clip.as_dict(), allow_nan=False)


def test_classes_that_psds_eval_leaves_out_are_noted(truth: GroundTruth) -> None:
    metric = measure(truth, system(15, 0))[0].metric
    assert metric.macro == pytest.approx(f1(15, 0, 30) / 2)  # dog: 0
    assert "dog" in metric.note
    assert f"{f1(15, 0, 30):.4f}" in metric.note
    assert measure(truth, system(15, 1))[0].metric.note == ""


def test_detections_in_unknown_clips_are_refused(truth: GroundTruth) -> None:
    with pytest.raises(UserError, match="far, near"):
        measure(truth, System(events(("near", 0.0, 1.0, "cat"), ("far", 0.0, 1.0, "cat"), ("1", 0.0, 1.0, "cat"))))


def test_scores_and_events_agree(truth: GroundTruth) -> None:
    """Frame scores that make the same events: the collar F1 of sed_scores_eval is the one counted here."""
    scores = np.random.default_rng(0).random((CLIPS, 20, 3)).round(1)
    scores[:, 2:6, 0], scores[:20, 10:12, 1] = 1, 1
    targets = np.zeros((CLIPS, 3), dtype=bool)
    targets[:, 0], targets[:20, 1] = True, True
    tables = score_tables(scores, names=truth.names, labels=LABELS, durations=truth.durations, seconds_per_frame=0.5)
    frames = [(f"{c}", f / 2, f / 2 + 0.5, LABELS[k]) for c, f, k in np.argwhere(scores > 0.55).tolist()]
    found = GroundTruth.build(events(*frames), truth.seconds, LABELS).by_clip()  # joins frames that touch
    joined = events(*((name, *event) for name, clip in found.items() for event in clip))
    metrics = measure(truth, System(joined, tables=tables, clipwise=scores.max(axis=1), targets=targets))
    expected, *_ = collar_based.fscore(
        {name: table.drop(columns="owl") for name, table in tables.items()}, truth.by_clip(), 0.55,
        onset_collar=0.2, offset_collar=0.2, offset_collar_rate=0.2,
    )  # fmt: skip
    collar = by_name(metrics, "collar F1").metric
    assert collar.macro == pytest.approx(expected["macro_average"], abs=1e-9)
    assert 0 < collar.macro < 1
    assert [each.metric.name for each in metrics][-1] == "clip mAP"
    psds = by_name(metrics, "PSDS2")
    assert "all thresholds" in psds.metric.criterion
    (metric,) = with_intervals([psds], CLIPS, resamples=50, seed=1)
    assert set(metric.intervals) == {"macro", "cat", "dog"}
    assert metric.intervals["macro"].low <= metric.macro <= metric.intervals["macro"].high


@pytest.mark.parametrize("with_scores", [False, True])
def test_one_class_alone(truth: GroundTruth, with_scores: bool) -> None:
    """PSDS2 compares classes: it has no value with one. PSDS1 of scores is that class's area."""
    cats = GroundTruth.build(truth.table[truth.table.event_label == "cat"], truth.seconds, LABELS)
    scores = np.random.default_rng(0).random((CLIPS, 20, 3))
    tables = score_tables(scores, names=truth.names, labels=LABELS, durations=truth.durations, seconds_per_frame=0.5)
    single = System(system(20, 0).events, tables=tables if with_scores else None)
    metrics = with_intervals(measure(cats, single), CLIPS, resamples=20, seed=1)
    first, second = (next(m for m in metrics if m.name == name) for name in ("PSDS1", "PSDS2"))
    assert np.isnan(second.macro)
    assert "only one" in second.note
    assert first.macro == first.per_class["cat"] if with_scores else np.isnan(first.macro)


def test_a_resample_without_events_has_no_value() -> None:
    one = GroundTruth.build(events(("0", 0.0, 1.0, "cat")), {"0": 5.0, "1": 5.0}, ["cat", "dog"])
    found = System(events(("0", 0.0, 1.0, "cat"), ("1", 0.0, 1.0, "cat")))
    rates = by_name(measure(one, found), "segment error rate").statistic
    assert rates is not None
    values = rates(np.array([[1, 0], [1, 2]], dtype=np.float32))
    np.testing.assert_array_equal(values, [[1, np.nan], [1, np.nan], [1, np.nan], [np.nan, np.nan]])


def test_clip_map_without_positives_has_no_value(truth: GroundTruth) -> None:
    nothing = replace(system(3, 3), clipwise=np.zeros((CLIPS, 3)), targets=np.zeros((CLIPS, 3), dtype=bool))
    found = measure(truth, nothing)[-1]
    assert np.isnan(found.metric.macro)
    assert found.statistic is None


def test_a_plain_metric_needs_only_its_name() -> None:
    metric = DetectionMetric("F1", "some", "mine", float("nan"), {"cat": 0.5})
    assert (metric.as_dict()["macro"], metric.interval, metric.micro) == (None, None, None)
