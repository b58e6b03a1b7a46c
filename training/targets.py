"""What a batch is to be learned as, and how it follows mixup and masks."""

from dataclasses import dataclass, replace
from typing import Optional

from torch import Tensor

from utils import do_mixup


@dataclass(frozen=True)
class Targets:
    """Targets of B clips, T frames of the network's time axis, K classes.

    clips: (B, K). frames: (B, T, K), where the loss is on frames. labelling: (B,) as data.clip_store has it, where
    clips differ. teacher: (B, T, K) probabilities of a teacher, and has_teacher (B,).
    """

    clips: Tensor
    frames: Optional[Tensor] = None
    labelling: Optional[Tensor] = None
    teacher: Optional[Tensor] = None
    has_teacher: Optional[Tensor] = None

    def mixed(self, weight: Tensor) -> "Targets":
        """Those of clips that are mixed with the reversed batch. weight: (B,) of each clip itself."""
        frames, teacher = (None if part is None else do_mixup(part, weight) for part in (self.frames, self.teacher))
        return replace(self, clips=do_mixup(self.clips, weight), frames=frames, teacher=teacher)

    def masked(self, left: Tensor) -> "Targets":
        """Those of clips of whose frames (B, T) shares are left: the rest is silent."""
        frames, teacher = (None if part is None else part * left[:, :, None] for part in (self.frames, self.teacher))
        return replace(self, frames=frames, teacher=teacher)

    def mixable(self) -> Optional[Tensor]:
        """(B,) bool: whether a clip and its partner in the reversed batch have the same kind of labels; None: all."""
        alike = None
        for kind in (self.labelling, self.has_teacher):
            if kind is not None:
                same = kind == kind.flip(0)
                alike = same if alike is None else alike & same
        return alike
