"""Figures of clips and of metrics, in which every axis has a name and a unit."""

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from data.files import whole_file
from data.names import score_text, shown
from evaluation.metrics import Interval
from evaluation.postprocess import frame_edges
from evaluation.psds import MOST_FALSE_ALARMS, PsdRoc
from evaluation.scores import EventList

TRUE_COLOUR, FOUND_COLOUR, SCORE_COLOUR = "#3aa883", "#d1495b", "#2b3a55"
MOST_SHOWN = 8  # classes of a clip, each with a strip of its own
WIDTH, WIDEST = 5.4, 36.0  # inches of a clip's figure, and of that of a long recording
SECONDS_IN_WIDTH = 60.0  # a longer recording has a wider figure
MOST_CURVES = 12  # classes whose curves stay distinguishable
MOST_COLUMNS = 1000  # of a waveform of any length
BINS = 32  # of a histogram
MOST_NUMBERS = 30  # classes of a table of confusions whose cells have room for numbers
MEL_TICKS = np.array([100, 500, 1000, 3000, 10000])  # Hz
LOGIT_TICKS = {1e-6: "1e-6", 1e-3: "0.001", 0.5: "0.5", 1 - 1e-3: "0.999", 1 - 1e-6: "1 - 1e-6"}
LOGIT_EDGE = 1e-7  # about float32's distance from 1 to the next number
# Class names are not formulas. Text stays text: the browser has the letters of every script.
STYLE: Any = {"font.size": 8, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "hts-at"}


@dataclass(frozen=True)
class ClipSound:
    """waveform: (samples,) in shares of full scale; logmel: (T, F) in dB; band_hz: (F,) the bands' centres, rising."""

    waveform: np.ndarray
    sample_rate: int
    logmel: np.ndarray
    band_hz: np.ndarray


@dataclass(frozen=True)
class ClipView:
    """A clip in a figure. scores: (frames, K), to compare with the thresholds (K,); duration in seconds.

    truth_known: False for a clip without annotation, whose truth is empty.
    """

    duration: float
    labels: list[str]
    scores: np.ndarray
    seconds_per_frame: float
    thresholds: tuple[float, ...]
    truth: EventList
    found: EventList
    sound: Optional[ClipSound] = None
    truth_known: bool = True
    title: str = ""

    @property
    def shown(self) -> list[int]:
        """The true classes, then the detected ones; without any, the class of the highest score."""
        both = dict.fromkeys(label for events in (self.truth, self.found) for label, *_ in events)
        return list(both)[:MOST_SHOWN] or [int(self.scores.max(axis=0).argmax())]


@dataclass(frozen=True)
class ScoreScale:
    """An axis of scores: a logit scale between 0 and 1, on which 0.999 and 0.99999 are distinct; else a linear one."""

    logit: bool
    low: float
    high: float

    @classmethod
    def of(cls, scores: np.ndarray) -> "ScoreScale":
        """The scale that holds all of the scores."""
        low, high = (float(scores.min()), float(scores.max())) if scores.size else (0.0, 1.0)
        logit = low >= 0 and high <= 1
        ends = place_on_logit(np.array([min(low, 0.05), max(high, 0.95)])) if logit else np.array([low, high])
        return cls(logit, float(ends[0]), float(max(ends[1], ends[0] + 1e-6)))

    def place(self, scores: np.ndarray | float) -> np.ndarray:
        values = np.asarray(scores, dtype=np.float64)
        return place_on_logit(values) if self.logit else values

    @property
    def label(self) -> str:
        return "score (0 to 1, logit scale)" if self.logit else "score (the system's unit)"

    def set_ticks(self, axis: matplotlib.axis.Axis) -> None:
        if self.logit:
            places = {float(place_on_logit(np.array(value))): text for value, text in LOGIT_TICKS.items()}
            inside = {place: text for place, text in places.items() if self.low <= place <= self.high}
            axis.set_ticks(list(inside), list(inside.values()))


