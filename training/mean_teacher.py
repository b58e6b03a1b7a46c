"""The mean teacher: a moving average of a network's weights, whose outputs the network is to agree with.

Tarvainen and Valpola: Mean teachers are better role models, NeurIPS 2017, arXiv 1703.01780. The baselines of DCASE task
4 train with it on clips without labels.
"""

import math

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


class MeanTeacher(AveragedModel):
    """A copy of a network that follows it slowly; `module` is the copy, update_parameters(network) moves it.

    Update n, from 0, keeps min(1 - 1 / (n + 1), decay) of the old average: at first a mean over all steps, so that the
    initial weights are soon forgotten. Buffers are copied. Make it when the network's own weights have been loaded.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """decay: largest share of the old average that an update keeps, from 0 to below 1."""

        def average(ours: Tensors, theirs: Tensors, updates: Tensor | int) -> None:
            get_ema_multi_avg_fn(min(1 - 1 / (int(updates) + 1), decay))(ours, theirs, updates)

        super().__init__(network, multi_avg_fn=average)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Always in eval mode: the parent's train() has no effect."""
        return super().train(False)


def ramp_up(epoch: float, epochs: float) -> float:
    """Share of its weight that the consistency has after `epoch` epochs: exp(-5 (1 - epoch / epochs)^2).

    It rises from 0.0067 to 1 in `epochs` epochs (above 0) and stays there (Tarvainen and Valpola, appendix B).
    """
    return math.exp(-5 * (1 - min(1.0, epoch / epochs)) ** 2)
