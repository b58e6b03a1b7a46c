"""AudioSet Strong: the 10 s clips of AudioSet whose events have times, in the classes of the training table."""

import hashlib
import math
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

from data.clip_store import STRONG, Clip, ClipStoreWriter, Event, Task, Waveforms, open_store, store_path
from data.tables import Row, clean, iterate_table, read_text, require_columns
from prepare import segments as audioset
from prepare.adapters import Flags
from prepare.audio_tables import read_events, source_file
from prepare.packing import pack_parts
from prepare.tables import lasts
from settings import Config, UserError

NAME = "audioset-strong"
SOURCE = (
    "S. Hershey et al.: The Benefit of Temporally-Strong Labels in Audio Event Classification, ICASSP 2021 (labels); "
    f"{audioset.AUDIOSET_SOURCE}"
)
LICENCE = audioset.AUDIOSET_LICENCE
TASK: Task = "multilabel"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder of the audio, or of HDF5 files or data sets of it"},
    "strong": {
        "type": str,
        "metavar": "FILE",
        "help": "audioset_train_strong.tsv: training segments; or a data set of them",
    },
    "table": {"type": Path, "metavar": "FILE", "help": "TSV of the segments to test on, audioset_eval_strong.tsv"},
    "processes": {"type": int, "metavar": "N", "help": "how many parts to pack at once [1]"},
    "class_names": {"type": Path, "metavar": "FILE", "help": "mid_to_display_name.tsv: names and order of the classes"},
}

COLUMNS = ("segment_id", "start_time_seconds", "end_time_seconds", "label")
SEGMENT_ID = re.compile(r"(?P<ytid>.+)_(?P<start>\d+)")  # an id may hold _ and -; the start is in milliseconds
CLIP_NAME = re.compile(r"Y?(?P<ytid>.{11})(?:_(?P<start>\d+))?")  # of a sound: 11 characters of YouTube
CLIPS_PER_PART = 1000  # what an interruption costs at most, for each process
VALIDATION_SHARE = 0.05  # of the training segments


@dataclass(frozen=True, slots=True)
class TimedMid:
    """An event in a table: AudioSet's id of its class, and seconds from the start of the segment."""

    mid: str
    onset: float
    offset: float


@dataclass(frozen=True)
class StrongSegment:
    """A segment of 10 s of a video, with its events."""

    segment: audioset.Segment
    events: list[TimedMid]


@dataclass
class StrongReport(audioset.AudiosetReport):
    """Counts and names of the segments of both tables."""

    per_split: Counter[str] = field(default_factory=Counter)  # clips
    events: int = 0
    empty_events: int = 0  # without duration, or beyond the end of their clip
    unknown: Counter[str] = field(default_factory=Counter)  # evaluation events of classes without training events

    def __str__(self) -> str:
        splits = ", ".join(f"{split} {count}" for split, count in self.per_split.items())
        lines = [
            super().__str__(),
            f"{self.events} events; clips: {splits} (validation: {VALIDATION_SHARE:.0%} of the training table's)",
        ]
        if self.unknown:
            lines.append(
                f"{self.unknown.total()} events of {len(self.unknown)} classes that only the evaluation table has were "
                f"left out: {', '.join(sorted(self.unknown))}"
            )
        if self.empty_events:
            lines.append(f"{self.empty_events} events without duration, or after the end of their clip, were left out")
        return "\n".join(lines)