def place_on_logit(scores: np.ndarray) -> np.ndarray:
    """log(s / (1 - s)), with 0 and 1 moved inside by LOGIT_EDGE."""
    inside = np.clip(scores.astype(np.float64), LOGIT_EDGE, 1 - LOGIT_EDGE)
    return np.log(inside / (1 - inside))


def clip_figure(view: ClipView) -> Figure:
    """Waveform and log-mel spectrogram, if there is sound, and a strip for each class shown.

    A strip has the class's scores and threshold, the true events as background and the detected ones as a bar.
    """
    classes = view.shown
    heights = [*([0.95, 1.5] if view.sound is not None else []), *([0.85] * len(classes))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_width(view.duration), sum(heights) + 0.75), layout="constrained")
        if view.title:
            figure.suptitle(view.title)
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        if view.sound is not None:
            _draw_sound(figure, axes[0], axes[1], view.sound, view.duration)
        scale = ScoreScale.of(view.scores[:, classes])
        for axis, label in zip(axes[-len(classes) :], classes, strict=True):
            _draw_strip(axis, view, label, scale)
        axes[-1].set_xlabel("time (s)")
        axes[-1].set_xlim(0, view.duration)
        handles = [
            *([Patch(color=TRUE_COLOUR, alpha=0.35, label="true")] if view.truth_known else []),
            Patch(color=FOUND_COLOUR, label="detected"),
            *axes[-1].plot([], [], color=SCORE_COLOUR, linewidth=1, label="score"),
            *axes[-1].plot([], [], color=SCORE_COLOUR, linewidth=0.8, linestyle="--", label="threshold"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.align_ylabels(axes)
    return figure


def _width(duration: float) -> float:
    """Inches of a figure over so many seconds: in half an hour, events are not to be a barcode."""
    return float(np.clip(WIDTH * duration / SECONDS_IN_WIDTH, WIDTH, WIDEST))


def tags_figure(tags: Sequence[tuple[str, float]], sound: ClipSound, duration: float, title: str = "") -> Figure:
    """Waveform and log-mel spectrogram of a clip of `duration` seconds, and its tags as bars (class, score 0 to 1)."""
    with matplotlib.rc_context(STYLE):
        heights = [0.95, 1.5, 0.5 + 0.2 * len(tags)]
        figure = Figure(figsize=(_width(duration), sum(heights) + 0.75), layout="constrained")
        if title:
            figure.suptitle(title)
        axes = figure.subplots(3, 1, height_ratios=heights)
        axes[0].sharex(axes[1])
        _draw_sound(figure, axes[0], axes[1], sound, duration)
        axes[1].set_xlabel("time (s)")
        axes[1].set_xlim(0, duration)
        axes[2].barh([shown(label) for label, _ in tags], [score for _, score in tags], color=SCORE_COLOUR)
        axes[2].invert_yaxis()
        axes[2].set_xlim(0, 1)
        axes[2].set_xlabel("score of the clip (0 to 1)")
    return figure


def _draw_sound(figure: Figure, top: Axes, bottom: Axes, sound: ClipSound, duration: float) -> None:
    columns = np.array_split(sound.waveform, min(MOST_COLUMNS, len(sound.waveform)))
    seconds = np.linspace(0, len(sound.waveform) / sound.sample_rate, len(columns))
    lows, highs = [part.min() for part in columns], [part.max() for part in columns]
    top.fill_between(seconds, lows, highs, color=SCORE_COLOUR, linewidth=0.3)
    top.set_ylabel("amplitude\n(1: full scale)")
    _draw_logmel(figure, bottom, sound.logmel, sound.band_hz, duration)


def _draw_logmel(figure: Figure, axis: Axes, logmel: np.ndarray, band_hz: np.ndarray, duration: float) -> None:
    bands = logmel.shape[1]
    image = axis.imshow(
        logmel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, duration, 0, bands),
        vmin=np.percentile(logmel, 2), vmax=logmel.max(),
    )  # fmt: skip
    ticks = MEL_TICKS[(band_hz[0] <= MEL_TICKS) & (band_hz[-1] >= MEL_TICKS)]
    axis.set_yticks(np.interp(ticks, band_hz, np.arange(bands)) + 0.5, [str(tick) for tick in ticks])
    axis.set_ylabel("frequency\n(Hz, mel scale)")
    figure.colorbar(image, ax=axis, label="power (dB)", pad=0.01, aspect=12)


def _draw_strip(axis: Axes, view: ClipView, label: int, scale: ScoreScale) -> None:
    edges = frame_edges(len(view.scores), view.seconds_per_frame, view.duration)
    for _, onset, offset in (event for event in view.truth if event[0] == label):
        axis.axvspan(onset, offset, color=TRUE_COLOUR, alpha=0.35, linewidth=0)
    for _, onset, offset in (event for event in view.found if event[0] == label):
        axis.axvspan(onset, offset, ymin=0.02, ymax=0.14, color=FOUND_COLOUR, linewidth=0)
    axis.stairs(scale.place(view.scores[:, label]), edges, baseline=None, color=SCORE_COLOUR, linewidth=1)
    axis.axhline(float(scale.place(view.thresholds[label])), color=SCORE_COLOUR, linewidth=0.8, linestyle="--")
    axis.set_title(
        f"{shown(view.labels[label])}: threshold {score_text(view.thresholds[label])}", loc="left", fontsize=8, pad=3.5
    )
    height = scale.high - scale.low
    axis.set_ylim(scale.low - 0.25 * height, scale.high + 0.1 * height)  # the bar of detections lies below the scores
    scale.set_ticks(axis.yaxis)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_ylabel("score\n(0 to 1)" if scale.logit else "score\n(any unit)")


def roc_figure(curve: PsdRoc, class_curves: dict[str, PsdRoc]) -> Figure:
    """The curve whose area is the polyphonic sound detection score, and those of the classes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.8), layout="constrained")
        axis = figure.subplots()
        drawn = class_curves if len(class_curves) <= MOST_CURVES else {}
        colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        for number, (label, each) in enumerate(drawn.items()):
            _draw_curve(axis, each, label=shown(label), color=colours[number * 2 % 20 + number // 10], linewidth=1)
        _draw_curve(axis, curve, label="all (mean less deviation)", color="black", linewidth=2)
        axis.set_xlim(0, MOST_FALSE_ALARMS)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("effective false alarms (per hour)")
        axis.set_ylabel("true positives (share of the events)")
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_curve(axis: Axes, curve: PsdRoc, *, label: str, color: str, linewidth: float) -> None:
    rates = [0.0, *curve.rates]  # empty for a curve that begins behind the right end
    alarms = [0.0, *curve.false_alarms, MOST_FALSE_ALARMS]
    axis.step(alarms, [*rates, rates[-1]], where="post", label=label, color=color, linewidth=linewidth)


def histogram_figure(positive: np.ndarray, negative: np.ndarray, threshold: float, scale: ScoreScale) -> Figure:
    """Scores of the frames with a class (P,) and of the others (Q,), and the class's threshold."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3, 2.2), layout="constrained")
        axis = figure.subplots()
        edges = np.linspace(scale.low, scale.high, BINS + 1)
        for scores, name, colour in ((negative, "other", "#8a8f99"), (positive, "true", TRUE_COLOUR)):
            counts = np.histogram(np.clip(scale.place(scores), scale.low, scale.high), edges)[0]
            percent = 100 * counts / max(len(scores), 1)
            axis.stairs(percent, edges, fill=True, color=colour, alpha=0.55, label=f"{name} ({len(scores):,})")
        axis.axvline(
            float(scale.place(threshold)), color=SCORE_COLOUR, linewidth=0.8, linestyle="--", label="threshold"
        )
        axis.set_xlabel(scale.label)
        axis.set_ylabel("frames (%)")
        scale.set_ticks(axis.xaxis)
        axis.margins(x=0.02)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, columnspacing=1, handlelength=1.3)
    return figure


