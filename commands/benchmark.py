"""python main.py benchmark: how fast this machine trains and infers, in memory and from the prepared store."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from data.facts import store_facts
from data.files import check_writable, whole_file, write_json
from data_generator import SEDDataModule, load_training_data
from runs.measure import (
    WARM_UP,
    Batches,
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
from settings import Config, UserError, resolve
from training.devices import on_gpu
from training.performance import settle

PROFILED_STEPS = 3
TRACE = "training.json"  # file in the folder of --profile
HEAVIEST = 10  # operations of a profile that are printed
PRECISIONS = ("32", "bf16-mixed", "16-mixed")
COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class Row:
    """One line of the report. memory in bytes; waiting and share_of_peak as shares of 1."""

    work: str
    data: str
    precision: str
    compile: str
    clips_per_second: float
    step_seconds: float
    first_step_seconds: float
    memory: int
    waiting: float
    flops_per_second: float
    share_of_peak: float


def run(
    given: dict[str, Any],
    precisions: Optional[str] = None,
    compile_modes: Optional[str] = None,
    steps: int = 20,
    json_file: Optional[str] = None,
    profile: Optional[str] = None,
) -> None:
    """Measure every precision with every compile mode, print a table, and write it to json_file.

    precisions, compile_modes: as in 32,bf16-mixed; None: what the settings say, or take where they say auto. profile:
    folder for a trace of training steps. Raises UserError for unknown names, and for steps below 1.
    """
    if steps < 1:
        raise UserError(f"--steps {steps} is not allowed: it must be 1 or more.")
    settings = resolve(given, facts=store_facts)
    wanted_precisions = chosen("precisions", precisions, PRECISIONS)
    modes = chosen("compile_modes", compile_modes, COMPILE_MODES)
    if "16-mixed" in (wanted_precisions or [settings.precision]) and not on_gpu(settings):
        raise UserError("Precision 16-mixed needs a GPU: on a CPU use 32 or bf16-mixed.")
    if json_file:
        check_writable(f"--json {json_file}", json_file)
    if profile:
        check_writable(f"--profile {profile}", Path(profile) / TRACE)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    data = prepared_data(settings)
    rows: list[Row] = []
    for precision, mode in itertools.product(wanted_precisions or [settings.precision], modes or [settings.compile]):
        rows += measure(settings.model_copy(update={"precision": precision, "compile": mode}), data, steps)
    print_rows(rows, settings)
    if json_file:
        write_json(Path(json_file), report(rows, settings, steps))
        print(f"Written: {json_file}")
    if profile:
        first = {"precision": rows[0].precision, "compile": rows[0].compile}
        print_heaviest(settings.model_copy(update=first), Path(profile))


def chosen(flag: str, words: Optional[str], allowed: tuple[str, ...]) -> list[str]:
    """The names of a list like 32,bf16-mixed; none where the flag is not given. Raises UserError for others."""
    names = [word.strip() for word in (words or "").split(",") if word.strip()]
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise UserError(f"--{flag} {words} is not allowed: {', '.join(unknown)} is none of {', '.join(allowed)}.")
    return list(dict.fromkeys(names))


def prepared_data(settings: Config) -> Optional[SEDDataModule]:
    """The training clips of the settings, or None, with the reason printed, where they cannot give a whole batch."""
    try:
        data = load_training_data(one_device(settings), ("train",))
    except UserError as error:
        print(f"Nothing is read from a store: {error}")
        return None
    clips, batch_size = len(data.tables["train"]), data.settings.batch_size
    if clips < batch_size:
        print(f"Nothing is read from a store: its {clips} training clips are less than a batch of {batch_size}.")
        return None
    return data


def measure(settings: Config, data: Optional[SEDDataModule], steps: int) -> Iterator[Row]:
    """Training and inference of one case, each with a batch in memory and, where there are data, from the store."""
    for work, timed in (("training", time_training), ("inference", time_inference)):
        training = work == "training"
        taken = one_device(settle(settings, training=training)[0])
        flops, peak = count_flops(taken, training=training), peak_flops(taken)
        batch = synthetic_batch(taken, taken.batch_size)
        sources: dict[str, Batches] = {"memory": Repeated(batch, WARM_UP + steps)}
        if data:
            sources["store"] = WholeBatches(data.train_dataloader(), WARM_UP + steps)  # type: ignore[arg-type]
        for source, batches in sources.items():
            yield row(work, source, taken, timed(taken, batches), flops, peak)


def row(work: str, data: str, settings: Config, timing: Timing, flops: float, peak: float) -> Row:
    """flops: of one clip; peak: FLOP/s of the device."""
    achieved = flops * timing.clips_per_second
    return Row(
        work=work,
        data=data,
        precision=settings.precision,
        compile=settings.compile,
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
    for column in ("", "data", "precision", "compile"):
        table.add_column(column, no_wrap=True)
    for column in ("clips/s", "ms a step", "first s", "GiB", "waiting", "GFLOP/s", "of peak"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r.work, r.data, r.precision, r.compile, f"{r.clips_per_second:,.1f}", f"{1000 * r.step_seconds:,.1f}",
            f"{r.first_step_seconds:.2f}", f"{r.memory / 2**30:.2f}", f"{r.waiting:.1%}",
            f"{r.flops_per_second / 1e9:,.0f}", f"{r.share_of_peak:.1%}",
        )  # fmt: skip
    Console(width=120).print(table)


def report(rows: list[Row], settings: Config, steps: int) -> dict[str, Any]:
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


def print_heaviest(settings: Config, folder: Path) -> None:
    """Profile training steps with a batch in memory: write folder/training.json, print the heaviest operations."""
    settings = one_device(settle(settings, training=True)[0])
    activities = [torch.profiler.ProfilerActivity.CPU]
    gpu = device_of(settings).type == "cuda"
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    batch = synthetic_batch(settings, settings.batch_size)
    fit(settings, Repeated(batch, WARM_UP + PROFILED_STEPS), ProfiledSteps(profiler))
    path = folder / TRACE
    with whole_file(path) as partial:
        profiler.export_chrome_trace(str(partial))

    found = profiler.key_averages()
    taken = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in found}
    total = sum(taken.values())
    device = "GPU" if gpu else "CPU"
    table = Table(title=f"The heaviest operations of {PROFILED_STEPS} training steps", title_justify="left")
    for column in ("operation", "calls", f"{device} ms", "share"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for event in sorted(found, key=lambda event: -taken[event.key])[:HEAVIEST]:
        microseconds = taken[event.key]
        table.add_row(event.key, f"{event.count:,}", f"{microseconds / 1000:,.1f}", f"{microseconds / total:.1%}")
    Console(width=120).print(table)
    print(f"Trace, for chrome://tracing or ui.perfetto.dev: {path}")
