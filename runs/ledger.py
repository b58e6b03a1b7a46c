"""The results ledger: one line of JSON a test, in results_path; the newest of each, and means over seeds."""

import errno
import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, ValidationError

from data.files import check_writable, explained
from settings import NOT_THE_EXPERIMENT, UserError, section

Kind = Literal["single", "ensemble", "weight average"]

IN_THE_LINE = ("random_seed", "esc_fold")  # fields of Result: runs that differ in nothing else belong together


class LedgerPart(BaseModel):
    """What a line is made of. Unknown fields, of a later version, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class IntervalRecord(LedgerPart):
    """A bootstrap interval over clips."""

    low: float
    high: float
    level: float
    resamples: int


class MetricRecord(LedgerPart):
    """One named metric; value is None where it is not defined or not finite."""

    name: str
    value: Optional[float]
    criterion: str
    clips: int
    classes: int
    all_classes: int
    interval: Optional[IntervalRecord] = None


class CheckpointRecord(LedgerPart):
    """A file of weights. sha256: of the whole file."""

    path: str
    sha256: str


class Result(LedgerPart):
    """One test: one line of the ledger.

    settings_hash and random_seed are those of the training, as the checkpoint has them; None where a foreign file
    carries none. An ensemble has the seeds of its members. protocol: held_out, paper, or unknown, of a foreign file.
    esc_fold: None but for ESC-50. git_revision ends in + where files differed from it. class_mapping: from AudioSet's
    classes to those of the data, where they differ. frontend: of a test with frontend_from = settings; else empty, and
    the front-end is the checkpoint's.
    """

    date: str
    kind: Kind
    dataset_type: str
    split: str
    protocol: str
    esc_fold: Optional[int]
    clips: int
    unreadable_clips: int = 0  # of the split, not among `clips`
    metrics: list[MetricRecord]
    tta_shifts: list[int]
    checkpoints: list[CheckpointRecord]
    settings_hash: Optional[str]
    random_seed: Optional[int | list[int]]
    data_fingerprint: str
    git_revision: str
    device: str
    class_mapping: Optional[str] = None
    precision: str = "32"
    frontend: dict[str, float] = {}

    def tested(self) -> tuple[Any, ...]:
        """Which weights were tested, and how: of lines that agree in it the newest counts."""
        hashes = tuple(sorted(checkpoint.sha256 for checkpoint in self.checkpoints))
        return (hashes, *self._how(), self.clips)

    def experiment(self) -> Optional[tuple[Any, ...]]:
        """What runs that differ in the seed alone have in common; None where the settings or the seed are unknown."""
        if self.settings_hash is None or self.random_seed is None:
            return None
        return (self.settings_hash, self.kind, *self._how(), self.clips)

    def seeds(self) -> Optional[tuple[int, ...]]:
        """The seed, or those of an ensemble's members in rising order: the members have no order."""
        if self.random_seed is None:
            return None
        return tuple(sorted(self.random_seed)) if isinstance(self.random_seed, list) else (self.random_seed,)

    def how(self) -> str:
        """How a test differs from the default one, for a table."""
        said = [f"{len(self.tta_shifts)} shifts"] if len(self.tta_shifts) > 1 else []
        said += [f"mapping {self.class_mapping}"] if self.class_mapping else []
        said += [f"precision {self.precision}"] if self.precision != "32" else []
        said += ["configured front-end"] if self.frontend else []
        return ", ".join(said)

    def _how(self) -> tuple[Any, ...]:
        scored = (self.dataset_type, self.data_fingerprint, self.split, self.protocol, tuple(self.tta_shifts))
        return (*scored, self.class_mapping, self.precision, tuple(sorted(self.frontend.items())))


@dataclass(frozen=True)
class Spread:
    """One metric over runs that differ in the seed: mean and sample standard deviation of n values."""

    name: str
    mean: float
    deviation: float
    n: int


def settings_hash(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the settings that determine an experiment, whatever its seed, fold and machine."""
    left_out = {*section(*NOT_THE_EXPERIMENT), *IN_THE_LINE}
    chosen = {name: value for name, value in settings.items() if name not in left_out}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def joint_settings_hash(members: Sequence[Optional[Mapping[str, Any]]]) -> Optional[str]:
    """settings_hash of one checkpoint's settings, or of an ensemble's, in any order. None where one has no settings."""
    hashes = [settings_hash(member) for member in members if member is not None]
    if len(hashes) < len(members):
        return None
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_ledger(path: Path) -> None:
    """Make the folder of a ledger, before a test. Raises UserError where no line could be added after it."""
    if path.is_dir():
        raise UserError(f"results_path = {path} is a folder: give the path of a file, as {path / 'results.jsonl'}.")
    check_writable(f"results_path = {path}", path)
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise UserError(f"results_path = {path} cannot be written: change its permissions, or give another file.")


def append_result(path: Path, result: Result) -> None:
    """Add a line in a single write, so that tests that end at the same time do not mix their lines.

    Fields that have their default are left out of it. Raises UserError where the line could not be written whole. It
    then stays as a broken line, which read_results skips.
    """
    with explained(path):
        _append_line(path, result)


def _append_line(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = result.model_dump_json(exclude_defaults=True).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # the last write was cut off: leave its line
            line = b"\n" + line
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "the disk took only a part of the line")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_results(path: Path) -> tuple[list[Result], list[str]]:
    """The results of a ledger in its order, and a message for each line that cannot be read.

    Raises UserError where there is no ledger, or nothing in it.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if not any(line.strip() for line in lines):
        raise UserError(
            f"There are no results in {path}: `python main.py test --resume_checkpoint PATH` and `esm_test` write "
            f"them; --results_path names another file."
        )
    results, broken = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            results.append(Result.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            broken.append(f"{path}, line {number}, is skipped: {place + ': ' if place else ''}{first['msg']}")
    return results, broken


def newest(results: Sequence[Result]) -> list[Result]:
    """Of tests of the same weights on the same clips in the same way the last one; in the order of the ledger."""
    last = {result.tested(): number for number, result in enumerate(results)}
    return [results[number] for number in sorted(last.values())]


def over_seeds(results: Sequence[Result]) -> list[tuple[Result, list[Spread]]]:
    """For each experiment with two seeds or more: its last result, and mean and deviation of its metrics.

    Of several checkpoints of one seed the one that was tested last counts. A metric that is not defined for every
    seed is left out.
    """
    experiments: dict[tuple[Any, ...], dict[Optional[tuple[int, ...]], Result]] = {}
    for result in newest(results):
        key = result.experiment()
        if key is not None:
            experiments.setdefault(key, {})[result.seeds()] = result
    return [
        (list(seeds.values())[-1], spreads(list(seeds.values()))) for seeds in experiments.values() if len(seeds) > 1
    ]


def spreads(results: Sequence[Result]) -> list[Spread]:
    """Mean and sample standard deviation (n - 1) of the metrics that all of two or more results have."""
    found = []
    for metric in results[0].metrics:
        values = [m.value for result in results for m in result.metrics if m.name == metric.name]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if len(known) == len(results):
            found.append(Spread(metric.name, statistics.fmean(known), statistics.stdev(known), len(known)))
    return found