def prepare(
    settings: Config,
    raw: Path,
    strong: str,
    table: Optional[Path] = None,
    processes: int = 1,
    class_names: Optional[Path] = None,
) -> StrongReport:
    """Write the store of the segments of the official tables whose audio is below `raw`, clip after clip.

    The sounds are packed in parts beside the store, `processes` at once, which a run that was interrupted leaves to the
    next one; the store does not depend on them.

    strong: audioset_train_strong.tsv, for training; 5 % of its segments with audio, chosen by random_seed, are the
    validation set. table: audioset_eval_strong.tsv, for testing. class_names: mid_to_display_name.tsv (mid, tab, name),
    with which the classes are sorted by name, as those of the published networks; without it they are sorted by mid,
    and named as in AudioSet's 527 classes where they are among them, else by mid. The classes are those of `strong`;
    events of others in `table` are left out and counted. prepare.segments finds the audio and cuts it from longer
    files. Events end with their clip, at 10 s at the latest. A table of the clips that are missing, corrupt, short or
    cut lies beside the store. Raises UserError where a table or folder is missing or wrong, and where no audio is
    found.
    """
    store, rate = store_path(settings.dataset_path, NAME), settings.sample_rate
    segments = {"train": read_strong(Path(strong)), "test": read_strong(table) if table else []}
    both = {one.segment.ytid for one in segments["train"]} & {one.segment.ytid for one in segments["test"]}
    if both:
        raise UserError(f"{strong} and {table} both list {min(both)}: a clip must not be trained and tested.")
    mids, labels = name_classes({event.mid for one in segments["train"] for event in one.events}, class_names)
    report = StrongReport(store)
    audio = audioset.index_audio(raw, report)
    found = {
        split: [(one, path) for one in rows if (path := audioset.find_audio(one.segment, audio)) is not None]
        for split, rows in segments.items()
    }
    there = {one.segment.name for rows in found.values() for one, _ in rows}
    names = [one.segment.name for rows in segments.values() for one in rows]
    report.missing = [name for name in names if name not in there]
    if not found["train"]:
        raise audioset.no_audio([one.segment for one in segments["train"]], Path(strong), raw, audio)
    held_out = choose_validation([one for one, _ in found["train"]], settings.random_seed)
    splits = {
        "train": [row for row in found["train"] if row[0].segment.ytid not in held_out],
        "validation": [row for row in found["train"] if row[0].segment.ytid in held_out],
        "test": found["test"],
    }
    numbers = {mid: number for number, mid in enumerate(mids)}
    with ClipStoreWriter(
        store, clip_samples=audioset.CLIP_SECONDS * rate, sample_rate=rate, labels=labels,
        dataset_type=NAME, task=TASK, source=SOURCE, licence=LICENCE,
    ) as writer:  # fmt: skip
        _write(writer, splits, numbers, report, processes)
        if report.clips == 0:
            raise UserError(f"None of the clips could be read.\n{report}")
    shutil.rmtree(parts_folder(store))
    audioset.write_details(report, store.with_name(f"{store.stem}_report.csv"))
    return report


def parts_folder(store: Path) -> Path:
    """Where the parts lie until the store is complete."""
    return store.with_name(f"{store.stem}_parts")


def read_strong(path: Path) -> list[StrongSegment]:
    """The segments of a strong table and their events, in its order.

    It may be the folder of a data set of Hugging Face with the columns audio and events (prepare.audio_tables).
    A line is segment_id (the video's id, `_`, the start in ms), start_time_seconds and end_time_seconds (from the
    segment's start) and label (a mid), with tabs between. Raises UserError, with the line, where one is not, and where
    a video has two segments.
    """
    if path.is_dir():
        return _read_dataset(path)
    columns, rows = iterate_table(path)
    require_columns(path, columns, COLUMNS)
    events: dict[str, list[TimedMid]] = {}
    for row in rows:
        name, event = _parse_event(row)
        events.setdefault(name, []).append(event)
    if not events:
        raise UserError(f"{path} lists no events.")
    segments: dict[str, StrongSegment] = {}
    for name, mine in events.items():
        segment = _parse_segment(name)
        if segment.ytid in segments:
            raise UserError(f"{path}: {name} is the second segment of its video; there must be one at most.")
        segments[segment.ytid] = StrongSegment(segment, mine)
    return list(segments.values())


def _read_dataset(folder: Path) -> list[StrongSegment]:
    segments: dict[str, StrongSegment] = {}
    for stem, events in read_events(folder):
        match = CLIP_NAME.fullmatch(stem)
        ytid, start = (match["ytid"], int(match["start"] or 0) / 1000) if match else (stem, 0.0)
        if ytid in segments or not all(0 <= onset <= offset < math.inf for _, onset, offset in events):
            raise UserError(f"{folder}: {stem} is there twice, or has other than rising seconds.")
        if events:
            segment = audioset.Segment(ytid, start, start + audioset.CLIP_SECONDS, ())
            segments[ytid] = StrongSegment(segment, [TimedMid(sys.intern(label), a, b) for label, a, b in events])
    return list(segments.values())


def _parse_event(row: Row) -> tuple[str, TimedMid]:
    name, start, end, mid = (row.cells[column] for column in COLUMNS)
    if not SEGMENT_ID.fullmatch(name):
        raise UserError(f"{row.place}: {name!r} is no segment_id, as b0RFKhbpFJA_30000: id, _ and the start in ms.")
    onset, offset = row.number(COLUMNS[1]), row.number(COLUMNS[2])
    if not 0 <= onset <= offset or not mid:
        raise UserError(
            f"{row.place}: an event of {mid!r} from {start} to {end} s; rising seconds and a mid are needed."
        )
    return name, TimedMid(sys.intern(mid), onset, offset)  # one string for each class, not one a line


def _parse_segment(name: str) -> audioset.Segment:
    match = SEGMENT_ID.fullmatch(name)
    assert match, "the table's lines were checked"
    start = int(match["start"]) / 1000
    return audioset.Segment(match["ytid"], start, start + audioset.CLIP_SECONDS, ())


