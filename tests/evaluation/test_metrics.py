"""Clip-level metrics against numbers computed by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.metrics import class_results, classification_metrics, frame_metric, tagging_metrics
from evaluation.tables import write_classes


def test_tagging_metrics_by_hand() -> None:
    """Class 0: ranks 1 and 3 of 4, AP (1 + 2/3) / 2, AUC 3/4. Class 1: perfect. Class 2: no positives."""
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.9, 0.5], [0.7, 0.2, 0.5], [0.1, 0.3, 0.5]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)
    metrics = tagging_metrics(scores, targets)
    assert [(m.name, m.classes, m.all_classes, m.clips) for m in metrics] == [
        ("mAP", 2, 3, 4),
        ("mAUC", 2, 3, 4),
        ("d_prime", 2, 3, 4),
    ]
    d_prime = np.sqrt(2) * 1.1503493803760079  # z(0.875)
    assert [m.value for m in metrics] == pytest.approx([(5 / 6 + 1) / 2, (0.75 + 1) / 2, d_prime])


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


def test_frame_map_by_hand() -> None:
    """Class 0: frames of both clips in one ranking, ranks 1 and 3 of 4; class 1 is never on."""
    scores = np.array([[[0.9, 0.1], [0.8, 0.1]], [[0.7, 0.1], [0.1, 0.1]]])
    targets = np.array([[[1, 0], [0, 0]], [[1, 0], [0, 0]]], dtype=bool)
    metric = frame_metric(scores, targets)
    assert (metric.value, metric.clips, metric.classes, metric.all_classes) == (pytest.approx(5 / 6), 2, 1, 2)


def test_results_of_each_class(tmp_path: Path) -> None:
    """One class a clip: two of three clips of a are right, the only one of b is not, c has none."""
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.6, 0.4, 0.0], [0.5, 0.1, 0.4]])
    targets = np.eye(3, dtype=bool)[[0, 0, 0, 1]]
    results = class_results("single_label", scores, targets, ["a", "b", "c"])
    assert results.confusion is not None
    assert results.confusion.tolist() == [[2, 1, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(results.values, [2 / 3, 0, np.nan])
    paths = write_classes(str(tmp_path / "test"), replace(results, labels=["=a", "b", "c\x1b"]))
    assert [path.name for path in paths] == ["test_classes.tsv", "test_confusion.tsv", "test_confusion.png"]
    lines = [[line.split("\t") for line in path.read_text().splitlines()] for path in paths[:2]]
    assert lines[0] == [
        ["class", "clips", "accuracy"],
        ["'=a", "3", "0.666667"],
        ["b", "1", "0.000000"],
        ["c\\x1b", "0", ""],
    ]
    assert lines[1][1] == ["'=a", "2", "1", "0"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    several = class_results("multilabel", scores, targets, ["a", "b", "c"])
    assert (several.metric, several.confusion, several.clips.tolist()) == ("average precision", None, [3, 1, 0])
    assert np.nanmean(several.values) == pytest.approx(tagging_metrics(scores, targets)[0].value)
    assert np.isnan(several.values[2])
