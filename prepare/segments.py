"""AudioSet's segments: their audio files, their place in a longer file, and the report on all of them."""

import csv
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from data.audio import read_int16
from data.clip_store import Clip
from data.files import AUDIO_SUFFIXES, whole_file
from data.finding import find_audio as find_files
from data.labels import audioset_classes
from data.levels import Remark
from prepare.audio_tables import index_rows, open_source, source_stem
from prepare.report import PrepareReport
from settings import UserError

AUDIOSET_SOURCE = "J. F. Gemmeke et al.: Audio Set: An ontology and human-labeled dataset for audio events, ICASSP 2017"
AUDIOSET_LICENCE = "Labels: Creative Commons Attribution 4.0; the sounds belong to those who uploaded them to YouTube"
CLASSES = audioset_classes()
LABELS = [entry["name"] for entry in CLASSES]
CLASS_OF_MID = {entry["mid"]: number for number, entry in enumerate(CLASSES)}
CLIP_SECONDS = 10
SHORT_SECONDS = 9  # a clip below this is packed and reported: its download may be incomplete
SLACK_SECONDS = 1  # a file may be so much longer than its segment without a report: codecs pad, cuts are not exact
EXAMPLES = 10  # how many clips of each kind a printed report names


@dataclass(frozen=True, slots=True)
class Segment:
    """One line of a segments table: YouTube's id, start and end in seconds of the video, class indexes."""

    ytid: str
    start: float
    end: float
    labels: tuple[int, ...]

    @property
    def name(self) -> str:
        """The clip's audio_name, as PANNs' files have it."""
        return f"Y{self.ytid}.wav"


@dataclass(frozen=True)
class Part:
    """One file to write: its segments, and the path of the audio of each, None where there is none."""

    path: Path
    sample_rate: int
    segments: Sequence[Segment]
    audio: Sequence[Optional[str]]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the segments; the packed file keeps them, and a later run compares them."""
        lines = (f"{segment.ytid} {segment.start} {segment.labels}\n" for segment in self.segments)
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@dataclass
class AudiosetReport(PrepareReport):
    """Counts and names of the clips of a table, or of one part of it. skipped: corrupt files."""

    missing: list[str] = field(default_factory=list)  # names without audio
    short: list[tuple[str, float]] = field(default_factory=list)  # (name, seconds), packed
    cut: list[tuple[str, str]] = field(default_factory=list)  # (name, stretch of a longer file), packed
    kept: int = 0  # parts of an earlier run
    details: Optional[Path] = None  # table of every clip that is missing, corrupt, short or cut

    def add(self, part: "AudiosetReport") -> None:
        """Add the report of one part."""
        for name in ("clips", "kept", "skipped", "missing", "short", "cut", "remarks"):
            setattr(self, name, getattr(self, name) + getattr(part, name))

    def rows(self) -> dict[str, list[tuple[str, str]]]:
        """state -> (clip or file, remark) of each clip that is missing, corrupt, short or cut."""
        missing, short = [(name, "") for name in self.missing], [(name, f"{s:.2f} s") for name, s in self.short]
        return {"missing": missing, "corrupt": self.skipped, "short": short, "cut": self.cut}

    def counts(self) -> str:
        return (
            f"found {self.clips + len(self.skipped)}, missing {len(self.missing)}, corrupt {len(self.skipped)}, "
            f"short (under {SHORT_SECONDS} s, packed) {len(self.short)}, cut from a longer file {len(self.cut)}"
        )

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.clips} clips of {self.clips + len(self.skipped) + len(self.missing)} segments",
            f"{self.counts()}; {self.kept} whole files kept from before",
        ]
        for state, rows in self.rows().items():
            lines += [f"  {state}: {name}  {remark}".rstrip() for name, remark in rows[:EXAMPLES]]
            lines += [f"  {state}: and {len(rows) - EXAMPLES} more"] if len(rows) > EXAMPLES else []
        lines += [f"all of them: {self.details}"] if self.details else []
        return "\n".join([*lines, *self.other_lines()])


def index_audio(raw: Path, report: Optional[PrepareReport] = None) -> dict[str, str]:
    """Stem -> path of every audio file below `raw`; of several with one stem, the first by name of its path.

    `raw` may be a table of sounds instead, or hold such (prepare.audio_tables). report: takes what lies there beside
    audio. Raises UserError where nothing lies there.
    """
    found: dict[str, str] = {}
    for stem, source in index_rows(raw) if raw.exists() else ():
        found.setdefault(stem, source)
    if found:
        return found
    if not raw.is_dir():
        raise UserError(
            f"There is no folder {raw}: --raw must be the folder of AudioSet's audio files, an HDF5 file with "
            f"audio_name and mp3, or the folder of a data set of Hugging Face."
        )
    below = find_files(raw)
    for path in map(str, below.audio):
        stem = os.path.splitext(os.path.basename(path))[0]
        found[stem] = min(path, found.get(stem, path))
    if report is not None:
        report.add_left_out(below, raw)
    return found


def find_audio(segment: Segment, audio: dict[str, str]) -> Optional[str]:
    """Path of the audio of a segment in index_audio's table, or None.

    Possible names are looked up, not parsed: an id may itself hold `_`, `-` and digits.
    """
    endings = ("", *(f"_{start}" for start in _start_forms(segment.start)))
    stems = (prefix + segment.ytid + ending for prefix in ("", "Y") for ending in endings)
    return next((audio[stem] for stem in stems if stem in audio), None)


def no_audio(segments: Sequence[Segment], table: Path, raw: Path, audio: dict[str, str]) -> UserError:
    """The error where no segment of a table has audio. audio: index_audio's table of `raw`."""
    first = segments[0]
    return UserError(
        f"None of the {len(segments)} clips of {table} is in {raw}, which has {len(audio)} audio files "
        f"({', '.join(AUDIO_SUFFIXES)}). A clip is named <YTID> or Y<YTID>, with or without _<start>: "
        f"{first.ytid}.wav, Y{first.ytid}_{_seconds(first.start)}.flac."
    )


