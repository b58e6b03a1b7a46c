"""What adapters share: tables of labels and events, the audio that they name, and the clips that are written."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from data.audio import audio_seconds, read_int16, stream_int16
from data.clip_store import END_TOLERANCE, LARGEST_FOLD, LEAST_SECONDS, Clip, ClipStoreWriter, Event
from data.finding import find_audio, readable_name
from data.levels import Remark
from data.progress import with_progress
from data.tables import EVENT_COLUMNS, Row, TimedLabel, clean, parse_event, require_columns
from prepare.finder import AudioFinder
from prepare.report import PrepareReport
from settings import UserError


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
        event = parse_event(row)
        entry = entry_of(entries, row)
        if event is not None:
            entry.events.append(event)
            entry.labels.add(event.label)
    return list(entries.values())


def read_class_folders(raw: Path, report: PrepareReport) -> list[Entry]:
    """The audio in the folders of `raw`, each named after its class. Files beside the folders go into the report."""
    entries = []
    found = find_audio(raw)
    for path in found.audio:
        name = readable_name(path.relative_to(raw))
        if "/" not in name:
            report.skipped.append((name, "It lies in no class folder."))
        else:
            entries.append(Entry(name, {clean(name.partition("/")[0])}, path=path))
    report.add_left_out(found, raw)
    if not entries:
        raise UserError(
            f"No audio was found in folders of {raw}: without a table it must hold one folder a class.\n{report}"
        )
    return entries


def measure(entries: Sequence[Entry], raw: Path, report: PrepareReport, table: Optional[Path] = None) -> list[Entry]:
    """The entries whose file exists, with path and duration; the others are reported as skipped.

    table: see AudioFinder.find. Events that end up to END_TOLERANCE after their clip are shortened, and those below
    LEAST_SECONDS left out, with their label. Raises UserError where one ends later, and where no file is left.
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
        _cut_events(entry, report)
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


def _cut_events(entry: Entry, report: PrepareReport) -> None:
    """Cut the events of an entry at the end of its clip; short ones are counted in the report."""
    within = [_within(event, entry) for event in entry.events]
    entry.events = [event for event in within if lasts(event.offset - event.onset)]
    report.short_events += len(within) - len(entry.events)
    if within:
        entry.labels = {event.label for event in entry.events}


def lasts(seconds: float) -> bool:
    """Whether a clip or an event is long enough to be one; times in tables are rounded to a microsecond at most."""
    return seconds > LEAST_SECONDS - 1e-6


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
    used_labels: bool = False,
    **attributes: str,
) -> None:
    """Read the audio of entries and write the store report.path; counts the clips in `report`.

    clip_seconds: longer clips are cut; None: the longest measured one fits. segment_seconds: cut into clips so long.
    used_labels: only the classes that a clip has are classes of the store.
    Files that cannot be read, or have another length than in their header, are reported as skipped. Raises UserError
    where no clip is left.
    """
    longest = clip_seconds or min(max(entry.seconds for entry in entries), segment_seconds or math.inf)
    with ClipStoreWriter(
        report.path,
        clip_samples=math.ceil(longest * sample_rate - 1e-6),
        sample_rate=sample_rate,
        labels=labels,
        used_labels=used_labels,
        **attributes,
    ) as writer:
        for entry in with_progress(entries, "files are read"):
            remarks: list[Remark] = []
            left_out: Counter[str] = Counter()
            try:
                with writer.all_or_none():  # a recording whose end cannot be read leaves no segments
                    for clip in _clips(entry, labels, sample_rate, segment_seconds, left_out, remarks):
                        writer.add(clip)
            except UserError as error:
                report.skipped.append((entry.name, str(error)))
                continue
            report.remarks += [(entry.name, remark) for remark in remarks]
            report.short_events += left_out["events"]
            report.short_segments += left_out["segments"]
        report.clips += len(writer.rows)
        if report.clips == 0:
            raise UserError(f"None of the {len(entries)} audio files could be read.\n{report}")


def _clips(
    entry: Entry,
    labels: list[str],
    sample_rate: int,
    segment_seconds: Optional[float],
    left_out: Counter[str],
    remarks: list[Remark],
) -> Iterator[Clip]:
    """The clip of an entry; with segment_seconds several, one after another, each with its part of the events.

    Segments and parts of events below LEAST_SECONDS are counted in `left_out`, as segments and events. Of a recording
    that is cut, one segment is held at a time. Raises UserError where the audio cannot be read.
    """
    events = [Event(labels.index(event.label), event.onset, event.offset) for event in entry.events]
    place = (entry.fold, entry.split)
    if segment_seconds is None:
        waveform = read_int16(entry.path, sample_rate, remarks)
        seconds = len(waveform) / sample_rate
        if abs(seconds - entry.seconds) > END_TOLERANCE:
            raise UserError(f"It ends after {seconds:.2f} s of {entry.seconds:.2f} s.")
        if not lasts(seconds):
            raise UserError(f"It lasts {seconds:g} s, below the least, {LEAST_SECONDS:g}.")
        targets = sorted(labels.index(label) for label in entry.labels)
        yield Clip(entry.name, waveform, targets, *place, events, entry.labelling)
        return
    first = 0
    for part in stream_int16(entry.path, sample_rate, round(segment_seconds * sample_rate), remarks):
        start, end = first / sample_rate, (first + len(part)) / sample_rate
        first += len(part)
        if not lasts(end - start):
            left_out["segments"] += 1
            continue
        touching = [
            Event(event.label, max(event.onset - start, 0.0), min(event.offset, end) - start)
            for event in events
            if event.onset < end and event.offset > start
        ]
        inside = [event for event in touching if lasts(event.offset - event.onset)]
        left_out["events"] += len(touching) - len(inside)
        name = f"{entry.name}#t={start:g},{end:g}"
        yield Clip(name, part, sorted({event.label for event in inside}), *place, inside, entry.labelling)
