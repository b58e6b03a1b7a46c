"""Callbacks of a training: checkpoints, averaged weights, progress, curves; and how a checkpoint is written."""

import csv
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    Checkpoint,
    ModelCheckpoint,
    TQDMProgressBar,
    WeightAveraging,
)
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data.files import whole_file
from evaluation.metrics import FRAME_METRIC, MAIN_METRIC
from model.checkpoint import write_checkpoint
from settings import FRAME_LOSSES, Config
from training.devices import on_gpu
from training.losses import RunningAverage

SECONDS = "epoch_seconds"  # column of a run's logs


def checkpoint_folder(settings: Config) -> Path:
    return settings.run_folder / "checkpoints"


def chosen_by(settings: Config) -> str:
    """The validation metric that checkpoints are chosen by."""
    return FRAME_METRIC if settings.loss_type in FRAME_LOSSES else MAIN_METRIC[settings.task]


def build_callbacks(settings: Config) -> list[Callback]:
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
    callbacks: list[Callback] = [
        best, last, BestLink(best), Progress(gpu=on_gpu(settings)), EpochLine(metric), EpochLog(),
    ]  # fmt: skip
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
        return MovingAveraging(device, decay=settings.ema_decay)
    return LastEpochsAveraging(device, first=settings.max_epoch - settings.average_last_epochs)


class MovingAveraging(WeightAveraging):
    """The exponential moving average of the weights after each step.

    All weights at once, where Lightning's EMAWeightAveraging takes one by one, and without its waits for the GPU.
    """

    def __init__(self, device: Optional[torch.device], *, decay: float) -> None:
        super().__init__(device, use_buffers=False)
        self.average = get_ema_multi_avg_fn(decay)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average_model = RunningAverage(pl_module, self.average, self._device or pl_module.device)


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
    """A ModelCheckpoint that finds its files after the run's folder has moved, or some of them were removed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None
        here = Path(self.dirpath)

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        paths = {name: moved(state_dict[name]) for name in state_dict if name.endswith("_model_path")}
        ranked = {moved(path): value for path, value in state_dict.get("best_k_models", {}).items()}
        state = {**state_dict, **paths, "best_k_models": ranked, "dirpath": self.dirpath}
        there = {path: value for path, value in ranked.items() if Path(path).is_file()}
        if there != ranked:  # the rank of a file that is gone counts no longer
            best = max(there, key=lambda path: float(there[path]), default="")
            last = min(there, key=lambda path: float(there[path]), default="")
            state |= {"best_k_models": there, "best_model_path": best, "best_model_score": there.get(best)}
            state |= {"kth_best_model_path": last, "kth_value": there.get(last, torch.tensor(-torch.inf))}
        super().load_state_dict(state)


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


def restore_best(folder: Path, name: str) -> None:
    """Of the best checkpoint's two names, best.ckpt and `name`, give it the one that is missing."""
    best, ranked = folder / "best.ckpt", folder / name
    if best.is_file() != ranked.is_file():
        link_or_copy(*((best, ranked) if best.is_file() else (ranked, best)))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, replacing what had it; where the file system has no hard links, copy."""
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

    def __init__(self, *, gpu: bool = False) -> None:
        """gpu: drawn anew every 20 steps, as the steps of a GPU are many."""
        super().__init__(refresh_rate=(20 if gpu else 1) if sys.stderr.isatty() else 0)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        losses = getattr(pl_module, "losses", None)
        if losses and losses.latest is not None:
            shown["train_loss"] = losses.latest
        line = next((c for c in trainer.callbacks if isinstance(c, EpochLine)), None)  # type: ignore[attr-defined]
        return {**shown, "left": line.left(trainer)} if line and trainer.training else shown


class EpochLog(Callback):
    """Logs each epoch's learning rate, its own and not the next one's, and its seconds, validation included.

    Of an epoch that is resumed in its middle, the seconds of the rest.
    """

    rate = started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.monotonic()  # Lightning does not call on_train_epoch_start for an epoch that is resumed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)  # the schedule moves it afterwards

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("learning_rate", self.rate, sync_dist=True)
        pl_module.log(SECONDS, time.monotonic() - self.started, sync_dist=True)

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:  # draw_curves reads them
            logger.save()


def read_curves(logs: Path) -> dict[str, dict[int, float]]:
    """{name: {epoch from 1: value}} of version_N/metrics.csv: a resumed run has several, of which later ones count."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(logs.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("epoch", "step"):
                        curves.setdefault(name, {})[int(row["epoch"]) + 1] = float(value)
    return curves


def draw_curves(curves: Mapping[str, Mapping[int, float]], metric: str, path: Path) -> None:
    """A picture with a row for losses, metric and learning rate; x: epochs."""
    from matplotlib.figure import Figure  # here: no step of a training needs it
    from matplotlib.ticker import MaxNLocator

    rows = {
        "loss": {"train_loss_epoch": "training", "val_loss": "validation"},
        metric: {metric: "validation", f"test_{metric}": "test"},
        "learning rate": {"learning_rate": ""},
    }
    figure = Figure(figsize=(6, 6.5), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True)
    for axis, (title, names) in zip(axes, rows.items(), strict=True):
        for name in (name for name in names if name in curves):
            epochs = sorted(curves[name])
            axis.plot(epochs, [curves[name][epoch] for epoch in epochs], marker=".", label=names[name])
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if any(names.values()) and axis.lines:
            axis.legend(frameon=False)
    axes[-1].set_yscale("log")
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


class EpochLine(Callback):
    """Prints one line an epoch: training and validation loss, metric, learning rate, time taken and time left."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.first_step, self.started, self.epoch_started, self.rate = 0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step, self.started = trainer.global_step, time.monotonic()
        self.on_train_epoch_start(trainer, pl_module)  # Lightning does not call it for an epoch that is resumed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch_started = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]  # at the end of the epoch it is the next one's

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = trainer.callback_metrics
        names = {"train_loss_epoch": "loss", "val_loss": "val loss", self.metric: self.metric}
        shown = [f"{name} {values[key]:.4f}" for key, name in names.items() if key in values]
        seconds = time.monotonic() - self.epoch_started
        print(
            f"epoch {trainer.current_epoch + 1:3d}/{trainer.max_epochs}  {'  '.join(shown)}  lr {self.rate:.2e}  "
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
