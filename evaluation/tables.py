"""What commands that evaluate detections share: score files as systems, and metrics as tables, JSON and TSV."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.files import write_text
from evaluation.detection import MACRO, MICRO, DetectionMetric, MetricComparison, System, score_tables
from evaluation.event_tables import GroundTruth
from evaluation.metrics import Interval
from evaluation.postprocess import PostProcessing, truth_table
from evaluation.scores import Scores
from settings import Config, UserError, section

WIDTH = 160  # characters of a line that goes into a file or a pipe; a terminal says its own
TSV_COLUMNS = (
    "metric", "criterion", "tool", "class", "value", "low", "high", "level", "resamples", "unit", "true_positives",
    "false_positives", "false_negatives", "positives", "note",
)  # fmt: skip


def choose_postprocessing(scores: Scores, settings: Config) -> PostProcessing:
    """What came with the scores (calibrated, or of the mapping), with what the settings fl_... say in its place.

    Its `source` tells which. Raises UserError for values that do not fit the classes.
    """
    base = scores.postprocessing or PostProcessing(tuple(scores.labels))
    given = {name: getattr(settings, name) for name in section("event detection")}
    given = {name: value for name, value in given.items() if value is not None and value != []}
    if not given:
        return base
    fields: dict[str, Any] = {
        "thresholds" if name == "fl_threshold" else name.removeprefix("fl_"): value for name, value in given.items()
    }
    return replace(base, **fields, source=f"{base.source}, with {', '.join(given)} as given")


def truth_of_scores(scores: Scores) -> GroundTruth:
    """The true events in a score file. Raises UserError where it has none."""
    if not scores.events or not any(scores.events):
        raise UserError("The score file has no true events: the data set was prepared without times.")
    durations = dict(zip(scores.names, scores.durations.tolist(), strict=True))
    return GroundTruth.build(truth_table(scores.names, scores.events, scores.labels), durations, scores.labels)


def system_of_scores(scores: Scores, post: PostProcessing, names: Sequence[str]) -> System:
    """Scores with their events, for clips in the order of `names`. Raises UserError where these are other clips."""
    if scores.framewise is None:
        raise UserError("The score file has no frame scores: run test with --fl_local True.")
    if sorted(scores.names) != sorted(names):
        raise UserError(
            f"The score files are of different clips: only in one of them {sorted(set(scores.names) ^ set(names))[:4]}."
        )
    where: dict[str, Any] = {"durations": scores.durations, "seconds_per_frame": scores.seconds_per_frame}
    smoothed, step = post.smooth(scores.framewise, **where)
    order = [scores.names.index(name) for name in names]
    return System(
        events=post.decode(scores.framewise, names=scores.names, **where),
        tables=score_tables(
            smoothed, names=scores.names, labels=scores.labels, durations=scores.durations, seconds_per_frame=step
        ),
        clipwise=scores.clipwise[order],
        targets=scores.targets[order],
    )


def print_metrics(title: str, metrics: Sequence[DetectionMetric], labels: Sequence[str]) -> None:
    """Two tables: every metric with its interval, and every class with its values and counts."""
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    for column in ("metric", "criterion", "defined by", MACRO, "95 % interval", MICRO, "95 % interval"):
        table.add_column(column, justify="right" if column in (MACRO, MICRO) else "left", no_wrap="interval" in column)
    for m in metrics:
        micro = [number(m.micro), str(m.intervals.get(MICRO, "none"))] if m.micro is not None else ["", ""]
        table.add_row(m.name, m.criterion, m.tool, number(m.macro), str(m.intervals.get(MACRO, "none")), *micro)
    used = {interval.resamples for m in metrics for interval in m.intervals.values()}
    table.caption = (
        f"Intervals: percentile bootstrap over clips, {' or '.join(map(str, sorted(used)))} resamples; those of"
    )
    table.caption += " PSDS and mAP corrected for bias. -: no true events."
    console.print(table)
    console.print(_class_table(metrics, labels))


def _class_table(metrics: Sequence[DetectionMetric], labels: Sequence[str]) -> Table:
    table = Table(title="Classes", title_justify="left", caption_justify="left")
    table.add_column("class")
    metrics = [m for m in metrics if m.per_class]
    for m in metrics:
        table.add_column(f"{m.name}\n{re.split('[,;]', m.criterion)[0]}", justify="right")
    for label in labels:
        cells = []
        for m in metrics:
            counts = m.counts.get(label)
            of = f"{counts.true_positives}/{counts.false_positives}/{counts.false_negatives}" if counts else ""
            cells.append(f"{number(m.per_class[label])}\n{of}")
        table.add_row(escape(label), *cells)
    table.caption = "Below each value: true positives / false positives / false negatives."
    return table


def print_comparison(names: tuple[str, str], compared: Sequence[MetricComparison]) -> None:
    """One row for each value of both systems, with the interval of the difference."""
    table = Table(
        title=escape(f"Difference: {names[0]} minus {names[1]}"), title_justify="left", caption_justify="left"
    )
    for column in ("metric", "criterion", "value", "first", "second", "difference", "95 % interval", "p"):
        table.add_column(column, no_wrap="interval" in column)
    for c in compared:
        row = (c.name, c.criterion, c.value, number(c.first), number(c.second), f"{c.comparison.difference:+.4f}")
        table.add_row(*row, str(c.comparison.interval), f"{c.comparison.p_value:.3f}")
    table.caption = "Paired bootstrap over clips; p: two-sided, for no difference."
    (Console() if Console().is_terminal else Console(width=WIDTH)).print(table)


def number(value: Optional[float]) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"


def tsv_text(metrics: Sequence[DetectionMetric]) -> str:
    """One row for each metric's macro and micro value and each class; empty where there is nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, TSV_COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for m in metrics:
        about = {"metric": m.name, "criterion": m.criterion, "tool": m.tool, "unit": m.unit, "note": m.note}
        values = {MACRO: m.macro, **({} if m.micro is None else {MICRO: m.micro}), **m.per_class}
        for row, value in values.items():
            counts = m.counts.get(row)
            cells = {} if counts is None else vars(counts)
            shown = repr(value) if np.isfinite(value) else ""
            writer.writerow({**about, "class": row, "value": shown, **_interval_cells(m.intervals.get(row)), **cells})
    return text.getvalue()


def _interval_cells(interval: Optional[Interval]) -> dict[str, Any]:
    return {} if interval is None else vars(interval)


def write_results(
    prefix: str, about: dict[str, Any], metrics: Sequence[DetectionMetric], compared: Sequence[MetricComparison] = ()
) -> list[Path]:
    """Write PREFIX_metrics.json and PREFIX_metrics.tsv. about: what the JSON says first."""
    content = {
        **about,
        "metrics": [metric.as_dict() for metric in metrics],
        "comparison": [each.as_dict() for each in compared],
    }
    paths = [Path(f"{prefix}_metrics.json"), Path(f"{prefix}_metrics.tsv")]
    write_text(paths[0], json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(paths[1], tsv_text(metrics))
    return paths
