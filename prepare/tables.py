"""What adapters share: tables of labels and events, the audio that they name, and the clips that are written."""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from data.audio import audio_seconds, read_int16
from data.clip_store import LARGEST_FOLD, Clip, ClipStoreWriter, Event
from data.finding import find_audio, readable_name
from data.levels import Remark
from data.progress import with_progress
from prepare.finder import AudioFinder
from prepare.report import PrepareReport
from settings import UserError

END_TOLERANCE = 0.5  # seconds that an event may reach beyond the end of its clip, as annotations round
EVENT_COLUMNS = ("filename", "onset", "offset", "event_label")


@dataclass(frozen=True)
class Row:
    """A line of a table. place: the file and the line number, for messages."""

    place: str
    cells: dict[str, str]


@dataclass(frozen=True)
class TimedLabel:
    """An event in a table: class name, onset and offset in seconds from the start of the clip."""

    place: str
    label: str
    onset: float
    offset: float


@dataclass
class Entry:
    """A clip before its audio is read. name: its path below the raw folder, or the end of that path."""

    name: str
    labels: set[str] = field(default_factory=set)
    events: list[TimedLabel] = field(default_factory=list)
    split: str = ""
    fold: int = 0
    path: Path = Path()
    seconds: float = math.nan  # duration in the header of the file; nan: not read
    labelling: Optional[int] = None  # STRONG, WEAK or UNLABELLED; None: STRONG in a store with events, else WEAK


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV or TSV: tab, comma or semicolon, whichever is most frequent in the header line.

    Raises UserError where the file is missing, is no text, has no rows, or a row is longer than the header.
    """
    if not path.is_file():
        raise UserError(f"There is no table {path}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte order mark
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max("\t,;", key=header.count), restval="", strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            lines = [(reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV or TSV in UTF-8: {error}") from None
    if not lines:
        raise UserError(f"{path} is empty: it needs a line of column names and a line for each clip or event.")
    rows = []
    for number, cells in lines:
        place = f"{path}, line {number}"
        if None in cells:
            raise UserError(f"{place} has more cells than the {len(columns)} columns: quote those that hold commas.")
        rows.append(Row(place, {name: cell.strip() for name, cell in cells.items()}))
    return columns, rows


def require_columns(table: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raise UserError where one of the needed columns is lacking."""
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise UserError(
            f"{table} lacks the columns {', '.join(lacking)}; it has {', '.join(columns)} "
            f"and needs {', '.join(needed)}."
        )


def require_folder(folder: Path, what: str) -> None:
    """Raise UserError where --raw is no folder. what: that it must be."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --raw must be {what}.")


def parse_fold(row: Row) -> int:
    """The fold of a row, 0 without such a column. Raises UserError for other than 1 to 127."""
    fold = row.cells.get("fold")
    if fold is None:
        return 0
    if not (fold.isdecimal() and 1 <= int(fold) <= LARGEST_FOLD):
        raise UserError(f"{row.place}: fold {fold!r} is not a whole number from 1 to {LARGEST_FOLD}.")
    return int(fold)


def entry_of(entries: dict[str, Entry], row: Row) -> Entry:
    """The entry that a row's filename names, added to `entries` where it is new."""
    name = row.cells["filename"]
    if not name:
        raise UserError(f"{row.place}: the filename is empty.")
    return entries.setdefault(name, Entry(name))


def read_event_rows(table: Path, columns: Sequence[str], rows: Iterable[Row]) -> list[Entry]:
    """Clips and their events, in the order of the table. Raises UserError for missing columns and wrong times."""
    require_columns(table, columns, EVENT_COLUMNS)
    entries: dict[str, Entry] = {}
    for row in rows:
        entry = entry_of(entries, row)
        label, times = row.cells["event_label"], (row.cells["onset"], row.cells["offset"])
        if not any((label, *times)):
            continue  # a clip without events
        if not label:
            raise UserError(f"{row.place}: the event from {times[0]} to {times[1]} s has no event_label.")
        event = TimedLabel(row.place, label, *(_seconds(row.place, text) for text in times))
        if not 0 <= event.onset < event.offset:
            raise UserError(f"{row.place}: an event must have 0 <= onset < offset, not {times[0]} and {times[1]} s.")
        entry.events.append(event)
        entry.labels.add(label)
    return list(entries.values())


