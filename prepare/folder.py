"""A user's own data: a folder of audio with a table of clips or of events, or with one folder a class."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Optional

import numpy as np
import soundfile

from data.audio import SUFFIXES, read_int16
from data.clip_store import SPLITS, Clip, ClipStoreWriter, Event, Task
from prepare.report import PrepareReport
from prepare.stratify import stratified_split
from settings import UserError

MAX_SECONDS = 600.0  # each clip takes the room of the longest one in the store
END_TOLERANCE = 0.5  # seconds that an event may reach beyond the end of its clip, as annotations round
CLIP_COLUMNS = ("filename", "label")
EVENT_COLUMNS = ("filename", "onset", "offset", "event_label")


@dataclass(frozen=True)
class Row:
    """A line of a table. place: the file and the line number, for messages."""

    place: str
    cells: dict[str, str]


@dataclass(frozen=True)
class TimedLabel:
    """An event as the table has it: class name, onset and offset in seconds from the clip's start."""

    place: str
    label: str
    onset: float
    offset: float


@dataclass
class Entry:
    """A clip before its audio is read. name: its path below the raw folder, or the end of it."""

    name: str
    labels: set[str] = field(default_factory=set)
    events: list[TimedLabel] = field(default_factory=list)
    split: str = ""
    fold: int = 0
    path: Path = Path()
    seconds: float = 0.0
    labelling: Optional[int] = None  # what is known of it; None: times where the store has any, else classes


def prepare_folder(
    raw: Path,
    store: Path,
    sample_rate: int,
    table: Optional[Path],
    seed: int,
    segment_seconds: Optional[float] = None,
) -> PrepareReport:
    """Write the store of the audio below `raw`, in any format and rate, with the classes that `table` gives.

    table: CSV or TSV with the columns filename, label (one line for each class of a clip) or filename, onset, offset,
    event_label (one line for each event, in seconds; an empty onset, offset and event_label for a clip without).
    Further columns: `split` (train, validation, test) or `fold` (whole numbers from 1). Without a table each folder
    in `raw` is a class. Classes are sorted by name. Where neither split nor fold is given, clips are shared out by
    stratified_split with `seed`. A filename is a path below `raw`, or the end of such a path where only one file has
    it; audio that the table does not name is left out. Files that are missing or cannot be read are skipped and
    reported. segment_seconds: cut recordings with a table of events into clips of so many seconds, named as media
    fragments (forest.wav#t=10,20), all of a recording in one split. Raises UserError for a wrong table, events beyond
    their clip, clips over 10 minutes that are not to be cut, and no audio.
    """
    _check_folder(raw)
    report = PrepareReport(store)
    entries = read_class_folders(raw, report) if table is None else read_entries(table)
    labels = sorted(set().union(*(entry.labels for entry in entries)))
    if not labels:
        raise UserError(f"{table} names no class: at least one event is needed.")
    entries = measure(entries, raw, report)
    if segment_seconds is None:
        _check_lengths(entries)
    elif segment_seconds <= 0 or table is None or any(entry.labels and not entry.events for entry in entries):
        raise UserError(
            f"--segment_seconds {segment_seconds:g} needs a table of events (filename, onset, offset, event_label), "
            f"which says what each part of a recording holds, and a length above 0."
        )
    if not any(entry.split or entry.fold for entry in entries):
        targets = np.array([[label in entry.labels for label in labels] for entry in entries])
        for entry, split in zip(entries, stratified_split(targets, seed), strict=True):
            entry.split = str(split)
    single = all(len(entry.labels) == 1 and not entry.events for entry in entries)
    task: Task = "single_label" if single else "multilabel"
    about = {"dataset_type": "folder", "task": task, "source": str(raw.resolve().name)}
    write_entries(entries, labels, sample_rate, report, segment_seconds=segment_seconds, **about)
    return report


def _check_lengths(entries: Sequence[Entry]) -> None:
    too_long = [f"{entry.name} ({entry.seconds:.0f} s)" for entry in entries if entry.seconds > MAX_SECONDS]
    if too_long:
        raise UserError(
            f"Clips may be {MAX_SECONDS / 60:.0f} minutes long at most; longer are {', '.join(too_long[:5])}"
            f"{' and others' if len(too_long) > 5 else ''}. Cut them into shorter files, or with a table of events by "
            f"--segment_seconds 10."
        )


