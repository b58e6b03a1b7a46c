"""python main.py benchmark: how fast this machine trains and infers, in memory and from the prepared store."""

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType

from data.files import check_writable, whole_file, write_json
from data_generator import SEDDataModule, TrainLoader, load_training_data
from model.registry import ENCODERS
from runs.measure import (
    WARM_UP,
    Batches,
    OutOfMemoryError,
    Repeated,
    Timing,
    WholeBatches,
    count_flops,
    device_of,
    fit,
    one_device,
    peak_flops,
    synthetic_batch,
    time_inference,
    time_training,
)
from runs.records import device_name, git_revision
from runs.resume import resolve_training
from settings import Config, UserError
from training.devices import on_gpu
from training.performance import settle

PROFILED_STEPS = 3
HEAVIEST = 10  # operations of a profile that are printed
LONGEST_NAME = 60  # of an operation, in the printed table
PRECISIONS = ("32", "bf16-mixed", "16-mixed")
FIGURES = {  # column of the table: of a Row, its scale and format
    "clips/s": ("clips_per_second", 1, "{:,.1f}"),
    "ms a step": ("step_seconds", 1000, "{:,.1f}"),
    "first s": ("first_step_seconds", 1, "{:.2f}"),
    "GiB": ("memory", 2**-30, "{:.2f}"),
    "waiting": ("waiting", 1, "{:.1%}"),
    "GFLOP/s": ("flops_per_second", 1e-9, "{:,.0f}"),
    "of peak": ("share_of_peak", 1, "{:.1%}"),
}
COMPILE_MODES = ("off", "default")


@dataclass(frozen=True)
class Row:
    """One line of the report. memory in bytes; waiting and share_of_peak as shares of 1; None: out of memory."""

    encoder: str
    work: str
    data: str
    precision: str
    compile: str
    clips_per_second: Optional[float] = None
    step_seconds: Optional[float] = None
    first_step_seconds: Optional[float] = None
    memory: Optional[int] = None
    waiting: Optional[float] = None
    flops_per_second: Optional[float] = None
    share_of_peak: Optional[float] = None


@dataclass(frozen=True)
class Operation:
    """Of a profile: a GPU's kernel, copy or fill, or a CPU's operator; its own time alone."""

    name: str
    calls: int
    milliseconds: float
    share: float


def run(
    given: dict[str, Any],
    precisions: Optional[str] = None,
    compile_modes: Optional[str] = None,
    encoders: Optional[str] = None,
    steps: int = 20,
    json_file: Optional[str] = None,
    profile: bool = False,
    trace: Optional[str] = None,
) -> None:
    """Measure every encoder and precision with every compile mode, print a table, and write it to json_file.

    precisions, compile_modes: as in 32,bf16-mixed; None: what the settings say, or take where they say auto. encoders:
    names or all; None: the settings'. profile: also the heaviest operations of training steps; trace: a file for all
    of them. What was measured is in json_file at once. Raises UserError for unknown names, and for steps below 1.
    """
    if steps < 1:
        raise UserError(f"--steps {steps} is not allowed: it must be 1 or more.")
    wanted_precisions = chosen("precisions", precisions, PRECISIONS)
    modes = chosen("compile_modes", compile_modes, COMPILE_MODES)
    names = chosen("encoders", encoders, ("all", *ENCODERS))
    names = list(ENCODERS) if "all" in names else names
    every = [resolve_training({**given, **({"encoder": name} if name else {})}) for name in names or [""]]
    settings = every[0]
    if "16-mixed" in (wanted_precisions or [settings.precision]) and not on_gpu(settings):
        raise UserError("Precision 16-mixed needs a GPU: on a CPU use 32 or bf16-mixed.")
    for flag, path in (("json", json_file), ("trace", trace)):
        if path:
            check_writable(f"--{flag} {path}", path)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    rows: list[Row] = []
    operations: list[Operation] = []

    def write() -> None:
        if json_file:
            write_json(Path(json_file), report(rows, operations, settings, steps))

    for each in every:
        data = prepared_data(each)
        for precision, mode in itertools.product(wanted_precisions or [each.precision], modes or [each.compile]):
            for row in measure(each.model_copy(update={"precision": precision, "compile": mode}), data, steps):
                rows.append(row)
                write()
    print_rows(rows, settings)
    if profile or trace:
        first = {"precision": rows[0].precision, "compile": rows[0].compile}
        operations = profile_training(settings.model_copy(update=first), Path(trace) if trace else None)
        print_operations(operations, settings)
        write()
    for path in filter(None, (json_file, trace)):
        print(f"Written: {path}")


def chosen(flag: str, words: Optional[str], allowed: tuple[str, ...]) -> list[str]:
    """The names of a list like 32,bf16-mixed; none where the flag is not given. Raises UserError for others."""
    names = [word.strip() for word in (words or "").split(",") if word.strip()]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise UserError(f"--{flag} {words} is not allowed: {', '.join(unknown)} is none of {', '.join(allowed)}.")
    return list(dict.fromkeys(names))


def prepared_data(settings: Config) -> Optional[SEDDataModule]:
    """The training clips of the settings, or None, with the reason printed, where they cannot give a whole batch."""
    part = one_device(settings)
    try:
        data = load_training_data(part, ("train",))
    except UserError as error:
        print(f"Nothing is read from a store: {error}")
        return None
    clips, batch_size = len(data.tables["train"]), data.settings.batch_size
    if clips < batch_size:
        print(f"Nothing is read from a store: its {clips} training clips are less than a batch of {batch_size}.")
        return None
    return data


