"""Learning rates over the training and over the layers, and the weight of the mean teacher's consistency."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from model import Network
from settings import Config

WARM_UP_EPOCHS = 3


def learning_rate_scale(epoch: int, lr_scheduler_epoch: Sequence[int], lr_rate: Sequence[float]) -> float:
    """Factor of learning_rate in an epoch, counted from 0: three warm-up epochs, three plateaus, then a slow decay.

    The plateaus last up to and including their epoch of lr_scheduler_epoch. As the published code has it, the decay
    ends at 0.03, which lies above lr_rate[0] = 0.02: the rate rises after the last plateau.
    """
    if epoch < WARM_UP_EPOCHS:
        return lr_rate[epoch]
    for last_epoch, rate in zip(lr_scheduler_epoch, reversed(lr_rate), strict=True):
        if epoch <= last_epoch:
            return rate
    return max(lr_rate[0] * 0.98**epoch, 0.03)


def cosine_scale(step: int, warm_up: int, steps: int) -> float:
    """Factor of learning_rate in a step, counted from 0, of `steps`: linear warm-up from 0, then half a cosine to 0."""
    if step < warm_up:
        return step / warm_up
    return (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up)))) / 2


def milestone_scale(step: int, warm_up: int, epoch_steps: float, milestones: Sequence[int], factor: float) -> float:
    """Factor of learning_rate in a step: linear warm-up from 0, and `factor` for each milestone (epochs) behind it."""
    passed = sum(step >= round(epochs * epoch_steps) for epochs in milestones)
    return min(1.0, step / warm_up if warm_up else 1.0) * factor**passed


def warm_up_steps(settings: Config, steps: int) -> int:
    """With a schedule by steps, of a training of so many."""
    return round(settings.warm_up if settings.warm_up >= 1 else settings.warm_up * steps)


def rate_scale(settings: Config, steps: int) -> Callable[[int], float]:
    """Factor of learning_rate by epoch, or with another lr_schedule by step, in a training of so many steps."""
    if settings.lr_schedule == "cosine":
        return partial(cosine_scale, warm_up=warm_up_steps(settings, steps), steps=steps)
    if settings.lr_schedule == "milestones":
        return partial(
            milestone_scale,
            warm_up=warm_up_steps(settings, steps),
            epoch_steps=steps / settings.max_epoch,
            milestones=settings.lr_milestones,
            factor=settings.lr_factor,
        )
    return partial(learning_rate_scale, lr_scheduler_epoch=settings.lr_scheduler_epoch, lr_rate=settings.lr_rate)


def schedule_warnings(settings: Config, steps: int = 0) -> list[str]:
    """Where the run ends before its warm-up or a plateau, or a plateau ends before the warm-up.

    steps: of the whole training, which a warm-up in steps is compared with; 0: not known.
    """
    if settings.lr_schedule != "epochs":
        warm_up = warm_up_steps(settings, steps)
        if steps == 0 or warm_up < steps:
            return []
        return [
            f"warm_up = {settings.warm_up:g}: the run ends after {steps:,} steps, within the warm-up. The rate reaches "
            f"{settings.learning_rate * steps / warm_up:.2g} of learning_rate = {settings.learning_rate:g} and never "
            f"falls. Give a share of all steps, as 0.1, or train longer."
        ]
    ends, epochs = settings.lr_scheduler_epoch, settings.max_epoch
    if epochs <= WARM_UP_EPOCHS:
        return [
            f"max_epoch = {epochs}: the run ends with the {WARM_UP_EPOCHS} warm-up epochs of lr_rate. Train longer."
        ]
    found = []
    starts = [WARM_UP_EPOCHS, *(max(end + 1, WARM_UP_EPOCHS) for end in ends[:2])]
    for start, end, scale in zip(starts, ends, reversed(settings.lr_rate), strict=True):
        if end < start:
            found.append(
                f"lr_scheduler_epoch = {ends}: no epoch has the scale {scale:g}, whose last epoch {end} comes before "
                f"its first, {start} (counted from 0)."
            )
        elif start >= epochs:
            found.append(
                f"max_epoch = {epochs}: the plateau of scale {scale:g} would begin after epoch {start}, beyond the "
                f"end. Lower lr_scheduler_epoch = {ends}."
            )
    return found


def parameter_groups(
    network: Network, rate: float, layer_decay: float, weight_decay: float, *, matrices_only: bool = False
) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer, with learning rate and weight decay of each layer.

    The classifier learns at `rate`, each layer below at layer_decay times the rate of the one above it (Clark et al.
    2020, ELECTRA, section 3.1; Bao et al. 2022, BEiT, for vision transformers). matrices_only: no decay of parameters
    of less than two dimensions, which have groups of their own. Else one group where layer_decay is 1.
    """
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for number, parameter in network.parameters_by_layer():
        if parameter.requires_grad:
            decay = 0.0 if matrices_only and parameter.ndim < 2 else weight_decay
            groups.setdefault((number if layer_decay < 1 else 0, decay), []).append(parameter)
    top = max((number for number, _ in groups), default=0)
    return [
        {"params": groups[number, decay], "lr": rate * layer_decay ** (top - number), "weight_decay": decay}
        for number, decay in sorted(groups, reverse=True)
    ]


def ramp_up(epoch: float, epochs: float) -> float:
    """Share of its weight that the consistency has after `epoch` epochs: exp(-5 (1 - epoch / epochs)^2).

    It rises from 0.0067 to 1 in `epochs` epochs (above 0) and stays there (Tarvainen and Valpola, appendix B).
    """
    return math.exp(-5 * (1 - min(1.0, epoch / epochs)) ** 2)
