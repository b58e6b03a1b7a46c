"""All metrics of a system's detections, each with its criterion and defining tool; intervals and comparisons."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

import numpy as np
import pandas as pd

from evaluation.bootstrap import (
    RESAMPLES,
    Comparison,
    Interval,
    Statistic,
    WeightedMeanAveragePrecision,
    bootstrap_values,
    paired_bootstrap,
    percentile_interval,
)
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
from evaluation.event_tables import EventSet, GroundTruth, check_clips, join_overlapping
from evaluation.metrics import tagging_metrics
from evaluation.psds import (
    PSDS1,
    PSDS2,
    PsdRoc,
    PsdsFromScores,
    PsdsResult,
    PsdsStatistic,
    Scenario,
    psds_from_operating_points,
)

COLLAR = "onset 200 ms, offset 200 ms or 20 %"
ONSETS = {"onset_f1_200ms": 0.2, "onset_f1_50ms": 0.05}  # seconds; of HEAR's DCASE 2016 task 2, the first primary
ERRORS = "segments of 1 s; micro with substitutions"  # there, a class in place of another is one error, not two
MACRO, MICRO = "macro", "micro"
SEGMENT_SECONDS, HIGHEST_FALSE_RATE = 1.0, 0.1  # of pAUROC: length of a segment, and the right end of its curves
MOST_ADDED = 4e8  # values to add for an interval of a PSDS, some seconds; more get fewer resamples
FEWEST_RESAMPLES = 200
MOST_CROSSED = 1e7  # clips x classes x classes, for PSDS2's cross triggers: a minute and 3 GiB


@dataclass(frozen=True)
class ClassCounts:
    """Counts of events, segments or clips of a class. positives: the true ones."""

    true_positives: int
    false_positives: int
    false_negatives: int
    positives: int


@dataclass(frozen=True)
class DetectionMetric:
    """One metric: macro (mean over the classes), micro (of the summed counts of all classes) and for each class.

    A class without true events has NaN, and is left out of the macro value. unit: of the counts. intervals: of "macro",
    "micro" and classes. curve, class_curves: of a PSDS. note: a remark for the reader.
    """

    name: str
    criterion: str
    tool: str
    macro: float
    per_class: dict[str, float]
    micro: Optional[float] = None
    unit: str = ""
    counts: dict[str, ClassCounts] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    curve: Optional[PsdRoc] = None
    class_curves: dict[str, PsdRoc] = field(default_factory=dict)
    note: str = ""

    @property
    def interval(self) -> Optional[Interval]:
        """That of the macro value, if any."""
        return self.intervals.get(MACRO)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: None in their place."""
        return _for_json(asdict(self))


@dataclass(frozen=True)
class System:
    """A system's detections in the clips of a ground truth.

    events: the table that is evaluated. operating_points: tables of further thresholds, for PSDS alone. tables: the
    frame scores, see score_tables, with which PSDS is independent of thresholds. clipwise: (N, K) scores and targets:
    (N, K) ground truth of the clips, for mAP.
    """

    events: pd.DataFrame
    operating_points: Sequence[pd.DataFrame] = ()
    tables: Optional[dict[str, pd.DataFrame]] = None
    clipwise: Optional[np.ndarray] = None
    targets: Optional[np.ndarray] = None


@dataclass(frozen=True)
class Measured:
    """A metric and its statistic for the bootstrap, with a value for each of `rows`; None: no bootstrap.

    correct_bias: move the interval by the bootstrap's estimate of bias (see bootstrap). Average precision needs it, and
    so does PSDS: resamples add to the deviation between classes that it subtracts.
    """

    metric: DetectionMetric
    rows: tuple[str, ...] = ()
    statistic: Optional[Statistic] = None
    correct_bias: bool = False
    resamples: int = RESAMPLES  # at most


@dataclass(frozen=True)
class MetricComparison:
    """A metric of two systems. value: macro or micro; comparison: of the first minus the second."""

    name: str
    criterion: str
    tool: str
    value: str
    first: float
    second: float
    comparison: Comparison

    def as_dict(self) -> dict[str, Any]:
        """For JSON, as DetectionMetric.as_dict."""
        return _for_json(asdict(self))


def measure(truth: GroundTruth, system: System) -> list[Measured]:
    """All metrics of a system that its scores and events allow, without intervals.

    Raises UserError, with their names, for detections in clips without a duration.
    """
    check_clips(system.events, truth.seconds, "The table of detections")
    found = truth.index(join_overlapping(system.events))
    segments = segment_counts(found, truth)
    psds1, psds2 = (_psds(truth, system, scenario) for scenario in (PSDS1, PSDS2))
    measured = [
        *(_intersection(truth, found, share) for share in (0.5, 0.7)),
        _counted("collar F1", COLLAR, "sed_scores_eval", truth, collar_counts(found, truth)),
        _counted(
            "collar F1, onset only", "onset 200 ms", "sed_scores_eval", truth,
            collar_counts(found, truth, offsets=False),
        ),
        *(_onsets(truth, system.events, name, collar) for name, collar in ONSETS.items()),
        _counted("segment F1", "segments of 1 s", "sed_scores_eval", truth, segments),
        _counted("segment error rate", ERRORS, "sed_scores_eval", truth, segments, error_rate_of),
        psds1,
        _macro_mean(psds1),
        psds2,
        _counted(
            "clip F1", "clips have the classes of their events", "scikit-learn", truth, clip_counts(found, truth)
        ),
    ]  # fmt: skip
    if system.tables is not None:
        measured.append(Measured(_partial_auroc(truth, system.tables)))
    if system.clipwise is not None and system.targets is not None:
        measured.append(_precision(truth, system.clipwise, system.targets))
    return measured


