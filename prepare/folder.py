"""A user's own data: a folder of audio with a table of clips or of events, or with one folder a class."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional

import numpy as np

from data.clip_store import LEAST_SECONDS, SPLITS, Task, store_path
from data.finding import find_audio
from data.tables import Row, read_table, require_columns
from prepare.adapters import Flags
from prepare.lists import read_class_table, read_lists
from prepare.report import PrepareReport
from prepare.stratify import stratified_split
from prepare.tables import (
    Entry,
    entry_of,
    join_spellings,
    lasts,
    measure,
    parse_fold,
    read_class_folders,
    read_event_rows,
    require_folder,
    write_entries,
)
from settings import Config, UserError, split_list

NAME = "folder"
SOURCE = "{folder}"  # its name
LICENCE = ""  # the user's to state
TASK: Task = "multilabel"  # single_label where each clip has exactly one class and no times
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder of the audio, without --table with one folder a class"},
    "table": {
        "type": Path,
        "metavar": "FILE",
        "help": "CSV or TSV: filename,label or filename,onset,offset,event_label",
    },
    "segment_seconds": {
        "type": float,
        "metavar": "SECONDS",
        "help": "with a table of events: cut recordings into clips so long",
    },
    "lists": {
        "type": str,
        "metavar": "FILES",
        "help": "JSON lists with wav and labels, in place of a table: train.json,test.json or with validation between",
    },
    "class_table": {
        "type": Path,
        "metavar": "FILE",
        "help": "with --lists: CSV of the classes in their order, index,mid,display_name",
    },
}

MAX_SECONDS = 600.0  # each clip takes the room of the longest one in the store
CLIP_COLUMNS = ("filename", "label")
SEPARATOR = re.compile("[,;|]")  # of several labels in one cell, as some tables have them
NAMED = 3  # how many labels a message names


def prepare(
    settings: Config,
    raw: Path,
    table: Optional[Path] = None,
    segment_seconds: Optional[float] = None,
    lists: Optional[str] = None,
    class_table: Optional[Path] = None,
    task: Optional[Task] = None,
) -> PrepareReport:
    """Write the store of the audio below `raw`, in any format and rate, with the classes of `table`.

    table: CSV or TSV with the columns filename, label (one line for each class of a clip) or filename, onset, offset,
    event_label (one line for each event, in seconds; an empty onset, offset and event_label for a clip without).
    Further columns: `split` (train, validation, test) or `fold` (whole numbers from 1). Without a table each folder
    in `raw` is a class. Classes are sorted by name. Without split and fold, the splits come from stratified_split with
    random_seed. A filename is a path below `raw`, or the end of such a path where only one file has it; audio that the
    table does not name is left out. Files that are missing or cannot be read are skipped and reported. segment_seconds:
    cut recordings with a table of events into clips of so many seconds, named as media fragments (forest.wav#t=10,20),
    all of a recording in one split. lists, class_table: see prepare/lists.py; the classes of the table are those of the
    store, in its order. task: None for single_label where each clip has exactly one class and no times.
    Raises UserError for a wrong table, events beyond their clip, clips over 10 minutes that are not to be cut, no
    audio, and single_label where a clip has not exactly one class.
    """
    require_folder(raw, "the folder of the audio")
    report = PrepareReport(store_path(settings.dataset_path, NAME))
    if (lists and table) or (class_table and not lists):
        raise UserError("--lists takes the place of --table, and --class_table belongs to --lists: leave one out.")
    names = read_class_table(class_table) if class_table else None
    if lists:
        entries = read_lists([Path(path) for path in split_list(lists)], raw, names)
    else:
        entries = read_class_folders(raw, report) if table is None else read_entries(table)
    entries = join_spellings(measure(entries, raw, report))
    labels = list(names.values()) if names else sorted(set().union(*(entry.labels for entry in entries)))
    if not labels:
        raise UserError(f"{table} names no class: at least one event of {LEAST_SECONDS:g} s is needed.\n{report}")
    if table is not None or lists:
        report.add_left_out(find_audio(raw), raw, used=len(entries))
    if names is None:
        _note_separators(labels, report)
    if segment_seconds is None:
        _check_lengths(entries)
    elif not lasts(segment_seconds) or table is None or any(entry.labels and not entry.events for entry in entries):
        raise UserError(
            f"--segment_seconds {segment_seconds:g} needs {LEAST_SECONDS:g} s or more and a table of events (filename, "
            f"onset, offset, event_label), so that each part of a recording has its own classes."
        )
    report.split_by = f"as {lists or table} says"
    if not any(entry.split or entry.fold for entry in entries):
        report.split_by = f"stratified by class, random_seed {settings.random_seed}"
        targets = np.array([[label in entry.labels for label in labels] for entry in entries])
        for entry, split in zip(entries, stratified_split(targets, settings.random_seed), strict=True):
            entry.split = str(split)
    write_entries(
        entries, labels, settings.sample_rate, report,
        segment_seconds=segment_seconds, used_labels=names is None, dataset_type=NAME,
        task=_task(entries, task), source=SOURCE.format(folder=raw.resolve().name), licence=LICENCE,
    )  # fmt: skip
    return report


def _task(entries: Sequence[Entry], asked: Optional[Task]) -> Task:
    """The task of the clips, or the one that is asked for. Raises UserError where that needs one class a clip."""
    others = [entry.name for entry in entries if len(entry.labels) != 1]
    if asked == "single_label" and others:
        raise UserError(
            f"--task single_label needs exactly one class in each clip; {len(others)} of {len(entries)} have none or "
            f"several, as {others[0]}. Leave --task out."
        )
    return asked or (TASK if others or any(entry.events for entry in entries) else "single_label")


def _note_separators(labels: Sequence[str], report: PrepareReport) -> None:
    """Note the labels that look like several: each stays one class."""
    several = [label for label in labels if SEPARATOR.search(label)]
    if several:
        report.notes.append(
            f"{len(several)} labels hold a comma, a semicolon or |, and each is one class: "
            f"{', '.join(map(repr, several[:NAMED]))}{', ...' if len(several) > NAMED else ''}. Several classes of a "
            f"clip are a line each: a.wav,dog and a.wav,outdoor."
        )


def _check_lengths(entries: Sequence[Entry]) -> None:
    too_long = [f"{entry.name} ({entry.seconds:.0f} s)" for entry in entries if entry.seconds > MAX_SECONDS]
    if too_long:
        raise UserError(
            f"Clips may be {MAX_SECONDS / 60:.0f} minutes long at most; longer are {', '.join(too_long[:5])}"
            f"{' and others' if len(too_long) > 5 else ''}. Cut them into shorter files, or with a table of events by "
            f"--segment_seconds 10."
        )


def read_entries(table: Path) -> list[Entry]:
    """The clips of a table of clips or of events, according to its columns."""
    columns, rows = read_table(table)
    if "event_label" not in columns and {"onset", "offset"} & set(columns):
        raise UserError(f"{table} has times but no column event_label; it has {', '.join(columns)}.")
    for one, other in (("label", "event_label"), ("split", "fold")):
        if {one, other} <= set(columns):
            raise UserError(f"{table} has both columns {one} and {other}: keep one of them.")
    entries = read_event_rows(table, columns, rows) if "event_label" in columns else _clip_rows(table, columns, rows)
    places: dict[str, tuple[str, int]] = {}
    for row in rows:
        place = (_parse_split(row), parse_fold(row))
        name = row.cells["filename"]
        if places.setdefault(name, place) != place:
            raise UserError(f"{row.place}: {name} has another split or fold than in a line before.")
    for entry in entries:
        entry.split, entry.fold = places[entry.name]
    return entries


def _clip_rows(table: Path, columns: Sequence[str], rows: Iterable[Row]) -> list[Entry]:
    """Clips and their classes from the columns filename and label."""
    require_columns(table, columns, CLIP_COLUMNS)
    entries: dict[str, Entry] = {}
    for row in rows:
        if not row.cells["label"]:
            raise UserError(f"{row.place}: the label is empty.")
        entry_of(entries, row).labels.add(row.cells["label"])
    return list(entries.values())


def _parse_split(row: Row) -> str:
    split = row.cells.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{row.place}: split {split!r} is not allowed: it must be {', '.join(SPLITS)}.")
    return split or ""
