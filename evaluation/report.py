"""One HTML file on a system's detections in a data set: metrics, curves, histograms, confusions and the worst clips.

Pictures and sound are in it as data URIs: it needs no other file and no internet. report.html is the template.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd
import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.names import score_text, shown
from evaluation.clips import read_sounds, view_clip
from evaluation.detection import MACRO, MICRO, DetectionMetric
from evaluation.event_metrics import intersection_counts
from evaluation.event_tables import EventSet, GroundTruth
from evaluation.metrics import ClassResults, class_results
from evaluation.plots import (
    ClipView,
    ScoreScale,
    clip_figure,
    confusion_figure,
    histogram_figure,
    roc_figure,
    svg_uri,
)
from evaluation.postprocess import PostProcessing
from evaluation.scores import Scores

MOST_CLASSES = 30  # in the histograms and in the table of confusions: those with the most true events


@dataclass(frozen=True)
class ClipErrors:
    """Events of a clip: found and missed true ones, and false detections (intersection F1 at 0.5)."""

    clip: int
    found: int
    missed: int
    false: int


@dataclass(frozen=True)
class Evaluated:
    """The content of a report. scores: (N, frames, K), to compare with the thresholds."""

    truth: GroundTruth
    detections: EventSet
    metrics: Sequence[DetectionMetric]
    post: PostProcessing
    scores: np.ndarray
    seconds_per_frame: float
    tags: Optional[ClassResults] = None  # of the clips


def build_report(
    scores: Scores,
    truth: GroundTruth,
    post: PostProcessing,
    found: pd.DataFrame,
    metrics: Sequence[DetectionMetric],
    *,
    title: str,
    about: Sequence[tuple[str, str]],
    worst: int,
) -> str:
    """The report of a score store's detected events, with its `worst` clips; see render_report."""
    smoothed, step = scores.smooth(post)
    task: Any = scores.attributes.get("task", "multilabel")  # earlier versions' files do not say it
    tags = class_results(task, scores.clipwise, scores.targets, scores.labels)
    evaluated = Evaluated(truth, truth.index(found), metrics, post, smoothed, step, tags)
    errors = worst_clips(evaluated.detections, truth, worst)
    sounds = read_sounds(scores, [each.clip for each in errors])
    views = [(each, view_clip(scores, post, found, each.clip, sounds.get(each.clip))) for each in errors]
    return render_report(evaluated, views, title=title, about=about)


def worst_clips(detections: EventSet, truth: GroundTruth, count: int) -> list[ClipErrors]:
    """The `count` clips with the most missed and false events, the worst first; no clip without mistakes."""
    counts = intersection_counts(detections, truth, 0.5)
    found, false = counts.found.sum(axis=1), counts.false.sum(axis=1)
    missed = counts.positive.sum(axis=1) - found
    order = np.argsort(-(missed + false), kind="stable")[:count]
    errors = (ClipErrors(int(k), int(found[k]), int(missed[k]), int(false[k])) for k in order)
    return [each for each in errors if each.missed + each.false]


def confused_seconds(
    detections: EventSet, truth: EventSet, durations: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each pair of a true and a detected class, (K + 1, K), and of each true class, (K + 1,).

    Row i, column j: class i is true and class j is detected but not true; for i = j it is both. The last row: no class
    is true. Exact, from the times of the events.
    """
    seconds, lengths = np.zeros((classes + 1, classes)), np.zeros(classes + 1)
    of_clips = zip(_by_clip(truth, len(durations)), _by_clip(detections, len(durations)), strict=True)
    for duration, parts in zip(durations.tolist(), of_clips, strict=True):
        times = [column for part in parts for column in (part.onset, part.offset)]
        edges = np.unique(np.clip(np.concatenate([[0.0, duration], *times]), 0, duration))
        length, middle = np.diff(edges), (edges[1:] + edges[:-1]) / 2
        true, found = (_active(part, middle, classes) for part in parts)
        rows = np.concatenate([true, ~true.any(axis=0, keepdims=True)])
        lengths += rows @ length
        wrong = found & ~true
        some, other = np.flatnonzero(rows.any(axis=1)), np.flatnonzero(wrong.any(axis=1))
        seconds[np.ix_(some, other)] += (rows[some] * length) @ wrong[other].T
        seconds[np.arange(classes), np.arange(classes)] += (true & found) @ length
    return seconds, lengths


def _by_clip(events: EventSet, clips: int) -> list[EventSet]:
    order = np.argsort(events.clip, kind="stable")
    edges = np.searchsorted(events.clip[order], np.arange(clips + 1))
    columns = (events.clip, events.label, events.onset, events.offset)
    return [EventSet(*(column[order[first:last]] for column in columns)) for first, last in pairwise(edges.tolist())]


def _active(events: EventSet, times: np.ndarray, classes: int) -> np.ndarray:
    """(K, S): True where a class is on at one of the times (S,)."""
    active = np.zeros((classes, len(times)), dtype=bool)
    for label, onset, offset in zip(events.label, events.onset, events.offset, strict=True):
        active[label] |= (onset <= times) & (times < offset)
    return active


def frames_of_class(evaluated: Evaluated, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a class, (P,) of frames in whose middle it is true and (Q,) of the others, padding left out."""
    scores, step = evaluated.scores[:, :, label], evaluated.seconds_per_frame
    events = evaluated.truth.events
    mine = events.label == label
    # Marks: +1 at the first frame of an event, -1 after its last.
    marks = np.zeros((len(scores), scores.shape[1] + 1), dtype=np.int32)
    for times, sign in ((events.onset, 1), (events.offset, -1)):
        place = np.clip(np.ceil(times[mine] / step - 0.5), 0, scores.shape[1]).astype(np.int64)
        np.add.at(marks, (events.clip[mine], place), sign)
    true = np.cumsum(marks, axis=1)[:, :-1] > 0
    inside = (np.arange(scores.shape[1]) + 0.5) * step < evaluated.truth.durations[:, None]
    return scores[true & inside], scores[~true & inside]


def audio_uri(waveform: np.ndarray, sample_rate: int) -> str:
    """(samples,) in shares of full scale as a data URI: FLAC, lossless and played by browsers."""
    content = io.BytesIO()
    soundfile.write(content, waveform, sample_rate, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(content.getvalue()).decode()}"


def render_report(
    evaluated: Evaluated,
    worst: Sequence[tuple[ClipErrors, ClipView]],
    *,
    title: str,
    about: Sequence[tuple[str, str]],
) -> str:
    """The report as text. about: lines of the section on the system; all names are escaped."""
    chosen = busiest_classes(evaluated.truth)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: shown(value) if isinstance(value, str) else value,
    )  # fmt: skip
    environment.filters.update(number=_number, share=lambda value: "-" if np.isnan(value) else f"{100 * value:.0f}")
    return environment.get_template("report.html").render(
        title=title,
        about=about,
        metrics=evaluated.metrics,
        macro=MACRO,
        micro=MICRO,
        classes=_class_rows(evaluated),
        curves=[(m, svg_uri(roc_figure(m.curve, m.class_curves))) for m in evaluated.metrics if m.curve is not None],
        histograms=_histograms(evaluated, chosen),
        confusions=_confusions(evaluated, chosen),
        chosen=[evaluated.truth.labels[k] for k in chosen],
        all_classes=len(evaluated.truth.labels),
        worst=[_clip_card(evaluated.truth, errors, view) for errors, view in worst],
        clips=len(evaluated.truth.names),
        tags=_tags(evaluated.tags),
    )


