"""Named metrics put together: what they carry, their intervals, notes, and two systems compared."""

import json

import numpy as np
import pandas as pd
import pytest

from evaluation.bootstrap import draw_weights
from evaluation.detection import (
    DetectionMetric,
    Measured,
    System,
    collar_f1,
    compare,
    intersection_f1,
    measure,
    score_tables,
    with_intervals,
)
from evaluation.event_tables import GroundTruth
from evaluation.postprocess import EVENT_COLUMNS

CLIPS = 30
LABELS = ["cat", "dog", "owl"]  # owl is never true


def events(*rows: tuple[str, float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=EVENT_COLUMNS)


@pytest.fixture
def truth() -> GroundTruth:
    """A cat from 1 to 3 s and a dog from 5 to 6 s in each clip of 10 s."""
    rows = [row for c in range(CLIPS) for row in ((f"{c}", 1.0, 3.0, "cat"), (f"{c}", 5.0, 6.0, "dog"))]
    return GroundTruth.build(events(*rows), {f"{c}": 10.0 for c in range(CLIPS)}, LABELS)


def system(cats: int, dogs: int, owls: int = 0) -> System:
    """Finds the cat in the first `cats` clips, the dog in the first `dogs`, and owls where there are none."""
    rows = [(f"{c}", 1.0, 3.0, "cat") for c in range(cats)] + [(f"{c}", 5.0, 6.0, "dog") for c in range(dogs)]
    return System(events(*rows, *((f"{c}", 8.0, 9.0, "owl") for c in range(owls))))


def by_name(measured: list[Measured], name: str) -> Measured:
    return next(each for each in measured if each.metric.name == name)


def f1(found: int, false: int, positive: int) -> float:
    return 2 * found / (found + false + positive)


def test_every_metric_says_what_it_is(truth: GroundTruth) -> None:
    measured = measure(truth, system(20, 10, owls=5))
    about = [(each.metric.name, each.metric.criterion, each.metric.tool) for each in measured]
    assert len(set(about)) == len(about) == 10
    assert all(name and criterion and tool for name, criterion, tool in about)
    collar = by_name(measured, "collar F1").metric
    assert collar.per_class["cat"] == pytest.approx(f1(20, 0, 30))
    assert collar.per_class["dog"] == pytest.approx(f1(10, 0, 30))
    assert np.isnan(collar.per_class["owl"])
    assert collar.macro == pytest.approx((f1(20, 0, 30) + f1(10, 0, 30)) / 2)  # without owl
    assert collar.micro == pytest.approx(f1(30, 5, 60))  # with its false positives
    assert vars(collar.counts["cat"]) == {
        "true_positives": 20, "false_positives": 0, "false_negatives": 10, "positives": 30,
    }  # fmt: skip
    segments = by_name(measured, "segment error rate").metric
    assert segments.macro == pytest.approx((20 / 60 + 20 / 30) / 2)  # 10 missed cats of 2 segments, 20 missed dogs of 1
    assert segments.micro == pytest.approx((20 + 20 + 5) / 90)
    assert segments.unit == "segments"


def test_metrics_go_into_json(truth: GroundTruth) -> None:
    metrics = with_intervals(measure(truth, system(20, 10, owls=5)), CLIPS, resamples=30, seed=1)
    content = json.loads(json.dumps([metric.as_dict() for metric in metrics], allow_nan=False))
    assert content[0]["per_class"]["owl"] is None
    assert set(content[0]["intervals"]) == {"macro", "micro", "cat", "dog"}
    assert content[6]["curve"]["rates"] == [pytest.approx(0.5 - 1 / 6)]  # mean less deviation of 2/3 and 1/3
    assert set(content[6]["class_curves"]) == {"cat", "dog"}


def test_intervals_are_of_the_resampled_clips(truth: GroundTruth) -> None:
    """The values of a resample, counted anew: so many clips with a cat that was found."""
    measured = by_name(measure(truth, system(20, 10)), "clip F1")
    assert measured.statistic is not None
    weights = next(draw_weights(CLIPS, 40, seed=3))
    cats = [f1(int(w[:20].sum()), 0, CLIPS) for w in weights.T]
    np.testing.assert_allclose(measured.statistic(weights)[measured.rows.index("cat")], cats)
    (metric,) = with_intervals([measured], CLIPS, resamples=40, seed=3)
    assert metric.intervals["cat"].low == pytest.approx(np.quantile(cats, 0.025))
    assert metric.intervals["cat"].high == pytest.approx(np.quantile(cats, 0.975))
    assert metric.interval is metric.intervals["macro"]


def test_fewer_resamples_where_they_cost_much(truth: GroundTruth) -> None:
    measured = by_name(measure(truth, system(20, 10)), "collar F1")
    cheap = Measured(measured.metric, measured.rows, measured.statistic, resamples=25)
    assert with_intervals([cheap], CLIPS, resamples=40, seed=3)[0].intervals["macro"].resamples == 25


def test_comparison_of_two_systems(truth: GroundTruth) -> None:
    first, second = measure(truth, system(30, 30)), measure(truth, system(10, 30))
    compared = {(c.name, c.criterion, c.value): c for c in compare(first, second, CLIPS, resamples=200, seed=1)}
    assert not [name for name, _, _ in compared if name.startswith("PSDS")]  # a single operating point has no resamples
    clip = compared["clip F1", "clips have the classes of their events", "macro"]
    assert (clip.first, clip.second) == (1.0, pytest.approx((f1(10, 0, 30) + 1) / 2))
    assert clip.comparison.difference == pytest.approx(clip.first - clip.second)
    assert clip.comparison.interval.low > 0
    assert clip.comparison.p_value < 0.05
    json.dumps(clip.as_dict(), allow_nan=False)


def test_what_psds_eval_leaves_out_is_noted(truth: GroundTruth) -> None:
    metric = measure(truth, system(15, 0))[0].metric
    assert metric.macro == pytest.approx(f1(15, 0, 30) / 2)  # dog: 0
    assert metric.note == f"Counts 0 for dog; psds_eval's own mean leaves such classes out and is {f1(15, 0, 30):.4f}."
    assert measure(truth, system(15, 1))[0].metric.note == ""


def test_detections_in_unknown_clips_are_refused(truth: GroundTruth) -> None:
    with pytest.raises(ValueError, match="detections has events in clips that the durations do not know: far, near"):
        measure(truth, System(events(("near", 0.0, 1.0, "cat"), ("far", 0.0, 1.0, "cat"), ("1", 0.0, 1.0, "cat"))))
    with pytest.raises(ValueError, match="do not know: far"):
        intersection_f1(events(("far", 0.0, 1.0, "cat")), truth.table, truth.seconds, labels=LABELS)


def test_scores_and_events_agree(truth: GroundTruth) -> None:
    """Frame scores that make the same events: the collar F1 of sed_scores_eval is the one counted here."""
    rng = np.random.default_rng(0)
    scores = rng.random((CLIPS, 20, 3)).round(1)
    scores[:, 2:6, 0], scores[:20, 10:12, 1] = 1, 1
    tables = score_tables(scores, names=truth.names, labels=LABELS, durations=truth.durations, seconds_per_frame=0.5)
    rows = []
    for clip, frame, k in np.argwhere(scores > 0.55).tolist():
        rows.append((f"{clip}", frame / 2, frame / 2 + 0.5, LABELS[k]))
    found = GroundTruth.build(events(*rows), truth.seconds, LABELS).by_clip()  # joins frames that touch
    joined = events(*((name, *event) for name, clip in found.items() for event in clip))
    measured = measure(truth, System(joined, tables=tables, clipwise=scores.max(axis=1), targets=target(truth)))
    expected = collar_f1(tables, truth.table, labels=LABELS, thresholds=np.array([0.55]))
    collar = by_name(measured, "collar F1").metric
    assert collar.macro == pytest.approx(expected.macro, abs=1e-9)
    assert 0 < collar.macro < 1
    assert [each.metric.name for each in measured][-1] == "clip mAP"
    psds = by_name(measured, "PSDS2")
    assert "all thresholds" in psds.metric.criterion
    (metric,) = with_intervals([psds], CLIPS, resamples=50, seed=1)
    assert set(metric.intervals) == {"macro", "cat", "dog"}
    assert metric.intervals["macro"].low <= metric.macro <= metric.intervals["macro"].high


def target(truth: GroundTruth) -> np.ndarray:
    targets = np.zeros((CLIPS, 3), dtype=bool)
    targets[:, 0], targets[:20, 1] = True, True
    return targets


def test_one_class_alone(truth: GroundTruth) -> None:
    """PSDS2 compares classes: it has no value with one. PSDS1 of scores is that class's area."""
    cats = GroundTruth.build(truth.table[truth.table.event_label == "cat"], truth.seconds, LABELS)
    scores = np.random.default_rng(0).random((CLIPS, 20, 3))
    tables = score_tables(scores, names=truth.names, labels=LABELS, durations=truth.durations, seconds_per_frame=0.5)
    for single in (system(20, 0), System(system(20, 0).events, tables=tables)):
        metrics = with_intervals(measure(cats, single), CLIPS, resamples=20, seed=1)
        first, second = (next(m for m in metrics if m.name == name) for name in ("PSDS1", "PSDS2"))
        assert np.isnan(second.macro)
        assert second.note == "No value: it compares classes, and only one has true events."
        assert np.isnan(first.macro) if single.tables is None else first.macro == first.per_class["cat"]


def test_a_resample_without_events_has_no_value() -> None:
    one = GroundTruth.build(events(("0", 0.0, 1.0, "cat")), {"0": 5.0, "1": 5.0}, ["cat", "dog"])
    found = System(events(("0", 0.0, 1.0, "cat"), ("1", 0.0, 1.0, "cat")))
    rates = by_name(measure(one, found), "segment error rate").statistic
    assert rates is not None
    values = rates(np.array([[1, 0], [1, 2]], dtype=np.float32))
    np.testing.assert_array_equal(values, [[1, np.nan], [1, np.nan], [1, np.nan], [np.nan, np.nan]])


def test_a_plain_metric_needs_no_more_than_its_name() -> None:
    metric = DetectionMetric("F1", "some", "mine", float("nan"), {"cat": 0.5})
    assert (metric.as_dict()["macro"], metric.interval, metric.micro) == (None, None, None)
