"""Event-level metrics, each with its name, its criterion and the tool that computed it."""

import contextlib
import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from evaluation.postprocess import EVENT_COLUMNS, frame_edges


@dataclass(frozen=True)
class DetectionMetric:
    """One named number, as macro mean over the classes and for each class."""

    name: str
    criterion: str
    tool: str
    macro: float
    per_class: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: None in their place."""
        per_class = {label: value if np.isfinite(value) else None for label, value in self.per_class.items()}
        return {**asdict(self), "macro": self.macro if np.isfinite(self.macro) else None, "per_class": per_class}


def intersection_f1(
    detections: pd.DataFrame, truth: pd.DataFrame, durations: dict[str, float], *, labels: list[str]
) -> DetectionMetric:
    """Intersection-based F1 (Bilen et al., ICASSP 2020), DTC = GTC = 0.5 and CTTC = 0.3, by psds_eval.

    Tables as of decode_events; durations: {filename: seconds}. A class without true events has no score: it is NaN
    and left out of the macro mean.
    """
    from psds_eval import PSDSEval

    metadata = pd.DataFrame({"filename": list(durations), "duration": list(durations.values())})
    present = _present(labels, truth)
    judge = PSDSEval(0.5, 0.5, 0.3, class_names=present, ground_truth=truth, metadata=metadata)
    _, by_class = judge.compute_macro_f_score(detections[detections.event_label.isin(present)])
    per_class = {label: float(np.nan_to_num(by_class[label])) if label in present else float("nan") for label in labels}
    return DetectionMetric("intersection F1", "DTC = GTC = 0.5", "psds_eval", _mean(per_class), per_class)


def collar_f1(
    scores: dict[str, pd.DataFrame],
    truth: pd.DataFrame,
    *,
    labels: list[str],
    thresholds: np.ndarray,
) -> DetectionMetric:
    """Collar-based F1: onset within 200 ms, offset within 200 ms or 20 % of the event, by sed_scores_eval.

    scores: {filename: table of sed_scores_eval}, as of score_tables. NaN for classes without true events.
    """
    from sed_scores_eval import collar_based

    present = _present(labels, truth)
    by_label = dict(zip(labels, np.broadcast_to(thresholds, len(labels)).tolist(), strict=True))
    values = collar_based.fscore(
        _columns(scores, present), _truth_by_clip(truth, list(scores)), {label: by_label[label] for label in present},
        onset_collar=0.2, offset_collar=0.2, offset_collar_rate=0.2,
    )[0]  # fmt: skip
    per_class = {label: float(values[label]) if label in present else float("nan") for label in labels}
    return DetectionMetric(
        "collar F1", "onset 200 ms, offset 200 ms or 20 %", "sed_scores_eval", _mean(per_class), per_class
    )


def psds1(
    scores: dict[str, pd.DataFrame], truth: pd.DataFrame, durations: dict[str, float], *, labels: list[str]
) -> DetectionMetric:
    """Polyphonic sound detection score of scenario 1 (DCASE task 4), over all thresholds, by sed_scores_eval.

    DTC = GTC = 0.7, no cross triggers, alpha_ST = 1, at most 100 false alarms an hour. The score itself punishes
    deviation between classes; the values of the classes are their own normalized areas.
    """
    from sed_scores_eval import intersection_based

    present = _present(labels, truth)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        value, by_class, *_ = intersection_based.psds(
            _columns(scores, present), _truth_by_clip(truth, list(scores)), durations,
            dtc_threshold=0.7, gtc_threshold=0.7, cttc_threshold=None, alpha_ct=0.0, alpha_st=1.0, max_efpr=100.0,
        )  # fmt: skip
    per_class = {label: float(by_class[label]) if label in present else float("nan") for label in labels}
    return DetectionMetric(
        "PSDS1", "DTC = GTC = 0.7, alpha_ST = 1, 100 / h; all thresholds", "sed_scores_eval", float(value), per_class
    )


def score_tables(
    framewise: np.ndarray, *, names: list[str], labels: list[str], durations: np.ndarray, seconds_per_frame: float
) -> dict[str, pd.DataFrame]:
    """(N, frames, K) scores -> the tables of sed_scores_eval, one a clip: onset, offset and a column for each class."""
    from sed_scores_eval.base_modules.scores import create_score_dataframe

    tables = {}
    for clip, name in enumerate(names):
        edges = frame_edges(framewise.shape[1], seconds_per_frame, float(durations[clip]))
        inside = edges[1:] > edges[:-1]
        tables[name] = create_score_dataframe(
            framewise[clip][inside].astype(np.float64), np.append(edges[:-1][inside], edges[-1]), labels
        )
    return tables


def _truth_by_clip(truth: pd.DataFrame, names: list[str]) -> dict[str, list[tuple[float, float, str]]]:
    events: dict[str, list[tuple[float, float, str]]] = {name: [] for name in names}
    for name, onset, offset, label in truth[EVENT_COLUMNS].to_numpy().tolist():
        events[name].append((onset, offset, label))
    return events


def _present(labels: list[str], truth: pd.DataFrame) -> list[str]:
    """The classes with true events: the others have no score."""
    return [label for label in labels if (truth.event_label == label).any()]


def _columns(scores: dict[str, pd.DataFrame], labels: list[str]) -> dict[str, pd.DataFrame]:
    return {name: table[["onset", "offset", *labels]] for name, table in scores.items()}


def _mean(per_class: dict[str, float]) -> float:
    values = [value for value in per_class.values() if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")