def name_classes(mids: set[str], class_names: Optional[Path]) -> tuple[list[str], list[str]]:
    """The classes in their order, and their names, no two alike; see prepare for class_names.

    Raises UserError where class_names lacks one of the classes, or is no such table.
    """
    names = {mid: audioset.LABELS[number] for mid, number in audioset.CLASS_OF_MID.items()}
    order = sorted(mids)
    if class_names is not None:
        given = _read_names(class_names)
        lacking = sorted(mids - set(given))
        if lacking:
            raise UserError(f"{class_names} lacks {len(lacking)} of {len(mids)} classes: {', '.join(lacking[:5])}.")
        order, names = sorted(mids, key=lambda mid: (given[mid], mid)), given
    shown = [names.get(mid, mid) for mid in order]
    count = Counter(shown)
    return order, [f"{name} ({mid})" if count[name] > 1 else name for mid, name in zip(order, shown, strict=True)]


def _read_names(path: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not clean(line):
            continue
        mid, _, name = map(clean, line.partition("\t"))
        if not mid or not name or mid in names:
            raise UserError(f"{path}, line {number}: {line!r}; a mid, a tab and a name are needed, each mid once.")
        names[mid] = name
    return names


def choose_validation(segments: Sequence[StrongSegment], seed: int) -> set[str]:
    """Ids of the validation videos: 5 % of the segments with the same rarest class, at least one in all.

    The order is a hash of seed and id, so that a few segments more or fewer change little.
    """
    clips = Counter(mid for one in segments for mid in {event.mid for event in one.events})
    groups: dict[str, list[tuple[bytes, str]]] = defaultdict(list)
    for one in segments:
        rarest = min({event.mid for event in one.events}, key=lambda mid: (clips[mid], mid))
        key = hashlib.sha256(f"{seed} {one.segment.ytid}".encode()).digest()
        groups[rarest].append((key, one.segment.ytid))
    chosen = {ytid for group in groups.values() for _, ytid in sorted(group)[: round(VALIDATION_SHARE * len(group))]}
    if not chosen and len(segments) > 1:
        chosen = {min(pair for group in groups.values() for pair in group)[1]}
    return chosen


def _write(
    writer: ClipStoreWriter,
    splits: dict[str, list[tuple[StrongSegment, str]]],
    numbers: dict[str, int],
    report: StrongReport,
    processes: int,
) -> None:
    """Pack the sounds in parts, and write them, one after another, with the events of the known classes."""
    rate = writer.attributes["sample_rate"]
    rows = [(split, one, source) for split, mine in splits.items() for one, source in mine]
    known = {one.segment.name: (split, one) for split, one, _ in rows}
    parts = _parts(report.path, rate, [one.segment for _, one, _ in rows], [source for *_, source in rows])
    for done in pack_parts(parts, processes):
        report.add(done)
    for part in parts:
        if not part.path.is_file():  # none of its clips could be read
            continue
        with open_store(part.path, "audio_name") as file:
            waveforms = Waveforms(file)
            for row, name in enumerate(map(bytes.decode, file["audio_name"][:].tolist())):
                split, one = known[name]
                waveform = waveforms.read(row)
                events = _events(one.events, len(waveform) / rate, numbers, report)
                labels = sorted({event.label for event in events})
                writer.add(Clip(name, waveform, labels, split=split, events=events, labelling=STRONG))
                report.per_split[split] += 1
                report.events += len(events)


def _parts(store: Path, rate: int, segments: Sequence[audioset.Segment], sources: Sequence[str]) -> list[audioset.Part]:
    """The parts of a store. Their names change with clips, rate and sounds; files of other parts are removed."""
    files = {path: path.stat() for path in set(map(source_file, sources))}
    folder, parts = parts_folder(store), []
    for start in range(0, len(segments), CLIPS_PER_PART):
        mine = slice(start, start + CLIPS_PER_PART)
        part = audioset.Part(folder, rate, segments[mine], sources[mine])
        there = [files[source_file(source)] for source in sources[mine]]
        said = [f"{source} {at.st_size} {at.st_mtime_ns}" for source, at in zip(sources[mine], there, strict=True)]
        key = hashlib.sha256("\n".join([part.fingerprint(), str(rate), *said]).encode(errors="surrogateescape"))
        parts.append(replace(part, path=folder / f"{start:07d}_{key.hexdigest()[:16]}.h5"))
    for left in set(folder.glob("*.h5")) - {part.path for part in parts}:
        left.unlink()
    return parts


def _events(events: list[TimedMid], seconds: float, numbers: dict[str, int], report: StrongReport) -> list[Event]:
    """The events in the numbering of the store, cut at the end of the clip; those left out are counted."""
    kept = []
    for event in events:
        if event.mid not in numbers:
            report.unknown[event.mid] += 1
        elif not lasts(min(event.offset, seconds) - event.onset):
            report.empty_events += 1
        else:
            kept.append(Event(numbers[event.mid], event.onset, min(event.offset, seconds)))
    return kept
