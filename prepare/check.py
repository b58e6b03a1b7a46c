"""Check prepared data before a training: contents, oddities, and errors that would spoil a training."""

import hashlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Optional

import numpy as np

from data.clip_store import END_TOLERANCE, ClipTable, Waveforms, open_store
from data.workers import end_with_parent
from prepare.near_duplicates import SIZE, candidates, fingerprint, nearly_same
from settings import UserError

FULL_SCALE = 32767  # largest int16 sample, as utils.float32_to_int16 writes it
SILENT_PEAK = FULL_SCALE * 10 ** (-60 / 20)  # a clip whose samples all lie below -60 dBFS is silent
CLIPPED_SHARE = 0.001  # a clip with more of its samples than this at full scale is clipped
TASK_CLIPS = 1000  # clips, of one file, that a process reads before it reports: 640 MB of AudioSet
Z_95 = 1.96  # standard deviations
NAMED = 3  # how many clips a message names


@dataclass(frozen=True)
class SplitReport:
    """Findings in one split. Clips are given by their rows in its table."""

    names: np.ndarray  # (N,) bytes
    per_class: np.ndarray  # (K,) clips of each class
    without_class: np.ndarray  # clips without a class
    with_several: np.ndarray  # clips with more than one class
    folds: list[int]  # empty without folds
    seconds: np.ndarray  # (N,) durations, NaN where a clip cannot be read
    silent: np.ndarray  # clips whose samples all lie below -60 dBFS
    clipped: np.ndarray  # clips with more than 0.1 % of their samples at full scale
    digests: np.ndarray  # (N,) sha256 of the waveform, 32 bytes each
    prints: np.ndarray  # (N, SIZE) fingerprint of the sound
    unreadable: dict[int, str]  # clip: reason
    fingerprint: str  # as provenance.json repeats it

    def audible(self) -> np.ndarray:
        """The clips that can be read and are not silent."""
        return np.setdiff1d(np.arange(len(self.names)), [*self.silent, *self.unreadable]).astype(int)

    @property
    def half_width(self) -> float:
        """Of the 95 % interval (Wilson) of an accuracy of 0.5 on these clips."""
        clips, squared = max(len(self.names), 1), Z_95**2
        return float(Z_95 * np.sqrt(0.25 / clips + squared / (4 * clips**2)) / (1 + squared / clips))

    def durations(self) -> Optional[tuple[float, float, float]]:
        """Shortest, median and longest duration in seconds, or None where no clip can be read."""
        known = self.seconds[~np.isnan(self.seconds)]
        return (float(known.min()), float(np.median(known)), float(known.max())) if len(known) else None


@dataclass(frozen=True)
class CheckReport:
    """Result of check_tables. problems: errors that would spoil a training; warnings: oddities that would not."""

    splits: dict[str, SplitReport]
    labels: list[str]
    sample_rate: int  # Hz
    size: int  # bytes on disk
    repeated: int  # clips whose audio another clip has too
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_tables(
    tables: dict[str, ClipTable],
    *,
    sample_rate: int,
    single_label: bool,
    processes: int = 1,
    advance: Callable[[int], None] = lambda clips: None,
) -> CheckReport:
    """Read every clip of some splits ({name: table}, all with the same classes) and report on them.

    sample_rate: Hz, for files without their own. single_label: whether each clip must have exactly one class.
    processes: how many read at once; few clips are read in this process. The report is the same for any number.
    advance: called with the number of clips that were read. 150 bytes are kept of each waveform. Raises UserError where
    no table is given, processes is below 1, or one of the processes is killed.
    """
    if not tables:
        raise UserError("There is no split to check.")
    if processes < 1:
        raise UserError(f"processes = {processes} is not allowed: at least one must read the clips.")
    scans = {split: _Scan(len(table), table.sample_rate or sample_rate) for split, table in tables.items()}
    tasks = [task for split, table in tables.items() for task in _tasks(split, table, scans[split].sample_rate)]
    for task, scan in _read_all(tasks, processes):
        scans[task.split].take(task.clips, scan)
        advance(len(task.clips))
    splits = {split: _split_report(table, scans[split]) for split, table in tables.items()}
    first = next(iter(tables.values()))
    labels = first.labels or [f"class {number}" for number in range(first.targets.shape[1])]
    same_audio = _groups(splits, "digests")
    report = CheckReport(
        splits,
        labels,
        sample_rate=first.sample_rate or sample_rate,
        size=sum(p.stat().st_size for p in {p for table in tables.values() for p in table.paths} if p.is_file()),
        repeated=sum(map(len, same_audio)),
    )
    for split, found in splits.items():
        _judge_split(split, found, report, single_label)
        _judge_events(split, tables[split], found, report)
    _judge_repeated("the same audio", same_audio, splits, report)
    _judge_repeated("the same id", _groups(splits, "names"), splits, report)
    _judge_near(tables, splits, report)
    _judge_classes(report)
    return report


