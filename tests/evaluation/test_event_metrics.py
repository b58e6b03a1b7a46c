"""Counts of events and PSDS: by hand on small cases, against psds_eval and sed_scores_eval on random ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
from psds_eval import PSDSEval
from sed_scores_eval import collar_based, intersection_based, segment_based
from sed_scores_eval.base_modules.curves import staircase_auc
from sed_scores_eval.base_modules.detection import scores_to_event_list
from sed_scores_eval.base_modules.scores import create_score_dataframe
from sklearn.metrics import f1_score

from evaluation.detection import System, measure
from evaluation.event_metrics import (
    ClipCounts,
    CountStatistic,
    Formula,
    clip_counts,
    collar_counts,
    error_rate_of,
    f1_of,
    intersection_counts,
    segment_counts,
)
from evaluation.event_tables import EventSet, GroundTruth, join_overlapping
from evaluation.postprocess import EVENT_COLUMNS
from evaluation.psds import PSDS1, PSDS2, PsdsFromScores, PsdsStatistic, Scenario, psds_from_operating_points
from tests.evaluation.examples import events

LABELS = ["cat", "dog", "owl", "silent"]  # silent: detected, never true
SEEDS = range(4)
scenarios = pytest.mark.parametrize("scenario", [PSDS1, PSDS2], ids=lambda scenario: scenario.name)


def sums(counts: ClipCounts) -> list[tuple[int, int, int]]:
    """True positives, false positives and positives of each class."""
    parts = (counts.found, counts.false, counts.positive)
    return list(zip(*(part.sum(axis=0).tolist() for part in parts), strict=True))


def values_of(counts: ClipCounts, formula: Formula = f1_of) -> np.ndarray:
    """(2 + K,): macro, micro, and each class, with every clip drawn once."""
    return CountStatistic(counts, formula)(np.ones((len(counts.found), 1), dtype=np.float32))[:, 0]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_detection_after_the_end_of_its_clip_is_not_counted() -> None:
    truth = GroundTruth.build(events(("x", 2, 4, "cat"), ("x", 6, 10, "cat")), {"x": 10.0, "y": 5.0}, ["cat"])
    found = events(("y", 5.5, 6, "cat"), ("y", 4.5, 7, "cat"))
    assert intersection_counts(truth.index(found), truth, 0.5).false.tolist() == [[0], [1]]


def test_collar_by_hand() -> None:
    """A 10 s event allows 2 s at its offset, a 0.5 s event 200 ms; the best pairing finds both that interlock."""
    true = events(("x", 0, 10, "cat"), ("x", 20, 20.5, "cat"), ("y", 1.0, 2.0, "dog"), ("y", 1.3, 2.2, "dog"))
    truth = GroundTruth(["x", "y"], np.array([30.0, 10.0]), ["cat", "dog"], true)
    late = [("x", 0.2, 12, "cat"), ("x", 20, 20.71, "cat"), ("y", 1.15, 2.1, "dog"), ("y", 0.9, 2.0, "dog")]
    assert sums(collar_counts(truth.index(events(*late)), truth)) == [(1, 1, 2), (2, 0, 2)]


def test_segments_by_hand() -> None:
    """x has segments 0-1, 1-2, 2-2.5 s. cat is true in the first two, dog in the last; cat is found in the last two."""
    truth = GroundTruth.build(
        events(("x", 0.2, 1.5, "cat"), ("x", 2.2, 4.0, "dog")), {"x": 2.5, "y": 1.0}, ["cat", "dog"]
    )
    counts = segment_counts(truth.index(events(("x", 1.9, 9.0, "cat"))), truth)
    assert sums(counts) == [(1, 1, 2), (0, 0, 1)]
    assert counts.errors is not None
    assert counts.errors.tolist() == [2, 0]  # cat missed in the first; cat for dog in the last: one substitution
    assert values_of(counts, error_rate_of) == pytest.approx([(1 + 1) / 2, 2 / 3, 1, 1])  # macro, micro, cat, dog
    assert values_of(counts) == pytest.approx([0.25, 2 / (2 + 1 + 2), 0.5, 0])


def test_clips_are_scikit_learns() -> None:
    true, found, durations = random_tables(3)
    truth = GroundTruth.build(true, durations, LABELS)
    tags = [
        np.array([[((t.filename == n) & (t.event_label == k)).any() for k in LABELS] for n in durations])
        for t in (true, found)
    ]
    values = values_of(clip_counts(truth.index(found), truth))
    assert values[1] == pytest.approx(f1_score(*tags, average="micro"), abs=1e-12)
    np.testing.assert_allclose(values[2:5], f1_score(*tags, average=None, zero_division=0)[:3], atol=1e-12)
    assert values[0] == pytest.approx(values[2:5].mean())
    assert np.isnan(values[5])


def test_weights_count_clips_again() -> None:
    """Clip 0 has one event that is found, clip 1 one that is missed, clip 2 a false one and the only dog, found."""
    counts = ClipCounts(
        "events", np.array([[1, 0], [0, 0], [0, 1]]), np.array([[0, 0], [0, 0], [1, 0]]),
        np.array([[1, 0], [1, 0], [0, 1]]),
    )  # fmt: skip
    weights = np.array([[1, 1, 1], [3, 0, 0], [0, 0, 3], [1, 2, 0]], dtype=np.float32).T
    values = CountStatistic(counts, f1_of)(weights)
    cat = [2 / (1 + 1 + 2), 6 / (3 + 3), np.nan, 2 / (1 + 3)]
    expected = [[0.75, 1, 1, 0.5], [4 / 6, 1, 6 / 9, 0.5], cat, [1, np.nan, 1, np.nan]]
    np.testing.assert_allclose(values, expected)


# --- against the tools -----------------------------------------------------------------------------------------------


def random_tables(seed: int, *, grid: float = 0.0) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]:
    """True and detected events that overlap within a class and run over their clips' ends; clips without events.

    grid: seconds to which times are rounded, so that criteria are met exactly.
    """
    rng = np.random.default_rng(seed)
    durations = {f"{clip}.wav": float(rng.integers(20, 101)) / 10 for clip in range(12)}

    def on_grid(seconds: float) -> float:
        return round(round(seconds / grid) * grid, 6) if grid else seconds

    true: list[tuple[str, float, float, str]] = []
    found: list[tuple[str, float, float, str]] = []
    for name, duration in list(durations.items())[:10]:
        for _ in range(rng.integers(0, 6)):
            onset = on_grid(rng.uniform(0, duration * 0.9))
            offset = onset + on_grid(rng.uniform(0.4, 4))
            label = LABELS[rng.integers(3)]
            true.append((name, onset, offset, label))
            for _ in range(rng.integers(0, 3)):
                shift = rng.uniform(-0.35, 0.35, 2)
                began = max(on_grid(onset + shift[0]), 0.0)
                found.append((name, began, max(on_grid(offset + shift[1]), began + 0.1), label))
    for name, duration in list(durations.items())[1:]:
        for _ in range(rng.integers(0, 4)):
            onset = on_grid(rng.uniform(0, duration * 1.1))
            found.append((name, onset, onset + on_grid(rng.uniform(0.3, 3)), LABELS[rng.integers(4)]))
    return events(*true), events(*found), durations


def joined(table: pd.DataFrame, *, touching: bool) -> pd.DataFrame:
    """The union of overlapping events, one interval after the other."""
    rows: list[list] = []
    for row in sorted(map(list, table.itertuples(index=False)), key=lambda r: (r[0], r[3], r[1], r[2])):
        if rows and rows[-1][::3] == row[::3] and (row[1] < rows[-1][2] or (touching and row[1] == rows[-1][2])):
            rows[-1][2] = max(rows[-1][2], row[2])
        else:
            rows.append(row)
    return pd.DataFrame(rows, columns=EVENT_COLUMNS)


def as_scores(table: pd.DataFrame, durations: dict[str, float], labels: list[str]) -> dict[str, pd.DataFrame]:
    """Events as score tables: 1 where a class is on, with frames that begin where anything changes."""
    tables = {}
    for name, duration in durations.items():
        mine = table[table.filename == name]
        times = np.unique([0, duration, *mine.onset, *mine.offset])
        scores = np.zeros((len(times) - 1, len(labels)))
        for _, onset, offset, label in mine.to_numpy().tolist():
            scores[(times[:-1] >= onset) & (times[1:] <= offset), labels.index(label)] = 1
        tables[name] = create_score_dataframe(scores, times, labels)
    return tables


def as_lists(table: pd.DataFrame, durations: dict[str, float]) -> dict[str, list[tuple[float, float, str]]]:
    mine = {name: table[table.filename == name] for name in durations}
    return {name: list(t[["onset", "offset", "event_label"]].itertuples(index=False)) for name, t in mine.items()}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grid", [0.0, 0.1, 0.25])
def test_overlapping_events_are_joined(seed: int, grid: float) -> None:
    true, found, _ = random_tables(seed, grid=grid)
    for table in (true, found):
        for touching in (False, True):
            expected = joined(table, touching=touching)
            pd.testing.assert_frame_equal(join_overlapping(table, touching=touching), expected)
    assert len(join_overlapping(found)) < len(found)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grid", [0.0, 0.25])
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_intersection_is_psds_evals(seed: int, grid: float, share: float) -> None:
    true, found, durations = random_tables(seed, grid=grid)
    truth = GroundTruth.build(true, durations, LABELS)
    counts = intersection_counts(truth.index(join_overlapping(found)), truth, share)
    metadata = pd.DataFrame({"filename": list(durations), "duration": list(durations.values())})
    judge = PSDSEval(share, share, 0.3, ground_truth=joined(true, touching=False), metadata=metadata)
    known = found[found.event_label != "silent"]
    macro, by_class = judge.compute_macro_f_score(joined(known, touching=False))
    expected = np.array([by_class[label] for label in LABELS[:3]])
    values = values_of(counts)
    np.testing.assert_allclose(values[2:5], np.nan_to_num(expected), atol=1e-9)  # psds_eval: NaN where nothing is found
    if not np.isnan(expected).any():
        assert values[0] == pytest.approx(macro, abs=1e-9)
    assert counts.positive.sum() == len(joined(true, touching=False))


COUNTS: dict[str, Callable[[EventSet, GroundTruth], ClipCounts]] = {
    "intersection": partial(intersection_counts, share=0.5),
    "collar": collar_counts,
    "onsets": partial(collar_counts, offsets=False),
    "segments": segment_counts,
}
CASES = [(name, grid) for name in COUNTS for grid in (0.0, 0.1, 0.25)]
CASES.remove(("intersection", 0.1))  # where a criterion is met exactly, psds_eval's rounding decides
FSCORE: dict[str, Callable[..., tuple]] = {
    "intersection": partial(intersection_based.fscore, threshold=0.5, dtc_threshold=0.5, gtc_threshold=0.5),
    "collar": partial(collar_based.fscore, threshold=0.5, onset_collar=0.2, offset_collar=0.2, offset_collar_rate=0.2),
    "onsets": partial(collar_based.fscore, threshold=0.5, onset_collar=0.2, offset_collar=np.inf),
    "segments": partial(segment_based.fscore, threshold=0.5, segment_length=1.0),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("criterion", "grid"), CASES)
def test_counts_are_sed_scores_evals(criterion: str, grid: float, seed: int) -> None:
    true, found, durations = random_tables(seed, grid=grid)
    labels = LABELS[:3]
    if criterion == "intersection":
        durations = dict.fromkeys(durations, 13.0)  # sed_scores_eval counts detections after a clip's end
    # It knows neither classes without true events, nor events that touch.
    true, found = joined(true, touching=True), joined(found[found.event_label != "silent"], touching=True)
    truth = GroundTruth.build(true, durations, labels)
    counts = COUNTS[criterion](truth.index(found), truth)
    given: dict[str, Any] = {"scores": as_scores(found, durations, labels), "ground_truth": as_lists(true, durations)}
    if criterion == "segments":
        given["audio_durations"] = durations
        rates, *_ = segment_based.error_rate(**given, threshold=0.5, segment_length=1.0)
        expected = [rates["macro_average"], *(rates[label] for label in labels)]
        np.testing.assert_allclose(np.delete(values_of(counts, error_rate_of), 1), expected, atol=1e-9)
    f1, _, _, statistics = FSCORE[criterion](**given)
    assert sums(counts) == [tuple(statistics[label][name] for name in ("tps", "fps", "n_ref")) for label in labels]
    expected = [f1["macro_average"], *(f1[label] for label in labels)]
    np.testing.assert_allclose(np.delete(values_of(counts), 1), expected, atol=1e-9)


# --- PSDS ------------------------------------------------------------------------------------------------------------


def random_scores(seed: int, *, clips: int = 30, step: float = 0.01) -> tuple[GroundTruth, dict[str, pd.DataFrame]]:
    """Scores of frames of 0.5 s that know the truth, with noise; multiples of `step`."""
    rng = np.random.default_rng(seed)
    durations = {f"{clip}.wav": 10.0 for clip in range(clips)}
    true = [
        (name, onset, onset + rng.uniform(1, 4), LABELS[rng.integers(3)])
        for name in durations for onset in rng.uniform(0, 8, rng.integers(0, 4))
    ]  # fmt: skip
    truth = GroundTruth.build(events(*true), durations, LABELS)
    times, tables = np.linspace(0, 10, 21), {}
    for name in durations:
        scores = rng.uniform(0, 0.7, (20, 4))
        for onset, offset, label in truth.by_clip()[name]:
            scores[(times[:-1] + 0.25 > onset) & (times[:-1] + 0.25 < offset), LABELS.index(label)] += 0.45
        tables[name] = create_score_dataframe((scores / step).round() * step, times, LABELS)
    return truth, tables


def sed_scores_evals(truth: GroundTruth, tables: dict[str, pd.DataFrame], **criteria: float) -> tuple[float, dict]:
    known = {name: table.drop(columns="silent") for name, table in tables.items()}
    value, by_class, *_ = intersection_based.psds(known, truth.by_clip(), truth.seconds, max_efpr=100.0, **criteria)
    assert 0 < value < 1
    return value, by_class


@scenarios
def test_psds_of_scores_is_sed_scores_evals(scenario: Scenario) -> None:
    truth, tables = random_scores(1)
    source = PsdsFromScores(tables, truth, scenario)
    result = source.result()
    criteria = (
        {"dtc_threshold": 0.7, "gtc_threshold": 0.7, "alpha_st": 1.0}
        if scenario is PSDS1
        else {"dtc_threshold": 0.1, "gtc_threshold": 0.1, "cttc_threshold": 0.3, "alpha_ct": 0.5, "alpha_st": 1.0}
    )
    value, by_class = sed_scores_evals(truth, tables, **criteria)
    assert result.value == pytest.approx(value, abs=1e-9)
    assert result.per_class == pytest.approx({label: by_class[label] for label in LABELS[:3]}, abs=1e-9)
    once = PsdsStatistic(source)(np.ones((30, 1), dtype=np.float32))[:, 0]
    np.testing.assert_allclose(once, [value, *result.per_class.values()], atol=1e-3)


def test_macro_mean_is_psds1_without_its_deviation() -> None:
    truth, tables = random_scores(1)
    measured = {each.metric.name: each.metric for each in measure(truth, System(truth.table, tables=tables))}
    wanted, _ = sed_scores_evals(truth, tables, dtc_threshold=0.7, gtc_threshold=0.7, alpha_st=0.0)
    mean = measured["psds1_macro"]
    assert mean.macro == pytest.approx(wanted, abs=1e-9)
    assert mean.macro > measured["PSDS1"].macro
    assert "alpha_ST = 0" in mean.criterion


@scenarios
def test_psds_of_a_resample_is_that_of_its_clips(scenario: Scenario) -> None:
    """The statistic of doubled and left-out clips against the score of a data set that has them so."""
    truth, tables = random_scores(2)
    statistic = PsdsStatistic(PsdsFromScores(tables, truth, scenario))
    weights = np.random.default_rng(0).integers(0, 3, (30, 2)).astype(np.float32)
    for values, weight in zip(statistic(weights).T, weights.T, strict=True):
        copies = [(name, f"{k} {name}") for name, w in zip(truth.names, weight, strict=True) for k in range(int(w))]
        rows = [truth.table[truth.table.filename == name].assign(filename=new) for name, new in copies]
        drawn = GroundTruth.build(pd.concat(rows), {new: 10.0 for _, new in copies}, LABELS)
        expected = PsdsFromScores({new: tables[name] for name, new in copies}, drawn, scenario).result()
        np.testing.assert_allclose(values, [expected.value, *expected.per_class.values()], atol=1e-3)


@scenarios
@pytest.mark.filterwarnings("ignore:.*fillna with .method.:FutureWarning")
def test_psds_of_operating_points_is_psds_evals(scenario: Scenario) -> None:
    """Three thresholds through psds_eval by hand; and, with all thresholds that there are, what the scores give."""
    truth, tables = random_scores(3, clips=12, step=0.1)
    levels = np.unique(np.concatenate([table[LABELS].to_numpy().ravel() for table in tables.values()]).round(3))
    points = []
    for level in levels - 0.05:
        found = scores_to_event_list(tables, float(level))
        points.append(events(*((name, *event) for name, list_ in found.items() for event in list_)))
    few = psds_from_operating_points(points[2:8:2], truth, scenario)
    metadata = pd.DataFrame({"filename": truth.names, "duration": truth.durations})
    judge = PSDSEval(scenario.dtc, scenario.gtc, scenario.cttc or 1.0, ground_truth=truth.table, metadata=metadata)
    for point in points[2:8:2]:
        judge.add_operating_point(point[point.event_label != "silent"])
    curve = judge.psds(scenario.alpha_ct, scenario.alpha_st).plt
    assert few.value == pytest.approx(staircase_auc(curve.yp, curve.xp, max_x=100.0) / 100, abs=1e-9)
    full = psds_from_operating_points(points, truth, scenario)
    exact = PsdsFromScores(tables, truth, scenario).result()
    assert few.value < full.value
    assert full.value == pytest.approx(exact.value, abs=1e-6)
    assert full.per_class == pytest.approx(exact.per_class, abs=1e-6)


def test_psds_of_nothing() -> None:
    truth, _ = random_scores(4, clips=6)
    assert psds_from_operating_points([events()], truth, PSDS1).value == 0