def measure(settings: Config, data: Optional[SEDDataModule], steps: int) -> Iterator[Row]:
    """Training and inference of one case, each with a batch in memory and, where there are data, from the store.

    Where a GPU has not enough memory, the row says so, and the next one follows.
    """
    for work, timed in (("training", time_training), ("inference", time_inference)):
        training = work == "training"
        taken = one_device(settle(settings, training=training)[0])
        flops, peak = count_flops(taken, training=training), peak_flops(taken)
        batch = synthetic_batch(taken, taken.batch_size)
        sources: dict[str, Batches] = {"memory": Repeated(batch, steps)}
        if data:
            loader: TrainLoader = data.train_dataloader()  # type: ignore[assignment]
            sources["store"] = WholeBatches(loader, steps)
        for source, batches in sources.items():
            empty = Row(taken.encoder, work, source, taken.precision, taken.compile)
            try:
                yield filled(empty, timed(taken, batches), flops, peak)
            except OutOfMemoryError as error:
                print(f"{taken.encoder}, {work} from {source}: {error}")
                yield empty


def filled(row: Row, timing: Timing, flops: float, peak: float) -> Row:
    """A row with its figures. flops: of one clip; peak: FLOP/s of the device."""
    achieved = flops * timing.clips_per_second
    return replace(
        row,
        clips_per_second=timing.clips_per_second,
        step_seconds=timing.step_seconds,
        first_step_seconds=timing.first_step,
        memory=timing.memory,
        waiting=timing.waiting_share,
        flops_per_second=achieved,
        share_of_peak=achieved / peak,
    )


def print_rows(rows: list[Row], settings: Config) -> None:
    measured = one_device(settings)
    table = Table(
        title=f"{device_name(measured)}: batches of {measured.batch_size} clips of "
        f"{settings.clip_samples / settings.sample_rate:g} s",
        caption="First: the first step, with compilation. GiB: the most memory that "
        + ("tensors took" if on_gpu(settings) else "the process had resident")
        + ". Waiting: share of the time between two steps.\nOf peak: of the fastest large matrix product in this run.",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("encoder", "", "data", "precision", "compile"):
        table.add_column(column, no_wrap=True)
    for column in FIGURES:
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(r.encoder, r.work, r.data, r.precision, r.compile, *figures(r))
    Console(width=120).print(table)


def figures(r: Row) -> list[str]:
    """Of a printed line."""
    values = asdict(r)
    if r.clips_per_second is None:
        return ["out of memory"]
    return [shown.format(scale * values[name]) for name, scale, shown in FIGURES.values()]


def report(rows: list[Row], operations: list[Operation], settings: Config, steps: int) -> dict[str, Any]:
    """What --json writes."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(one_device(settings)),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "git_revision": git_revision(),
        "batch_size": one_device(settings).batch_size,
        "steps": steps,
        "rows": [asdict(r) for r in rows],
        "operations": [asdict(operation) for operation in operations],
        "settings": settings.model_dump(),
    }


class ProfiledSteps(pl.Callback):
    """Profiles the training steps that come after the warm-up."""

    def __init__(self, profiler: torch.profiler.profile) -> None:
        self.profiler = profiler

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        if number == WARM_UP:
            self.profiler.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.profiler.stop()


def profile_training(settings: Config, trace: Optional[Path]) -> list[Operation]:
    """The operations of some training steps with a batch in memory, heaviest first; trace: a file for all of them."""
    settings = one_device(settle(settings, training=True)[0])
    activities = [torch.profiler.ProfilerActivity.CPU]
    gpu = device_of(settings).type == "cuda"
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    batch = synthetic_batch(settings, settings.batch_size)
    try:
        fit(settings, Repeated(batch, PROFILED_STEPS), ProfiledSteps(profiler))
    except OutOfMemoryError as error:
        print(f"Nothing is profiled: {error}")
        return []
    if trace:
        with whole_file(trace) as partial:
            profiler.export_chrome_trace(str(partial))
    return operations_of(profiler.key_averages(), gpu=gpu)


def operations_of(events: Iterable[Any], *, gpu: bool) -> list[Operation]:
    """Of a profiler's averages, heaviest first: those of the device, without ranges.

    A range, as Optimizer.step, covers operations that are counted themselves; on a GPU it covers pauses, too.
    """
    device = DeviceType.CUDA if gpu else DeviceType.CPU
    found = [event for event in events if event.device_type == device and not event.is_user_annotation]
    taken = [event.self_device_time_total if gpu else event.self_cpu_time_total for event in found]
    total = sum(taken) or 1.0
    operations = [
        Operation(event.key, event.count, microseconds / 1000, microseconds / total)
        for event, microseconds in zip(found, taken, strict=True)
    ]
    return sorted(operations, key=lambda operation: -operation.milliseconds)


def print_operations(operations: list[Operation], settings: Config) -> None:
    device = "GPU" if on_gpu(settings) else "CPU"
    table = Table(title=f"The heaviest operations of {PROFILED_STEPS} training steps", title_justify="left")
    for column in ("operation", "calls", f"{device} ms", "share"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for each in operations[:HEAVIEST]:
        name = each.name if len(each.name) <= LONGEST_NAME else f"{each.name[:LONGEST_NAME]}..."
        table.add_row(name, f"{each.calls:,}", f"{each.milliseconds:,.1f}", f"{each.share:.1%}")
    Console(width=120).print(table)
