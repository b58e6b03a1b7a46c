"""Polyphonic sound detection scores: by sed_scores_eval over all thresholds, by psds_eval from operating points.

Source: Bilen et al., A Framework for the Robust Evaluation of Sound Event Detection, ICASSP 2020; the scenarios are
those of DCASE task 4, the computation over all thresholds that of Ebbers et al., Threshold-Independent Evaluation of
Sound Event Detection Scores, ICASSP 2022.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import pandas as pd

from evaluation.event_tables import GroundTruth, join_overlapping

SECONDS_PER_HOUR = 3600.0
MOST_FALSE_ALARMS = 100.0  # false alarms an hour (with the weighted cross triggers): the right end of the curves
CELLS = 1000  # of the curves of resamples: 0.1 false alarms an hour each


@dataclass(frozen=True)
class Scenario:
    """The criteria of a score: shares of events (dtc, gtc, cttc), weights of cross triggers and deviation."""

    name: str
    dtc: float
    gtc: float
    cttc: Optional[float]
    alpha_ct: float
    alpha_st: float

    @property
    def criterion(self) -> str:
        cross = "" if self.cttc is None else f", CTTC = {self.cttc:g}, alpha_CT = {self.alpha_ct:g}"
        return f"DTC = GTC = {self.dtc:g}{cross}, alpha_ST = {self.alpha_st:g}, {MOST_FALSE_ALARMS:g} / h"


PSDS1 = Scenario("PSDS1", 0.7, 0.7, None, 0.0, 1.0)  # fast reaction: events must be found as a whole
PSDS2 = Scenario("PSDS2", 0.1, 0.1, 0.3, 0.5, 1.0)  # classes must not be confused


@dataclass(frozen=True)
class PsdRoc:
    """A staircase: from false_alarms[i] an hour on, the rate of true positives is rates[i], up to MOST_FALSE_ALARMS."""

    false_alarms: list[float]
    rates: list[float]

    @classmethod
    def build(cls, false_alarms: np.ndarray, rates: np.ndarray) -> "PsdRoc":
        kept = false_alarms <= MOST_FALSE_ALARMS
        return cls(false_alarms[kept].tolist(), rates[kept].tolist())

    @property
    def area(self) -> float:
        """The area under the staircase up to MOST_FALSE_ALARMS, as a share of the whole."""
        widths = np.diff([*self.false_alarms, MOST_FALSE_ALARMS])
        return float(widths @ np.array(self.rates) / MOST_FALSE_ALARMS)


@dataclass(frozen=True)
class PsdsResult:
    """A score, the normalized areas of the classes with true events, and the curves of both."""

    value: float
    per_class: dict[str, float]
    curve: PsdRoc
    class_curves: dict[str, PsdRoc]


class PsdsFromScores:
    """A score over all thresholds. sed_scores_eval's statistics of each clip give the value and the bootstrap."""

    def __init__(self, tables: dict[str, pd.DataFrame], truth: GroundTruth, scenario: Scenario) -> None:
        """tables: those of score_tables."""
        from sed_scores_eval.intersection_based.intermediate_statistics import intermediate_statistics_deltas

        self.scenario, self.seconds, self.labels = scenario, truth.seconds, truth.present
        self.truth = truth.by_clip()
        chosen = {name: table[["onset", "offset", *self.labels]] for name, table in tables.items()}
        self.deltas: dict[str, Any] = intermediate_statistics_deltas(
            chosen, self.truth, dtc_threshold=scenario.dtc, gtc_threshold=scenario.gtc, cttc_threshold=scenario.cttc
        )

    def result(self) -> PsdsResult:
        """The score as sed_scores_eval defines it."""
        from sed_scores_eval import intersection_based

        s = self.scenario
        value, per_class, (rate, alarms), curves = intersection_based.psds(
            None, self.truth, self.seconds, deltas=self.deltas, dtc_threshold=s.dtc, gtc_threshold=s.gtc,
            cttc_threshold=s.cttc, alpha_ct=s.alpha_ct, alpha_st=s.alpha_st, max_efpr=MOST_FALSE_ALARMS,
        )  # fmt: skip
        return PsdsResult(
            float(value),
            {label: float(per_class[label]) for label in self.labels},
            PsdRoc.build(alarms, rate),
            {label: PsdRoc.build(curves[label][1], curves[label][0]) for label in self.labels},
        )


