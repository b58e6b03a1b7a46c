"""Training on event times: FrameSEDWrapper, with frame targets, a teacher's logits and a mean teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from data.clip_store import STRONG, UNLABELLED
from data.frame_targets import Events, rasterize, resample_steps
from evaluation.metrics import FRAME_METRIC, clip_metrics, frame_metric
from model.encoders.htsat import HTSAT_Swin_Transformer, Outputs
from sed_model import Batch, SEDWrapper
from settings import FRAME_LOSSES, Config
from training import augment, augment_features
from training.losses import clip_bce, consistency, distillation_bce, frame_bce, weak_strong_bce
from training.mean_teacher import MeanTeacher, ramp_up
from utils import do_mixup, get_mix_lambda, int16_to_float32


def build_wrapper(network: HTSAT_Swin_Transformer, settings: Config, labels: Sequence[str]) -> SEDWrapper:
    """The training of a network that the settings ask for: on clips, or on event times."""
    kind = FrameSEDWrapper if settings.loss_type in FRAME_LOSSES else SEDWrapper
    return kind(network, settings, labels)


@dataclass(frozen=True)
class Targets:
    """What a batch is to be learned as: B clips, S steps, K classes.

    frames: (B, S, K), clips: (B, K), labelling: (B,), and where there is a teacher its probabilities (B, S, K) and
    has_teacher (B,).
    """

    frames: Tensor
    clips: Tensor
    labelling: Tensor
    teacher: Optional[Tensor] = None
    has_teacher: Optional[Tensor] = None

    def mixed(self, mixup_lambda: Tensor) -> "Targets":
        """The targets of clips that are mixed with their partners in the reversed batch."""
        teacher = None if self.teacher is None else do_mixup(self.teacher, mixup_lambda)
        frames, clips = do_mixup(self.frames, mixup_lambda), do_mixup(self.clips, mixup_lambda)
        return replace(self, frames=frames, clips=clips, teacher=teacher)

    def masked(self, left: Tensor) -> "Targets":
        """The targets of clips of which (B, S, 1) is left in each step."""
        return replace(self, frames=self.frames * left, teacher=None if self.teacher is None else self.teacher * left)


class FrameSEDWrapper(SEDWrapper):
    """One network that learns from event times, from clip labels where there are no times, and from teachers.

    The labels, and what a teacher has said, follow every augmentation. After each epoch the validation clips with
    times give frame_mAP, by which checkpoints are chosen.
    """

    def __init__(self, network: HTSAT_Swin_Transformer, settings: Config, labels: Sequence[str]) -> None:
        super().__init__(network, settings, labels)
        self.main_metric = FRAME_METRIC
        self.teacher = MeanTeacher(network, settings.mean_teacher_decay) if settings.mean_teacher else None

    def training_loss(self, batch: Batch) -> Tensor:
        waveform, targets = self._hear(int16_to_float32(batch["waveform"]), batch)
        mixup_lambda = self._mixup_lambda(targets)
        # A mask lies over both sounds of clips that are mixed before it, and over one of those that are mixed after.
        if self.settings.mixup_waveforms:
            waveform, targets = augment.mix_waveforms(waveform, mixup_lambda), self._mixed(targets, mixup_lambda)
        logmel, targets = self._augment_features(self.sed_model.forward_frontend(waveform), targets)
        if not self.settings.mixup_waveforms:
            logmel, targets = do_mixup(logmel, mixup_lambda), self._mixed(targets, mixup_lambda)
        outputs = self.sed_model.forward_logmel(logmel)
        loss = self._label_loss(outputs, targets)
        if targets.teacher is not None and targets.has_teacher is not None:
            # Of a batch whose clips all have a teacher: (1 - weight) of one and weight of the other.
            count, part = self._in_all_processes(targets.has_teacher)
            share = self.settings.distillation_weight * count / (len(logmel) * self._world_size())
            taught = distillation_bce(outputs["framewise_logits"], targets.teacher, targets.has_teacher)
            loss = (1 - share) * loss + share * part * taught
        return loss if self.teacher is None else loss + self._consistency(outputs, logmel)

    def _hear(self, waveform: Tensor, batch: Batch) -> tuple[Tensor, Targets]:
        """The clips after the augmentations of the sound, and their targets on the network's own steps."""
        settings, rate = self.settings, self.settings.sample_rate
        seconds, clips = waveform.shape[1] / rate, len(waveform)
        events: Events = batch["events"]
        moved = torch.zeros(clips, device=waveform.device)  # seconds by which the teacher's steps are to be moved
        whole = seconds
        if settings.enable_time_shift:
            shifts = torch.randint(settings.shift_max, (clips,))
            waveform = augment.shift_in_time_with(waveform, shifts)
            moved = (shifts / rate).to(waveform.device)
            events = augment.shift_events(events, moved, seconds)
        if settings.crop_size is not None:
            waveform, events, begin = augment.crop_with_events(waveform, events, settings.crop_size, rate)
            seconds, moved = waveform.shape[1] / rate, moved - begin
        if settings.gain_range:
            waveform = augment.random_gain(waveform, settings.gain_range)
        teacher = batch.get("teacher")
        if teacher is not None:
            probabilities = teacher.float().sigmoid().transpose(1, 2)  # (B, T, K)
            teacher = resample_steps(probabilities, self.sed_model.steps, whole, shift=moved, length=seconds)
        frames = self._rasterize(events, clips, seconds)
        targets = Targets(frames, batch["target"], batch["labelling"], teacher, batch.get("has_teacher"))
        return waveform, targets

    def _rasterize(self, events: Events, clips: int, seconds: float) -> Tensor:
        """(clips, steps, K) frame targets."""
        return rasterize(
            events,
            clips=clips,
            classes=self.settings.classes_num,
            steps=self.sed_model.steps,
            seconds=seconds,
            fractional=self.settings.fractional_targets,
        )

    def _mixup_lambda(self, targets: Targets) -> Tensor:
        """(B,) weight of each clip's own sound: 1 for none, and where a partner's labels are of another kind."""
        clips, device = len(targets.clips), targets.clips.device
        if not self.settings.mixup_alpha:
            return torch.ones(clips, device=device)
        drawn = get_mix_lambda(self.settings.mixup_alpha, clips, device)
        alike = targets.labelling == targets.labelling.flip(0)
        if targets.has_teacher is not None:
            alike &= targets.has_teacher == targets.has_teacher.flip(0)
        return torch.where(alike, drawn, 1.0)

    def _mixed(self, targets: Targets, mixup_lambda: Tensor) -> Targets:
        return targets.mixed(mixup_lambda) if self.settings.mixup_targets else targets

    def _augment_features(self, logmel: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """The augmentations of the log-mel (B, F, T), normalized as bn0 leaves it."""
        settings = self.settings
        if settings.filter_augment:
            bn0 = self.sed_model.bn0
            assert bn0.running_var is not None
            decibel = bn0.weight.detach() / (bn0.running_var + bn0.eps).sqrt()
            logmel = augment_features.filter_augment(logmel, settings.filter_augment, decibel)
        logmel = augment_features.warp_frequency(logmel, settings.frequency_warp)
        logmel = augment_features.mix_style(logmel, settings.mix_style)
        if settings.spec_augment:
            everything = torch.ones(len(logmel), self.sed_model.steps, 1, device=logmel.device)
            logmel, left = augment_features.mask_time(logmel, everything)
            logmel, targets = augment_features.mask_bands(logmel), targets.masked(left)
        return logmel, targets

    def _label_loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        logits, strong = outputs["framewise_logits"], targets.labelling == STRONG
        if self.settings.loss_type == "frame_bce":
            return self._in_all_processes(strong)[1] * frame_bce(logits, targets.frames, strong.float())
        clip = outputs["clipwise_logits"], targets.clips
        loss = weak_strong_bce(logits, targets.frames, *clip, targets.labelling, self.settings.weak_weight)
        return self._in_all_processes(targets.labelling != UNLABELLED)[1] * loss

    def _world_size(self) -> int:
        return self._trainer.world_size if self._trainer else 1

    def _in_all_processes(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """How many clips are chosen in the batches of all processes, and what a mean over those of (B,) counts here.

        DistributedDataParallel averages over processes, which may have different numbers of clips with labels: so the
        result is the mean over the clips.
        """
        here, world = chosen.sum().float(), self._world_size()
        if world == 1:
            return here, torch.ones_like(here)
        total = self.trainer.strategy.reduce(here.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total, here * world / total.clamp(min=1)

    def _consistency(self, outputs: Outputs, logmel: Tensor) -> Tensor:
        """How far the network is from its mean teacher, which hears the same features, in frames and clips."""
        assert self.teacher is not None
        network = self.teacher.network
        assert isinstance(network, HTSAT_Swin_Transformer)
        with torch.no_grad():
            wanted = network.forward_logmel(logmel)
        weight = self.settings.mean_teacher * ramp_up(self._epochs_done(), self.settings.mean_teacher_rampup)
        names = ("framewise_logits", "clipwise_logits")
        differences = [consistency(outputs[name].sigmoid(), wanted[name].sigmoid()) for name in names]
        return weight * torch.stack(differences).sum()

    def _epochs_done(self) -> float:
        """Epochs of training so far, with the part of the one at work."""
        batches = self.trainer.num_training_batches if self._trainer else 1
        return self.current_epoch + min(self.batch_in_epoch / max(batches, 1), 1.0)

    def optimizer_step(self, *words: Any, **more: Any) -> None:
        """The mean teacher follows at once: a checkpoint in the middle of an epoch is written before other hooks."""
        super().optimizer_step(*words, **more)
        if self.teacher is not None:
            self.teacher.update(self.sed_model, self.global_step)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        waveform = int16_to_float32(batch["waveform"])
        outputs = self(waveform)
        seconds = waveform.shape[1] / self.settings.sample_rate
        frames = self._rasterize(batch["events"], len(waveform), seconds)
        found = (outputs["clipwise_logits"], batch["target"], outputs["framewise_logits"], frames, batch["labelling"])
        collected = self.watched if dataloader_idx else self.collected
        collected.append((batch["index"], *found))

    def on_validation_epoch_end(self) -> None:
        for collected, prefix in ((self.collected, ""), (self.watched, "test_")):
            if not collected:
                continue
            _, clips, targets, frames, frame_targets, labelling = self._gather(collected)
            strong, labelled = labelling == STRONG, labelling != UNLABELLED
            frames, frame_targets = frames[strong], frame_targets[strong]
            clips, targets = clips[labelled], targets[labelled]
            metrics = [frame_metric(frames, frame_targets >= 0.5), *clip_metrics(self.task, clips, targets > 0.5)]
            for metric in metrics:
                shown = not prefix and metric.name in (FRAME_METRIC, "mAP")
                self.log(prefix + metric.name, metric.value, prog_bar=shown, sync_dist=True)
            if not prefix:
                self.log("val_loss", self._validation_loss(frames, frame_targets, clips, targets), sync_dist=True)
        self.collected, self.watched = [], []

    def _validation_loss(
        self, frames: np.ndarray, frame_targets: np.ndarray, clips: np.ndarray, targets: np.ndarray
    ) -> Tensor:
        """Of the clips with times their frames' loss; where there are none, the clips'."""
        arrays = (frames, frame_targets) if len(frames) else (clips, targets)
        return clip_bce(*map(torch.from_numpy, arrays)).to(self.device)
