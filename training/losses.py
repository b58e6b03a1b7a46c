"""Losses of clips, by their names in config.py, and of frames, as scalars; the mean teacher; their way to the logs."""

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Loss = Callable[[Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, ...] | list[Tensor]
Average = Callable[[Tensors, Tensors, int], None]

WEAK, STRONG = 1, 2  # of `labelling`, as data.clip_store has them; any other number: not labelled


def clip_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, averaged over clips and classes (paper, section 3.1)."""
    return F.binary_cross_entropy_with_logits(logits, targets)


def clip_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over the classes, averaged over clips; targets are one-hot, or mixed."""
    return F.cross_entropy(logits, targets)


def asl_loss(
    logits: Tensor, targets: Tensor, *, gamma_negative: float = 4.0, gamma_positive: float = 0.0, margin: float = 0.05
) -> Tensor:
    """Asymmetric loss (Ridnik et al., ICCV 2021, equations 4 to 6), averaged over clips and classes.

    Easy negatives weigh less: their probability is lowered by `margin` and focused with gamma_negative.
    """
    probability = logits.sigmoid()
    shifted = (probability - margin).clamp(min=0)
    positive = (1 - probability) ** gamma_positive * F.logsigmoid(logits)
    negative = shifted**gamma_negative * torch.log1p(-shifted)
    return -(targets * positive + (1 - targets) * negative).mean()


def frame_bce(logits: Tensor, targets: Tensor, weight: Optional[Tensor] = None) -> Tensor:
    """Binary cross entropy of frames: the mean over steps and classes, then the weighted mean over clips.

    logits, targets: (B, steps, K), targets from 0 to 1. weight: (B,), None for 1 each; clips of weight 0 count for
    nothing. Where all weights are 0, the loss is 0 and still has a gradient (0) for every parameter, which
    DistributedDataParallel waits for.
    """
    clips = _clip_means(logits, targets)
    return clips.mean() if weight is None else _weighted_mean(clips, weight.to(clips.dtype))


def weak_strong_bce(
    frame_logits: Tensor,
    frame_targets: Tensor,
    clip_logits: Tensor,
    clip_targets: Tensor,
    labelling: Tensor,
    weak_weight: float,
) -> Tensor:
    """Binary cross entropy of frames where their times are known, of clips where only their classes are.

    frame_logits, frame_targets: (B, steps, K); clip_logits, clip_targets: (B, K); labelling: (B,) int, WEAK or STRONG,
    anything else has no labels and counts for nothing. The sum of the strong clips' frame losses, and of weak_weight
    times the weak clips' losses, is divided by the number of labelled clips: each kind is averaged over its own clips
    and weighted by its share of the labelled ones, so a batch's composition decides. 0, with a gradient, for none.
    """
    strong, weak = labelling == STRONG, labelling == WEAK
    frames = _clip_means(frame_logits, frame_targets)
    clips = _clip_means(clip_logits, clip_targets)
    total = (frames * strong + weak_weight * clips * weak).sum()
    return total / (strong | weak).sum().clamp(min=1)


def distillation_bce(logits: Tensor, teacher_probabilities: Tensor, has_teacher: Tensor) -> Tensor:
    """Binary cross entropy against a teacher's probabilities (Hinton et al. 2015, per class), as frame_bce.

    logits, teacher_probabilities: (B, steps, K); has_teacher: (B,) bool, the clips that a teacher has scored. Its
    smallest value is not 0 but the entropy of the teacher's probabilities.
    """
    return frame_bce(logits, teacher_probabilities, has_teacher)


def consistency(student_probabilities: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """Mean squared error of a student's probabilities from its mean teacher's, of the same shape.

    Tarvainen and Valpola 2017. The teacher gets no gradient.
    """
    return F.mse_loss(student_probabilities, teacher_probabilities.detach())


class RunningAverage(AveragedModel):
    """torch's AveragedModel with the number of updates on the CPU too: it waits for the GPU twice a step to read it."""

    def __init__(self, network: nn.Module, average: Average, device: torch.device | int | None = None) -> None:
        """average(averages, weights, updates) changes the averages in place; the first update copies the weights."""
        super().__init__(network, device)
        self.average = average
        self.updates: Optional[int] = None  # None: read n_averaged
        self.register_load_state_dict_post_hook(lambda average, _: setattr(average, "updates", None))

    @torch.no_grad()
    def update_parameters(self, network: nn.Module) -> None:
        updates = int(self.n_averaged) if self.updates is None else self.updates
        averages: list[Tensor] = list(self.module.parameters())
        weights = [w.to(a.device) for a, w in zip(averages, network.parameters(), strict=True)]
        if updates:
            self.average(averages, weights, updates)
        else:
            for kept, weight in zip(averages, weights, strict=True):
                kept.copy_(weight)
        for kept, buffer in zip(self.module.buffers(), network.buffers(), strict=True):
            kept.copy_(buffer)
        self.updates = updates + 1
        self.n_averaged.fill_(self.updates)


class MeanTeacher(RunningAverage):
    """A copy of a network that follows it slowly; `module` is the copy, update_parameters(network) moves it.

    Tarvainen and Valpola: Mean teachers are better role models, NeurIPS 2017, arXiv 1703.01780. The baselines of DCASE
    task 4 train with it on clips without labels.

    Update n, from 0, keeps min(1 - 1 / (n + 1), decay) of the old average: at first a mean over all steps, so that the
    initial weights are soon forgotten. Buffers are copied. Make it when the network's own weights have been loaded.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """decay: largest share of the old average that an update keeps, from 0 to below 1."""

        def average(ours: Tensors, theirs: Tensors, updates: int) -> None:
            get_ema_multi_avg_fn(min(1 - 1 / (updates + 1), decay))(ours, theirs, updates)

        super().__init__(network, average)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Always in eval mode: the parent's train() has no effect."""
        return super().train(False)


def _clip_means(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, ...) -> (B,) binary cross entropy, averaged over all but the clips."""
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return loss.flatten(1).mean(dim=1)


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """(B,), (B,) -> scalar; 0 where the weights are."""
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1)


# The losses of clip logits (B, K) and targets (B, K), by loss_type. Where training learns from times, the validation
# clips are still scored as clips.
LOSSES: dict[str, Loss] = {
    "clip_bce": clip_bce,
    "clip_ce": clip_ce,
    "asl_loss": asl_loss,
    "frame_bce": clip_bce,
    "weak_strong_bce": clip_bce,
}


class StepLoss(NamedTuple):
    """step: of the training, counted from 0. clips: of this process."""

    step: int
    clips: int
    loss: float


class StepLosses:
    """The losses of an epoch so far.

    A GPU computes a step some time after the CPU has asked for it. To read its loss at once is to wait for it, and then
    the GPU waits for the CPU. So losses are copied to the CPU some together, and read when the next ones are copied.
    """

    def __init__(self) -> None:
        self.total, self.clips = 0.0, 0  # of those that were read: the sum of the clips' losses, and clips
        self.latest: Optional[float] = None
        self._steps: list[tuple[int, int]] = []  # step and clips of those on the device
        self._losses: list[Tensor] = []
        self._sent: Optional[tuple[list[tuple[int, int]], Tensor, Optional[torch.cuda.Event]]] = None

    @property
    def mean(self) -> float:
        """Over the clips; 0 for none."""
        return self.total / max(self.clips, 1)

    def add(self, step: int, clips: int, loss: Tensor) -> None:
        self._steps.append((step, clips))
        self._losses.append(loss.detach())

    def count(self, loss: float, clips: int) -> None:
        """What was read elsewhere: the loss of a part of the epoch."""
        self.total, self.clips, self.latest = self.total + loss * clips, self.clips + clips, loss

    def read(self, reduce: Callable[[Tensor], Tensor], *, wait: bool) -> list[StepLoss]:
        """The losses that were on their way, in order; those that were added since are sent. wait: for these, too.

        reduce: (steps,) of this process -> the mean over all processes.
        """
        found = self._arrived()
        if self._losses:
            losses = reduce(torch.stack(self._losses).float())
            copied = losses.to("cpu", non_blocking=True)  # into pinned memory
            event = None
            if losses.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self._sent, self._steps, self._losses = (self._steps, copied, event), [], []
        return found + self._arrived() if wait else found

    def _arrived(self) -> list[StepLoss]:
        if self._sent is None:
            return []
        (steps, losses, event), self._sent = self._sent, None
        if event is not None:
            event.synchronize()
        found = [StepLoss(*step, loss) for step, loss in zip(steps, losses.tolist(), strict=True)]
        for each in found:
            self.count(each.loss, each.clips)
        return found
