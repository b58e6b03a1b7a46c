"""AudioSet: 10 s clips of YouTube in 527 classes -> HDF5 files in PANNs' layout, several processes at once."""

import csv
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress

from data.audio import SUFFIXES, read_int16
from data.clip_store import Clip, ClipStoreWriter, Task, Waveforms, open_store
from data.files import whole_file
from prepare.report import PrepareReport
from settings import UserError

SOURCE = "J. F. Gemmeke et al.: Audio Set: An ontology and human-labeled dataset for audio events, ICASSP 2017"
LICENCE = "Labels: Creative Commons Attribution 4.0; the sounds belong to those who uploaded them to YouTube"
TASK: Task = "multilabel"
CLASSES = json.loads((Path(__file__).parents[1] / "assets" / "audioset_labels.json").read_text())
LABELS: list[str] = [entry["name"] for entry in CLASSES]
CLASS_OF_MID: dict[str, int] = {entry["mid"]: entry["index"] for entry in CLASSES}
SPLITS = ("balanced_train", "eval", "unbalanced_train")
CLIP_SECONDS = 10
SHORT_SECONDS = 9  # a clip below this is packed and reported: its download may have been cut off
SLACK_SECONDS = 1  # a file may be so much longer than its segment without a word: codecs pad, cuts are not exact
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
    """One file to be: its segments, and where the audio of each lies (None: nowhere)."""

    path: Path
    sample_rate: int
    segments: Sequence[Segment]
    audio: Sequence[Optional[str]]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the segments, which the packed file keeps: a later run knows it by them."""
        lines = (f"{segment.ytid} {segment.start} {segment.labels}\n" for segment in self.segments)
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@dataclass
class AudiosetReport(PrepareReport):
    """What became of the clips of a table, or of one part of it. skipped: corrupt files."""

    missing: list[str] = field(default_factory=list)  # names without audio
    short: list[tuple[str, float]] = field(default_factory=list)  # (name, seconds), packed
    cut: list[tuple[str, str]] = field(default_factory=list)  # (name, what was taken of a longer file), packed
    kept: int = 0  # parts left as they are
    details: Optional[Path] = None  # table of every clip that is missing, corrupt, short or cut

    def add(self, part: "AudiosetReport") -> None:
        """Take in the report of one part."""
        for name in ("clips", "kept", "skipped", "missing", "short", "cut"):
            setattr(self, name, getattr(self, name) + getattr(part, name))

    def rows(self) -> dict[str, list[tuple[str, str]]]:
        """(clip or file, remark) of each clip that is not as it should be, by its state."""
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
        return "\n".join([*lines, f"all of them: {self.details}"] if self.details else lines)


def prepare_audioset(
    raw: Path, segments: Path, dataset_path: Path, sample_rate: int, processes: int, clips_per_part: int = 50000
) -> AudiosetReport:
    """Pack the clips of one segments table from the audio below `raw`; go on where an earlier run ended.

    segments: balanced_train*.csv, eval*.csv or unbalanced_train*.csv, as AudioSet comes. raw: searched with its
    folders for `<YTID>` or `Y<YTID>`, also with the start (`_30`, `_30.000`, `_30000`), of any format of
    data.audio; `find_start` says what is taken of a longer file. Writes below dataset_path
    hdf5s/waveforms/{balanced_train,eval}.h5, or hdf5s/waveforms/unbalanced_train/unbalanced_train_partNN.h5 of
    clips_per_part lines each, with clips padded with zeros to 10 s, and a table hdf5s/reports/<split>.csv of the clips
    that are missing, corrupt, short or cut. A file that is whole is kept; one without any clip is not written.
    processes: how many parts are packed at once. Whole videos are decoded in full, 1.3 GB an hour of stereo. Raises
    ValueError where a table or folder is missing or wrong, no audio is found, or a file there holds other clips.
    """
    split = _split_of(segments)
    if clips_per_part < 1:
        raise UserError(f"clips_per_part = {clips_per_part} must be at least 1.")
    rows = read_segments(segments)
    audio = index_audio(raw)
    files = [find_audio(row, audio) for row in rows]
    if not any(files):
        raise UserError(
            f"None of the {len(rows)} clips of {segments} is in {raw}, which has {len(audio)} audio files "
            f"({', '.join(SUFFIXES)}). A clip is named <YTID> or Y<YTID>, with or without _<start>: "
            f"{rows[0].ytid}.wav, Y{rows[0].ytid}_{_seconds(rows[0].start)}.flac."
        )
    paths = part_paths(dataset_path, split, len(rows), clips_per_part)
    size = clips_per_part if split == "unbalanced_train" else len(rows)
    parts = [
        Part(path, sample_rate, rows[number * size : (number + 1) * size], files[number * size : (number + 1) * size])
        for number, path in enumerate(paths)
    ]
    report = AudiosetReport(paths[0].parent if split == "unbalanced_train" else paths[0])
    for done in pack_parts(parts, processes):
        report.add(done)
    write_details(report, dataset_path / "hdf5s" / "reports" / f"{split}.csv")
    if report.clips == 0:
        raise UserError(f"None of the clips could be read.\n{report}")
    return report


def _split_of(segments: Path) -> str:
    split = next((split for split in SPLITS if segments.name.startswith(split)), None)
    if split is None or segments.suffix.lower() != ".csv":
        names = ", ".join(f"{split}*.csv" for split in SPLITS)
        raise UserError(f"{segments} does not say by its name which clips it lists: it must be one of {names}.")
    return split


def read_segments(path: Path) -> list[Segment]:
    """The lines `YTID, start, end, "mid,mid"` of a segments table; lines that begin with # are comments.

    Raises UserError, with the line, for a wrong number of columns, start, class or an id that comes twice.
    """
    if not path.is_file():
        raise UserError(f"There is no {path}: give one of AudioSet's tables of segments (balanced_train*.csv, ...).")
    found: dict[str, Segment] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not line.startswith("#"):
                    segment = _parse_segment(line, f"{path}, line {number}")
                    if segment.ytid in found:
                        raise UserError(f"{path}, line {number}: {segment.ytid} is listed twice.")
                    found[segment.ytid] = segment
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file; a table of segments is needed.") from None
    if not found:
        raise UserError(f'{path} lists no segments; its lines must read YTID, start, end, "mid,mid".')
    return list(found.values())


def _parse_segment(line: str, where: str) -> Segment:
    try:
        columns = next(csv.reader([line], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise UserError(f"{where}: {error}.") from None
    if len(columns) != 4:
        raise UserError(f'{where}: {len(columns)} columns; there must be 4: YTID, start, end, "mid,mid".')
    ytid, start, end, mids = (column.strip() for column in columns)
    try:
        first, last = float(start), float(end)
    except ValueError:
        first = last = math.nan
    if not ytid or not 0 <= first < last < math.inf:
        raise UserError(f"{where}: {ytid!r} with start {start!r}, end {end!r}; an id and rising seconds are needed.")
    labels = []
    for mid in mids.split(","):
        if mid.strip() not in CLASS_OF_MID:
            raise UserError(
                f"{where}: class {mid.strip()!r} is not one of AudioSet's {len(LABELS)}, which "
                f"assets/audioset_labels.json lists, as /m/09x0r (Speech)."
            )
        labels.append(CLASS_OF_MID[mid.strip()])
    return Segment(ytid, first, last, tuple(labels))


def index_audio(raw: Path) -> dict[str, str]:
    """Stem -> path of every audio file below `raw`; of several with one stem, the first by name of its path."""
    if not raw.is_dir():
        raise UserError(f"There is no folder {raw}: --raw must be the folder of AudioSet's audio files.")
    found: dict[str, str] = {}
    for folder, _, names in os.walk(raw):
        for name in names:
            stem, suffix = os.path.splitext(name)
            path = os.path.join(folder, name)
            if suffix.lower() in SUFFIXES and (stem not in found or path < found[stem]):
                found[stem] = path
    return found


def find_audio(segment: Segment, audio: dict[str, str]) -> Optional[str]:
    """Where the audio of a segment lies, by index_audio's table; None where it has none.

    The names it may have are looked up, not taken apart: an id may itself hold `_`, `-` and digits.
    """
    endings = ("", *(f"_{start}" for start in _start_forms(segment.start)))
    stems = (prefix + segment.ytid + ending for prefix in ("", "Y") for ending in endings)
    return next((audio[stem] for stem in stems if stem in audio), None)


def _start_forms(start: float) -> tuple[str, str, str]:
    """A start of 30 s as download scripts write it: 30, 30.000, and 30000 in milliseconds."""
    return _seconds(start), f"{start:.3f}", f"{start * 1000:.0f}"


def _seconds(start: float) -> str:
    return f"{start:.3f}".rstrip("0").rstrip(".")


def part_paths(dataset_path: Path, split: str, clips: int, clips_per_part: int) -> list[Path]:
    """The files of a split, in the order of its table.

    Raises UserError where the folder has parts that are not among them, which an index would take in as well.
    """
    waveforms = dataset_path / "hdf5s" / "waveforms"
    if split != "unbalanced_train":
        return [waveforms / f"{split}.h5"]
    count = -(-clips // clips_per_part)
    digits = max(2, len(str(count - 1)))
    paths = [waveforms / split / f"{split}_part{number:0{digits}}.h5" for number in range(count)]
    others = sorted(set((waveforms / split).glob("*.h5")) - set(paths))
    if others:
        raise UserError(
            f"{others[0]} is not one of the {count} parts that {clips_per_part} clips a part make: delete it, or "
            f"give another dataset_path or the clips_per_part with which it was packed."
        )
    return paths


def pack_parts(parts: Sequence[Part], processes: int) -> list[AudiosetReport]:
    """The report of each part, in order; those not whole yet are packed, `processes` at once, and told on stderr."""
    reports = {part.path: report for part in parts if (report := read_packed(part)) is not None}
    waiting = {part.path: part for part in parts if part.path not in reports}
    workers = max(min(processes, len(waiting)), 1)
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("clips", total=sum(len(part.segments) for part in waiting.values()))
            for report in _pack(list(waiting.values()), workers, lambda clips: bar.advance(task, clips)):
                reports[report.path] = report
                print(f"{report.path.name} ({len(reports)} of {len(parts)}): {report.counts()}", file=sys.stderr)
    except (BrokenProcessPool, OSError) as error:  # out of memory; disk full
        raise UserError(
            f"Packing with {workers} processes stopped ({error}): are disk and memory large enough? The files that "
            f"are whole are kept: run prepare again to go on, if memory ran out with fewer processes."
        ) from None
    return [reports[part.path] for part in parts]


def _pack(parts: Sequence[Part], workers: int, advance: Callable[[int], None]) -> Iterator[AudiosetReport]:
    """Reports of the parts, each when it is whole; `advance` is told how many clips more were looked at."""
    if workers == 1:
        yield from (pack_part(part, advance) for part in parts)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(pack_part, part): part for part in parts}
        try:
            for done in as_completed(running):
                advance(len(running[done].segments))
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or when interrupted, no further part is begun


def read_packed(part: Part) -> Optional[AudiosetReport]:
    """The report of a part that is whole already; None where it is missing or cut off.

    What lacks in it is missing where there is no audio for it even now, and corrupt otherwise.
    Raises UserError where the file holds other clips than those of the part, or other lengths.
    """
    try:
        h5py.File(part.path, "r").close()
    except OSError:  # not there, or cut off: a copy that was interrupted
        return None
    with open_store(part.path, "audio_name", "target") as file:
        whole = CLIP_SECONDS * int(file.attrs.get("sample_rate", part.sample_rate))
        samples = Waveforms(file).width or whole  # `compress` leaves no width
        fingerprint = file.attrs.get("segments")
        packed = [name.decode() for name in file["audio_name"][:]]
        lengths = file["real_len"][:].tolist() if "real_len" in file else [samples] * len(packed)
        cut = [line.decode().split("\t") for line in file["cut"][:]] if "cut" in file else []
    names = {segment.name for segment in part.segments}
    same = fingerprint == part.fingerprint() if fingerprint else names.issuperset(packed)  # PANNs' have none
    if not same or samples != CLIP_SECONDS * part.sample_rate:
        raise UserError(
            f"{part.path} exists and holds {len(packed)} clips of {samples} samples that are not those of this table "
            f"at {part.sample_rate} Hz, or were packed with another clips_per_part: delete it, or give another "
            f"dataset_path."
        )
    report = AudiosetReport(part.path, clips=len(packed), kept=1, cut=[(name, taken) for name, taken in cut])
    for name, length in zip(packed, lengths, strict=True):
        note_length(report, name, length, part.sample_rate)
    present = set(packed)
    for segment, audio in zip(part.segments, part.audio, strict=True):
        if segment.name not in present and audio is None:
            report.missing.append(segment.name)
        elif audio is not None and segment.name not in present:
            reason = f"was missing or unreadable when {part.path.name} was packed: to try again, delete that file"
            report.skipped.append((audio, reason))
    return report


def pack_part(part: Part, advance: Callable[[int], None] = lambda clips: None) -> AudiosetReport:
    """Write one part. Without a single clip there is no file, so that a later run with more audio packs it.

    Beside what every store has, `cut` keeps the lines "name, tab, what was taken" of the clips from longer files.
    """
    for left in part.path.parent.glob(f"{part.path.name}*.partial"):  # by a run that was killed
        left.unlink()
    report = AudiosetReport(part.path)
    clips = read_clips(part, report, advance)
    if (first := next(clips, None)) is None:
        return report
    with ClipStoreWriter(
        part.path, clip_samples=CLIP_SECONDS * part.sample_rate, sample_rate=part.sample_rate, labels=LABELS,
        dataset_type="audioset", task=TASK, source=SOURCE, licence=LICENCE, segments=part.fingerprint(),
    ) as writer:  # fmt: skip
        for clip in itertools.chain([first], clips):
            writer.add(clip)
            report.clips += 1
            note_length(report, clip.name, len(clip.waveform), part.sample_rate)
        writer.file["cut"] = np.array(["\t".join(row).encode() for row in report.cut], dtype="S")
    return report


def find_start(segment: Segment, stem: str, seconds: float) -> float:
    """Where a segment begins in its file of so many seconds, whose name without ending is `stem`.

    A file with the start in its name begins with the segment. One without may be the whole video: it is taken for
    that where it is longer than the segment and reaches the segment's end, give or take a second. Any other file
    begins with the segment. Of each, the segment's length is taken, at most 10 s.
    """
    length = segment.end - segment.start
    whole = seconds > length + SLACK_SECONDS and seconds >= segment.end - min(SLACK_SECONDS, length / 2)
    return segment.start if whole and stem in (segment.ytid, f"Y{segment.ytid}") else 0.0


def read_clips(part: Part, report: AudiosetReport, advance: Callable[[int], None]) -> Iterator[Clip]:
    """The clips of a part that can be read; the others go into the report."""
    for segment, file in zip(part.segments, part.audio, strict=True):
        advance(1)
        if file is None:
            report.missing.append(segment.name)
            continue
        try:
            waveform = read_int16(Path(file), part.sample_rate)
            if len(waveform) == 0:  # a sample or two that resampling leaves nothing of
                raise UserError(f"{file} holds no samples at {part.sample_rate} Hz.")
        except UserError as error:
            report.skipped.append((file, str(error)))
            continue
        seconds, wanted = len(waveform) / part.sample_rate, min(segment.end - segment.start, CLIP_SECONDS)
        start = find_start(segment, Path(file).stem, seconds)
        if seconds > wanted + SLACK_SECONDS:
            report.cut.append((segment.name, f"{start:g} to {min(start + wanted, seconds):g} s of {seconds:.2f} s"))
        first = round(start * part.sample_rate)
        yield Clip(segment.name, waveform[first : first + round(wanted * part.sample_rate)], segment.labels)


def note_length(report: AudiosetReport, name: str, samples: int, sample_rate: int) -> None:
    """Note a packed clip of so many samples that is short."""
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
