"""The devices, machines and processes that share a run."""

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import distributed as fabric
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch import Tensor, nn

from settings import Config, UserError

LOOK_SECONDS = 1.0
GRACE_SECONDS = 10.0  # in which a process that has met an error of its own ends by itself
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|process group", re.IGNORECASE)
ENDED = "The processes of a run end together; `python main.py train --resume auto` resumes from its last checkpoint."


def device_count(settings: Config) -> int:
    """How many devices a run uses: with devices = 0 as many GPUs as divide batch_size.

    Raises UserError where there are fewer than asked for, or where they do not divide batch_size.
    """
    gpus = torch.cuda.device_count()
    part, left = divmod(settings.batch_size, settings.accumulate_batches)
    if left or (settings.devices and part % settings.devices):
        raise UserError(
            f"batch_size = {settings.batch_size} must be a multiple of accumulate_batches = "
            f"{settings.accumulate_batches} times devices = {settings.devices}."
        )
    if settings.accelerator == "cpu" or (settings.accelerator == "auto" and gpus == 0):
        return max(settings.devices, 1)
    if gpus < max(settings.devices, 1):
        raise UserError(
            f"accelerator = {settings.accelerator}, devices = {settings.devices}: this machine shows {gpus} GPUs. "
            f"Use --accelerator cpu, or fewer devices."
        )
    return settings.devices or max(count for count in range(1, gpus + 1) if part % count == 0)


def node_count() -> int:
    """How many machines take part, from the environment of torchrun or SLURM; else 1."""
    variables = os.environ
    if "LOCAL_WORLD_SIZE" in variables:
        return int(variables["WORLD_SIZE"]) // int(variables["LOCAL_WORLD_SIZE"])
    return int(variables.get("SLURM_NNODES", "1")) if SLURMEnvironment.detect() else 1


def process_count(settings: Config) -> int:
    """How many processes share a step: the devices of all machines. Raises UserError where they cannot."""
    processes = device_count(settings) * node_count()
    if settings.batch_size % (processes * settings.accumulate_batches):
        raise UserError(
            f"batch_size = {settings.batch_size} must be a multiple of the {processes} processes on {node_count()} "
            f"machines times accumulate_batches = {settings.accumulate_batches}."
        )
    return processes


def on_gpu(settings: Config) -> bool:
    return settings.accelerator == "gpu" or (settings.accelerator == "auto" and torch.cuda.is_available())


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From the CPU to a GPU by pinned memory: else the CPU waits for all of the GPU's work."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=8)
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which batches are copied to it, beside its work."""
    return torch.cuda.Stream(device)


def sum_of_processes(values: Tensor) -> Tensor:
    """The sum over the processes of a run. Lightning's `reduce` would wait for the GPU first."""
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def average_statistics(network: nn.Module) -> None:
    """BatchNorm's statistics, which each process has of its own clips -> their mean over the processes."""
    kept = [value for name, value in network.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if not kept:
        return
    means = sum_of_processes(torch.cat(kept)) / torch.distributed.get_world_size()
    for value, mean in zip(kept, means.split([len(value) for value in kept]), strict=True):
        value.copy_(mean)


def is_first_process() -> bool:
    """Whether this process prints and writes for all.

    torchrun sets RANK for the processes that it starts, Lightning LOCAL_RANK and NODE_RANK, srun SLURM_PROCID.
    """
    variables = os.environ
    if "RANK" in variables:
        return int(variables["RANK"]) == 0
    if "LOCAL_RANK" in variables:
        return int(variables["LOCAL_RANK"]) == 0 and int(variables.get("NODE_RANK", "0")) == 0
    return int(variables.get("SLURM_PROCID", "0")) == 0


def total_memory(settings: Config) -> int:
    """Bytes of the GPU, or of the machine."""
    if on_gpu(settings):
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class EndTogether(Callback):
    """In the process that started the others: where one of them is killed or fails, end all.

    Left alone, the others would wait for it in their next exchange: for half an hour with NCCL.
    """

    def __init__(self) -> None:
        self.ending, self.at_sigterm = threading.Event(), signal.getsignal(signal.SIGTERM)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        started: Sequence[subprocess.Popen[Any]] = getattr(trainer.strategy.launcher, "procs", ())
        if started:
            threading.Thread(target=_watch, args=(started, self.ending), daemon=True, name="end together").start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Undo Lightning's handling of SIGTERM, which waits for the other processes in the middle of an exchange.

        And in each step, for which the CPU waits for the GPU.
        """
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.at_sigterm)

    on_test_start = on_train_start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # With NCCL Lightning ends the exchange at exit, which waits for the processes that wait for this one.
        atexit.unregister(getattr(fabric, "_destroy_dist_connection", print))
        if isinstance(exception, KeyboardInterrupt):  # this process ends the others itself
            self.ending.set()


def _watch(started: Sequence["subprocess.Popen[Any]"], ending: threading.Event) -> None:
    while not ending.is_set():
        codes = [process.poll() for process in started]
        for rank, code in enumerate(codes, start=1):
            if code:
                how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit status {code}"
                if code > 0:
                    time.sleep(GRACE_SECONDS)
                print(f"error: Process {rank} of this run {how}. {ENDED}", file=sys.stderr, flush=True)
                for process in started:
                    process.kill()
                os._exit(2)
        if None not in codes:
            return
        time.sleep(LOOK_SECONDS)


@contextmanager
def lost_processes(trainer: pl.Trainer) -> Iterator[None]:
    """An exchange with a process that has ended is a UserError in the first process, and ends the others quietly."""
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size == 1 or not (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
            raise
        if trainer.global_rank:
            raise SystemExit(2) from None
        time.sleep(GRACE_SECONDS + 2 * LOOK_SECONDS)  # where this process has started it, EndTogether says more
        raise UserError(f"Another process of this run was lost ({str(error).splitlines()[0][:100]}). {ENDED}") from None
