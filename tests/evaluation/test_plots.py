"""Figures of several systems."""

from itertools import combinations

from evaluation.metrics import Interval
from evaluation.plots import Point, cost_figure


def test_names_of_close_points_stay_apart() -> None:
    points = [Point(f"encoder {n}", 1e9 + 1e7 * n, 0.5 + 0.004 * n, Interval(0.3, 0.7, 0.95, 1000)) for n in range(5)]
    figure = cost_figure(points, "mAP")
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts]
    assert sorted(text.get_text() for text in axis.texts) == [point.name for point in points]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
