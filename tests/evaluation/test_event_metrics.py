"""Counts of events and PSDS: by hand on small cases, against psds_eval and sed_scores_eval on random ones."""

import numpy as np
import pandas as pd
import pytest

from evaluation.detection import System, measure
from evaluation.event_metrics import (
    ClipCounts,
    CountStatistic,
    clip_counts,
    collar_counts,
    error_rate_of,
    f1_of,
    intersection_counts,
    segment_counts,
)
from evaluation.event_tables import GroundTruth, join_overlapping
from evaluation.postprocess import EVENT_COLUMNS
from evaluation.psds import PSDS1, PSDS2, PsdsFromScores, psds_from_operating_points

LABELS = ["cat", "dog", "owl", "silent"]  # silent: detected, never true
SEEDS = range(4)


def events(*rows: tuple[str, float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=EVENT_COLUMNS)


def sums(counts: ClipCounts) -> list[tuple[int, int, int]]:
    """True positives, false positives and positives of each class."""
    parts = (counts.found, counts.false, counts.positive)
    return list(zip(*(part.sum(axis=0).tolist() for part in parts), strict=True))


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_intersection_by_hand() -> None:
    """Truth 2-4 s and 6-10 s. Detections: 2.5-4.5 (75 % of it true), 6-7 and 8-9 (half of the second event)."""
    truth = GroundTruth.build(events(("x", 2, 4, "cat"), ("x", 6, 10, "cat")), {"x": 10.0, "y": 5.0}, ["cat"])
    found = events(("x", 2.5, 4.5, "cat"), ("x", 6, 7, "cat"), ("x", 8, 9, "cat"), ("y", 1, 2, "cat"))

    def at(share: float) -> list[tuple[int, int, int]]:
        counts = intersection_counts(truth.index(found), truth.events, truth.durations, 1, dtc=share, gtc=share)
        return sums(counts)

    assert at(0.5) == [(2, 1, 2)]
    assert at(0.7) == [(1, 1, 2)]  # the second event is covered by half only, its detections are not false
    assert at(0.8) == [(0, 2, 2)]
    outside = events(("y", 5.5, 6, "cat"), ("y", 4.5, 7, "cat"))  # the first lies wholly behind the end of its clip
    counts = intersection_counts(truth.index(outside), truth.events, truth.durations, 1, dtc=0.5, gtc=0.5)
    assert sums(counts) == [(0, 1, 2)]
    assert counts.false.tolist() == [[0], [1]]


def test_collar_by_hand() -> None:
    """A 10 s event allows 2 s at its offset, a 0.5 s event 200 ms; the best pairing finds both that interlock."""
    true = events(("x", 0, 10, "cat"), ("x", 20, 20.5, "cat"), ("y", 1.0, 2.0, "dog"), ("y", 1.3, 2.2, "dog"))
    truth = GroundTruth(["x", "y"], np.array([30.0, 10.0]), ["cat", "dog"], true)
    found = truth.index(
        events(("x", 0.2, 12, "cat"), ("x", 20, 20.71, "cat"), ("y", 1.15, 2.1, "dog"), ("y", 0.9, 2.0, "dog"))
    )
    assert sums(collar_counts(found, truth.events, 2, 2)) == [(1, 1, 2), (2, 0, 2)]
    assert sums(collar_counts(found, truth.events, 2, 2, offset_collar=None)) == [(2, 0, 2), (2, 0, 2)]


def test_segments_by_hand() -> None:
    """x has segments 0-1, 1-2, 2-2.5 s. cat is true in the first two, dog in the last; cat is found in the last two."""
    truth = GroundTruth.build(
        events(("x", 0.2, 1.5, "cat"), ("x", 2.2, 4.0, "dog")), {"x": 2.5, "y": 1.0}, ["cat", "dog"]
    )
    counts = segment_counts(truth.index(events(("x", 1.9, 9.0, "cat"))), truth.events, truth.durations, 2)
    assert sums(counts) == [(1, 1, 2), (0, 0, 1)]
    assert counts.errors is not None
    assert counts.errors.tolist() == [
        2,
        0,
    ]  # cat missed in the first segment; cat for dog in the last: one substitution
    rates = CountStatistic(counts, error_rate_of)(np.ones((2, 1), dtype=np.float32))[:, 0]
    assert rates.tolist() == pytest.approx([(1 + 1) / 2, 2 / 3, 1, 1])  # macro, micro, cat, dog
    scores = CountStatistic(counts, f1_of)(np.ones((2, 1), dtype=np.float32))[:, 0]
    assert scores.tolist() == pytest.approx([0.25, 2 / (2 + 1 + 2), 0.5, 0])


def test_clips_by_hand_and_scikit_learn() -> None:
    from sklearn.metrics import f1_score

    true, found, durations = random_tables(3)
    truth = GroundTruth.build(true, durations, LABELS)
    counts = clip_counts(truth.index(found), truth.events, len(durations), 4)
    tags = [
        np.array([[((t.filename == n) & (t.event_label == k)).any() for k in LABELS] for n in durations])
        for t in (true, found)
    ]
    values = CountStatistic(counts, f1_of)(np.ones((len(durations), 1), dtype=np.float32))[:, 0]
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
    np.testing.assert_allclose(
        values[2], [0.5, 1, np.nan, 0.5]
    )  # cat: 2 / (1 + 1 + 2), 6 / (3 + 3), no cat, 2 / (1 + 3)
    np.testing.assert_allclose(values[3], [1, np.nan, 1, np.nan])
    np.testing.assert_allclose(values[0], [0.75, 1, 1, 0.5])
    np.testing.assert_allclose(values[1], [4 / 6, 1, 6 / 9, 0.5])


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
    from sed_scores_eval.base_modules.scores import create_score_dataframe

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
    by_clip: dict[str, list[tuple[float, float, str]]] = {name: [] for name in durations}
    for name, onset, offset, label in table.itertuples(index=False):
        by_clip[name].append((onset, offset, label))
    return by_clip


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
    from psds_eval import PSDSEval

    true, found, durations = random_tables(seed, grid=grid)
    truth = GroundTruth.build(true, durations, LABELS)
    detected = truth.index(join_overlapping(found))
    counts = intersection_counts(detected, truth.events, truth.durations, 4, dtc=share, gtc=share)
    values = CountStatistic(counts, f1_of)(np.ones((len(durations), 1), dtype=np.float32))[:, 0]
    metadata = pd.DataFrame({"filename": list(durations), "duration": list(durations.values())})
    judge = PSDSEval(share, share, 0.3, ground_truth=joined(true, touching=False), metadata=metadata)
    known = found[found.event_label != "silent"]
    macro, by_class = judge.compute_macro_f_score(joined(known, touching=False))
    expected = np.array([by_class[label] for label in LABELS[:3]])
    np.testing.assert_allclose(values[2:5], np.nan_to_num(expected), atol=1e-9)  # psds_eval: NaN where nothing is found
    if not np.isnan(expected).any():
        assert values[0] == pytest.approx(macro, abs=1e-9)
    assert counts.positive.sum() == len(joined(true, touching=False))


@pytest.mark.parametrize("seed", SEEDS)
def test_intersection_is_sed_scores_evals(seed: int) -> None:
    from sed_scores_eval import intersection_based

    true, found, durations = random_tables(seed)
    durations = dict.fromkeys(durations, 12.0)  # sed_scores_eval counts what lies behind a clip's end
    found, labels = found[found.event_label != "silent"], LABELS[:3]
    truth = GroundTruth.build(true, durations, labels)
    counts = intersection_counts(
        truth.index(join_overlapping(found)), truth.events, truth.durations, 3, dtc=0.5, gtc=0.5
    )
    f1, _, _, statistics = intersection_based.fscore(
        as_scores(found, durations, labels), as_lists(joined(true, touching=True), durations), 0.5,
        dtc_threshold=0.5, gtc_threshold=0.5,
    )  # fmt: skip
    check(counts, f1, statistics, labels)


def check(counts: ClipCounts, f1: dict[str, float], statistics: dict[str, dict[str, float]], labels: list[str]) -> None:
    expected = [(statistics[label]["tps"], statistics[label]["fps"], statistics[label]["n_ref"]) for label in labels]
    assert sums(counts) == expected
    values = CountStatistic(counts, f1_of)(np.ones((len(counts.found), 1), dtype=np.float32))[:, 0]
    np.testing.assert_allclose(values[2:], [f1[label] for label in labels], atol=1e-9)
    assert values[0] == pytest.approx(f1["macro_average"], abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grid", [0.0, 0.1])
@pytest.mark.parametrize("offset_collar", [0.2, None])
def test_collar_is_sed_scores_evals(seed: int, grid: float, offset_collar: float | None) -> None:
    from sed_scores_eval import collar_based

    true, found, durations = random_tables(seed, grid=grid)
    found, labels = joined(found[found.event_label != "silent"], touching=True), LABELS[:3]
    true = joined(true, touching=True)  # sed_scores_eval knows no events that touch
    truth = GroundTruth.build(true, durations, labels)
    counts = collar_counts(truth.index(found), truth.events, len(durations), 3, offset_collar=offset_collar)
    f1, _, _, statistics = collar_based.fscore(
        as_scores(found, durations, labels), as_lists(true, durations), 0.5, onset_collar=0.2,
        offset_collar=np.inf if offset_collar is None else offset_collar, offset_collar_rate=0.2,
    )  # fmt: skip
    check(counts, f1, statistics, labels)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grid", [0.0, 0.25])
def test_segments_are_sed_scores_evals(seed: int, grid: float) -> None:
    from sed_scores_eval import segment_based

    true, found, durations = random_tables(seed, grid=grid)
    found, labels = found[found.event_label != "silent"], LABELS[:3]
    truth = GroundTruth.build(true, durations, labels)
    counts = segment_counts(truth.index(join_overlapping(found)), truth.events, truth.durations, 3)
    tables, lists = as_scores(found, durations, labels), as_lists(joined(true, touching=True), durations)
    f1, _, _, statistics = segment_based.fscore(tables, lists, durations, 0.5, segment_length=1.0)
    check(counts, f1, statistics, labels)
    rates, *_ = segment_based.error_rate(tables, lists, durations, 0.5, segment_length=1.0)
    values = CountStatistic(counts, error_rate_of)(np.ones((len(durations), 1), dtype=np.float32))[:, 0]
    np.testing.assert_allclose(values[2:], [rates[label] for label in labels], atol=1e-9)
    assert values[0] == pytest.approx(rates["macro_average"], abs=1e-9)


# --- PSDS ------------------------------------------------------------------------------------------------------------


def random_scores(seed: int, *, clips: int = 30, step: float = 0.01) -> tuple[GroundTruth, dict[str, pd.DataFrame]]:
    """Scores of frames of 0.5 s that know the truth, with noise; multiples of `step`."""
    from sed_scores_eval.base_modules.scores import create_score_dataframe

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


@pytest.mark.parametrize("scenario", [PSDS1, PSDS2], ids=["PSDS1", "PSDS2"])
def test_psds_of_scores_is_sed_scores_evals(scenario: object) -> None:
    from sed_scores_eval import intersection_based

    truth, tables = random_scores(1)
    result = PsdsFromScores(tables, truth, PSDS1 if scenario is PSDS1 else PSDS2).result()
    criteria = (
        {"dtc_threshold": 0.7, "gtc_threshold": 0.7, "alpha_st": 1.0}
        if scenario is PSDS1
        else {"dtc_threshold": 0.1, "gtc_threshold": 0.1, "cttc_threshold": 0.3, "alpha_ct": 0.5, "alpha_st": 1.0}
    )
    known = {name: table.drop(columns="silent") for name, table in tables.items()}
    value, by_class, *_ = intersection_based.psds(known, truth.by_clip(), truth.seconds, max_efpr=100.0, **criteria)
    assert 0 < value < 1
    assert result.value == pytest.approx(value, abs=1e-9)
    assert result.per_class == pytest.approx({label: by_class[label] for label in LABELS[:3]}, abs=1e-9)
    assert result.statistic is not None
    once = result.statistic(np.ones((30, 1), dtype=np.float32))[:, 0]
    np.testing.assert_allclose(once, [value, *result.per_class.values()], atol=1e-3)


def test_macro_mean_is_psds1_without_its_deviation() -> None:
    from sed_scores_eval import intersection_based

    truth, tables = random_scores(1)
    measured = {each.metric.name: each.metric for each in measure(truth, System(truth.table, tables=tables))}
    known = {name: table.drop(columns="silent") for name, table in tables.items()}
    wanted, *_ = intersection_based.psds(
        known, truth.by_clip(), truth.seconds, max_efpr=100.0, dtc_threshold=0.7, gtc_threshold=0.7, alpha_st=0.0
    )
    assert measured["PSDS1, macro mean"].macro == pytest.approx(wanted, abs=1e-9)
    assert measured["PSDS1, macro mean"].macro > measured["PSDS1"].macro
    assert "alpha_ST = 0" in measured["PSDS1, macro mean"].criterion


@pytest.mark.parametrize("scenario", [PSDS1, PSDS2], ids=["PSDS1", "PSDS2"])
def test_psds_of_a_resample_is_that_of_its_clips(scenario: object) -> None:
    """The statistic of doubled and left-out clips against the score of a data set that has them so."""
    chosen = PSDS1 if scenario is PSDS1 else PSDS2
    truth, tables = random_scores(2)
    statistic = PsdsFromScores(tables, truth, chosen).result().statistic
    assert statistic is not None
    weights = np.random.default_rng(0).integers(0, 3, (30, 2)).astype(np.float32)
    for values, weight in zip(statistic(weights).T, weights.T, strict=True):
        copies = [(name, f"{k} {name}") for name, w in zip(truth.names, weight, strict=True) for k in range(int(w))]
        rows = [truth.table[truth.table.filename == name].assign(filename=new) for name, new in copies]
        drawn = GroundTruth.build(pd.concat(rows), {new: 10.0 for _, new in copies}, LABELS)
        expected = PsdsFromScores({new: tables[name] for name, new in copies}, drawn, chosen).result()
        np.testing.assert_allclose(values, [expected.value, *expected.per_class.values()], atol=1e-3)


@pytest.mark.parametrize("scenario", [PSDS1, PSDS2], ids=["PSDS1", "PSDS2"])
@pytest.mark.filterwarnings("ignore:.*fillna with .method.:FutureWarning")
def test_psds_of_operating_points_is_psds_evals(scenario: object) -> None:
    """Three thresholds through psds_eval by hand; and, with all thresholds that there are, what the scores give."""
    from psds_eval import PSDSEval
    from sed_scores_eval.base_modules.curves import staircase_auc
    from sed_scores_eval.base_modules.detection import scores_to_event_list

    chosen = PSDS1 if scenario is PSDS1 else PSDS2
    truth, tables = random_scores(3, clips=12, step=0.05)
    levels = np.unique(np.concatenate([table[LABELS].to_numpy().ravel() for table in tables.values()]))
    points = []
    for level in levels - 0.025:
        found = scores_to_event_list(tables, float(level))
        points.append(events(*((name, *event) for name, list_ in found.items() for event in list_)))
    few = psds_from_operating_points(points[4:16:4], truth, chosen)
    metadata = pd.DataFrame({"filename": truth.names, "duration": truth.durations})
    judge = PSDSEval(chosen.dtc, chosen.gtc, chosen.cttc or 1.0, ground_truth=truth.table, metadata=metadata)
    for point in points[4:16:4]:
        judge.add_operating_point(point[point.event_label != "silent"])
    curve = judge.psds(chosen.alpha_ct, chosen.alpha_st).plt
    assert few.value == pytest.approx(staircase_auc(curve.yp, curve.xp, max_x=100.0) / 100, abs=1e-9)
    full = psds_from_operating_points(points, truth, chosen)
    exact = PsdsFromScores(tables, truth, chosen).result()
    assert few.value < full.value
    assert full.value == pytest.approx(exact.value, abs=1e-6)
    assert full.per_class == pytest.approx(exact.per_class, abs=1e-6)


def test_psds_of_nothing() -> None:
    truth, _ = random_scores(4, clips=6)
    assert psds_from_operating_points([events()], truth, PSDS1).value == 0