def confusion_figure(counts: np.ndarray, labels: Sequence[str]) -> Figure:
    """(K, K) clips by true class (rows) and chosen class, coloured by their share of the row."""
    classes = len(labels)
    side = min(2.6 + max(0.32 if classes <= MOST_NUMBERS else 0.16, 1.6 / classes) * classes, 30.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axis = figure.subplots()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        names = [shown(label) for label in labels]
        size = 8 if classes <= MOST_NUMBERS else 6
        axis.set_xticks(range(classes), names, rotation=90, fontsize=size)
        axis.set_yticks(range(classes), names, fontsize=size)
        axis.set_xlabel("class with the highest score")
        axis.set_ylabel("true class")
        if classes <= MOST_NUMBERS:
            for row, column in zip(*np.nonzero(counts), strict=True):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, ax=axis, label="clips of the true class (%)", shrink=0.8, pad=0.02)
    return figure


# Of names beside their points, in points (1/72 inch) to the right and upwards.
PLACES = ((5, 6), (5, -6), (-5, 6), (-5, -6), (5, 14), (5, -14), (-5, 14), (-5, -14), (0, 22), (0, -22))


@dataclass(frozen=True)
class Point:
    """A system in cost_figure. multiply_adds: of a clip; interval: of the metric's value."""

    name: str
    multiply_adds: float
    value: float
    interval: Interval