def with_intervals(
    measured: Sequence[Measured], clips: int, *, resamples: int = RESAMPLES, seed: int
) -> list[DetectionMetric]:
    """The metrics, those with a statistic with their 95 % bootstrap intervals over the clips, unless resamples is 0."""
    return [_with_interval(each, clips, min(resamples, each.resamples), seed) for each in measured]


def compare(
    first: Sequence[Measured], second: Sequence[Measured], clips: int, *, resamples: int = RESAMPLES, seed: int
) -> list[MetricComparison]:
    """The macro and micro values of two systems, measured on the same ground truth, by a paired bootstrap."""
    found = []
    others = {(each.metric.name, each.metric.criterion, each.metric.tool): each for each in second}
    for one in first:
        key = (one.metric.name, one.metric.criterion, one.metric.tool)
        other = others.get(key)
        if other is None or one.statistic is None or other.statistic is None:
            continue
        for row in (name for name in (MACRO, MICRO) if name in one.rows):
            values = [_value(each.metric, row) for each in (one, other)]
            mine, its = (_row(each, row) for each in (one, other))
            used = min(resamples, one.resamples, other.resamples)
            comparison = paired_bootstrap(mine, its, clips, resamples=used, seed=seed)
            comparison = replace(comparison, difference=values[0] - values[1])
            found.append(MetricComparison(*key, row, values[0], values[1], comparison))
    return found


def _value(metric: DetectionMetric, row: str) -> float:
    value = metric.micro if row == MICRO else metric.macro
    assert value is not None
    return value


def _row(measured: Measured, row: str) -> Statistic:
    statistic, place = measured.statistic, measured.rows.index(row)
    assert statistic is not None
    return lambda weights: statistic(weights)[place]


def _with_interval(measured: Measured, clips: int, resamples: int, seed: int) -> DetectionMetric:
    if measured.statistic is None or resamples == 0:
        return measured.metric
    values = bootstrap_values(measured.statistic, clips, resamples=resamples, seed=seed)
    if measured.correct_bias:
        observed = measured.statistic(np.ones((clips, 1), dtype=np.float32))
        values = np.clip(values + observed - np.nanmean(values, axis=1, keepdims=True), 0, 1)
    intervals = {
        row: percentile_interval(found)
        for row, found in zip(measured.rows, values, strict=True)
        if not np.isnan(found).all()
    }
    return replace(measured.metric, intervals=intervals)


def _counted(
    name: str, criterion: str, tool: str, truth: GroundTruth, counts: ClipCounts, formula: Formula = f1_of
) -> Measured:
    """A metric of counts of each clip and class."""
    statistic = CountStatistic(counts, formula)
    macro, micro, *by_class = statistic(np.ones((len(truth.names), 1), dtype=np.float32))[:, 0].tolist()
    sums = np.stack([counts.found, counts.false, counts.positive - counts.found, counts.positive]).sum(axis=1)
    metric = DetectionMetric(
        name,
        criterion,
        tool,
        macro,
        dict(zip(truth.labels, by_class, strict=True)),
        micro=micro,
        unit=counts.unit,
        counts={label: ClassCounts(*of.tolist()) for label, of in zip(truth.labels, sums.T, strict=True)},
    )
    return Measured(metric, (MACRO, MICRO, *truth.labels), statistic)


def _intersection(truth: GroundTruth, found: EventSet, share: float) -> Measured:
    counts = intersection_counts(found, truth, share)
    measured = _counted("intersection F1", f"DTC = GTC = {share:g}", "psds_eval", truth, counts)
    values = measured.metric.per_class
    missed = [label for label in truth.present if values[label] == 0]
    if not missed or len(missed) == len(truth.present):
        return measured
    kept = float(np.mean([values[label] for label in truth.present if label not in missed]))
    note = f"Counts 0 for {', '.join(missed)}; psds_eval's own mean leaves such classes out and is {kept:.4f}."
    return replace(measured, metric=replace(measured.metric, note=note))


def _onsets(truth: GroundTruth, detected: pd.DataFrame, name: str, collar: float) -> Measured:
    """F1 of onsets alone, as sed_eval defines it: overlapping events of one class count each by itself."""
    true = truth.annotated_events
    counts = collar_counts(truth.index(detected), truth, offsets=False, collar=collar, true=true)
    return _counted(name, f"onset {collar * 1000:g} ms, no event joined", "sed_eval", truth, counts)


