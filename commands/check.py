"""python main.py check: report on prepared data, and on errors that would spoil a training."""

import os
from typing import Any, Optional

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.clip_store import SPLITS, ClipTable
from data.facts import store_facts
from data.names import markup, shown, terminal_text
from data_generator import SEDDataModule, hopeless, load_table
from prepare.check import CheckReport, SplitReport, check_tables
from settings import Config, UserError, resolve
from training.schedule import schedule_warnings

TELLING = 0.05  # half an interval that needs no remark: that of 380 clips
NUMBER_COLUMN: dict[str, Any] = {"justify": "right"}


def run(given: dict[str, Any], processes: Optional[int] = None) -> None:
    """Check the three splits of the data that the settings name. Ends with exit status 1 where there are problems.

    processes: how many read the clips; None for one on each core.
    """
    settings = resolve(given, facts=store_facts)
    tables, problems = load_tables(settings)
    warnings: list[str] = []
    if tables:
        report = read_tables(tables, settings, os.cpu_count() or 1 if processes is None else processes)
        print_report(report, settings)
        problems += report.problems + hopeless(settings, tables)
        steps = SEDDataModule(settings, {"train": tables["train"]}).steps_per_epoch(1) if "train" in tables else 0
        warnings = report.warnings + schedule_warnings(settings, steps * settings.max_epoch)
        print(end="".join(what_it_tells(split, found) for split, found in report.splits.items()))
    for message in warnings:
        print(f"warning: {terminal_text(message)}")
    for message in problems:
        print(f"problem: {terminal_text(message)}")
    if problems:
        raise SystemExit(1)
    print("No problems found.")


def what_it_tells(split: str, found: SplitReport) -> str:
    """A line on how exact a metric on the clips of a split can be; "" for training clips and for many."""
    if split == "train" or found.half_width < TELLING:
        return ""
    return (
        f"note: {split} has {len(found.names)} clips: an accuracy of 0.5 on them is known to +- {found.half_width:.2f} "
        f"(95 % interval). Smaller differences between two runs are chance.\n"
    )


def load_tables(settings: Config) -> tuple[dict[str, ClipTable], list[str]]:
    """The splits that can be loaded, and why others cannot.

    Where validation is on the test clips (protocol paper), the two are one entry, `validation = test`.
    """
    tables: dict[str, ClipTable] = {}
    problems: list[str] = []
    for split in SPLITS:
        try:
            tables[split] = load_table(settings, split)  # type: ignore[arg-type]
        except UserError as error:
            problems.append(str(error))
        except (OSError, LookupError) as error:  # HDF5 that opens, with a part that is damaged or does not fit the rest
            problems.append(f"the clips for {split} in {settings.dataset_path} cannot be read: {error}")
    if settings.protocol == "paper" and {"validation", "test"} <= tables.keys():
        del tables["validation"]
        tables["validation = test"] = tables.pop("test")
    return tables, list(dict.fromkeys(problems))


def read_tables(tables: dict[str, ClipTable], settings: Config, processes: int) -> CheckReport:
    """check_tables with a bar, on stderr, where that is a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("clips", total=sum(map(len, tables.values())))
        return check_tables(
            tables,
            sample_rate=settings.sample_rate,
            single_label=settings.task == "single_label",
            processes=processes,
            advance=lambda clips: bar.advance(task, clips),
        )


def print_report(report: CheckReport, settings: Config) -> None:
    """The report's tables: the data set, its splits, its classes."""
    console = Console()
    print(f"{settings.dataset_type}: {shown(settings.dataset_path)}")  # no title of a table, which would break the path
    table = Table(show_header=False)
    table.add_row("sample rate", f"{report.sample_rate} Hz")
    table.add_row("size on disk", f"{report.size / 2**20:,.1f} MiB")
    table.add_row("clips with audio that another has", str(report.repeated))
    console.print(table)
    console.print(splits_table(report.splits))
    console.print(classes_table(report))


def splits_table(splits: dict[str, SplitReport]) -> Table:
    """One column a split."""
    table = Table(title="splits", title_justify="left")
    table.add_column()
    for split in splits:
        table.add_column(split, **NUMBER_COLUMN)
    columns = list(splits.values())
    table.add_row("clips", *(str(len(found.names)) for found in columns))
    if any(found.folds for found in columns):
        table.add_row("folds", *(", ".join(map(str, found.folds)) for found in columns))
    for place, name in enumerate(("shortest", "median", "longest")):
        seconds = [found.durations() for found in columns]
        table.add_row(f"{name} in s", *("-" if s is None else f"{s[place]:.2f}" for s in seconds))
    for name in ("silent", "clipped", "unreadable"):
        table.add_row(name, *(str(len(getattr(found, name))) for found in columns))
    table.add_row("fingerprint", *(found.fingerprint for found in columns))
    return table


def classes_table(report: CheckReport) -> Table:
    """Clips of each class in each split; a warning names the classes that have none."""
    counts = np.stack([found.per_class for found in report.splits.values()], axis=1)
    table = Table(title="clips of each class", title_justify="left")
    table.add_column("class")
    for split in report.splits:
        table.add_column(split, **NUMBER_COLUMN)
    for label, row in zip(report.labels, counts.tolist(), strict=True):
        if any(row):
            table.add_row(markup(label), *map(str, row))
    return table
