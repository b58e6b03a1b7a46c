"""python main.py plan: what a training will need, and whether it can work, before it starts."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytorch_lightning as pl
from rich.console import Console
from rich.table import Table

from data.names import markup, terminal_text
from data_generator import SEDDataModule, Split, load_training_data
from model import build_model
from runs.measure import (
    Timing,
    WholeBatches,
    device_of,
    one_device,
    resident_memory,
    saved_for_backward,
    time_inference,
    time_training,
)
from runs.records import BYTES_PER_TRAINED_PARAMETER, device_name
from runs.resume import find_resumed, resolve_training
from sed_model import SEDWrapper, build_wrapper
from settings import Config, UserError
from training.devices import device_count, on_gpu, total_memory
from training.performance import settle
from training.schedule import (
    WARM_UP_EPOCHS,
    learning_rate_scale,
    rate_scale,
    schedule_warnings,
    warm_up_steps,
)

RECIPE_RATE, RECIPE_BATCH = 1e-3, 128  # paper, section 3.1
FLOAT32, MOMENTS = 4, 2  # bytes of a number; AdamW keeps two for each weight
READ_CLIPS = 64  # for the disk's rate
MEASURED_SECONDS = 5.0  # of training, and of inference
FEW, MORE = 2, 6  # clips of a step that is measured on a CPU: from their memory that of a whole batch follows


@dataclass
class Plan:
    """What was found: lines of the table, and what is wrong. A problem is what a training would fail with."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, or None where it raises UserError, which is a problem then."""
        try:
            return work()
        except UserError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None


def run(given: dict[str, Any], measure_steps: int = 20) -> None:
    """Print the plan of the training that `train` with the same flags would be. Exit status 1 where it cannot run.

    measure_steps: training steps to time, 0 for none. Nothing is written.
    """
    if measure_steps < 0:
        raise UserError(f"--measure_steps {measure_steps} is not allowed: it must be 0 or more.")
    settings = resolve_training(given)
    plan = Plan()
    print_plan(settings, plan, make_plan(settings, plan, measure_steps))
    if plan.problems:
        raise SystemExit(1)


def make_plan(settings: Config, plan: Plan, measure_steps: int) -> str:
    """Fill `plan`; returns the name of the device."""
    say("devices and data")
    devices = plan.attempt(lambda: device_count(settings))
    if devices is None:
        return "no device"
    done = plan.attempt(lambda: complete_epochs(settings)) or 0
    data: Optional[SEDDataModule] = plan.attempt(lambda: training_data(settings, devices))
    steps = data.steps_per_epoch(devices) * (settings.max_epoch - done) if data else 0
    settings, performance = settle(settings, training=True, steps=steps)
    plan.rows.append(("performance", str(performance)))
    module = plan.attempt(lambda: build_wrapper(build_model(settings), settings, []))
    if module is None:
        return device_name(settings)
    weights = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    say("memory")
    plan.rows.append(("parameters", f"{weights:,} ({trained:,} trained)"))
    enough = plan_memory(settings, plan, module, weights, trained)
    if data is None:
        return device_name(settings)
    plan_schedule(settings, plan, data, devices)
    plan_disk(settings, plan, data, module, weights, trained)
    say("reading clips")
    read = plan.attempt(lambda: reading_rate(data))
    if read:
        plan.rows.append(("disk", str(read)))
    clips, batch = len(data.tables["train"]), measured_part(settings).batch_size
    if measure_steps and clips < batch:
        plan.warnings.append(f"Nothing is timed: {clips} training clips are less than a batch of {batch}.")
    elif measure_steps and enough:
        epochs = settings.max_epoch - done
        plan.attempt(lambda: plan_duration(settings, plan, data, steps, epochs, measure_steps, read))
    return device_name(settings)


def say(what: str) -> None:
    """What is at work, since the plan itself comes last."""
    print(f"plan: {what} ...", file=sys.stderr, flush=True)


def complete_epochs(settings: Config) -> int:
    """Complete epochs of the run to resume. Raises UserError where train would refuse the run folder."""
    resumed = find_resumed(settings)
    return (resumed.complete_epochs or 0) if resumed else 0