class PsdsStatistic:
    """A score as a statistic of the bootstrap: weights (N, R) -> (1 + K, R), the score and the area of each class.

    Curves are drawn in cells of 0.1 false alarms an hour, which moves a score by less than 1e-3 (a test compares):
    thousands of exact ones would take minutes. A class without events in a resample is left out of it.
    """

    def __init__(self, source: PsdsFromScores) -> None:
        self.scenario, self.labels = source.scenario, source.labels
        self.seconds = np.array(list(source.seconds.values()), dtype=np.float32)
        self.count = np.zeros((len(self.labels), len(self.seconds)), dtype=np.float32)  # true events
        self.length = np.zeros_like(self.count)  # their seconds
        for clip, name in enumerate(source.seconds):
            for onset, offset, label in source.truth[name]:
                self.count[self.labels.index(label), clip] += 1
                self.length[self.labels.index(label), clip] += offset - onset
        self.steps = [_class_steps(source, k) for k in range(len(self.labels))]

    @property
    def added(self) -> int:
        """The number of values that a resample adds."""
        return sum(len(steps.clip) for steps in self.steps) + len(self.steps) * CELLS

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        hours = (self.seconds @ weights) / SECONDS_PER_HOUR
        events, lengths = self.count @ weights, (self.length @ weights) / SECONDS_PER_HOUR
        curves = np.stack([
            self._curve(k, weights, hours, events[k], np.delete(lengths, k, axis=0)) for k in range(len(self.labels))
        ])  # fmt: skip
        curves[events == 0] = np.nan  # (K, R, CELLS)
        known = (events > 0).sum(axis=0)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.nansum(curves, axis=0) / known
            deviation = np.sqrt(np.nansum((curves - mean) ** 2, axis=0) / known)
        score = np.maximum(mean - self.scenario.alpha_st * deviation, 0).mean(axis=1)
        return np.concatenate([score[None], curves.mean(axis=2)]).astype(np.float64)

    def _curve(
        self, k: int, weights: np.ndarray, hours: np.ndarray, events: np.ndarray, other_hours: np.ndarray
    ) -> np.ndarray:
        """(R, CELLS): the highest rate of true positives of class k with that many false alarms, or fewer."""
        steps, resamples = self.steps[k], weights.shape[1]
        drawn = weights[steps.clip]  # (S, R)
        false = np.broadcast_to(steps.false[:, None], drawn.shape)
        if steps.crossed is not None and len(other_hours):
            known = other_hours > 0
            share = np.where(known, hours / np.where(known, other_hours, 1), 0) / np.maximum(known.sum(axis=0), 1)
            false = false + self.scenario.alpha_ct * (steps.crossed @ share.astype(np.float32))
        alarms = np.cumsum(false * drawn, axis=0)[steps.last] / hours
        # A cell holds the alarms around its middle: rounded down as often as up.
        reached = np.flatnonzero(alarms.min(axis=1, initial=np.inf) <= MOST_FALSE_ALARMS)
        cell = np.maximum(np.ceil(alarms[reached] * (CELLS / MOST_FALSE_ALARMS) - 0.5 - 1e-4), 0).astype(np.int64)
        rising = np.flatnonzero(steps.found)
        found = np.zeros((len(rising) + 1, resamples), dtype=np.float32)
        np.cumsum(steps.found[rising, None] * drawn[rising], axis=0, out=found[1:])
        rate = found[np.searchsorted(rising, steps.last[reached], side="right")] / np.maximum(events, 1)
        inside = cell < CELLS
        curve = np.zeros((resamples, CELLS), dtype=np.float32)
        np.maximum.at(curve.reshape(-1), (cell + np.arange(resamples) * CELLS)[inside], rate[inside])
        return np.maximum.accumulate(curve, axis=1)


@dataclass(frozen=True)
class ClassSteps:
    """How the counts of one class change as its threshold falls: clip (S,), true and false positives (S,) float32.

    crossed: (S, K - 1) cross triggers with the other classes, where the scenario counts them. last: (P,) the last
    place of each threshold.
    """

    clip: np.ndarray
    found: np.ndarray
    false: np.ndarray
    crossed: Optional[np.ndarray]
    last: np.ndarray


def _class_steps(source: PsdsFromScores, k: int) -> ClassSteps:
    label = source.labels[k]
    parts = [source.deltas[name][label] for name in source.seconds]
    score = np.concatenate([part[0] for part in parts])
    order = np.argsort(-score, kind="stable")
    clip = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])[order]
    last = np.flatnonzero(np.append(score[order][1:] != score[order][:-1], True)) if len(score) else order

    def column(name: str) -> np.ndarray:
        return np.concatenate([part[1][name] for part in parts])[order].astype(np.float32)

    crossed = None
    if source.scenario.cttc is not None:
        others = [other for other in source.labels if other != label]
        crossed = np.array([_crossed(parts, other) for other in others]).reshape(len(others), -1).T[order]
    return ClassSteps(clip, column("tps"), column("fps"), crossed, last)


def _crossed(parts: Sequence[tuple[np.ndarray, dict[str, Any]]], other: str) -> np.ndarray:
    """Changes of the cross triggers with another class, in either of sed_scores_eval's two layouts."""
    found = [part[1]["cts"][other] if "cts" in part[1] else part[1][f"cts\\{other}"] for part in parts]
    return np.concatenate(found).astype(np.float32)


def psds_from_operating_points(points: Sequence[pd.DataFrame], truth: GroundTruth, scenario: Scenario) -> PsdsResult:
    """The score of one or several tables of events, each of one threshold, by psds_eval.

    The curve is constant between two points: fewer points give a lower score. psds_eval averages cross triggers over
    the other classes: at least two must have true events.
    """
    from psds_eval import PSDSEval

    present = truth.present
    known = [join_overlapping(point[point.event_label.isin(present)]) for point in points]
    known = [point for point in known if len(point)]
    if not known:
        empty = PsdRoc([0.0], [0.0])
        return PsdsResult(0.0, dict.fromkeys(present, 0.0), empty, dict.fromkeys(present, empty))
    metadata = pd.DataFrame({"filename": truth.names, "duration": truth.durations})
    cttc = 1.0 if scenario.cttc is None else scenario.cttc
    judge = PSDSEval(scenario.dtc, scenario.gtc, cttc, ground_truth=truth.table, metadata=metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A similar operating point exists")  # the second one is left out
        for point in known:
            judge.add_operating_point(point)
        warnings.filterwarnings("ignore", message=".*fillna with 'method'", category=FutureWarning)
        # psds_eval's area up to a limit fails with numpy 2.4: the area is taken here, from the whole curve.
        with np.errstate(invalid="ignore"):  # a whole curve without false alarms has no area
            whole = judge.psds(scenario.alpha_ct, scenario.alpha_st).plt
        by_class = judge.psd_roc_curves(scenario.alpha_ct)[2]
    curve = PsdRoc.build(whole.xp, whole.yp)
    curves = {label: PsdRoc.build(by_class.xp, by_class.yp[k]) for k, label in enumerate(sorted(present))}
    return PsdsResult(curve.area, {label: curves[label].area for label in present}, curve, curves)