def _start_forms(start: float) -> tuple[str, str, str]:
    """A start of 30 s in the names of download scripts: 30, 30.000, and 30000 in milliseconds."""
    return _seconds(start), f"{start:.3f}", f"{start * 1000:.0f}"


def _seconds(start: float) -> str:
    return f"{start:.3f}".rstrip("0").rstrip(".")


def find_start(segment: Segment, stem: str, seconds: float) -> float:
    """Second of its file at which a segment begins. stem: the file's name without ending; seconds: its length.

    A file with the start in its name begins with the segment. One without counts as the whole video where it is longer
    than the segment and reaches the segment's end within a second; else it begins with the segment.
    """
    length = segment.end - segment.start
    whole = seconds > length + SLACK_SECONDS and seconds >= segment.end - min(SLACK_SECONDS, length / 2)
    return segment.start if whole and stem in (segment.ytid, f"Y{segment.ytid}") else 0.0


def read_clips(part: Part, report: AudiosetReport, advance: Callable[[int], None]) -> Iterator[Clip]:
    """The clips of a part that can be read; the others go into the report. advance: called with 1 for each."""
    for segment, file in zip(part.segments, part.audio, strict=True):
        advance(1)
        if file is None:
            report.missing.append(segment.name)
            continue
        remarks: list[Remark] = []
        try:
            waveform = read_int16(open_source(file), part.sample_rate, remarks)
            if len(waveform) == 0:  # resampling left nothing of one or two samples
                raise UserError(f"{file} holds no samples at {part.sample_rate} Hz.")
        except UserError as error:
            report.skipped.append((file, str(error)))
            continue
        seconds, wanted = len(waveform) / part.sample_rate, min(segment.end - segment.start, CLIP_SECONDS)
        start = find_start(segment, source_stem(file), seconds)
        if seconds > wanted + SLACK_SECONDS:
            report.cut.append((segment.name, f"{start:g} to {min(start + wanted, seconds):g} s of {seconds:.2f} s"))
        report.remarks += [(segment.name, remark) for remark in remarks]
        first = round(start * part.sample_rate)
        yield Clip(segment.name, waveform[first : first + round(wanted * part.sample_rate)], segment.labels)


def note_length(report: AudiosetReport, name: str, samples: int, sample_rate: int) -> None:
    """Add a packed clip of so many samples to the report where it is short."""
    if samples < SHORT_SECONDS * sample_rate:
        report.short.append((name, samples / sample_rate))


def write_details(report: AudiosetReport, path: Path) -> None:
    """Write every clip that is missing, corrupt, short or cut as a line `clip,state,remark`."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("clip", "state", "remark"))
        for state, rows in report.rows().items():
            writer.writerows((name, state, remark) for name, remark in rows)
    report.details = path