def training_data(settings: Config, devices: int) -> SEDDataModule:
    """The clips. Raises UserError where a split is missing or empty, or cannot be shared by the devices."""
    splits: tuple[Split, ...] = ("train", "validation", "test") if settings.watch_test else ("train", "validation")
    data = load_training_data(settings, splits)
    clips = len(data.tables["train"])
    if clips < devices:
        raise UserError(f"{clips} training clips cannot be shared by {devices} processes: set devices lower.")
    data.train_dataloader()  # the balanced sampler needs a clip that has a class
    return data


# --- memory ---------------------------------------------------------------------------------------------------------


def plan_memory(settings: Config, plan: Plan, module: SEDWrapper, weights: int, trained: int) -> bool:
    """Estimate the memory of one device; returns whether it is enough."""
    part = one_device(settings)
    averages = weights * FLOAT32 if settings.weight_averaging != "none" else 0
    fixed = trained * BYTES_PER_TRAINED_PARAMETER + (weights - trained) * FLOAT32 + averages
    activations = saved_for_backward(part, module) * part.batch_size
    libraries = 0 if on_gpu(settings) else resident_memory()
    also = "" if on_gpu(settings) else f", {gib(libraries)} for the process itself"
    plan.rows.append(
        (
            "memory of a device",
            f"{gib(fixed)} for weights, gradients and AdamW, {gib(activations)} for the activations of "
            f"{part.batch_size} clips{also}; there is {gib(total_memory(settings))}",
        )
    )
    return has_room(settings, plan, fixed + activations + libraries)


def has_room(settings: Config, plan: Plan, needed: float) -> bool:
    """Whether the device has the memory that one process needs; else that is a problem of the plan."""
    processes = 1 if on_gpu(settings) else device_count(settings)  # CPU processes share their memory
    there = total_memory(settings)
    if needed * processes <= there:
        return True
    plan.problems.append(
        f"The training needs {gib(needed * processes)} of memory, and there is {gib(there)}: lower batch_size, raise "
        f"accumulate_batches, or set gradient_checkpointing."
    )
    return False


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


# --- steps and learning rate ----------------------------------------------------------------------------------------


def plan_schedule(settings: Config, plan: Plan, data: SEDDataModule, devices: int) -> None:
    """Steps, warm-up, learning rates; warnings where they cannot do what they are for."""
    steps, clips = data.steps_per_epoch(devices), len(data.tables["train"])
    total = steps * settings.max_epoch
    if settings.lr_schedule != "epochs":
        warm_up = warm_up_steps(settings, total)
        written = f"{warm_up:,} steps, {warm_up / total:.0%} of the run"
    else:
        epochs = min(WARM_UP_EPOCHS, settings.max_epoch)
        written = f"{steps * epochs:,} steps in {epochs} epochs, {epochs / settings.max_epoch:.0%} of the run"
    plan.rows += [
        ("clips", ", ".join(f"{split} {len(table):,}" for split, table in data.tables.items())),
        ("steps", f"{steps:,} an epoch of {settings.batch_size} clips each, {total:,} in all"),
        ("warm-up", written),
        ("learning rate", ", ".join(learning_rates(settings, total))),
    ]
    plan.warnings += schedule_warnings(settings, total)
    if settings.batch_size > clips:
        plan.warnings.append(
            f"batch_size = {settings.batch_size} is more than the {clips} training clips: an epoch is one step "
            f"of them all. Lower batch_size."
        )
    if settings.learning_rate == RECIPE_RATE and settings.batch_size != RECIPE_BATCH:
        scaled = RECIPE_RATE * settings.batch_size / RECIPE_BATCH
        plan.warnings.append(
            f"learning_rate = {RECIPE_RATE:g} belongs to the recipe's batch_size = {RECIPE_BATCH}; this run has "
            f"{settings.batch_size}. In proportion to the batch it would be {scaled:.2g}."
        )


