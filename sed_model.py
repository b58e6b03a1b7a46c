"""Training and testing of the network: SEDWrapper for one, Ensemble_SEDWrapper for several. PyTorch Lightning."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from data.clip_store import UNREADABLE
from data.ontology import read_ontology
from evaluation.mapping import ClassMapping
from evaluation.metrics import MAIN_METRIC, Metric, clip_metrics
from model.encoders.htsat import HTSAT_Swin_Transformer, Outputs
from settings import Config, UserError, section
from training import augment
from training.losses import LOSSES
from utils import do_mixup, get_mix_lambda, int16_to_float32

Batch = dict[str, Any]
CHECK_LOSS_EVERY = 50  # steps; a loss that is not finite stays so


def learning_rate_scale(epoch: int, lr_scheduler_epoch: Sequence[int], lr_rate: Sequence[float]) -> float:
    """Factor of learning_rate in an epoch, counted from 0: three warm-up epochs, three plateaus, then a slow decay.

    The plateaus last up to and including their epoch of lr_scheduler_epoch. As the published code has it, the decay
    ends at 0.03, which lies above lr_rate[0] = 0.02: the rate rises after the last plateau.
    """
    if epoch < 3:
        return lr_rate[epoch]
    for last_epoch, rate in zip(lr_scheduler_epoch, reversed(lr_rate), strict=True):
        if epoch <= last_epoch:
            return rate
    return max(lr_rate[0] * 0.98**epoch, 0.03)


def parameter_groups(network: HTSAT_Swin_Transformer, rate: float, layer_decay: float) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer, with the learning rate of each layer.

    The classifier learns at `rate`, each layer below at layer_decay times the rate of the one above it (Clark et al.
    2020, ELECTRA, section 3.1; Bao et al. 2022, BEiT, for vision transformers). One group where layer_decay is 1.
    """
    layers: dict[int, list[nn.Parameter]] = {}
    for number, parameter in network.parameters_by_layer():
        if parameter.requires_grad:
            layers.setdefault(number if layer_decay < 1 else 0, []).append(parameter)
    top = max(layers, default=0)
    return [{"params": layers[k], "lr": rate * layer_decay ** (top - k)} for k in sorted(layers, reverse=True)]


