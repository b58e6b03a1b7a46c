"""Speech Commands V2: 105,829 recordings of 1 s of 35 words, with official lists of validation and test clips."""

from collections.abc import Iterator
from pathlib import Path

from data.clip_store import Task, store_path
from data.finding import find_audio, readable_name
from data.labels import read_labels
from data.tables import clean, read_text
from prepare.adapters import Flags
from prepare.finder import spelling
from prepare.report import PrepareReport
from prepare.tables import Entry, require_folder, write_entries
from settings import Config, UserError

NAME = "scv2"
SOURCE = "P. Warden: Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, 2018, arXiv 1804.03209"
LICENCE = "Creative Commons Attribution 4.0"
TASK: Task = "single_label"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder with one folder a word and the two lists"},
    "label_order": {
        "type": str,
        "metavar": "ORDER",
        "help": "sorted, or published: the order of the published checkpoint [sorted]",
    },
}

PUBLISHED_LABELS = read_labels("scv2_published_labels.json")  # in the order of a directory listing
LABEL_ORDERS = ("sorted", "published")
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
CLIP_SECONDS = 1


def prepare(settings: Config, raw: Path, label_order: str = "sorted") -> PrepareReport:
    """Write the store of a folder with one folder a word, testing_list.txt and validation_list.txt.

    label_order: `sorted`, the words in alphabetical order; `published`, the 35 words as the published checkpoint
    numbers them. Folders that begin with `_` or `.` are no words. Clips that no list names are for training. Clips over
    1 s are cut; shorter ones keep their length and are filled when they are read. Files that cannot be read, and those
    in a list that are absent, are skipped and reported. Raises UserError for another label_order, missing lists, a clip
    in both of them, and words that the published order lacks.
    """
    words = find_words(raw)
    labels = _labels(words, label_order)
    split_of = read_lists(raw)
    report = PrepareReport(store_path(settings.dataset_path, NAME))
    paths = [path for word in words for path in _audio(raw / word, raw, report)]
    names = [readable_name(path.relative_to(raw)) for path in paths]
    entries = [
        Entry(name, {name.partition("/")[0]}, split=split_of.get(spelling(name), "train"), path=path)
        for name, path in zip(names, paths, strict=True)
    ]
    report.skipped += _absent(split_of, names)
    write_entries(
        entries, labels, settings.sample_rate, report, clip_seconds=CLIP_SECONDS,
        dataset_type=NAME, task=TASK, source=SOURCE, licence=LICENCE,
    )  # fmt: skip
    return report


def find_words(raw: Path) -> list[str]:
    """The names of the word folders, sorted. Raises UserError where there are none."""
    require_folder(raw, "the unpacked Speech Commands V2")
    words = sorted(path.name for path in raw.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
    if not words:
        raise UserError(f"{raw} has no folders: --raw must hold one folder a word, as Speech Commands V2 comes.")
    return words


def read_lists(raw: Path) -> dict[str, str]:
    """{spelling of word/file: test or validation} of the lists. Raises UserError for a missing or contradicting one."""
    split_of: dict[str, str] = {}
    for split, name in LISTS.items():
        path = raw / name
        if not path.is_file():
            raise UserError(
                f"There is no {path}: --raw must be the folder with the words, {' and '.join(LISTS.values())}."
            )
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            entry = clean(line)
            if not entry:
                continue
            if spelling(entry).count("/") != 1:
                raise UserError(f"{path}, line {number}: {entry!r} is not of the form word/file.wav.")
            if split_of.setdefault(spelling(entry), split) != split:
                raise UserError(f"{path}, line {number}: {entry} is in {LISTS[split_of[spelling(entry)]]} as well.")
    return split_of


def _labels(words: list[str], label_order: str) -> list[str]:
    if label_order not in LABEL_ORDERS:
        raise UserError(f"--label_order {label_order} is not allowed: it must be {' or '.join(LABEL_ORDERS)}.")
    if label_order == "sorted":
        return words
    strange = [word for word in words if word not in PUBLISHED_LABELS]
    if strange:
        raise UserError(
            f"The folders {', '.join(strange)} are none of the published checkpoint's 35 words: remove them, or use "
            f"--label_order sorted."
        )
    return PUBLISHED_LABELS


def _audio(folder: Path, raw: Path, report: PrepareReport) -> list[Path]:
    """The audio of a word; what lies deeper is reported as skipped."""
    found = find_audio(folder)
    report.add_left_out(found, raw)
    deeper = [path for path in found.audio if path.parent != folder]
    report.skipped += [(readable_name(path.relative_to(raw)), "It does not lie in a word's folder.") for path in deeper]
    return [path for path in found.audio if path.parent == folder]


def _absent(split_of: dict[str, str], names: list[str]) -> Iterator[tuple[str, str]]:
    """(clip, reason) of those that a list names and no folder holds."""
    there = {spelling(name) for name in names}
    for name, split in split_of.items():
        if name not in there:
            yield name, f"It is in {LISTS[split]} but in no word folder."