def read_entries(table: Path) -> list[Entry]:
    """The clips of a table of clips or of events, whichever its columns say."""
    columns, rows = read_table(table)
    if "event_label" not in columns and {"onset", "offset"} & set(columns):
        raise UserError(f"{table} has times but no column event_label; it has {', '.join(columns)}.")
    if {"label", "event_label"} <= set(columns):
        raise UserError(f"{table} has both columns label and event_label: keep one of them.")
    if {"split", "fold"} <= set(columns):
        raise UserError(f"{table} has both columns split and fold: keep one of them.")
    entries = read_event_rows(table, columns, rows) if "event_label" in columns else _clip_rows(table, columns, rows)
    places: dict[str, tuple[str, int]] = {}
    for row in rows:
        place = (_split(row), _fold(row))
        name = row.cells["filename"]
        if places.setdefault(name, place) != place:
            raise UserError(f"{row.place}: {name} has another split or fold than in a line before.")
    for entry in entries:
        entry.split, entry.fold = places[entry.name]
    return entries


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and lines of a CSV or TSV: tab, comma or semicolon, whichever its first line has most of.

    Raises UserError where the file is missing, no text, has no lines, or lines longer than the first.
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


def read_event_rows(table: Path, columns: Sequence[str], rows: Iterable[Row]) -> list[Entry]:
    """Clips and their events, in the order of the table. Raises UserError for missing columns and wrong times."""
    _check_columns(table, columns, EVENT_COLUMNS)
    entries: dict[str, Entry] = {}
    for row in rows:
        entry = _entry(entries, row)
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


def read_class_folders(raw: Path, report: PrepareReport) -> list[Entry]:
    """The audio of each folder in `raw`, which is its class; files beside the folders are reported as skipped."""
    entries = []
    for path in find_audio(raw):
        parts = path.relative_to(raw).parts
        if len(parts) == 1:
            report.skipped.append((path.name, "It lies in no class folder."))
        else:
            entries.append(Entry("/".join(parts), {parts[0]}))
    if not entries:
        raise UserError(
            f"No audio was found in folders of {raw}: without a table it must hold one folder a class. The endings are "
            f"{', '.join(SUFFIXES)}."
        )
    return entries


def find_audio(raw: Path) -> list[Path]:
    """The audio files below a folder, sorted, but hidden ones."""
    found = (path for path in raw.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(raw).parts))


def audio_seconds(path: Path) -> float:
    """Duration as the file's header says. Raises UserError where it is no audio or has no samples."""
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as audio: {error}") from None
    if info.frames == 0:
        raise UserError(f"{path} holds no samples.")
    return info.frames / info.samplerate


def measure(entries: Sequence[Entry], raw: Path, report: PrepareReport, table: Optional[Path] = None) -> list[Entry]:
    """The entries whose file is there, with path and duration; the others are reported as skipped.

    table: see AudioFinder.find. Events that end up to 0.5 s after their clip are shortened. Raises UserError where one
    ends later, and where no file is left.
    """
    finder = AudioFinder(raw)
    found = []
    for entry in entries:
        try:
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


class AudioFinder:
    """Finds the file that a table names: at its place below a folder, or deeper where only one has that name."""

    def __init__(self, raw: Path) -> None:
        self.raw = raw

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        paths = defaultdict(list)
        for path in find_audio(self.raw):
            paths[path.name].append(path)
        return paths

    def find(self, name: str, table: Optional[Path] = None) -> Path:
        """Path of the file. Raises UserError where there is none, or several deeper ones.

        table: of several, the one whose folders have most names in common with the folders and the name of this table.
        """
        if (self.raw / name).is_file():
            return self.raw / name
        wanted = PurePosixPath(name)
        deeper = [path for path in self._by_name.get(wanted.name, []) if path.as_posix().endswith(f"/{wanted}")]
        if len(deeper) > 1 and table is not None:
            deeper = self._nearest(deeper, table)
        if len(deeper) > 1:
            raise UserError(f"Several files have this name: {deeper[0]} and {deeper[1]}.")
        if not deeper:
            raise UserError(f"There is no file {self.raw / name}, nor one of that name in its folders.")
        return deeper[0]

    def _nearest(self, paths: Sequence[Path], table: Path) -> list[Path]:
        names = set(table.resolve().with_suffix("").parts)
        common = [len(names & set(path.parent.relative_to(self.raw).parts)) for path in paths]
        return [path for path, count in zip(paths, common, strict=True) if count == max(common)]


