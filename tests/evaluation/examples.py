"""What the tests of evaluation share: tables of events, score stores, metrics by their names."""

from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np
import pandas as pd

from evaluation.detection import DetectionMetric, measure
from evaluation.postprocess import EVENT_COLUMNS, PostProcessing
from evaluation.scores import EventList, Scores
from evaluation.systems import system_of_scores, truth_of_scores

STEP = 10 / 32  # seconds of HTS-AT's frames


def events(*rows: tuple[str, float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=EVENT_COLUMNS)


def rows(table: pd.DataFrame) -> list[tuple[str, float, float, str]]:
    return list(table[EVENT_COLUMNS].itertuples(index=False, name=None))


def clip_names(clips: int) -> list[str]:
    return [f"{clip}.wav" for clip in range(clips)]


def score_store(
    framewise: np.ndarray,
    true: Optional[Sequence[EventList]] = None,
    *,
    labels: Iterable[str] = "abc",
    step: float = STEP,
    seconds: float | np.ndarray = 10.0,
    **attributes: Any,
) -> Scores:
    """A store of (N, frames, K) scores, whose clips have the classes of their events."""
    clips, _, classes = framewise.shape
    targets = np.zeros((clips, classes), dtype=bool)
    for clip, here in enumerate(true or []):
        targets[clip, [label for label, _, _ in here]] = True
    return Scores(
        names=clip_names(clips),
        clipwise=framewise.max(axis=1),
        targets=targets,
        durations=np.broadcast_to(np.asarray(seconds, dtype=float), clips).copy(),
        labels=list(labels),
        framewise=framewise,
        seconds_per_frame=step,
        events=None if true is None else list(true),
        attributes=attributes,
    )


def on_grid(true: Sequence[EventList], shape: tuple[int, int, int], step: float = STEP) -> np.ndarray:
    """True events as frame scores: 1 from the frame edge nearest to an onset to that nearest to the offset, else 0."""
    framewise = np.zeros(shape)
    for clip, here in enumerate(true):
        for label, onset, offset in here:
            framewise[clip, round(onset / step) : round(offset / step), label] = 1
    return framewise


def measured(scores: Scores, post: PostProcessing) -> dict[str, DetectionMetric]:
    """All metrics of a store, without intervals, by name (intersection F1 at 0.7 as `intersection F1 0.7`)."""
    found = [each.metric for each in measure(truth_of_scores(scores), system_of_scores(scores, post))]
    return {f"{m.name} 0.7" if m.criterion == "DTC = GTC = 0.7" else m.name: m for m in found}
