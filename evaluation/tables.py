"""Metrics of detections as tables on the screen, JSON and TSV."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from data.files import write_each, write_json, write_text
from data.names import markup, score_text, table_cell
from data.tables import EVENT_COLUMNS
from evaluation.detection import MACRO, MICRO, DetectionMetric, MetricComparison
from evaluation.metrics import ClassResults
from evaluation.postprocess import PostProcessing

WIDTH = 1000  # characters of a line in a file or a pipe; a terminal has its own
TSV_COLUMNS = (
    "metric", "criterion", "tool", "class", "value", "low", "high", "level", "resamples", "unit", "true_positives",
    "false_positives", "false_negatives", "positives", "note",
)  # fmt: skip


def print_metrics(title: str, metrics: Sequence[DetectionMetric], labels: Sequence[str]) -> None:
    """Two tables: every metric with its interval, and every class with its values and counts."""
    console = _console()
    table = Table(title=markup(title), title_justify="left", caption_justify="left")
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
        table.add_row(markup(label), *cells)
    table.caption = "Below each value: true positives / false positives / false negatives."
    return table


def print_comparison(names: tuple[str, str], compared: Sequence[MetricComparison]) -> None:
    """One row for each value of both systems, with the interval of the difference."""
    table = Table(
        title=markup(f"Difference: {names[0]} minus {names[1]}"), title_justify="left", caption_justify="left"
    )
    for column in ("metric", "criterion", "value", "first", "second", "difference", "95 % interval", "p"):
        table.add_column(column, no_wrap="interval" in column)
    for c in compared:
        row = (c.name, c.criterion, c.value, number(c.first), number(c.second), f"{c.comparison.difference:+.4f}")
        table.add_row(*row, str(c.comparison.interval), f"{c.comparison.p_value:.3f}")
    table.caption = "Paired bootstrap over clips; p: two-sided, for no difference."
    _console().print(table)


def _console() -> Console:
    return Console() if Console().is_terminal else Console(width=WIDTH)


def number(value: Optional[float]) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"


def tsv_text(metrics: Sequence[DetectionMetric]) -> str:
    """One row for each metric's macro and micro value and for each class; empty cells for missing values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, TSV_COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for m in metrics:
        about = {"metric": m.name, "criterion": m.criterion, "tool": m.tool, "unit": m.unit, "note": m.note}
        values = {MACRO: m.macro, **({} if m.micro is None else {MICRO: m.micro}), **m.per_class}
        for row, value in values.items():
            cells = {"class": table_cell(row), "value": repr(value) if np.isfinite(value) else ""}
            for part in (m.intervals.get(row), m.counts.get(row)):
                cells |= {} if part is None else vars(part)
            writer.writerow({**about, **cells})
    return text.getvalue()


def write_results(
    prefix: str, about: dict[str, Any], metrics: Sequence[DetectionMetric], compared: Sequence[MetricComparison] = ()
) -> list[Path]:
    """Write PREFIX_metrics.json and PREFIX_metrics.tsv. about: the first entries of the JSON."""
    content = {
        **about,
        "metrics": [metric.as_dict() for metric in metrics],
        "comparison": [each.as_dict() for each in compared],
    }
    return write_each(
        {
            Path(f"{prefix}_metrics.json"): lambda path: write_json(path, content),
            Path(f"{prefix}_metrics.tsv"): lambda path: write_text(path, tsv_text(metrics)),
        }
    )


def write_detections(
    prefix: str, clips: int, post: PostProcessing, found: pd.DataFrame, metrics: Sequence[DetectionMetric]
) -> list[Path]:
    """Write PREFIX_events.tsv, PREFIX_detection.json and PREFIX_detection.tsv."""
    content = {
        "clips": clips,
        "postprocessing": post.as_dict(),
        "metrics": [metric.as_dict() for metric in metrics],
    }
    cells = found.assign(filename=found.filename.map(table_cell), event_label=found.event_label.map(table_cell))
    events = cells.to_csv(sep="\t", index=False, columns=EVENT_COLUMNS, float_format="%.4f")
    return write_each(
        {
            Path(f"{prefix}_events.tsv"): lambda path: write_text(path, events),
            Path(f"{prefix}_detection.json"): lambda path: write_json(path, content),
            Path(f"{prefix}_detection.tsv"): lambda path: write_text(path, tsv_text(metrics)),
        }
    )


def write_classes(prefix: str, results: ClassResults) -> list[Path]:
    """Write PREFIX_classes.tsv and, for one class a clip, PREFIX_confusion.tsv and its picture PREFIX_confusion.png."""
    names = [table_cell(label) for label in results.labels]
    values = ["" if np.isnan(value) else f"{value:.6f}" for value in results.values]
    columns = {"class": names, "clips": results.clips, results.metric.replace(" ", "_"): values}
    tables = {"classes.tsv": pd.DataFrame(columns)}
    if results.confusion is not None:
        counts = pd.DataFrame(results.confusion, columns=names)
        counts.insert(0, "true class", names, allow_duplicates=True)
        tables["confusion.tsv"] = counts
    for end, table in tables.items():
        write_text(Path(f"{prefix}_{end}"), table.to_csv(sep="\t", index=False))
    paths = [Path(f"{prefix}_{end}") for end in tables]
    if results.confusion is not None:
        from evaluation.plots import confusion_figure, save_png  # here: it brings matplotlib

        paths.append(Path(f"{prefix}_confusion.png"))
        save_png(confusion_figure(results.confusion, results.labels), paths[-1])
    return paths


def describe(post: PostProcessing) -> str:
    """The values in one line: one where all classes have the same, else the smallest and the largest."""
    shown = []
    units = {"thresholds": "", "median_filter": " frames", "minimum_duration": " s", "maximum_gap": " s"}
    for name, unit in units.items():
        values = getattr(post, name)
        text = score_text if name == "thresholds" else "{:g}".format
        span = text(min(values)) if min(values) == max(values) else f"{text(min(values))} to {text(max(values))}"
        shown.append(f"{name.replace('_', ' ')} {span}{unit}")
    parts = "no interpolation" if post.interpolation == 1 else f"{post.interpolation} parts a frame"
    way = "" if post.convention == "edges" else f", convention {post.convention}"
    return f"{', '.join(shown)}, {parts}{way}"