def _tags(results: Optional[ClassResults]) -> Optional[dict[str, Any]]:
    if results is None:
        return None
    confusion = None if results.confusion is None else svg_uri(confusion_figure(results.confusion, results.labels))
    rows = zip(results.labels, results.clips.tolist(), results.values.tolist(), strict=True)
    return {"metric": results.metric, "rows": list(rows), "confusion": confusion}


def busiest_classes(truth: GroundTruth) -> list[int]:
    """The MOST_CLASSES classes with the most true events, in the order of the labels."""
    counts = np.bincount(truth.events.label, minlength=len(truth.labels))
    return sorted(np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist())


def _number(value: Optional[float]) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def _class_rows(evaluated: Evaluated) -> list[dict[str, Any]]:
    post, truth = evaluated.post, evaluated.truth
    counts = np.bincount(truth.events.label, minlength=len(truth.labels)).tolist()
    rows = []
    for k, label in enumerate(truth.labels):
        extras = [
            (post.median_filter[k] > 1, f"median of {post.median_filter[k]}"),
            (post.minimum_duration[k] > 0, f"at least {post.minimum_duration[k]:g} s"),
            (post.maximum_gap[k] > 0, f"gaps to {post.maximum_gap[k]:g} s"),
        ]
        cells = [
            (m.per_class[label], m.counts.get(label), m.intervals.get(label)) for m in evaluated.metrics if m.per_class
        ]
        rows.append({
            "label": label, "events": counts[k], "threshold": score_text(post.thresholds[k]), "cells": cells,
            "extras": ", ".join(text for used, text in extras if used),
        })  # fmt: skip
    return rows


def _histograms(evaluated: Evaluated, chosen: Sequence[int]) -> list[tuple[str, str]]:
    """(class, picture) pairs, all on one scale."""
    scale = ScoreScale.of(evaluated.scores[:, :, list(chosen)])
    pictures = []
    for k in chosen:
        figure = histogram_figure(*frames_of_class(evaluated, k), evaluated.post.thresholds[k], scale)
        pictures.append((evaluated.truth.labels[k], svg_uri(figure)))
    return pictures


def _confusions(evaluated: Evaluated, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the table: shares of the seconds in which the row's class (or no class) is true."""
    truth, classes = evaluated.truth, len(evaluated.truth.labels)
    seconds, lengths = confused_seconds(evaluated.detections, truth.events, truth.durations, classes)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = seconds / lengths[:, None]
    return [
        {
            "label": truth.labels[k] if k < classes else "nothing true",
            "seconds": f"{lengths[k]:,.0f}",
            "cells": [(float(shares[k, j]), j == k, truth.labels[j]) for j in chosen],
        }
        for k in [*chosen, classes]
    ]


def _clip_card(truth: GroundTruth, errors: ClipErrors, view: ClipView) -> dict[str, Any]:
    def listed(events: list[tuple[int, float, float]]) -> str:
        return "; ".join(f"{view.labels[k]} {on:.2f} to {off:.2f} s" for k, on, off in events) or "nothing"

    hidden = len({label for label, *_ in (*view.truth, *view.found)} - set(view.shown))
    sound = view.sound
    return {
        "name": truth.names[errors.clip],
        "errors": errors,
        "true": listed(view.truth),
        "detected": listed(view.found),
        "figure": svg_uri(clip_figure(view)),
        "audio": audio_uri(sound.waveform, sound.sample_rate) if sound is not None else None,
        "hidden": hidden,
    }
