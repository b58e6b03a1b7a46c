"""Losses by their names in config.py. Each takes logits (B, K) and targets (B, K) and returns a scalar."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


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


LOSSES: dict[str, Loss] = {"clip_bce": clip_bce, "clip_ce": clip_ce, "asl_loss": asl_loss}
