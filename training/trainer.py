"""The one place where Lightning's Trainer is built, with its callbacks and logs."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    Checkpoint,
    EMAWeightAveraging,
    ModelCheckpoint,
    TQDMProgressBar,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_only

from data.files import whole_file
from evaluation.metrics import FRAME_METRIC, MAIN_METRIC
from model.checkpoint import write_checkpoint
from settings import FRAME_LOSSES, Config, UserError

DEBUG_BATCHES = 3  # of each split, with the setting debug


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
    """How many machines take part, as torchrun or SLURM tell; 1 where nothing does."""
    told = os.environ
    if "LOCAL_WORLD_SIZE" in told:
        return int(told["WORLD_SIZE"]) // int(told["LOCAL_WORLD_SIZE"])
    return int(told.get("SLURM_NNODES", "1")) if SLURMEnvironment.detect() else 1


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


def build_trainer(settings: Config, *, steps_per_epoch: Optional[int]) -> pl.Trainer:
    """A Trainer for a run: one process, or one for each device with DistributedDataParallel.

    steps_per_epoch: of the training, for the logs; None: a test, which keeps neither logs nor checkpoints.
    """
    training = steps_per_epoch is not None
    # Lightning's own use of a function that torch has renamed.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", module="pytorch_lightning")
    if settings.freeze_backbone or settings.mean_teacher:
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    devices = device_count(settings)
    gpu = on_gpu(settings)
    strategy: str | Strategy = "auto"
    if devices * node_count() > 1:
        # Nothing but BandNorm has buffers that change, and it keeps them equal by itself: to broadcast them would only
        # tie together validation shares, which may differ in length.
        strategy = DDPStrategy(process_group_backend="nccl" if gpu else "gloo", broadcast_buffers=False)
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the first page says it in one place
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=devices,
        num_nodes=node_count(),
        strategy=strategy,
        precision="32-true" if settings.precision in ("32", "auto") else settings.precision,
        accumulate_grad_batches=settings.accumulate_batches if training else 1,
        max_epochs=settings.max_epoch,
        gradient_clip_val=settings.gradient_clip or None,
        use_distributed_sampler=False,  # data_generator.py has its own
        deterministic=True,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, steps_per_epoch or 1),
        enable_model_summary=False,
        logger=_loggers(settings) if training else False,
        callbacks=_callbacks(settings) if training else [Progress()],
        enable_checkpointing=training,
        limit_train_batches=DEBUG_BATCHES if settings.debug else 1.0,
        limit_val_batches=DEBUG_BATCHES if settings.debug else 1.0,
        limit_test_batches=DEBUG_BATCHES if settings.debug else 1.0,
    )


@contextmanager
def interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Ctrl-C in a fit or test ends as KeyboardInterrupt, which Lightning turns into SystemExit."""
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def _loggers(settings: Config) -> list[Any]:
    """CSV and TensorBoard in logs/version_N of the run folder; a resumed run begins a new N."""
    csv = CSVLogger(str(settings.run_folder), name="logs")
    return [csv, TensorBoardLogger(str(settings.run_folder), name="logs", version=csv.version)]


def checkpoint_folder(settings: Config) -> Path:
    return settings.run_folder / "checkpoints"


def chosen_by(settings: Config) -> str:
    """The validation metric that checkpoints are chosen by."""
    return FRAME_METRIC if settings.loss_type in FRAME_LOSSES else MAIN_METRIC[settings.task]


