"""AudioSet: 10 s clips of YouTube in 527 classes -> HDF5 files in PANNs' layout, several processes at once."""

import csv
import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Optional

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress

from data.clip_store import ClipStoreWriter, Task, Waveforms, open_store
from data.progress import ProgressLines
from data.tables import read_text
from data.workers import end_with_parent
from prepare.adapters import Flags
from prepare.segments import (
    AUDIOSET_LICENCE,
    AUDIOSET_SOURCE,
    CLASS_OF_MID,
    CLIP_SECONDS,
    LABELS,
    AudiosetReport,
    Part,
    Segment,
    find_audio,
    index_audio,
    no_audio,
    note_length,
    read_clips,
    write_details,
)
from settings import Config, UserError

NAME = "audioset"
SOURCE, LICENCE = AUDIOSET_SOURCE, AUDIOSET_LICENCE
TASK: Task = "multilabel"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "FOLDER", "help": "folder of the audio files"},
    "segments": {"type": Path, "metavar": "FILE", "help": "CSV of the segments"},
    "processes": {"type": int, "metavar": "N", "help": "how many parts to pack at once [1]"},
}

SPLITS = ("balanced_train", "eval", "unbalanced_train")
CLIPS_PER_PART = 50_000  # of unbalanced_train


def prepare(settings: Config, raw: Path, segments: Path, processes: int = 1) -> AudiosetReport:
    """Pack the clips of one segments table from the audio below `raw`; files that an earlier run finished are kept.

    segments: balanced_train*.csv, eval*.csv or unbalanced_train*.csv, as AudioSet comes. raw: searched with its
    folders for `<YTID>` or `Y<YTID>`, also with the start (`_30`, `_30.000`, `_30000`), of any format of
    data.audio; prepare.segments.find_start finds the segment in a longer file. Writes below dataset_path
    hdf5s/waveforms/{balanced_train,eval}.h5, or hdf5s/waveforms/unbalanced_train/unbalanced_train_partNN.h5 of
    CLIPS_PER_PART lines each, with clips padded with zeros to 10 s, and a table hdf5s/reports/<split>.csv of the clips
    that are missing, corrupt, short or cut. A file without any clip is not written. processes: how many parts are
    packed at once; whole videos are decoded in full, 1.3 GB an hour of stereo. Raises UserError where a table or folder
    is missing or wrong, no audio is found, or a file there holds other clips.
    """
    split, dataset_path, rate = _split_of(segments), Path(settings.dataset_path), settings.sample_rate
    rows = read_segments(segments)
    left_out = AudiosetReport(dataset_path)
    audio = index_audio(raw, left_out)
    files = [find_audio(row, audio) for row in rows]
    if not any(files):
        raise no_audio(rows, segments, raw, audio)
    paths = part_paths(dataset_path, split, len(rows))
    size = CLIPS_PER_PART if split == "unbalanced_train" else len(rows)
    parts = [
        Part(path, rate, rows[number * size : (number + 1) * size], files[number * size : (number + 1) * size])
        for number, path in enumerate(paths)
    ]
    report = AudiosetReport(paths[0].parent if split == "unbalanced_train" else paths[0])
    report.others, report.unopened = left_out.others, left_out.unopened
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
    found: dict[str, Segment] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip() and not line.startswith("#"):
            segment = _parse_segment(line, f"{path}, line {number}")
            if segment.ytid in found:
                raise UserError(f"{path}, line {number}: {segment.ytid} is listed twice.")
            found[segment.ytid] = segment
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


def part_paths(dataset_path: Path, split: str, clips: int) -> list[Path]:
    """The files of a split, in the order of its table.

    Raises UserError where the folder has parts that are not among them: an index would include these.
    """
    waveforms = dataset_path / "hdf5s" / "waveforms"
    if split != "unbalanced_train":
        return [waveforms / f"{split}.h5"]
    count = -(-clips // CLIPS_PER_PART)
    digits = max(2, len(str(count - 1)))
    paths = [waveforms / split / f"{split}_part{number:0{digits}}.h5" for number in range(count)]
    others = sorted(set((waveforms / split).glob("*.h5")) - set(paths))
    if others:
        raise UserError(
            f"{others[0]} is not one of the {count} parts that {CLIPS_PER_PART} clips a part make: delete it, or give "
            f"another dataset_path."
        )
    return paths


def pack_parts(parts: Sequence[Part], processes: int) -> list[AudiosetReport]:
    """The report of each part, in order; missing parts are packed, `processes` at once, and reported on stderr."""
    reports = {part.path: report for part in parts if (report := read_packed(part)) is not None}
    waiting = {part.path: part for part in parts if part.path not in reports}
    workers = max(min(processes, len(waiting)), 1)
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("clips", total=sum(len(part.segments) for part in waiting.values()))
            lines, total = ProgressLines(), sum(len(part.segments) for part in waiting.values())

            def advance(clips: int) -> None:
                bar.advance(task, clips)
                if not console.is_terminal:
                    lines.show(f"{bar.tasks[0].completed:.0f} of {total} clips are read")

            for report in _pack(list(waiting.values()), workers, advance):
                reports[report.path] = report
                print(f"{report.path.name} ({len(reports)} of {len(parts)}): {report.counts()}", file=sys.stderr)
    except (BrokenProcessPool, OSError) as error:  # out of memory; disk full
        raise UserError(
            f"Packing with {workers} processes stopped ({error}): are disk and memory large enough? Finished files are "
            f"kept: run prepare again, with fewer processes if memory ran out."
        ) from None
    return [reports[part.path] for part in parts]


def _pack(parts: Sequence[Part], workers: int, advance: Callable[[int], None]) -> Iterator[AudiosetReport]:
    """Reports of the parts as they are finished. advance: called with the number of clips that were read."""
    if workers == 1:
        yield from (pack_part(part, advance) for part in parts)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        running = {pool.submit(pack_part, part): part for part in parts}
        try:
            for done in as_completed(running):
                advance(len(running[done].segments))
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt


def read_packed(part: Part) -> Optional[AudiosetReport]:
    """The report of a part that is finished; None where its file is missing or cut off.

    A clip that it lacks is reported as missing where there is still no audio for it, else as corrupt.
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
            f"at {part.sample_rate} Hz, or were packed with another number of clips a part: delete it, or give "
            f"another dataset_path."
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
    """Write one part; without a single clip no file, so that a later run with more audio packs it.

    Beyond the datasets of every store, `cut` has the lines "name, tab, stretch" of the clips from longer files.
    """
    for left in part.path.parent.glob(f"{part.path.name}*.partial"):  # by a run that was killed
        left.unlink()
    report = AudiosetReport(part.path)
    clips = read_clips(part, report, advance)
    if (first := next(clips, None)) is None:
        return report
    with ClipStoreWriter(
        part.path, clip_samples=CLIP_SECONDS * part.sample_rate, sample_rate=part.sample_rate, labels=LABELS,
        dataset_type=NAME, task=TASK, source=SOURCE, licence=LICENCE, segments=part.fingerprint(),
    ) as writer:  # fmt: skip
        for clip in itertools.chain([first], clips):
            writer.add(clip)
            report.clips += 1
            note_length(report, clip.name, len(clip.waveform), part.sample_rate)
        writer.file["cut"] = np.array(["\t".join(row).encode() for row in report.cut], dtype="S")
    return report
