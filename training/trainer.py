"""The one place where Lightning's Trainer is built, with its logs."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy

from settings import Config
from training.callbacks import AtomicCheckpointIO, Progress, build_callbacks
from training.devices import EndTogether, device_count, lost_processes, node_count, on_gpu

DEBUG_BATCHES = 3  # of each split, with the setting debug


def build_trainer(settings: Config, *, steps_per_epoch: Optional[int]) -> pl.Trainer:
    """A Trainer for a run: one process, or one for each device with DistributedDataParallel.

    steps_per_epoch: of the training, for the logs; None: a test, which keeps neither logs nor checkpoints.
    """
    training = steps_per_epoch is not None
    # Lightning's own use of a function that torch has renamed.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", module="pytorch_lightning")
    if settings.freeze_backbone or settings.mean_teacher:
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    # Of a run that is resumed: find_resumed tells a new one from it.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    # The wrapper's is meant: no data module has one.
    warnings.filterwarnings("ignore", message=r"You have overridden `transfer_batch_to_device`")
    devices = device_count(settings)
    gpu = on_gpu(settings)
    strategy: str | Strategy = "auto"
    if devices * node_count() > 1:
        # Buffers that change are BatchNorm's: BandNorm keeps them equal by itself, the others are averaged before a
        # validation. To broadcast them would tie together validation shares, which may differ in length.
        strategy = DDPStrategy(process_group_backend="nccl" if gpu else "gloo", broadcast_buffers=False)
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.signal_connector"):
        # print_first_page prints device and processes, main what an interruption leaves
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    # With `deterministic` torch fills every new tensor before it is written: some 500 launches a step. No result
    # depends on it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made at run time
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=devices,
        num_nodes=node_count(),
        strategy=strategy,
        precision="32-true" if settings.precision == "32" or settings.precision == "auto" else settings.precision,
        accumulate_grad_batches=settings.accumulate_batches if training else 1,
        max_epochs=settings.max_epoch,
        gradient_clip_val=settings.gradient_clip or None,
        use_distributed_sampler=False,  # data_generator.py has its own
        deterministic=True,
        default_root_dir=str(settings.run_folder),  # where Lightning looks for what a SLURM job has left
        plugins=[AtomicCheckpointIO(), *_environment()],
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, steps_per_epoch or 10, DEBUG_BATCHES if settings.debug else 10),
        enable_model_summary=False,
        logger=_loggers(settings) if training else False,
        callbacks=[EndTogether(), *(build_callbacks(settings) if training else [Progress(gpu=gpu)])],
        enable_checkpointing=training,
        limit_train_batches=DEBUG_BATCHES if settings.debug else 1.0,
        limit_val_batches=DEBUG_BATCHES if settings.debug else 1.0,
        limit_test_batches=DEBUG_BATCHES if settings.debug else 1.0,
    )


def _environment() -> list[SLURMEnvironment]:
    """SLURM without Lightning's requeueing, whose checkpoints any later run in that folder would resume."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM in a fit or test end as KeyboardInterrupt, though Lightning makes SystemExit of it.

    Of SIGTERM to a whole group of processes, a DataLoader may find first that its worker has ended. See lost_processes.
    """
    try:
        with lost_processes(trainer):
            yield
    except SystemExit as error:
        if trainer.interrupted and error.code in (None, 1):
            cause = error.__context__
            raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt) from None
        raise
    except RuntimeError as error:
        if "is killed by signal: Terminated" in str(error) and callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)  # which is on its way to this process
        raise


def _loggers(settings: Config) -> list[Any]:
    """CSV and TensorBoard in logs/version_N of the run folder; a resumed run begins a new N."""
    csv = CSVLogger(str(settings.run_folder), name="logs")
    return [csv, TensorBoardLogger(str(settings.run_folder), name="logs", version=csv.version)]