def _seconds(place: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UserError(f"{place}: {text!r} is not a time in seconds.")
    return seconds


def read_class_folders(raw: Path, report: PrepareReport) -> list[Entry]:
    """The audio in the folders of `raw`, each named after its class. Files beside the folders go into the report."""
    entries = []
    found = find_audio(raw)
    for path in found.audio:
        name = readable_name(path.relative_to(raw))
        if "/" not in name:
            report.skipped.append((name, "It lies in no class folder."))
        else:
            entries.append(Entry(name, {name.partition("/")[0]}, path=path))
    report.add_left_out(found, raw)
    if not entries:
        raise UserError(
            f"No audio was found in folders of {raw}: without a table it must hold one folder a class.\n{report}"
        )
    return entries


def measure(entries: Sequence[Entry], raw: Path, report: PrepareReport, table: Optional[Path] = None) -> list[Entry]:
    """The entries whose file exists, with path and duration; the others are reported as skipped.

    table: see AudioFinder.find. Events that end up to 0.5 s after their clip are shortened. Raises UserError where one
    ends later, and where no file is left.
    """
    finder = AudioFinder(raw)
    found = []
    for entry in with_progress(entries, "files are measured"):
        try:
            if entry.path == Path():
                entry.path = finder.find(entry.name, table)
            entry.seconds = audio_seconds(entry.path)
        except UserError as error:
            report.skipped.append((entry.name, str(error)))
            continue
        entry.events = [_within(event, entry) for event in entry.events]
        found.append(entry)
    if not found:
        raise UserError(f"None of the {len(entries)} audio files could be read.\n{report}")
    return found


def join_spellings(entries: Sequence[Entry]) -> list[Entry]:
    """The measured entries, those of one file as one: a table may spell its name in several ways.

    Raises UserError where a file is in two splits or folds.
    """
    joined: dict[Path, Entry] = {}
    for entry in entries:
        first = joined.setdefault(entry.path, entry)
        if first is not entry:
            if (first.split, first.fold) != (entry.split, entry.fold):
                raise UserError(f"{first.name} and {entry.name} are one file, {entry.path}, in two splits or folds.")
            first.labels |= entry.labels
            first.events += entry.events
    return list(joined.values())


def _within(event: TimedLabel, entry: Entry) -> TimedLabel:
    """The event, cut at the end of its clip. Raises UserError where too much of it lies beyond, or all."""
    if event.offset > entry.seconds + END_TOLERANCE or event.onset >= entry.seconds:
        raise UserError(
            f"{event.place}: the event from {event.onset} to {event.offset} s does not fit into {entry.name}, which is "
            f"{entry.seconds:.2f} s long."
        )
    return TimedLabel(event.place, event.label, event.onset, min(event.offset, entry.seconds))


def write_entries(
    entries: Sequence[Entry],
    labels: list[str],
    sample_rate: int,
    report: PrepareReport,
    *,
    clip_seconds: Optional[float] = None,
    segment_seconds: Optional[float] = None,
    **attributes: str,
) -> None:
    """Read the audio of entries and write the store report.path; counts the clips in `report`.

    clip_seconds: longer clips are cut; None: the longest measured one fits. segment_seconds: cut into clips so long.
    Files that cannot be read, or have another length than in their header, are reported as skipped. Raises UserError
    where no clip is left.
    """
    longest = clip_seconds or min(max(entry.seconds for entry in entries), segment_seconds or math.inf)
    with ClipStoreWriter(
        report.path,
        clip_samples=math.ceil(longest * sample_rate - 1e-6),
        sample_rate=sample_rate,
        labels=labels,
        **attributes,
    ) as writer:
        for entry in with_progress(entries, "files are read"):
            remarks: list[Remark] = []
            try:
                waveform = read_int16(entry.path, sample_rate, remarks)
                if abs(len(waveform) / sample_rate - entry.seconds) > END_TOLERANCE:
                    raise UserError(f"It ends after {len(waveform) / sample_rate:.2f} s of {entry.seconds:.2f} s.")
                for clip in _clips(entry, waveform, labels, sample_rate, segment_seconds):
                    writer.add(clip)
                    report.clips += 1
                report.remarks += [(entry.name, remark) for remark in remarks]
            except UserError as error:
                report.skipped.append((entry.name, str(error)))
        if report.clips == 0:
            raise UserError(f"None of the {len(entries)} audio files could be read.\n{report}")


def _clips(
    entry: Entry, waveform: np.ndarray, labels: list[str], sample_rate: int, segment_seconds: Optional[float]
) -> Iterator[Clip]:
    """The clip of an entry; with segment_seconds several, one after another, each with its part of the events."""
    events = [Event(labels.index(event.label), event.onset, event.offset) for event in entry.events]
    place = (entry.fold, entry.split)
    if segment_seconds is None:
        targets = sorted(labels.index(label) for label in entry.labels)
        yield Clip(entry.name, waveform, targets, *place, events, entry.labelling)
        return
    length = round(segment_seconds * sample_rate)
    for first in range(0, len(waveform), length):
        part = waveform[first : first + length]
        start, end = first / sample_rate, (first + len(part)) / sample_rate
        inside = [
            Event(event.label, max(event.onset - start, 0.0), min(event.offset, end) - start)
            for event in events
            if event.onset < end and event.offset > start
        ]
        name = f"{entry.name}#t={start:g},{end:g}"
        yield Clip(name, part, sorted({event.label for event in inside}), *place, inside, entry.labelling)