def _partial_auroc(truth: GroundTruth, tables: dict[str, pd.DataFrame]) -> DetectionMetric:
    """Area under the ROC curve of segments up to HIGHEST_FALSE_RATE, over all thresholds: mean over the classes."""
    from sed_scores_eval import segment_based

    chosen = {name: table[["onset", "offset", *truth.present]] for name, table in tables.items()}
    areas = segment_based.auroc(
        chosen, truth.by_clip(), truth.seconds, segment_length=SEGMENT_SECONDS, max_fpr=HIGHEST_FALSE_RATE
    )[0]
    per_class = {label: float(areas[label]) if label in truth.present else float("nan") for label in truth.labels}
    known = [area for area in per_class.values() if np.isfinite(area)]
    criterion = f"segments of {SEGMENT_SECONDS:g} s, false positive rate up to {HIGHEST_FALSE_RATE:g}; all thresholds"
    value = float(np.mean(known)) if known else float("nan")
    return DetectionMetric("pAUROC", criterion, "sed_scores_eval", value, per_class, note="No interval.")


def _psds(truth: GroundTruth, system: System, scenario: Scenario) -> Measured:
    nothing = PsdsResult(float("nan"), {}, PsdRoc([], []), {})
    if len(truth.present) < 2 and (system.tables is None or scenario.cttc is not None):
        note = "No value: it compares classes, and only one has true events."
        tool = "psds_eval" if system.tables is None else "sed_scores_eval"
        return Measured(_psds_metric(truth, scenario, scenario.criterion, tool, nothing, note))
    if scenario.cttc is not None and len(truth.names) * len(truth.present) ** 2 > MOST_CROSSED:
        note = f"No value: cross triggers between {len(truth.present)} classes take too long: see fl_class_num."
        return Measured(_psds_metric(truth, scenario, scenario.criterion, "sed_scores_eval", nothing, note))
    if system.tables is None:
        points = [system.events, *system.operating_points]
        plural = "" if len(points) == 1 else "s"
        criterion = f"{scenario.criterion}; {len(points)} operating point{plural}"
        note = "No interval. From events alone it is a lower bound: give more operating points, or scores."
        return Measured(
            _psds_metric(
                truth, scenario, criterion, "psds_eval", psds_from_operating_points(points, truth, scenario), note
            )
        )
    source = PsdsFromScores(system.tables, truth, scenario)
    metric = _psds_metric(truth, scenario, f"{scenario.criterion}; all thresholds", "sed_scores_eval", source.result())
    statistic = PsdsStatistic(source)
    most = int(np.clip(MOST_ADDED // statistic.added, FEWEST_RESAMPLES, RESAMPLES))
    return Measured(metric, (MACRO, *truth.present), statistic, True, most)


def _macro_mean(psds1: Measured) -> Measured:
    """PSDS1 without the deviation between classes (alpha_ST = 0), as results on AudioSet Strong are reported.

    The mean over classes of the areas under their curves is the area under the mean of the curves.
    """
    metric = psds1.metric
    areas = np.array([area for area in metric.per_class.values() if np.isfinite(area)])
    return Measured(
        replace(
            metric,
            name="psds1_macro",
            criterion=metric.criterion.replace(f"alpha_ST = {PSDS1.alpha_st:g}", "alpha_ST = 0"),
            macro=float(areas.mean()) if len(areas) else float("nan"),
            per_class={},
            curve=None,
            class_curves={},
            note="" if metric.note else "No interval of its own: see PSDS1's.",
        )
    )


def _psds_metric(
    truth: GroundTruth, scenario: Scenario, criterion: str, tool: str, result: PsdsResult, note: str = ""
) -> DetectionMetric:
    per_class = {label: result.per_class.get(label, float("nan")) for label in truth.labels}
    return DetectionMetric(
        scenario.name,
        criterion,
        tool,
        result.value,
        per_class,
        curve=result.curve,
        class_curves=result.class_curves,
        note=note,
    )


def _precision(truth: GroundTruth, clipwise: np.ndarray, targets: np.ndarray) -> Measured:
    """mAP of clip scores; its interval is corrected for bias (see bootstrap)."""
    mean, *_ = tagging_metrics(clipwise, targets)
    statistic = WeightedMeanAveragePrecision(clipwise, targets)
    once = np.ones((len(clipwise), 1), dtype=np.float32)
    values = [float(ranked.average_precision(once)[0]) for ranked in statistic.classes]
    known = dict(zip(np.flatnonzero(targets.any(axis=0)).tolist(), values, strict=True))
    per_class = {label: known.get(k, float("nan")) for k, label in enumerate(truth.labels)}
    metric = DetectionMetric("clip mAP", mean.criterion, "scikit-learn", mean.value, per_class)
    if not known:
        return Measured(metric)
    return Measured(
        metric, (MACRO,), lambda weights: statistic(weights)[None], True, resamples=statistic.affordable_resamples()
    )


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
