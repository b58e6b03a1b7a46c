"""The devices, machines and processes that share a run."""

import os

import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

from settings import Config, UserError


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