def cost_figure(points: Sequence[Point], metric: str) -> Figure:
    """A metric against the arithmetic that it takes, with intervals. The line joins those that none dominates."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axis = figure.subplots()
        ordered = sorted(points, key=lambda point: (point.multiply_adds, -point.value))
        best = np.maximum.accumulate([point.value for point in ordered])
        front = [point for point, most in zip(ordered, [-np.inf, *best], strict=False) if point.value > most]
        axis.plot([p.multiply_adds for p in front], [p.value for p in front], color="#8a8f99", linewidth=0.8, zorder=1)
        for point in points:
            axis.vlines(point.multiply_adds, point.interval.low, point.interval.high, color=SCORE_COLOUR, linewidth=0.8)
            axis.plot(point.multiply_adds, point.value, marker="o", markersize=4, color=SCORE_COLOUR)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.25)
        axis.set_xlabel("multiply-adds a clip (10⁹)")
        axis.set_ylabel(f"{metric} (95 % interval)")
        axis.grid(alpha=0.3)
        label_points(axis, [(point.name, point.multiply_adds, point.value) for point in points])
    return figure


def label_points(axis: Axes, labels: Sequence[tuple[str, float, float]]) -> None:
    """Write each name beside its point (x, y): of PLACES the first that covers no point, no other name and no edge."""
    figure = axis.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # from here on the axes stay where they are
    figure.set_layout_engine("none")
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axis.transData.transform([label[1:] for label in labels])]
    for name, x, y in labels:
        texts = [
            axis.annotate(
                name, (x, y), xytext=(right, up), textcoords="offset points", fontsize=7,
                ha="left" if right > 0 else "right" if right < 0 else "center", va="center",
            )
            for right, up in PLACES
        ]  # fmt: skip
        boxes = [text.get_window_extent() for text in texts]
        inside = axis.get_window_extent()
        covered = [
            sum(box.overlaps(other) for other in taken)
            + (not inside.contains(box.x0, box.y0) or not inside.contains(box.x1, box.y1))
            for box in boxes
        ]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        for number, text in enumerate(texts):
            if number != best:
                text.remove()


def svg_uri(figure: Figure) -> str:
    """A figure as a data URI, for the src of an image."""
    content = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # equal figures give equal text
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser's font draws it
        figure.savefig(content, format="svg", metadata=nothing)
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure into a new file, whose folder is made."""
    with whole_file(path) as partial, matplotlib.rc_context(STYLE):
        figure.savefig(partial, format="png", dpi=160)
