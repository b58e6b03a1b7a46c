"""Metrics against numbers computed by hand, and detection from end to end."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.detection import DetectionMetric, collar_f1, intersection_f1, psds1, score_tables
from evaluation.metrics import classification_metrics, tagging_metrics
from evaluation.postprocess import EVENT_COLUMNS, PostProcessing, active_runs, decode_events, truth_table
from evaluation.scores import Scores
from evaluation.tables import choose_postprocessing
from fl_evaluate import evaluate
from settings import resolve

STEP = 10 / 32
POST = PostProcessing(("a", "b", "c"))


def test_tagging_metrics_by_hand() -> None:
    """Class 0: ranks 1 and 3 of 4, AP (1 + 2/3) / 2, AUC 3/4. Class 1: perfect. Class 2: no positives."""
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.9, 0.5], [0.7, 0.2, 0.5], [0.1, 0.3, 0.5]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)
    mean_ap, mean_auc, d_prime = tagging_metrics(scores, targets)
    assert mean_ap.value == pytest.approx((5 / 6 + 1) / 2)
    assert mean_auc.value == pytest.approx((0.75 + 1) / 2)
    assert d_prime.value == pytest.approx(np.sqrt(2) * 1.1503493803760079)  # z(0.875)
    assert [(m.name, m.classes, m.all_classes, m.clips) for m in (mean_ap, mean_auc, d_prime)] == [
        ("mAP", 2, 3, 4),
        ("mAUC", 2, 3, 4),
        ("d_prime", 2, 3, 4),
    ]


def test_metrics_go_into_json() -> None:
    perfect = tagging_metrics(np.array([[0.9], [0.1]]), np.array([[1], [0]], dtype=bool))
    assert [metric.as_dict()["value"] for metric in perfect] == [1.0, 1.0, None]  # d' is infinite, JSON has no such


def test_a_class_that_is_always_there_has_no_auc() -> None:
    mean_ap, mean_auc, _ = tagging_metrics(np.array([[0.1], [0.2]]), np.ones((2, 1), dtype=bool))
    assert (mean_ap.value, mean_ap.classes, mean_auc.classes) == (1.0, 1, 0)
    assert np.isnan(mean_auc.value)


def test_accuracy() -> None:
    scores, targets = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), np.array([[1, 0], [0, 1], [0, 1]], dtype=bool)
    (accuracy,) = classification_metrics(scores, targets)
    assert (accuracy.name, accuracy.value, accuracy.clips) == ("acc", pytest.approx(2 / 3), 3)
    with pytest.warns(UserWarning, match="several"):
        classification_metrics(scores, np.ones((3, 2), dtype=bool))


def test_runs_and_events() -> None:
    active = np.array([[1, 0], [1, 0], [0, 1], [1, 1]], dtype=bool)
    runs = zip(*(column.tolist() for column in active_runs(active[None])), strict=True)
    assert list(runs) == [(0, 0, 0, 2), (0, 0, 3, 4), (0, 1, 2, 4)]
    found = decode_events(
        active[None].astype(float), names=["x.wav"], labels=["a", "b"], durations=np.array([1.75]),
        seconds_per_frame=0.5, thresholds=np.array([0.5]),
    )  # fmt: skip
    assert found.to_numpy().tolist() == [["x.wav", 0.0, 1.0, "a"], ["x.wav", 1.5, 1.75, "a"], ["x.wav", 1.0, 1.75, "b"]]
    cut = decode_events(
        active[None].astype(float), names=["x.wav"], labels=["a", "b"], durations=np.array([1.0]),
        seconds_per_frame=0.5, thresholds=np.array([0.5]),
    )  # fmt: skip
    assert cut.to_numpy().tolist() == [["x.wav", 0.0, 1.0, "a"]]


def random_scores(clips: int = 12) -> Scores:
    """Frame scores that are the truth on the grid, and the truth itself."""
    rng = np.random.default_rng(0)
    labels, framewise = ["a", "b", "c"], np.zeros((clips, 32, 3))
    events: list[list[tuple[int, float, float]]] = [[] for _ in range(clips)]
    for clip in range(clips):
        for label in range(2):  # class c never sounds
            onset = rng.uniform(0, 5)
            offset = onset + rng.uniform(2, 4.5)
            events[clip].append((label, onset, offset))
            framewise[clip, round(onset / STEP) : round(offset / STEP), label] = 1
    return Scores(
        names=[f"{clip}.wav" for clip in range(clips)],
        clipwise=framewise.max(axis=1),
        targets=framewise.max(axis=1) > 0,
        durations=np.full(clips, 10.0),
        labels=labels,
        framewise=framewise,
        seconds_per_frame=STEP,
        events=events,
        attributes={"dataset_type": "demo", "sample_rate": 32000, "fmin": 50.0, "clip_store": "gone.h5"},
    )


def by_name(metrics: list[DetectionMetric], name: str) -> DetectionMetric:
    return next(metric for metric in metrics if metric.name == name)


def test_truth_on_the_grid_scores_high() -> None:
    found, metrics = evaluate(random_scores(), POST)
    intersection, collar, psds = (by_name(metrics, name) for name in ("intersection F1", "collar F1", "PSDS1"))
    assert len(found) == 24
    assert intersection.macro == intersection.per_class["a"] == 1.0
    assert collar.macro > 0.9
    assert psds.macro > 0.95
    assert all(np.isnan(metric.per_class["c"]) for metric in (intersection, collar))


def test_nothing_found_scores_nothing() -> None:
    scores = random_scores()
    assert scores.framewise is not None
    scores.framewise[:] = 0
    found, metrics = evaluate(scores, POST)
    intersection, collar, psds = (by_name(metrics, name) for name in ("intersection F1", "collar F1", "PSDS1"))
    assert len(found) == 0
    assert (intersection.macro, collar.macro, psds.macro) == (0, 0, 0)


def test_detection_metrics_by_hand() -> None:
    """Truth 2-4 s. A detection 2.5-4.5 s: covers 75 % both ways (found at 0.5), but begins 500 ms late (no collar)."""
    truth = pd.DataFrame([("x", 2.0, 4.0, "a"), ("y", 1.0, 2.0, "a")], columns=EVENT_COLUMNS)
    framewise = np.zeros((2, 20, 1))
    framewise[0, 5:9], framewise[1, 2:4] = 1, 1
    where = {"names": ["x", "y"], "labels": ["a"], "durations": np.full(2, 10.0), "seconds_per_frame": 0.5}
    found = decode_events(framewise, thresholds=np.array([0.5]), **where)  # type: ignore[arg-type]
    durations = {"x": 10.0, "y": 10.0}
    assert intersection_f1(found, truth, durations, labels=["a"]).macro == 1.0
    tables = score_tables(framewise, **where)  # type: ignore[arg-type]
    collar = collar_f1(tables, truth, labels=["a"], thresholds=np.array([0.5]))
    assert collar.macro == pytest.approx(0.5)  # one of two detections, one of two events
    assert psds1(tables, truth, durations, labels=["a"]).macro == 1.0  # 75 % is over 0.7


def test_missing_parts_are_named() -> None:
    scores = random_scores()
    without_frames = Scores(**{**scores.__dict__, "framewise": None})
    with pytest.raises(ValueError, match="--fl_local True"):
        evaluate(without_frames, POST)
    with pytest.raises(ValueError, match="no true events"):
        evaluate(Scores(**{**scores.__dict__, "events": None}), POST)
    assert len(truth_table(scores.names, scores.events or [], scores.labels)) == 24


def test_what_is_given_stands_in_for_what_was_calibrated() -> None:
    calibrated = PostProcessing(("a", "b", "c"), (0.1, 0.2, 0.3), (1, 3, 5), source="calibrated")
    scores = replace(random_scores(), attributes={"postprocessing": json.dumps(calibrated.as_dict())})
    assert choose_postprocessing(scores, resolve()) == calibrated
    chosen = choose_postprocessing(scores, resolve({"fl_threshold": [0.7], "fl_maximum_gap": "0,0,1"}))
    assert (chosen.thresholds, chosen.median_filter, chosen.maximum_gap) == ((0.7, 0.7, 0.7), (1, 3, 5), (0, 0, 1))
    assert chosen.source == "calibrated, with fl_threshold, fl_maximum_gap as given"
    assert choose_postprocessing(random_scores(), resolve()).thresholds == (0.5, 0.5, 0.5)
    for given in ({"fl_interpolation": 0}, {"fl_threshold": [0.1, 0.2]}, {"fl_median_filter": [2]}):
        with pytest.raises(ValueError, match=r"interpolation|thresholds|median_filter"):
            choose_postprocessing(scores, resolve(given))
