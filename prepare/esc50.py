"""ESC-50: 2,000 environmental recordings of 5 s in 50 classes and five folds."""

from pathlib import Path

from data.clip_store import Task, store_path
from data.labels import read_labels
from data.tables import read_table, require_columns
from prepare.adapters import Flags
from prepare.finder import AudioFinder
from prepare.report import PrepareReport
from prepare.tables import Entry, parse_fold, write_entries
from settings import Config, UserError

NAME = "esc-50"
SOURCE = "K. J. Piczak: ESC: Dataset for Environmental Sound Classification, ACM Multimedia 2015"
LICENCE = "Creative Commons Attribution-NonCommercial 3.0 (ESC-10: Attribution 3.0), clips by their Freesound authors"
TASK: Task = "single_label"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder with meta/esc50.csv and audio/"},
}

LABELS = read_labels("esc50_labels.json")
CLIP_SECONDS = 5
COLUMNS = ("filename", "fold", "target", "category")


def prepare(settings: Config, raw: Path) -> PrepareReport:
    """Write the store of a folder with meta/esc50.csv and audio/, as ESC-50 comes (or ESC-10, or other folds of it).

    The classes are those of the table, in ESC-50's order: ten of ESC-10. Clips over 5 s are cut; shorter ones keep
    their length and are filled when they are read. Files that cannot be read are skipped and reported. Raises UserError
    where the table is missing or wrong.
    """
    report = PrepareReport(store_path(settings.dataset_path, NAME))
    entries = read_meta(raw)
    finder = AudioFinder(raw / "audio")
    found = []
    for entry in entries:
        try:
            entry.path = finder.find(entry.name)
            found.append(entry)
        except UserError as error:
            report.skipped.append((entry.name, str(error)))
    report.add_left_out(finder.found, finder.raw, used=len(found))
    labels = [label for label in LABELS if any(label in entry.labels for entry in entries)]
    write_entries(
        found, labels, settings.sample_rate, report, clip_seconds=CLIP_SECONDS,
        dataset_type=NAME, task=TASK, source=SOURCE, licence=LICENCE,
    )  # fmt: skip
    return report


def read_meta(raw: Path) -> list[Entry]:
    """The clips of esc50.csv. Raises UserError for missing columns, and for classes that are not ESC-50's."""
    table = raw / "meta" / "esc50.csv"
    if not table.is_file():
        raise UserError(f"There is no {table}: --raw must be the folder that holds meta/ and audio/ of ESC-50.")
    columns, rows = read_table(table)
    require_columns(table, columns, COLUMNS)
    entries = []
    for row in rows:
        name, target, category = row.cells["filename"], row.cells["target"], row.cells["category"]
        if not (target.isdecimal() and int(target) < len(LABELS) and category == LABELS[int(target)]):
            raise UserError(f"{row.place}: class {target} {category!r} is not one of ESC-50's.")
        entries.append(Entry(name, {category}, fold=parse_fold(row)))
    return entries
