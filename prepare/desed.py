"""DESED: domestic recordings and soundscapes in ten classes, strongly, weakly or not annotated."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from data.clip_store import STRONG, UNLABELLED, WEAK, Task, store_path
from data.finding import find_audio, readable_name
from data.labels import read_labels
from data.tables import read_table, require_columns
from prepare.adapters import Flags
from prepare.report import PrepareReport
from prepare.tables import (
    Entry,
    entry_of,
    measure,
    read_event_rows,
    require_folder,
    write_entries,
)
from settings import Config, UserError, split_list

NAME = "desed"
SOURCE = (
    "N. Turpault, R. Serizel, A. Parag Shah, J. Salamon: Sound event detection in domestic environments with weakly "
    "labeled data and soundscape synthesis, DCASE Workshop 2019"
)
LICENCE = "as stated with the download of DESED; the clips are their authors'"
TASK: Task = "multilabel"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder of the clips"},
    "table": {"type": Path, "metavar": "FILE", "help": "TSV of the events to test on"},
    "strong": {"type": str, "metavar": "FILE", "help": "TSV of the events to train on; several as A,B"},
    "weak": {"type": Path, "metavar": "FILE", "help": "TSV of the classes of training clips without event times"},
    "unlabelled": {"type": Path, "metavar": "FOLDER", "help": "training audio without annotation"},
    "validation": {"type": Path, "metavar": "FILE", "help": "TSV of the events to validate on"},
}

LABELS = read_labels("desed_labels.json")
WEAK_COLUMNS = ("filename", "event_labels")


def prepare(
    settings: Config,
    raw: Path,
    table: Optional[Path] = None,
    strong: str = "",
    weak: Optional[Path] = None,
    unlabelled: Optional[Path] = None,
    validation: Optional[Path] = None,
) -> PrepareReport:
    """Write one store of the clips below `raw` that the tables name, each with the annotation that it has.

    table: the strong table of the split `test`; validation: that of `validation`; strong: those of `train`, with
    commas between; weak: clips of `train` with classes alone; unlabelled: a folder (in `raw`, or anywhere) of audio for
    `train`. A strong table is a TSV with the columns filename, onset, offset, event_label, times in seconds; a clip
    without events has one line with the last three empty. A weak one has filename and event_labels, with commas between
    them. A file that is not directly in `raw` is looked for in its folders; of several with its name the one whose
    folders are named most like those of the table is taken. A training clip in several sets is taken once, with its
    strongest annotation. Clips are kept whole, whatever their length. Files that are missing or cannot be read are
    skipped and reported. Raises UserError, with the line, for classes other than DESED's ten, offsets that are not
    after their onset, and events that end over 0.5 s after their clip (less is cut); and for a clip in two splits.
    """
    require_folder(raw, "the folder of DESED's clips")
    training = [(Path(name), "train") for name in split_list(strong)]
    strong_sets = [*training, (validation, "validation"), (table, "test")]
    tables = [(path, split, read_strong) for path, split in strong_sets if path is not None]
    if weak is not None:
        tables.append((weak, "train", read_weak))
    if not tables:
        raise UserError("prepare --dataset_type desed needs a table: --table, --strong, --weak or --validation.")
    sets = {str(path): _labelled(path, split, read) for path, split, read in tables}
    report = PrepareReport(store_path(settings.dataset_path, NAME))
    sets = {name: measure(entries, raw, report, Path(name)) for name, entries in sets.items()}
    if unlabelled is not None:
        folder = unlabelled if unlabelled.is_dir() else raw / unlabelled
        sets[str(folder)] = measure(_unlabelled(folder, report), folder, report)
    entries = merge(sets, raw)
    write_entries(
        entries, LABELS, settings.sample_rate, report,
        dataset_type=NAME, task=TASK, source=SOURCE, licence=LICENCE,
    )  # fmt: skip
    return report


def read_strong(table: Path) -> list[Entry]:
    """The clips and events of a strong table. Raises UserError, with the line, for a class that is not DESED's."""
    entries = read_event_rows(table, *read_table(table))
    for entry in entries:
        entry.labelling = STRONG
        for event in entry.events:
            _check_class(event.label, event.place)
    return entries


def read_weak(table: Path) -> list[Entry]:
    """The clips and classes of a weak table. Raises UserError for missing columns, and for a line without a class."""
    columns, rows = read_table(table)
    require_columns(table, columns, WEAK_COLUMNS)
    entries: dict[str, Entry] = {}
    for row in rows:
        entry = entry_of(entries, row)
        entry.labelling = WEAK
        for label in row.cells["event_labels"].split(","):
            _check_class(label.strip(), row.place)
            entry.labels.add(label.strip())
    return list(entries.values())


def merge(sets: dict[str, list[Entry]], raw: Path) -> list[Entry]:
    """All entries of some tables and folders ({path: entries}), each file once, with names that no two share.

    A file in several sets is taken from the first: sets with stronger annotation must come first. Files that share a
    name are named by their paths from `raw`. Raises UserError where a file is in two splits, or twice in one table.
    """
    taken: dict[Path, tuple[Entry, str]] = {}
    for place, entries in sets.items():
        for entry in entries:
            path = entry.path.resolve()
            other, before = taken.setdefault(path, (entry, place))
            if other is not entry and (place == before or other.split != entry.split):
                raise UserError(
                    f"{entry.path} is there twice: as {other.name} in {before} ({other.split}) and as {entry.name} in "
                    f"{place} ({entry.split}). Take it out of one of them."
                )
    merged = [entry for entry, _ in taken.values()]
    count = Counter(entry.name for entry in merged)
    for entry in merged:
        if count[entry.name] > 1:
            entry.name = Path(os.path.relpath(entry.path, raw)).as_posix()
    return merged


def _labelled(table: Path, split: str, read: Callable[[Path], list[Entry]]) -> list[Entry]:
    entries = read(table)
    for entry in entries:
        entry.split = split
    return entries


def _unlabelled(folder: Path, report: PrepareReport) -> list[Entry]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --unlabelled must be one, as it lies or below --raw.")
    found = find_audio(folder)
    if not found.audio:
        raise UserError(f"{folder} has no audio files: --unlabelled must be the folder of the unlabelled clips.")
    report.add_left_out(found, folder)
    return [
        Entry(readable_name(path.relative_to(folder)), split="train", labelling=UNLABELLED, path=path)
        for path in found.audio
    ]


def _check_class(label: str, place: str) -> None:
    if label not in LABELS:
        raise UserError(f"{place}: {label!r} is none of DESED's classes: {', '.join(LABELS)}.")
