"""The losses of training steps on their way from the device to the logs: no step waits for one."""

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor


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
