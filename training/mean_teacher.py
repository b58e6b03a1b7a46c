"""The mean teacher: a moving average of a network's weights, whose answers the network is held to.

Tarvainen and Valpola: Mean teachers are better role models, NeurIPS 2017, arXiv 1703.01780. The baselines of DCASE
task 4 train with it on clips without labels.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from settings import UserError


class MeanTeacher(nn.Module):
    """A copy of a network that follows it slowly. It stays as in evaluation, and nothing trains it.

    Called as the network is. Its weights and buffers are in its state dict, so that a run that is gone on with has the
    same teacher. decay: largest share of the old average that an update keeps, 0 to below 1. The copy is as the network
    is when it is made: make it when the network's own weights have been loaded. Raises UserError for another decay.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"mean_teacher_decay = {decay} is not allowed: it must be 0 or more, and below 1.")
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MeanTeacher":
        """A teacher is never in training, whatever the module that holds it is told."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the network's forward returns, without gradients."""
        return self.network(*inputs, **options)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Take in the weights of `student`, a network of the same make, after optimizer step `step`, from 0 on.

        The old average keeps min(1 - 1 / (step + 1), decay): at first a mean over all steps, so that the weights
        of the start are soon forgotten. Buffers (bn0's statistics, averages already) are copied.
        """
        keep = min(1 - 1 / (step + 1), self.decay)
        averages, weights = list(self.network.parameters()), list(student.parameters())
        assert len(averages) == len(weights), "teacher and student must have the same layers"
        get_ema_multi_avg_fn(keep)(averages, weights, step)
        for ours, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
            ours.copy_(theirs)


def ramp_up(epoch: float, epochs: float) -> float:
    """Share of its weight that the consistency has after `epoch` epochs, whole or not: exp(-5 (1 - epoch / epochs)^2).

    It rises from 0.0067 to 1 in `epochs` epochs (greater than 0) and stays there (Tarvainen and Valpola, appendix B).
    """
    return math.exp(-5 * (1 - min(1.0, epoch / epochs)) ** 2)
