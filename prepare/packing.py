"""AudioSet's clips packed in parts, each a file of its own: several at once, and those of an earlier run are kept."""

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Optional

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress

from data.clip_store import ClipStoreWriter, Waveforms, open_store
from data.progress import ProgressLines
from data.workers import end_with_parent
from prepare.segments import (
    AUDIOSET_LICENCE,
    AUDIOSET_SOURCE,
    CLIP_SECONDS,
    LABELS,
    AudiosetReport,
    Part,
    note_length,
    read_clips,
)
from settings import UserError


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
        dataset_type="audioset", task="multilabel", source=AUDIOSET_SOURCE, licence=AUDIOSET_LICENCE,
        segments=part.fingerprint(),
    ) as writer:  # fmt: skip
        for clip in itertools.chain([first], clips):
            writer.add(clip)
            report.clips += 1
            note_length(report, clip.name, len(clip.waveform), part.sample_rate)
        writer.file["cut"] = np.array(["\t".join(row).encode() for row in report.cut], dtype="S")
    return report