def learning_rates(settings: Config, steps: int = 0) -> list[str]:
    """As in `epochs 4-11: 0.001`: the epochs, counted from 1, that share a rate; the slow decay is one entry.

    steps: of the whole training, for a schedule by steps.
    """
    if settings.lr_schedule != "epochs":
        scale, highest = rate_scale(settings, steps), min(warm_up_steps(settings, steps), steps - 1)
        shown = sorted({0, highest, steps - 1})
        return [f"step {step + 1:,}: {settings.learning_rate * scale(step):.2g}" for step in shown]
    found = []
    last_plateau = settings.lr_scheduler_epoch[2] + 1  # counted from 1
    plateaus = range(min(settings.max_epoch, max(last_plateau, WARM_UP_EPOCHS)))
    for value, epochs in groupby(plateaus, key=lambda epoch: rate(settings, epoch)):
        numbers = [epoch + 1 for epoch in epochs]
        several = f"epochs {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"epoch {numbers[0]}"
        found.append(f"{several}: {value:.2g}")
    if settings.max_epoch > len(plateaus):
        end = rate(settings, settings.max_epoch - 1)
        found.append(
            f"epochs {len(plateaus) + 1}-{settings.max_epoch}: {rate(settings, len(plateaus)):.2g} to {end:.2g}"
        )
    return found


def rate(settings: Config, epoch: int) -> float:
    """The learning rate in an epoch, counted from 0."""
    return settings.learning_rate * learning_rate_scale(epoch, settings.lr_scheduler_epoch, settings.lr_rate)


# --- disk -----------------------------------------------------------------------------------------------------------


def plan_disk(
    settings: Config, plan: Plan, data: SEDDataModule, module: SEDWrapper, weights: int, trained: int
) -> None:
    """Room for checkpoints (the best, the last, one being written) and for the scores of a test."""
    averages = weights if settings.weight_averaging != "none" else 0
    checkpoint = FLOAT32 * (weights + averages + MOMENTS * trained)
    kept = min(settings.save_top_k, settings.max_epoch) + 1
    clips = len(data.tables.get("test", data.tables["validation"]))
    frames = module.sed_model.frames if settings.fl_local else 0
    scores = clips * settings.classes_num * FLOAT32 * (1 + frames)
    needed = checkpoint * (kept + 1) + scores
    free = free_space(settings.run_folder)
    plan.rows.append(
        (
            "space on disk",
            f"{gib(checkpoint * kept)} for {kept} checkpoints, {gib(scores)} for the scores of a test; there is "
            f"{gib(free)} free",
        )
    )
    if needed > free:
        plan.problems.append(
            f"The run needs {gib(needed)} of disk (a checkpoint being written included), and {settings.workspace} has "
            f"{gib(free)} free: make room, move workspace, or lower save_top_k."
        )


