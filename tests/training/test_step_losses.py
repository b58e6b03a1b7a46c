"""Losses of steps come from the device in order, some steps later, and each once."""

import torch

from training.losses import StepLosses


def test_losses_are_read_one_time_later() -> None:
    losses = StepLosses()
    losses.add(0, 2, torch.tensor(1.0))
    losses.add(1, 2, torch.tensor(3.0, requires_grad=True))
    assert losses.read(torch.neg, wait=False) == []
    assert (losses.mean, losses.latest) == (0.0, None)
    losses.add(2, 4, torch.tensor(5.0))
    assert losses.read(torch.neg, wait=False) == [(0, 2, -1.0), (1, 2, -3.0)]  # reduced by all processes
    assert losses.mean == -2.0
    losses.add(3, 2, torch.tensor(7.0))
    assert losses.read(torch.neg, wait=True) == [(2, 4, -5.0), (3, 2, -7.0)]
    assert losses.read(torch.neg, wait=True) == []
    losses.count(1.0, 2)  # of a part that an interrupted run has trained
    assert (losses.clips, losses.latest) == (12, 1.0)
    assert losses.mean == (2 * -1 + 2 * -3 + 4 * -5 + 2 * -7 + 2 * 1) / 12
