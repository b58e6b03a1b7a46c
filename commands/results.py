"""python main.py results: the tests that were run, and the mean and deviation of experiments over seeds."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.table import Table

from data.files import whole_file
from data.names import markup
from runs.ledger import MetricRecord, Result, Spread, newest, over_seeds, read_results
from settings import UserError, resolve

WIDTH = 1000  # characters of a line in a file or a pipe; a terminal has its own width
TSV_COLUMNS = (
    "date", "dataset_type", "esc_fold", "split", "protocol", "kind", "random_seed", "metric", "value", "low", "high",
    "level", "resamples", "criterion", "clips", "tta_shifts", "class_mapping", "precision", "frontend",
    "settings_hash", "data_fingerprint", "git_revision", "device", "checkpoints", "sha256",
)  # fmt: skip


def run(given: dict[str, Any], tsv: Optional[str] = None) -> None:
    """Print the ledger results_path, newest last; a --dataset_type that is given picks the tests on that data set.

    tsv: file to write them into as well, one row for each metric of each test. Raises UserError where there are none.
    """
    settings = resolve(given)
    results, broken = read_results(Path(settings.results_path))
    for message in broken:
        print(f"warning: {message}")
    if "dataset_type" in given:
        results = [result for result in results if result.dataset_type == settings.dataset_type]
    if not results:
        chosen = f" with dataset_type = {settings.dataset_type}" if "dataset_type" in given else ""
        raise UserError(f"{settings.results_path} holds no readable result{chosen}.")
    shown = newest(results)
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    console.print(results_table(shown))
    experiments = over_seeds(results)
    if experiments:
        console.print(seeds_table(experiments))
    if len(shown) < len(results):
        print(f"{len(results) - len(shown)} earlier tests of the same weights on the same clips are not shown.")
    if tsv is not None:
        write_tsv(Path(tsv), shown)
        print(f"{tsv}: {len(shown)} tests")


def results_table(results: Sequence[Result]) -> Table:
    """One row a test."""
    table = Table(title="Tests, newest last", title_justify="left", caption_justify="left")
    table.caption = markup("[low to high]: 95 % percentile bootstrap over clips. +: files differed from the revision.")
    for column in (
        "date",
        "data set",
        "split, protocol",
        "clips",
        "metrics",
        "seed",
        "settings",
        "revision",
        "weights",
    ):
        table.add_column(column, justify="right" if column in ("clips", "seed") else "left", overflow="fold")
    for r in results:
        table.add_row(
            r.date[:16].replace("T", " "),
            r.dataset_type + (f" fold {r.esc_fold}" if r.esc_fold is not None else ""),
            _tested(r),
            str(r.clips),
            markup("\n".join(_value(metric) for metric in r.metrics)),
            _seeds(r),
            (r.settings_hash or "-")[:8],
            r.git_revision,
            markup(_weights(r)),
        )
    return table


def seeds_table(experiments: Sequence[tuple[Result, Sequence[Spread]]]) -> Table:
    """One row an experiment: mean +- sample standard deviation."""
    table = Table(title="Over seeds: mean +- sample standard deviation", title_justify="left")
    for column in ("data set", "split, protocol", "kind", "settings", "metrics", "seeds"):
        table.add_column(column, justify="right" if column == "seeds" else "left")
    for r, spreads in experiments:
        table.add_row(
            r.dataset_type + (f" fold {r.esc_fold}" if r.esc_fold is not None else ""),
            _tested(r),
            r.kind,
            (r.settings_hash or "-")[:8],
            "\n".join(f"{s.name} {s.mean:.4f} +- {s.deviation:.4f}" for s in spreads),
            str(spreads[0].n) if spreads else "-",
        )
    return table


def _tested(result: Result) -> str:
    return markup(", ".join(said for said in (result.split, result.protocol, result.how()) if said))


def _value(metric: MetricRecord) -> str:
    value = "-" if metric.value is None else f"{metric.value:.4f}"
    interval = metric.interval
    return f"{metric.name} {value}" + (f" [{interval.low:.4f} to {interval.high:.4f}]" if interval else "")


def _seeds(result: Result) -> str:
    seeds = result.random_seed
    return "-" if seeds is None else ", ".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)


def _weights(result: Result) -> str:
    """The files, with the run that each belongs to, and the kind where it is not a single network."""
    lines = [] if result.kind == "single" else [f"{result.kind}:"]
    for checkpoint in result.checkpoints:
        path = Path(checkpoint.path)
        parts = [part for part in path.parts[-3:] if part != "checkpoints"]
        lines.append(f"{'/'.join(parts[-2:])} ({checkpoint.sha256[:8]})")
    return "\n".join(lines)


def write_tsv(path: Path, results: Sequence[Result]) -> None:
    """One row for each metric of each test; lists are joined by commas, what is not known is empty."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TSV_COLUMNS, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for result in results:
            common = {
                **result.model_dump(),
                "checkpoints": ",".join(checkpoint.path for checkpoint in result.checkpoints),
                "sha256": ",".join(checkpoint.sha256 for checkpoint in result.checkpoints),
                "tta_shifts": ",".join(map(str, result.tta_shifts)),
                "frontend": ",".join(f"{name} {value:g}" for name, value in result.frontend.items()),
                "random_seed": "" if result.random_seed is None else _seeds(result).replace(" ", ""),
            }
            for metric in result.metrics:
                interval = metric.interval.model_dump() if metric.interval else {}
                writer.writerow({**common, **metric.model_dump(), "metric": metric.name, **interval})