def free_space(folder: Path) -> int:
    """Bytes free where the folder is or will be made."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


@dataclass(frozen=True)
class ReadingRate:
    """How fast one process read some training clips in random order. cold: the system was asked to forget the files."""

    clips: int
    seconds: float
    bytes_per_clip: int
    cold: bool

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds

    def __str__(self) -> str:
        megabytes = self.clips_per_second * self.bytes_per_clip / 1e6
        state = "after the system was asked to forget the files" if self.cold else "partly from the system's cache"
        return (
            f"{self.clips_per_second:,.0f} clips/s, {megabytes:,.0f} MB/s of int16: {self.clips} random clips, "
            f"one process, {state}"
        )


def reading_rate(data: SEDDataModule) -> ReadingRate:
    """Read some random training clips, as the loader does."""
    table = data.tables["train"]
    rows = np.random.default_rng(data.settings.random_seed).permutation(len(table))[:READ_CLIPS]
    cold = hasattr(os, "posix_fadvise")
    for number in np.unique(table.path_number[rows]) if cold else []:
        descriptor = os.open(table.paths[number], os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    dataset = data.dataset("train")
    started = time.perf_counter()
    for row in rows.tolist():
        dataset[row]
    return ReadingRate(len(rows), time.perf_counter() - started, 2 * dataset.clip_samples, cold)


# --- time -----------------------------------------------------------------------------------------------------------


def plan_duration(
    settings: Config,
    plan: Plan,
    data: SEDDataModule,
    steps: int,
    epochs: int,
    measured: int,
    read: Optional[ReadingRate],
) -> None:
    """Time some training steps from the store, and a few batches of inference for the validation."""
    devices, part = device_count(settings), measured_part(settings)
    whole = one_device(settings).batch_size
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)

    def batches(clips: int, count: int) -> WholeBatches:
        loader = load_training_data(part.model_copy(update={"batch_size": clips}), ("train",)).train_dataloader()
        return WholeBatches(loader, count, seconds=MEASURED_SECONDS)  # type: ignore[arg-type]

    say(f"training steps, for about {MEASURED_SECONDS:g} s")
    few = (
        time_training(part.model_copy(update={"batch_size": FEW}), batches(FEW, 1)) if part.batch_size < whole else None
    )
    training = time_training(part, batches(part.batch_size, measured))
    say("inference")
    inference = time_inference(part, batches(part.batch_size, max(1, measured // 4)))
    fitting = steps * settings.accumulate_batches * training.step_seconds * whole / part.batch_size
    scored = sum(len(table) for split, table in data.tables.items() if split != "train")
    validating = epochs * scored / devices / inference.clips_per_second
    plan.rows += [
        ("measured", measured_line(settings, training)),
        *([] if few is None else [("memory, measured", grown_memory(settings, plan, few, training))]),
        (
            "duration",
            f"{hours(training.first_step + fitting + validating)} for {epochs} epochs: {hours(fitting)} of steps, "
            f"{hours(validating)} of validation; writing checkpoints"
            + (" and exchanging gradients do" if devices > 1 else " does")
            + " not count",
        ),
    ]
    if read:
        plan_reading(settings, plan, training, devices, read)


def measured_part(settings: Config) -> Config:
    """The settings of the steps that are measured: on a CPU, where steps are long, a few clips stand for a batch."""
    part = one_device(settings)
    if on_gpu(settings) or settings.labelling_shares:  # of which a few clips may have no whole number
        return part
    return part.model_copy(update={"batch_size": min(part.batch_size, MORE)})


def grown_memory(settings: Config, plan: Plan, few: Timing, more: Timing) -> str:
    """The most memory of a process with whole batches, on the straight line through two sizes of a step."""
    whole = one_device(settings).batch_size
    peak = more.memory + max(0, more.memory - few.memory) / (MORE - FEW) * (whole - MORE)
    has_room(settings, plan, peak)
    return f"{gib(peak)} at most with {whole} clips a step, by steps of {FEW} and {MORE} clips"


def measured_line(settings: Config, training: Timing) -> str:
    memory = "tensors on the GPU" if device_of(settings).type == "cuda" else "the process, libraries included"
    return (
        f"{training.steps} steps of {training.clips // training.steps} clips on one device: "
        f"{1000 * training.step_seconds:,.0f} ms each, {training.waiting_share:.0%} of it waiting for data; "
        f"{gib(training.memory)} at most ({memory})"
    )


def plan_reading(settings: Config, plan: Plan, training: Timing, devices: int, read: ReadingRate) -> None:
    """Compare what the steps would take, if they never waited, with what the readers can give."""
    needed = devices * training.clips / (training.seconds - training.waiting)
    readers = devices * max(1, settings.num_workers)
    there = readers * read.clips_per_second
    plan.rows.append(
        (
            "reading",
            f"{needed:,.0f} clips/s keep the steps going; {readers} reading processes give {there:,.0f} where the disk "
            f"serves all as it served one",
        )
    )
    if needed > there:
        plan.warnings.append(
            f"The steps take {needed:,.0f} clips/s, reading gives {there:,.0f}: raise num_workers = "
            f"{settings.num_workers}, or put the data on a faster disk."
        )


def hours(seconds: float) -> str:
    """As h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def print_plan(settings: Config, plan: Plan, device: str) -> None:
    table = Table(title=f"Plan of {markup(settings.exp_name)}", show_header=False, title_justify="left")
    for name, text in (("device", device), *plan.rows):
        table.add_row(name, markup(text))
    Console().print(table)
    for message in plan.warnings:
        print(f"warning: {terminal_text(message)}")
    for message in plan.problems:
        print(f"problem: {terminal_text(message)}")
    if not plan.problems:
        print("The training can run.")