class Evaluation(pl.LightningModule):
    """What one network and an ensemble share: scoring every clip once, and the metrics over all of them.

    After a test: test_metrics, test_index (N,), test_clipwise (N, K), test_targets (N, K) and, with fl_local,
    test_framewise (N, steps, K), on every process, in the order of the table.
    """

    def __init__(self, settings: Config, labels: Sequence[str]) -> None:
        super().__init__()
        self.settings, self.labels = settings, list(labels)
        self.task = settings.task
        self.main_metric = MAIN_METRIC[self.task]
        self.keep_frames = settings.fl_local
        self.shifts = [0] if settings.fl_local else settings.tta_shifts  # localization is not averaged over shifts
        self.mapping: Optional[ClassMapping] = None  # where a test's data has other classes than the network
        self.collected: list[tuple[Tensor, ...]] = []
        self.not_scored = 0  # clips that could not be read, in the last evaluation
        self.test_metrics: list[Metric] = []

    def clip_and_frame_scores(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """(B, samples) -> probabilities (B, K) of the clips and (B, steps, K) of the frames."""
        raise NotImplementedError

    def on_test_epoch_start(self) -> None:
        self.collected = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        clipwise, framewise = self.mean_over_shifts(batch["waveform"])
        frames = [framewise] if self.keep_frames else []
        self.collected.append((batch["index"], clipwise, batch["target"], *frames))

    def mean_over_shifts(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """(B, samples) int16 -> probabilities of the clips (B, K), the mean over tta_shifts, and of the frames.

        All shifted copies make one batch, made where the waveforms are; it goes through the network in pieces of at
        most a loader's batch, so that a test needs no more memory than its settings say. The
        copies share nothing further: no two of the paper's shifts differ by a multiple of the hop.
        """
        world = self._trainer.world_size if self._trainer else 1
        most = max(len(waveform), self.settings.batch_size // world // self.settings.accumulate_batches)
        copies = torch.cat([waveform.roll(shift, dims=1) for shift in self.shifts])  # (shifts * B, samples)
        pieces = copies.split(most)
        scores = [self.clip_and_frame_scores(int16_to_float32(piece)) for piece in pieces]
        clipwise = torch.cat([clip for clip, _ in scores]).unflatten(0, (len(self.shifts), -1)).mean(dim=0)
        return clipwise, scores[0][1][: len(waveform)]

    def on_test_epoch_end(self) -> None:
        index, clipwise, targets, *frames = self._gather(self.collected)
        self.collected = []
        if self.mapping is not None:
            clipwise, frames = self.mapping.apply(clipwise), [self.mapping.apply(scores) for scores in frames]
        self.test_index, self.test_clipwise, self.test_targets = index, clipwise, targets > 0.5
        self.test_framewise: Optional[np.ndarray] = frames[0] if frames else None
        self.test_metrics = clip_metrics(self.task, clipwise, self.test_targets)

    def _gather(self, collected: list[tuple[Tensor, ...]]) -> list[np.ndarray]:
        """What the steps collected, from all processes, sorted by the clips' place in the table, each clip once."""
        columns = list(zip(*collected, strict=True))
        parts = [torch.cat(columns[0]), *(torch.cat(column).float() for column in columns[1:])]
        if self.trainer.world_size > 1:
            parts = [torch.cat(gather_all_tensors(part.contiguous())) for part in parts]
        arrays = [part.cpu().numpy() for part in parts]
        self.not_scored = int((arrays[0] == UNREADABLE).sum())
        if self.not_scored:
            warnings.warn(
                f"{self.not_scored} clips could not be read: they are not in the metrics. `python main.py check` tells "
                f"which.",
                stacklevel=2,
            )
        numbers, first = np.unique(arrays[0], return_index=True)
        return [array[first[numbers != UNREADABLE]] for array in arrays]


class SEDWrapper(Evaluation):
    """One network with the paper's training recipe (section 3.1).

    network: HTSAT_Swin_Transformer or anything with its outputs; its weights are saved under the prefix sed_model.
    """

    def __init__(self, network: HTSAT_Swin_Transformer, settings: Config, labels: Sequence[str]) -> None:
        super().__init__(settings, labels)
        self.sed_model = network
        self.loss_func = LOSSES[settings.loss_type]
        self.watched: list[tuple[Tensor, ...]] = []  # of the test clips, with watch_test
        self.unreadable = 0  # clips of this epoch, in this process
        self.batch_in_epoch = 0
        ontology = settings.class_map_path if settings.enable_label_enhance else None
        self.ontology = read_ontology(Path(ontology)) if ontology else None
        if settings.freeze_backbone:
            # ImageNet's weights bring no bn0: it has to learn what sounds are like.
            network.freeze_backbone(with_bn0=settings.swin_pretrain_path is None)
        for parameter in network.unused_parameters():  # they get no gradient, which DistributedDataParallel refuses
            parameter.requires_grad_(False)

    def forward(self, waveform: Tensor, mixup_lambda: Optional[Tensor] = None) -> Outputs:
        return self.sed_model(waveform, mixup_lambda)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Random numbers of their own for each step and process: a resumed run draws what an unbroken one draws."""
        place = [self.settings.random_seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batch_in_epoch = batch_idx
        loss = self.training_loss(batch)
        self.unreadable += batch["unreadable"]
        if self.global_step % CHECK_LOSS_EVERY == 0 and not torch.isfinite(loss):  # it makes the CPU wait for a GPU
            raise UserError(
                f"The loss is {loss.item()} in epoch {self.current_epoch}, step {self.global_step}, with the clips "
                f"{', '.join(batch['audio_name'][:4])}, ...: lower learning_rate, or use precision 32."
            )
        size = len(batch["waveform"])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=size)
        return loss

    def training_loss(self, batch: Batch) -> Tensor:
        """The loss of a batch of ClipDataset, on the device, with the augmentations of the settings."""
        waveform, targets = int16_to_float32(batch["waveform"]), batch["target"]  # int16 travels to the device
        waveform, targets = self._augment(waveform, targets)
        mixup_lambda = None
        if self.settings.mixup_alpha > 0:
            mixup_lambda = get_mix_lambda(self.settings.mixup_alpha, len(waveform), self.device)
            if self.settings.mixup_targets:
                targets = do_mixup(targets, mixup_lambda)
        if targets.ndim == 3:  # by frame: (B, steps, K)
            logits = self(waveform, mixup_lambda)["framewise_logits"].flatten(0, 1)
            return self.loss_func(logits, targets.flatten(0, 1))
        return self.loss_func(self(waveform, mixup_lambda)["clipwise_logits"], targets)

    def _augment(self, waveform: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The augmentations that the settings ask for: (B, samples) and (B, K), or (B, steps, K) with token labels."""
        settings = self.settings
        if settings.enable_time_shift:
            waveform = augment.shift_in_time(waveform, settings.shift_max)
        if settings.crop_size is not None:
            waveform = augment.crop(waveform, settings.crop_size)
        if self.ontology is not None:
            ancestors = torch.from_numpy(self.ontology.ancestors).to(targets.device)
            targets = augment.enhance_labels(targets, ancestors, self.ontology.children)
        if settings.enable_token_label:
            steps = self.sed_model.steps
            return augment.replace_stretch(waveform, targets, steps, settings.token_label_range)
        return waveform, targets

    def on_train_epoch_end(self) -> None:
        if self.unreadable:
            warnings.warn(
                f"{self.unreadable} clips could not be read in epoch {self.current_epoch}; others of their classes "
                f"stood in. `python main.py check` tells which.",
                stacklevel=2,
            )
        self.log("unreadable_clips", float(self.unreadable), sync_dist=True, reduce_fx="sum")
        self.unreadable = 0

    def on_validation_epoch_start(self) -> None:
        self.collected, self.watched = [], []

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(int16_to_float32(batch["waveform"]))["clipwise_logits"]
        collected = self.watched if dataloader_idx else self.collected
        collected.append((batch["index"], logits, batch["target"]))

    def on_validation_epoch_end(self) -> None:
        _, logits, targets = self._gather(self.collected)
        loss = self.loss_func(torch.from_numpy(logits), torch.from_numpy(targets))
        self.log("val_loss", loss.to(self.device), prog_bar=True, sync_dist=True)
        for metric in clip_metrics(self.task, logits, targets > 0.5):
            self.log(metric.name, metric.value, prog_bar=metric.name == self.main_metric, sync_dist=True)
        if self.watched:
            _, logits, targets = self._gather(self.watched)
            for metric in clip_metrics(self.task, logits, targets > 0.5):
                self.log(f"test_{metric.name}", metric.value, sync_dist=True)
        self.collected, self.watched = [], []

    def clip_and_frame_scores(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        return self.sed_model.probabilities(waveform)[:2]

    def configure_optimizers(self) -> Any:
        """AdamW, and a factor of its learning rate that changes from epoch to epoch."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            parameter_groups(self.sed_model, settings.learning_rate, settings.layer_decay),
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=settings.weight_decay,
            fused=settings.precision != "16-mixed",  # whose gradients are scaled: they must be unscaled to be clipped
        )
        scale: Callable[[int], float] = lambda epoch: learning_rate_scale(  # noqa: E731
            epoch, settings.lr_scheduler_epoch, settings.lr_rate
        )
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, scale)}

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        """By norm. Lightning's own refuses a fused optimizer in bfloat16, whose gradients are not scaled."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says itself what it is: plain values only, so that reading it cannot run code."""
        values = self.settings.model_dump()
        checkpoint["settings"], checkpoint["labels"] = values, self.labels
        # `epoch` is Lightning's number of the epoch at work, which a checkpoint in its middle leaves incomplete.
        checkpoint["complete_epochs"] = self.current_epoch + int(self.trainer.is_last_batch)
        checkpoint["frontend"] = {name: values[name] for name in section("front-end")}


class Ensemble_SEDWrapper(Evaluation):
    """Several networks tested as one: the mean of their probabilities, of clips and of frames (paper, section 3.1).

    together: all on the device; otherwise they wait in main memory, and each is on the device for its turn only.
    """

    def __init__(
        self,
        networks: Sequence[HTSAT_Swin_Transformer],
        settings: Config,
        labels: Sequence[str],
        *,
        together: bool = True,
    ) -> None:
        super().__init__(settings, labels)
        self.together, self.networks = together, [network.eval() for network in networks]
        self.sed_models = nn.ModuleList(networks if together else [])  # Lightning moves what is registered

    def clip_and_frame_scores(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        scores = [self._member_scores(network, waveform) for network in self.networks]
        clips, frames = zip(*scores, strict=True)
        return torch.stack(clips).mean(dim=0), torch.stack(frames).mean(dim=0)

    def _member_scores(self, network: HTSAT_Swin_Transformer, waveform: Tensor) -> tuple[Tensor, Tensor]:
        if self.together:
            return network.probabilities(waveform)[:2]
        scores = network.to(waveform.device).probabilities(waveform)[:2]
        network.cpu()
        return scores