def _callbacks(settings: Config) -> list[Callback]:
    metric = chosen_by(settings)
    folder = checkpoint_folder(settings)
    best = RunCheckpoint(
        dirpath=str(folder),
        filename=f"epoch_{{epoch:03d}}-{metric}_{{{metric}:.4f}}",
        auto_insert_metric_name=False,
        monitor=metric,
        mode="max",
        save_top_k=settings.save_top_k,
        enable_version_counter=False,  # an epoch that is trained again after an interruption takes its old name
    )
    # The last one is written when the epoch is complete, so that a resumed run starts with the next epoch.
    last = RunCheckpoint(
        dirpath=str(folder), filename="last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    callbacks: list[Callback] = [best, last, BestLink(best), Progress(), EpochLine(metric)]
    if settings.checkpoint_every_steps:
        callbacks.append(MidEpoch(folder, settings.checkpoint_every_steps))
    if settings.weight_averaging != "none":
        callbacks.append(weight_averaging(settings))
    return callbacks


def weight_averaging(settings: Config) -> WeightAveraging:
    """The callback that averages weights while training: checkpoints and validation have the average.

    Buffers are taken as they are: a moving average would damage those that hold indexes, and bn0's are one already.
    """
    device = torch.device("cuda") if on_gpu(settings) else None  # else Lightning leaves the average on the CPU
    if settings.weight_averaging == "ema":
        return EMAWeightAveraging(device, use_buffers=False, decay=settings.ema_decay)
    return LastEpochsAveraging(device, first=settings.max_epoch - settings.average_last_epochs)


class LastEpochsAveraging(WeightAveraging):
    """The mean of the weights after each epoch from epoch `first` on, counted from 0; before, the weights alone."""

    def __init__(self, device: Optional[torch.device], *, first: int) -> None:
        super().__init__(device, use_buffers=False)
        self.first, self.steps = first, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)

    def should_update(self, step_idx: Optional[int] = None, epoch_idx: Optional[int] = None) -> bool:
        if step_idx is None or (step_idx + 1) % self.steps:  # after the last step of an epoch, before its validation
            return False
        if step_idx // self.steps <= self.first:
            assert self._average_model is not None
            self._average_model.n_averaged.zero_()
        return True


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that knows its files again after the run's folder has moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None
        here = Path(self.dirpath)

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        paths = {name: moved(state_dict[name]) for name in state_dict if name.endswith("_model_path")}
        ranked = {moved(path): value for path, value in state_dict.get("best_k_models", {}).items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": ranked, "dirpath": self.dirpath})


class MidEpoch(RunCheckpoint):
    """Writes last.ckpt every so many steps in the middle of an epoch, never between the parts of a step."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(
            dirpath=str(folder), filename="last", save_top_k=1, enable_version_counter=False, every_n_train_steps=steps
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole_step and not trainer.is_last_batch:  # the end of an epoch has its own checkpoint, after validation
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then renames it: a kill leaves the old one or the new one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Optional[Any] = None) -> None:
        write_checkpoint(Path(path), checkpoint)


class BestLink(Checkpoint):
    """Keeps best.ckpt, a second name of the best checkpoint so far.

    Being a Checkpoint keeps its place between the two ModelCheckpoints: last.ckpt is never there without its best.
    """

    def __init__(self, best: ModelCheckpoint) -> None:
        self.best = best

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        source = Path(self.best.best_model_path)
        if self.best.best_model_path and source.is_file():
            link_or_copy(source, source.with_name("best.ckpt"))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, replacing what had it; where the file system has no hard links, copy."""
    import shutil

    if target.exists() and target.samefile(source):  # renaming one name of a file to another leaves both
        return
    with whole_file(target) as partial:
        partial.unlink()
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


class Progress(TQDMProgressBar):
    """A bar on a terminal, nothing elsewhere: a log file gets EpochLine's lines."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 0)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        line = next((c for c in trainer.callbacks if isinstance(c, EpochLine)), None)  # type: ignore[attr-defined]
        return {**shown, "left": line.left(trainer)} if line and trainer.training else shown


class EpochLine(Callback):
    """Prints one line an epoch: training and validation loss, metric, learning rate, time taken and time left."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.first_step, self.started, self.epoch_started = 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step, self.started = trainer.global_step, time.monotonic()
        self.epoch_started = self.started  # of an epoch that is gone on with, Lightning does not tell the start

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch_started = time.monotonic()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = trainer.callback_metrics
        names = {"train_loss_epoch": "loss", "val_loss": "val loss", self.metric: self.metric}
        shown = [f"{name} {values[key]:.4f}" for key, name in names.items() if key in values]
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        seconds = time.monotonic() - self.epoch_started
        print(
            f"epoch {trainer.current_epoch + 1:3d}/{trainer.max_epochs}  {'  '.join(shown)}  lr {rate:.2e}  "
            f"{seconds:.0f} s, left {self.left(trainer)}",
            flush=True,
        )

    def left(self, trainer: pl.Trainer) -> str:
        """Time to the end of the run at the speed so far, as h:mm:ss."""
        done = trainer.global_step - self.first_step
        total = int(trainer.estimated_stepping_batches)
        if done == 0:
            return "?"
        seconds = int((time.monotonic() - self.started) / done * (total - trainer.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