def write_entries(
    entries: Sequence[Entry],
    labels: list[str],
    sample_rate: int,
    report: PrepareReport,
    *,
    segment_seconds: Optional[float] = None,
    **attributes: str,
) -> None:
    """Write measured entries into the store report.path, whose width is the longest clip; counts them in `report`.

    Files that turn out unreadable, or to have another length than their header says, are reported as skipped.
    """
    longest = min(max(entry.seconds for entry in entries), segment_seconds or math.inf)
    with ClipStoreWriter(
        report.path,
        clip_samples=math.ceil(longest * sample_rate - 1e-6),
        sample_rate=sample_rate,
        labels=labels,
        **attributes,
    ) as writer:
        for entry in entries:
            try:
                waveform = read_int16(entry.path, sample_rate)
                if abs(len(waveform) / sample_rate - entry.seconds) > END_TOLERANCE:
                    raise UserError(f"It ends after {len(waveform) / sample_rate:.2f} s of {entry.seconds:.2f} s.")
                for clip in _clips(entry, waveform, labels, sample_rate, segment_seconds):
                    writer.add(clip)
                    report.clips += 1
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


def _check_folder(raw: Path) -> None:
    if not raw.is_dir():
        raise UserError(f"There is no folder {raw}: --raw must be the folder of the audio.")


def _check_columns(table: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise UserError(
            f"{table} lacks the columns {', '.join(lacking)}; it has {', '.join(columns)}. A table of clips has "
            f"{', '.join(CLIP_COLUMNS)}, one of events {', '.join(EVENT_COLUMNS)}."
        )


def _clip_rows(table: Path, columns: Sequence[str], rows: Iterable[Row]) -> list[Entry]:
    """Clips and their classes from the columns filename and label."""
    _check_columns(table, columns, CLIP_COLUMNS)
    entries: dict[str, Entry] = {}
    for row in rows:
        if not row.cells["label"]:
            raise UserError(f"{row.place}: the label is empty.")
        _entry(entries, row).labels.add(row.cells["label"])
    return list(entries.values())


def _entry(entries: dict[str, Entry], row: Row) -> Entry:
    """The entry of a line's clip, made where the line is the clip's first."""
    name = row.cells["filename"]
    if not name:
        raise UserError(f"{row.place}: the filename is empty.")
    return entries.setdefault(name, Entry(name))


def _seconds(place: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise UserError(f"{place}: {text!r} is not a time in seconds.")
    return seconds


def _split(row: Row) -> str:
    split = row.cells.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{row.place}: split {split!r} is not allowed: it must be {', '.join(SPLITS)}.")
    return split or ""


def _fold(row: Row) -> int:
    fold = row.cells.get("fold")
    if fold is None:
        return 0
    if not (fold.isdecimal() and 1 <= int(fold) <= 127):
        raise UserError(f"{row.place}: fold {fold!r} is not a whole number from 1 to 127.")
    return int(fold)


def _within(event: TimedLabel, entry: Entry) -> TimedLabel:
    """The event, cut at its clip's end. Raises UserError where too much of it lies beyond, or all."""
    if event.offset > entry.seconds + END_TOLERANCE or event.onset >= entry.seconds:
        raise UserError(
            f"{event.place}: the event from {event.onset} to {event.offset} s does not fit into {entry.name}, which is "
            f"{entry.seconds:.2f} s long."
        )
    return TimedLabel(event.place, event.label, event.onset, min(event.offset, entry.seconds))
