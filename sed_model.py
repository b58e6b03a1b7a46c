"""Training and testing in PyTorch Lightning: SEDWrapper on clips, FrameSEDWrapper on event times, Ensemble_SEDWrapper.

Shapes: B clips, F bands, T frames, K classes.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from data.clip_store import STRONG, UNLABELLED, UNREADABLE
from data.frame_targets import Events, Targets, rasterize, resample_steps, roll
from data.labels import read_ontology
from data_generator import SEDDataModule
from evaluation.metrics import FRAME_METRIC, MAIN_METRIC, Metric, clip_metrics, frame_metric
from model import Network, Outputs
from model.checkpoint import EPOCH_SO_FAR
from model.network import resample
from settings import FRAME_LOSSES, Config, UserError, section
from training import augment
from training.devices import average_statistics, copy_stream, sum_of_processes, to_device
from training.losses import (
    LOSSES,
    MeanTeacher,
    StepLosses,
    clip_bce,
    consistency,
    distillation_bce,
    frame_bce,
    weak_strong_bce,
)
from training.schedule import parameter_groups, ramp_up, rate_scale
from utils import do_mixup, get_mix_lambda, int16_to_float32

Batch = dict[str, Any]
FeatureStep = Callable[[Tensor, Targets], tuple[Tensor, Targets]]
ScoreMapping = Callable[[np.ndarray], np.ndarray]  # scores (..., K) of a network's classes -> of the data's


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
        self.mapping: Optional[ScoreMapping] = None  # where a test's data has other classes than the network
        self.collected: list[tuple[Tensor, ...]] = []
        self.not_scored = 0  # clips that could not be read, in the last evaluation
        self.test_metrics: list[Metric] = []

    @property
    def has_frames(self) -> bool:
        """Whether there are frame scores: whether an encoder has a time axis."""
        raise NotImplementedError

    def clip_and_frame_scores(self, waveform: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
        """(B, samples) float at sample_rate -> probabilities (B, K) of the clips and (B, T, K) of the frames."""
        raise NotImplementedError

    def sample_rate_of(self, batch: Batch) -> int:
        """Of a batch's waveforms, in Hz."""
        return int(batch.get("sample_rate", self.settings.sample_rate))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The copy of a batch in pinned memory goes on beside the step before, which the GPU is still computing."""
        if device.type != "cuda":
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        copies, work = copy_stream(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(copies):
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        work.wait_stream(copies)
        events = moved.get("events")
        for value in (*moved.values(), *(vars(events).values() if events else ())):
            if isinstance(value, Tensor):
                value.record_stream(work)  # so that its memory is not given away while the step needs it
        return moved

    def on_test_epoch_start(self) -> None:
        self.collected = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        clipwise, framewise = self.mean_over_shifts(batch["waveform"], self.sample_rate_of(batch))
        frames = [framewise] if self.keep_frames else []
        self.collected.append((batch["index"], clipwise, batch["target"], *frames))

    def mean_over_shifts(self, waveform: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
        """(B, samples) int16 at sample_rate -> clip probabilities (B, K), the mean over tta_shifts, and frame ones.

        All shifted copies make one batch, made where the waveforms are; it goes through the network in pieces of at
        most a loader's batch, so that a test needs no more memory than its settings say. The
        copies share nothing further: no two of the paper's shifts differ by a multiple of the hop.
        """
        world = self._trainer.world_size if self._trainer else 1
        most = max(len(waveform), self.settings.batch_size // world // self.settings.accumulate_batches)
        copies = torch.cat([waveform.roll(shift, dims=1) for shift in self.shifts])  # (shifts * B, samples)
        pieces = copies.split(most)
        scores = [self.clip_and_frame_scores(int16_to_float32(piece), sample_rate) for piece in pieces]
        clipwise = torch.cat([clip for clip, _ in scores]).unflatten(0, (len(self.shifts), -1)).mean(dim=0)
        return clipwise, scores[0][1][: len(waveform)]

    def on_test_epoch_end(self) -> None:
        index, clipwise, targets, *frames = self._gather(self.collected)
        self.collected = []
        if self.mapping is not None:
            clipwise, frames = self.mapping(clipwise), [self.mapping(scores) for scores in frames]
        self.test_index, self.test_clipwise, self.test_targets = index, clipwise, targets > 0.5
        self.test_framewise: Optional[np.ndarray] = frames[0] if frames else None
        self.test_metrics = clip_metrics(self.task, clipwise, self.test_targets)

    def _joined(self, column: tuple[Tensor, ...], dtype: torch.dtype) -> np.ndarray:
        """What the steps of all processes collected."""
        part = torch.cat(column).to(dtype)
        if self.trainer.world_size > 1:
            part = torch.cat(gather_all_tensors(part.contiguous()))
        return part.cpu().numpy()

    def _gather(self, collected: list[tuple[Tensor, ...]]) -> list[np.ndarray]:
        """What the steps collected, from all processes, sorted by the clips' place in the table, each clip once."""
        index, *others = zip(*collected, strict=True)
        # One column after another: of many frames a device has no room for two.
        arrays = [self._joined(index, torch.long), *(self._joined(column, torch.float32) for column in others)]
        self.not_scored = int((arrays[0] == UNREADABLE).sum())
        if self.not_scored:
            warnings.warn(
                f"{self.not_scored} clips could not be read: they are not in the metrics. `python main.py check` tells "
                f"which.",
                stacklevel=2,
            )
        numbers, first = np.unique(arrays[0], return_index=True)
        return [array[first[numbers != UNREADABLE]] for array in arrays]