@dataclass(frozen=True)
class _Task:
    """Some clips of one file, by their rows in the table of their split and in the file."""

    split: str
    path: Path
    clips: np.ndarray
    rows: np.ndarray
    sample_rate: int

    def read(self) -> "_Scan":
        scan = _Scan(len(self.clips), self.sample_rate)
        scan.read_file(self.path, self.rows)
        return scan


def _tasks(split: str, table: ClipTable, sample_rate: int) -> Iterator[_Task]:
    """The clips of a table in the order of its files, for sequential reading."""
    for number in np.unique(table.path_number):
        clips = np.flatnonzero(table.path_number == number)
        clips = clips[np.argsort(table.row[clips], kind="stable")]
        for start in range(0, len(clips), TASK_CLIPS):
            chosen = clips[start : start + TASK_CLIPS]
            yield _Task(split, table.paths[number], chosen, table.row[chosen], sample_rate)


def _read_all(tasks: Sequence[_Task], processes: int) -> Iterator[tuple[_Task, "_Scan"]]:
    """Each task with its findings, in order; few clips are read in this process, as starting another takes longer."""
    workers = min(processes, sum(len(task.clips) for task in tasks) // TASK_CLIPS)
    if workers <= 1:
        yield from ((task, task.read()) for task in tasks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker) as pool:
        try:
            yield from zip(tasks, pool.map(_Task.read, tasks), strict=True)
        except BrokenProcessPool:
            raise UserError(
                f"One of {workers} processes that read the clips was killed, perhaps for lack of memory: try fewer, as "
                f"with --processes 1."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # where it was interrupted


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that waits for it
    end_with_parent()


def _split_report(table: ClipTable, scan: "_Scan") -> SplitReport:
    classes = table.targets.sum(axis=1)
    return SplitReport(
        names=table.names,
        per_class=table.targets.sum(axis=0),
        without_class=np.flatnonzero(classes == 0),
        with_several=np.flatnonzero(classes > 1),
        folds=[fold for fold in np.unique(table.fold).tolist() if fold],
        seconds=scan.seconds,
        silent=np.flatnonzero(scan.silent),
        clipped=np.flatnonzero(scan.clipped),
        digests=scan.digests,
        prints=scan.prints,
        unreadable=dict(sorted(scan.unreadable.items())),
        fingerprint=table.fingerprint(),
    )


class _Scan:
    """Findings on each waveform."""

    def __init__(self, count: int, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self.seconds = np.full(count, np.nan)
        self.silent, self.clipped = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        self.digests, self.prints = np.zeros(count, dtype="V32"), np.zeros((count, SIZE), dtype=np.int8)
        self.unreadable: dict[int, str] = {}

    def take(self, clips: np.ndarray, found: "_Scan") -> None:
        """Add the findings on some clips."""
        for name in ("seconds", "silent", "clipped", "digests", "prints"):
            getattr(self, name)[clips] = getattr(found, name)
        self.unreadable.update({int(clips[place]): reason for place, reason in found.unreadable.items()})

    def read_file(self, path: Path, rows: np.ndarray) -> None:
        """Read some rows of a file, one for each clip of this scan."""
        try:
            with open_store(path) as file:
                waveforms = Waveforms(file)
                for clip, row in enumerate(rows.tolist()):
                    try:
                        self.measure(clip, _read_row(waveforms, row))
                    except (UserError, OSError, IndexError) as error:
                        self.unreadable[clip] = f"{path}, row {row}: {error}"
        except (UserError, OSError) as error:  # the file itself
            self.unreadable.update(dict.fromkeys(range(len(rows)), str(error)))

    def measure(self, clip: int, waveform: np.ndarray) -> None:
        """waveform: (samples,) int16."""
        self.seconds[clip] = len(waveform) / self.sample_rate
        lowest, highest = int(waveform.min()), int(waveform.max())
        self.silent[clip] = max(-lowest, highest) < SILENT_PEAK
        full = np.count_nonzero(waveform >= FULL_SCALE) + np.count_nonzero(waveform <= -FULL_SCALE)
        self.clipped[clip] = full > CLIPPED_SHARE * len(waveform)
        self.digests[clip] = np.void(hashlib.sha256(waveform.tobytes()).digest())
        self.prints[clip] = fingerprint(waveform, self.sample_rate)


def _read_row(waveforms: Waveforms, row: int) -> np.ndarray:
    """(samples,) int16 of a row. Raises UserError, IndexError or OSError where it is unusable."""
    if not 0 <= row < len(waveforms):
        raise UserError(f"the file has {len(waveforms)} rows")
    waveform = waveforms.read(row)
    if len(waveform) == 0:
        raise UserError("the clip is empty")
    return waveform


def _groups(splits: dict[str, SplitReport], column: str) -> list[list[tuple[str, int]]]:
    """The clips, as (split, row), that share a name or their audio with others: a list for each name or sound.

    Silent clips, which are all alike, are left out.
    """
    keys, places = [], []
    for split, found in splits.items():
        chosen = found.audible() if column == "digests" else np.arange(len(found.names))
        keys.append(getattr(found, column)[chosen])
        places += [(split, place) for place in chosen.tolist()]
    _, inverse, counts = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
    groups: dict[int, list[tuple[str, int]]] = {}
    for number in np.flatnonzero(counts[inverse] > 1).tolist():
        groups.setdefault(int(inverse[number]), []).append(places[number])
    return list(groups.values())


def _judge_split(split: str, found: SplitReport, report: CheckReport, single_label: bool) -> None:
    """Problems and warnings of one split."""
    if len(found.names) == 0:
        report.problems.append(f"{split} has no clips.")
    if found.unreadable:
        reason = next(iter(found.unreadable.values()))
        report.problems.append(f"{_some(split, found, found.unreadable)} cannot be read: {reason}")
    if single_label:
        wrong = [*found.without_class, *found.with_several]
        if wrong:
            report.problems.append(f"{_some(split, found, wrong)} must have one class each (task = single_label).")
    elif len(found.without_class):
        report.warnings.append(f"{_some(split, found, found.without_class)} without a class.")
    if len(found.silent):
        report.warnings.append(f"{_some(split, found, found.silent)} silent (all samples below -60 dBFS).")
    if len(found.clipped):
        report.warnings.append(f"{_some(split, found, found.clipped)} clipped (over 0.1 % of samples at full scale).")


def _judge_events(split: str, table: ClipTable, found: SplitReport, report: CheckReport) -> None:
    """Clips with an event that ends more than END_TOLERANCE after them."""
    late = []
    for clip in range(len(table) if table.events else 0):
        events = table.events[table.path_number[clip]]
        if (events.offset[events.of(table.row[clip])] > found.seconds[clip] + END_TOLERANCE).any():
            late.append(clip)
    if late:
        report.problems.append(
            f"{_some(split, found, late)} have events that end more than {END_TOLERANCE:g} s after the clip."
        )


def _judge_repeated(
    what: str, groups: list[list[tuple[str, int]]], splits: dict[str, SplitReport], report: CheckReport
) -> None:
    """Clips that share an id or their audio: a problem across splits, a warning within one."""
    for messages, wanted, place in ((report.problems, True, "in two splits"), (report.warnings, False, "in one split")):
        chosen = [group for group in groups if (len({split for split, _ in group}) > 1) == wanted]
        if chosen:
            shown = [" = ".join(f"{_name(splits[split], clip)} ({split})" for split, clip in g[:NAMED]) for g in chosen]
            messages.append(f"{what} {place}, {len(chosen)} times: {_listed(shown)}.")


def _judge_near(tables: dict[str, ClipTable], splits: dict[str, SplitReport], report: CheckReport) -> None:
    """Clips of two splits whose audio is nearly the same: a warning with their names."""
    shown = []
    with ExitStack() as stack:

        @cache
        def waveforms(path: Path) -> Waveforms:
            return Waveforms(stack.enter_context(open_store(path)))

        @lru_cache(maxsize=64)
        def sound(split: str, clip: int) -> np.ndarray:
            table = tables[split]
            return waveforms(table.paths[table.path_number[clip]]).read(int(table.row[clip]))

        for (one, first), (other, second) in itertools.combinations(splits.items(), 2):
            these, those = first.audible(), second.audible()
            for a, b in candidates(first.prints[these], second.prints[those]):
                left, right = int(these[a]), int(those[b])
                if first.digests[left] == second.digests[right]:
                    continue
                if nearly_same(sound(one, left), sound(other, right)):
                    shown.append(f"{_name(first, left)} ({one}) ~ {_name(second, right)} ({other})")
    if shown:
        report.warnings.append(
            f"nearly the same audio in two splits, {len(shown)} times: {_listed(shown)}. What is learned in one is "
            f"known in the other: keep them in one split."
        )


def _judge_classes(report: CheckReport) -> None:
    """Classes that no clip has, and those that are tested but not trained."""
    total = np.sum([found.per_class for found in report.splits.values()], axis=0)
    if (total == 0).any():
        empty = [report.labels[k] for k in np.flatnonzero(total == 0)]
        report.warnings.append(f"{len(empty)} of {len(report.labels)} classes without clips: {_listed(empty)}.")
    if "train" in report.splits:
        untrained = [report.labels[k] for k in np.flatnonzero((report.splits["train"].per_class == 0) & (total > 0))]
        if untrained:
            report.warnings.append(
                f"{len(untrained)} classes have clips to validate or test but none to train: {_listed(untrained)}."
            )


def _some(split: str, found: SplitReport, clips: Iterable[int]) -> str:
    """`train: 4 of 20 clips (a.wav, b.wav, c.wav and 1 more)`."""
    names = [_name(found, clip) for clip in clips]
    return f"{split}: {len(names)} of {len(found.names)} clips ({_listed(names)})"


def _name(found: SplitReport, clip: int) -> str:
    return found.names[clip].decode(errors="replace")


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(words[:NAMED]) + more