def at_rate_of(network: Network, waveform: Tensor, sample_rate: int) -> Tensor:
    """(B, samples) float at sample_rate -> at the network's own, resampled on the device, at most clip_samples long."""
    return resample(waveform, sample_rate, network.sample_rate)[:, : network.clip_samples]


class SEDWrapper(Evaluation):
    """One network with the paper's training recipe (section 3.1).

    A step is one sequence: the waveform, its augmentation, features, their augmentation, the encoder, the loss. The
    weights are saved under the prefix sed_model.
    """

    masks_silence = False  # whether SpecAugment's masks over time count as silence in the targets

    def __init__(self, network: Network, settings: Config, labels: Sequence[str]) -> None:
        super().__init__(settings, labels)
        self.sed_model = network
        self.loss_func = LOSSES[settings.loss_type]
        self.watched: list[tuple[Tensor, ...]] = []  # of the test clips, with watch_test
        self.unreadable = 0  # clips of this epoch, in this process
        self.losses = StepLosses()
        self.before: Optional[list[Any]] = None  # of an epoch that is resumed: see EPOCH_SO_FAR
        self.batch_in_epoch = 0
        ontology = settings.class_map_path if settings.enable_label_enhance else None
        self.ontology = read_ontology(Path(ontology)) if ontology else None
        if settings.freeze_backbone:
            network.freeze_backbone(from_images=settings.swin_pretrain_path is not None)
        for parameter in network.unused_parameters():  # they get no gradient, which DistributedDataParallel refuses
            parameter.requires_grad_(False)

    @property
    def has_frames(self) -> bool:
        return self.sed_model.frames > 0

    def forward(self, waveform: Tensor) -> Outputs:
        return self.sed_model(waveform)

    def sound(self, batch: Batch) -> Tensor:
        """The waveforms of a batch (B, samples): float32, at the network's sample rate."""
        waveform = int16_to_float32(batch["waveform"])  # int16 travels to the device
        return at_rate_of(self.sed_model, waveform, self.sample_rate_of(batch))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Random numbers of their own for each step and process: a resumed run draws what an unbroken one draws."""
        place = [self.settings.random_seed, self.current_epoch, batch_idx, self.global_rank]
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs a millisecond where there is no GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batch_in_epoch = batch_idx
        loss = self.training_loss(batch)
        self.unreadable += batch["unreadable"]
        self._count_what_was_before()
        self.losses.add(self.global_step, len(batch["waveform"]), loss)
        trainer = self._trainer
        last = trainer is None or trainer.is_last_batch
        if last or (batch_idx + 1) % self._log_interval() == 0:
            self._read_losses(wait=last)
        if last:
            self.log("train_loss_epoch", self.losses.mean, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return loss

    def _log_interval(self) -> int:
        """Steps from one that is logged to the next."""
        return self._trainer.log_every_n_steps if self._trainer else 1  # type: ignore[attr-defined]  # set at run time

    def _count_what_was_before(self) -> None:
        """The part of a resumed epoch before its checkpoint: each process takes its share of the clips."""
        if self.before and self.before[0] == self.current_epoch:
            _, loss, clips, unreadable = self.before
            self.unreadable += unreadable if self.global_rank == 0 else 0
            self.losses.count(loss, round(clips / self._world_size()))
        self.before = None

    def _read_losses(self, *, wait: bool) -> None:
        """Log the losses of the steps that have come from the device. wait: of all steps.

        Raises UserError where one is not finite, in all processes.
        """
        every, loggers = self._log_interval(), self._trainer.loggers if self._trainer else []
        logged = {}
        for step, _, loss in self.losses.read(self._mean_of_processes, wait=wait):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is no finite number since step {step}")
            if (step + 1) % every == 0:
                logged[step] = loss  # of a step in parts, the last one's
        for step, loss in logged.items():  # not by self.log, which would log it as of the step that is at work
            for logger in loggers:
                logger.log_metrics({"train_loss_step": loss, "epoch": self.current_epoch}, step=step)

    def _mean_of_processes(self, values: Tensor) -> Tensor:
        if self._world_size() == 1:
            return values
        return sum_of_processes(values) / self._world_size()

    def _diverged(self, why: str) -> BaseException:
        """What to raise, in all processes: the first one says why."""
        if self.global_rank:
            return SystemExit(2)
        return UserError(
            f"The training diverged in epoch {self.current_epoch + 1}: {why}. Try a lower learning_rate (it is "
            f"{self.settings.learning_rate:g}), smaller scales of the first epochs (lr_rate), gradient_clip = 1, or "
            f"precision = 32."
        )

    def _world_size(self) -> int:
        return self._trainer.world_size if self._trainer else 1

    def training_loss(self, batch: Batch) -> Tensor:
        """The loss of a batch of the training data, on the device, with the augmentations of the settings."""
        network = self.sed_model
        waveform, targets = self.augmented_sound(self.sound(batch), batch)
        features, targets = self.augment_features(network.features(waveform), targets)
        outputs = network.forward_head(network.forward_features(features))
        return self.loss(outputs, targets, features)

    def augmented_sound(self, waveform: Tensor, batch: Batch) -> tuple[Tensor, Targets]:
        """(B, samples) -> the waveforms after all augmentation before the front-end, and their targets."""
        waveform, targets = self.augment_waveform(waveform, batch)
        waveform, targets = self.wavmix(waveform, targets)
        # A mask covers both sounds of clips that are mixed before it, and one of those that are mixed after it.
        return self.mixup(waveform, targets) if self.settings.mixup_waveforms else (waveform, targets)

    def augment_waveform(self, waveform: Tensor, batch: Batch) -> tuple[Tensor, Targets]:
        """(B, samples) -> the augmented waveforms and their targets."""
        settings, samples = self.settings, waveform.shape[1]
        shifts = starts = torch.zeros(len(waveform), dtype=torch.long)
        if settings.enable_time_shift:
            waveform, shifts = augment.shift_in_time(waveform, settings.shift_max)
        if settings.crop_size is not None:
            waveform, starts = augment.crop(waveform, settings.crop_size)
        if settings.gain_range:
            waveform = augment.random_gain(waveform, settings.gain_range)
        rate = self.sed_model.sample_rate
        targets = self.targets(batch, shifts / rate, starts / rate, samples / rate, waveform.shape[1] / rate)
        if settings.enable_token_label:
            shares = settings.token_label_range
            waveform, frames = augment.replace_stretch(waveform, targets.clips, self.sed_model.frames, shares)
            targets = replace(targets, frames=frames)
        return waveform, targets

    def targets(self, batch: Batch, shifts: Tensor, begin: Tensor, whole: float, seconds: float) -> Targets:
        """Of clips of `whole` seconds, rolled by (B,) `shifts` seconds, then cut to `seconds` from (B,) `begin` on."""
        clips = batch["target"]
        if self.ontology is not None:
            ancestors = to_device(torch.from_numpy(self.ontology.ancestors), clips.device)
            clips = augment.enhance_labels(clips, ancestors, self.ontology.children)
        return Targets(clips)

    def wavmix(self, waveform: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """(B, samples): some clips mixed with others of the batch, and their targets whatever mixup_targets says.

        PretrainedSED takes the partners from the whole data set.
        """
        settings = self.settings
        if not settings.wavmix:
            return waveform, targets
        partner, weight = augment.draw_mixing(len(waveform), settings.wavmix_alpha, larger=True)
        weight = torch.where(augment.happens(settings.wavmix, len(waveform)), weight, 1.0)
        mixing = self._where_alike(targets, partner, weight)
        return augment.mix_waveforms(waveform, mixing), targets.mixed(mixing.weight, mixing.partner)

    def mixup(self, inputs: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """Waveforms or features (B, ...) mixed with those of other clips; mixup_targets: the targets as well."""
        settings, clips = self.settings, len(inputs)
        if not settings.mixup_alpha or not augment.happens(settings.mixup_probability):
            return inputs, targets
        if settings.augment_by == "batches":
            partner, weight = augment.draw_mixing(clips, settings.mixup_alpha, larger=True)
        else:
            partner, weight = torch.arange(clips - 1, -1, -1), get_mix_lambda(settings.mixup_alpha, clips)
        partner, weight = self._where_alike(targets, partner, weight)
        targets = targets.mixed(weight, partner) if settings.mixup_targets else targets
        return do_mixup(inputs, weight, partner), targets

    def _where_alike(self, targets: Targets, partner: Tensor, weight: Tensor) -> augment.Mixing:
        """On the device; the weight is 1 where a clip's partner has labels of another kind."""
        device = targets.clips.device
        partner, weight = to_device(partner, device), to_device(weight, device)
        alike = targets.mixable(partner)
        return augment.Mixing(partner, weight if alike is None else torch.where(alike, weight, 1.0))

    def augment_features(self, features: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """(B, F, T) -> the augmented features and their targets.

        Sounds are mixed after filter and warp, each with its own, and before them as PretrainedSED has it.
        """
        early: list[FeatureStep] = [self._filter, self._warp]
        late: list[FeatureStep] = [] if self.settings.mixup_waveforms else [self.mixup]
        if self.settings.augment_by == "batches":
            early, late = late, early
        for step in (self._shift, *early, self._mix_style, self._mask, *late):
            features, targets = step(features, targets)
        features = augment.add_noise(features, self.settings.feature_noise) if self.settings.feature_noise else features
        return features, targets

    def _shift(self, features: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        if not self.settings.frame_shift:
            return features, targets
        clips, _, frames = features.shape
        shifts = augment.draw_shifts(clips, frames, self.settings.frame_shift)
        targets = targets.rolled(augment.shift_on(shifts, frames, self.sed_model.frames))
        return roll(features, shifts.tolist(), dim=1), targets

    def _filter(self, features: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        settings = self.settings
        if settings.filter_augment and augment.happens(settings.filter_probability):
            decibel, of_batch = self.sed_model.decibel(), settings.augment_by == "batches"
            features = augment.filter_augment(features, settings.filter_augment, decibel, of_batch=of_batch)
        return features, targets

    def _warp(self, features: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        settings = self.settings
        if settings.frequency_warp and augment.happens(settings.warp_probability):
            of_batch = settings.augment_by == "batches"
            features = augment.warp_frequency(features, settings.frequency_warp, of_batch=of_batch)
        return features, targets

    def _mix_style(self, features: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        settings, of_batch = self.settings, self.settings.augment_by == "batches"
        return augment.mix_style(features, settings.mix_style, settings.mix_style_alpha, of_batch=of_batch), targets

    def _mask(self, features: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """SpecAugment's masks, and time_mask; the targets follow where masks_silence."""
        settings, steps = self.settings, self.sed_model.frames
        shares = []
        if settings.spec_augment:
            count = settings.spec_masks
            features, left = augment.mask_time(features, count, settings.spec_mask_frames)
            features = augment.mask_bands(features, count, settings.spec_mask_bands)
            shares = [augment.left_of_steps(left, steps)] if self.masks_silence else []
        if settings.time_mask:
            steps = steps or features.shape[2]
            features, left = augment.mask_stretch(features, *augment.draw_stretch(steps, settings.time_mask), steps)
            shares += [left] if self.masks_silence else []
        for share in shares:
            targets = targets.masked(share)
        return features, targets

    def loss(self, outputs: Outputs, targets: Targets, features: Tensor) -> Tensor:
        """The loss of a step. features: (B, F, T), of which the outputs were made."""
        if targets.frames is not None:
            return self.loss_func(outputs.frame_logits.flatten(0, 1), targets.frames.flatten(0, 1))
        return self.loss_func(outputs.clip_logits, targets.clips)

    def on_train_epoch_end(self) -> None:
        if self.unreadable:
            warnings.warn(
                f"{self.unreadable} clips could not be read in epoch {self.current_epoch}; others of their classes "
                f"stood in. `python main.py check` tells which.",
                stacklevel=2,
            )
        self.log("unreadable_clips", float(self.unreadable), sync_dist=True, reduce_fx="sum")
        self.unreadable = 0
        self.losses = StepLosses()

    def on_validation_epoch_start(self) -> None:
        self.collected, self.watched = [], []
        if self._world_size() > 1:
            average_statistics(self.sed_model)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(self.sound(batch)).clip_logits
        collected = self.watched if dataloader_idx else self.collected
        collected.append((batch["index"], logits, batch["target"]))

    def check_scores(self, logits: np.ndarray) -> None:
        """Raise UserError where the scores of validation clips are not finite."""
        if not np.isfinite(logits).all():
            raise self._diverged("the scores of the validation clips are not finite")

    def on_validation_epoch_end(self) -> None:
        _, logits, targets = self._gather(self.collected)
        self.check_scores(logits)
        loss = self.loss_func(torch.from_numpy(logits), torch.from_numpy(targets))
        self.log("val_loss", loss.to(self.device), prog_bar=True, sync_dist=True)
        for metric in clip_metrics(self.task, logits, targets > 0.5):
            self.log(metric.name, metric.value, prog_bar=metric.name == self.main_metric, sync_dist=True)
        if self.watched:
            _, logits, targets = self._gather(self.watched)
            for metric in clip_metrics(self.task, logits, targets > 0.5):
                self.log(f"test_{metric.name}", metric.value, sync_dist=True)
        self.collected, self.watched = [], []

    def clip_and_frame_scores(self, waveform: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
        return self.sed_model.probabilities(at_rate_of(self.sed_model, waveform, sample_rate))[:2]

    def configure_optimizers(self) -> Any:
        """AdamW, and a factor of its learning rate that changes from epoch to epoch or from step to step."""
        settings, network = self.settings, self.sed_model
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.AdamW(
            parameter_groups(network, rate, settings.layer_decay, decay, matrices_only=settings.decay_matrices_only),
            betas=(settings.adam_beta1, 0.999),
            eps=1e-8,
            fused=settings.precision != "16-mixed",  # whose gradients are scaled: they must be unscaled to be clipped
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_scale(settings, self._planned_steps()))
        interval = "epoch" if settings.lr_schedule == "epochs" else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    def _planned_steps(self) -> int:
        """Of the whole training; 1 where the data do not say it, as in a benchmark."""
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, SEDDataModule):
            return 1
        return data.steps_per_epoch(self._world_size()) * self.settings.max_epoch

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        """By norm. Lightning's own refuses a fused optimizer in bfloat16, whose gradients are not scaled."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed optimizer keeps its moments; learning rates, decay and arithmetic are those of the settings.

        Buffers that follow from the sizes are computed, never read.
        """
        self.before = checkpoint.get(EPOCH_SO_FAR)  # None in those of earlier versions
        computed = {k: v for k, v in self.state_dict().items() if k.endswith(self.sed_model.computed)}
        checkpoint["state_dict"].update({k: v for k, v in computed.items() if k in checkpoint["state_dict"]})
        fresh = self.configure_optimizers()
        groups, schedule = fresh["optimizer"].state_dict()["param_groups"], fresh["lr_scheduler"]["scheduler"]
        states = zip(checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", []), strict=True)
        before, now = checkpoint.get("settings", {}).get("lr_schedule", "epochs"), self.settings.lr_schedule
        for optimizer, scheduler in states:
            if "epochs" in (before, now) and before != now:  # one counts epochs, the other one steps
                scheduler["last_epoch"] = checkpoint["complete_epochs" if now == "epochs" else "global_step"]
            scales = [scale(scheduler["last_epoch"]) for scale in schedule.lr_lambdas]
            rates = [base * scale for base, scale in zip(schedule.base_lrs, scales, strict=True)]
            scheduler.update(base_lrs=schedule.base_lrs, _last_lr=rates)
            for group, new, rate in zip(optimizer["param_groups"], groups, rates, strict=True):
                group.update({**new, "params": group["params"], "lr": rate})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says itself what it is: plain values only, so that reading it cannot run code.

        Raises UserError, and nothing is written, where the weights are not finite.
        """
        broken = [name for name, p in self.sed_model.named_parameters() if not p.isfinite().all()]
        if broken:
            raise self._diverged(f"{broken[0]} is not finite")
        values = self.settings.model_dump()
        checkpoint["settings"], checkpoint["labels"] = values, self.labels
        # `epoch` is Lightning's number of the epoch at work, which a checkpoint in its middle leaves incomplete.
        checkpoint["complete_epochs"] = self.current_epoch + int(self.trainer.is_last_batch)
        checkpoint["frontend"] = {name: values[name] for name in section("front-end")}
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SEDDataModule):
            checkpoint["data"] = {**data.identity, "processes": self.trainer.world_size}
        self._read_losses(wait=True)
        world = self._world_size()
        counts = torch.tensor([self.losses.clips, self.unreadable], dtype=torch.float64, device=self.device)
        clips, unreadable = (round(mean * world) for mean in self._mean_of_processes(counts).tolist())
        checkpoint[EPOCH_SO_FAR] = [self.current_epoch, self.losses.mean, clips, unreadable]


class FrameSEDWrapper(SEDWrapper):
    """One network that learns from event times, from clip labels where there are no times, and from teachers.

    Labels and the teacher's scores follow every augmentation. After each epoch the validation clips with event times
    give frame_mAP, by which checkpoints are chosen.
    """

    masks_silence = True

    def __init__(self, network: Network, settings: Config, labels: Sequence[str]) -> None:
        super().__init__(network, settings, labels)
        self.main_metric = FRAME_METRIC
        self.teacher = MeanTeacher(network, settings.mean_teacher_decay) if settings.mean_teacher else None

    def targets(self, batch: Batch, shifts: Tensor, begin: Tensor, whole: float, seconds: float) -> Targets:
        events: Events = batch["events"]
        device = batch["target"].device
        shifts, begin = to_device(shifts, device), to_device(begin, device)
        if self.settings.enable_time_shift:
            events = augment.shift_events(events, shifts, whole)
        if self.settings.crop_size is not None:
            events = augment.crop_events(events, begin, seconds)
        teacher = batch.get("teacher")
        if teacher is not None:
            probabilities = teacher.float().sigmoid().transpose(1, 2)  # (B, T of the teacher, K)
            steps = self.sed_model.frames
            teacher = resample_steps(probabilities, steps, whole, shift=shifts - begin, length=seconds)
        frames = self._rasterize(events, len(batch["target"]), seconds)
        return Targets(batch["target"], frames, batch["labelling"], teacher, batch.get("has_teacher"))

    def _rasterize(self, events: Events, clips: int, seconds: float) -> Tensor:
        """(clips, T, K) frame targets."""
        return rasterize(
            events,
            clips=clips,
            classes=self.settings.classes_num,
            steps=self.sed_model.frames,
            seconds=seconds,
            fractional=self.settings.fractional_targets,
            touched=self.settings.touched_targets,
        )

    def loss(self, outputs: Outputs, targets: Targets, features: Tensor) -> Tensor:
        loss = self._label_loss(outputs, targets)
        if targets.teacher is not None and targets.has_teacher is not None:
            # Of a batch whose clips all have a teacher: (1 - weight) of one and weight of the other.
            count, part = self._in_all_processes(targets.has_teacher)
            share = self.settings.distillation_weight * count / (len(features) * self._world_size())
            taught = distillation_bce(outputs.frame_logits, targets.teacher, targets.has_teacher)
            loss = (1 - share) * loss + share * part * taught
        return loss if self.teacher is None else loss + self._consistency(outputs, features)

    def _label_loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        assert targets.frames is not None
        assert targets.labelling is not None
        logits, strong = outputs.frame_logits, targets.labelling == STRONG
        if self.settings.loss_type == "frame_bce":
            return self._in_all_processes(strong)[1] * frame_bce(logits, targets.frames, strong.float())
        clip = outputs.clip_logits, targets.clips
        loss = weak_strong_bce(logits, targets.frames, *clip, targets.labelling, self.settings.weak_weight)
        return self._in_all_processes(targets.labelling != UNLABELLED)[1] * loss

    def _in_all_processes(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """How many clips are chosen in the batches of all processes, and what a mean over those of (B,) counts here.

        DistributedDataParallel averages over processes, which may have different numbers of clips with labels: so the
        result is the mean over the clips.
        """
        here, world = chosen.sum().float(), self._world_size()
        if world == 1:
            return here, torch.ones_like(here)
        total = sum_of_processes(here)
        return total, here * world / total.clamp(min=1)

    def _consistency(self, outputs: Outputs, features: Tensor) -> Tensor:
        """Distance of the network from its mean teacher on the same features, in frames and clips."""
        assert self.teacher is not None
        teacher = self.teacher.module
        assert isinstance(teacher, Network)
        with torch.no_grad():
            wanted = teacher.forward_head(teacher.forward_features(features))
        weight = self.settings.mean_teacher * ramp_up(self._epochs_done(), self.settings.mean_teacher_rampup)
        pairs = (outputs.frame_logits, wanted.frame_logits), (outputs.clip_logits, wanted.clip_logits)
        differences = [consistency(ours.sigmoid(), theirs.sigmoid()) for ours, theirs in pairs]
        return weight * torch.stack(differences).sum()

    def _epochs_done(self) -> float:
        """Epochs of training so far, with the part of the one at work."""
        batches = self.trainer.num_training_batches if self._trainer else 1
        return self.current_epoch + min(self.batch_in_epoch / max(batches, 1), 1.0)

    def optimizer_step(self, *words: Any, **more: Any) -> None:
        """The mean teacher follows at once: a checkpoint in the middle of an epoch is written before other hooks."""
        super().optimizer_step(*words, **more)
        if self.teacher is not None:
            self.teacher.update_parameters(self.sed_model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checkpoints of earlier versions call the mean teacher's copy teacher.network."""
        weights: dict[str, Tensor] = checkpoint["state_dict"]
        for key in [key for key in weights if key.startswith("teacher.network.")]:
            weights[key.replace("teacher.network.", "teacher.module.")] = weights.pop(key)
            weights.setdefault("teacher.n_averaged", torch.tensor(checkpoint["global_step"]))
        super().on_load_checkpoint(checkpoint)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        waveform = self.sound(batch)
        outputs = self(waveform)
        seconds = waveform.shape[1] / self.sed_model.sample_rate
        frames = self._rasterize(batch["events"], len(waveform), seconds)
        found = (outputs.clip_logits, batch["target"], outputs.frame_logits, frames, batch["labelling"])
        collected = self.watched if dataloader_idx else self.collected
        collected.append((batch["index"], *found))

    def on_validation_epoch_end(self) -> None:
        for collected, prefix in ((self.collected, ""), (self.watched, "test_")):
            if not collected:
                continue
            _, clips, targets, frames, frame_targets, labelling = self._gather(collected)
            self.check_scores(clips)
            self.check_scores(frames)
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


def build_wrapper(network: Network, settings: Config, labels: Sequence[str]) -> SEDWrapper:
    """The training of a network that loss_type asks for: on clips, or on event times.

    Raises UserError for event times with an encoder that has no time axis.
    """
    on_frames = settings.loss_type in FRAME_LOSSES
    if (on_frames or settings.enable_token_label) and network.frames == 0:
        asked = f"loss_type = {settings.loss_type}" if on_frames else "enable_token_label = True"
        raise UserError(
            f"{asked} needs frames, and encoder = {settings.encoder} has no time axis: use another encoder."
        )
    return (FrameSEDWrapper if on_frames else SEDWrapper)(network, settings, labels)


def mean_on_finest(frames: Sequence[Tensor]) -> Tensor:
    """Frame scores (B, T, K) of the same clips on time axes of their own -> their mean on that of the most frames."""
    steps = max(each.shape[1] for each in frames)
    still = torch.zeros(len(frames[0]), device=frames[0].device)
    fine = [each if each.shape[1] == steps else resample_steps(each, steps, 1.0, shift=still) for each in frames]
    return torch.stack(fine).mean(dim=0)


class Ensemble_SEDWrapper(Evaluation):
    """Several networks tested as one: the mean of their probabilities, of clips and of frames (paper, section 3.1).

    together: all on the device; otherwise they wait in main memory, and each is on the device for its turn only.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        settings: Config,
        labels: Sequence[str],
        *,
        together: bool = True,
    ) -> None:
        super().__init__(settings, labels)
        self.together, self.networks = together, [network.eval() for network in networks]
        self.sed_models = nn.ModuleList(networks if together else [])  # Lightning moves what is registered

    @property
    def has_frames(self) -> bool:
        return any(network.frames for network in self.networks)

    def clip_and_frame_scores(self, waveform: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
        """Frame scores are the mean over the members that have a time axis."""
        scores = [self.member_scores(network, waveform, sample_rate) for network in self.networks]
        clips, frames = zip(*scores, strict=True)
        timed = [each for each in frames if each.shape[1]] or list(frames)
        return torch.stack(clips).mean(dim=0), mean_on_finest(timed)

    def member_scores(self, network: Network, waveform: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
        waveform = at_rate_of(network, waveform, sample_rate)
        if self.together:
            return network.probabilities(waveform)[:2]
        scores = network.to(waveform.device).probabilities(waveform)[:2]
        network.cpu()
        return scores
