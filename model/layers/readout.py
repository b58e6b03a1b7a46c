"""Frame scores on the time grid of an earlier stage: the last stage's features, with those of the stages before it.

Top-down, as feature pyramids (Lin et al. 2017, arXiv 1612.03144) read a picture. And the time axis of encoders whose
steps do not divide a clip. Shapes: B clips, C channels, L tokens.
"""

import math
from collections.abc import Sequence

from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from settings import UserError

MOST_FRAMES = 8  # that a step is divided into


class Lateral(nn.Module):
    """(B, L, channels in) of an earlier stage -> (B, channels out, freq_bins, steps of that stage).

    LayerNorm and a linear layer that starts at zero: at first it adds nothing to what it is added to.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels_in)
        self.linear = nn.Linear(channels_in, channels_out)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, freq_ratio: int, freq_bins: int, steps: int) -> Tensor:
        """tokens: in the order in which they merge (model.layers.swin.merging_order), of a folded map."""
        width = steps // freq_ratio  # of the map, in tokens
        place = {"r": freq_ratio, "i": 2, "j": 2, "w": width // 2}
        # The rows of a stretch of time, (f i), are averaged to freq_bins: p of them become one.
        pooled = rearrange(tokens, "b (r f w j i) c -> b (f i) (r w j) c", **place)
        pooled = reduce(pooled, "b (f p) t c -> b f t c", "mean", f=freq_bins)
        return self.linear(self.norm(pooled)).permute(0, 3, 1, 2)


class Readout(nn.Module):
    """The last stage's grid repeated in time to a finer one, plus the laterals of the stages from there on.

    channels: of each of those stages; steps: of each of them, over the whole image, the finest first.
    """

    def __init__(self, channels: Sequence[int], steps: Sequence[int], channels_out: int, freq_ratio: int) -> None:
        super().__init__()
        self.freq_ratio, self.steps = freq_ratio, list(steps)
        self.laterals = nn.ModuleList(Lateral(each, channels_out) for each in channels)

    def forward(self, grid: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """(B, C, freq_bins, steps) of the last stage, and the tokens of each earlier one -> (B, C, freq_bins, finest).

        The tokens are as model.layers.swin.Stage hands them out before they merge, the finest first.
        """
        fine = repeat_in_time(grid, self.steps[0])
        for lateral, tokens, steps in zip(self.laterals, earlier, self.steps, strict=True):
            own = lateral(tokens, self.freq_ratio, grid.shape[2], steps)
            fine = fine + repeat_in_time(own, self.steps[0])
        return fine


def repeat_in_time(values: Tensor, steps: int) -> Tensor:
    """(..., T) -> (..., steps), a multiple of T: each step several times, so that all last as long as before."""
    return values if values.shape[-1] == steps else repeat(values, "... t -> ... (t n)", n=steps // values.shape[-1])


def frame_samples(step: int, steps: int, clip_samples: int) -> int:
    """Samples of a frame: the longest stretch that divides both the clip and a step, of `step` samples, of a network.

    Its steps need not divide a clip. Raises UserError for clips without a step, or of more than MOST_FRAMES in one.
    """
    frame = math.gcd(step, clip_samples)
    if steps < 1 or step > MOST_FRAMES * frame:
        raise UserError(
            f"clip_samples = {clip_samples} is not allowed: a step of the network has {step} samples; give a multiple "
            f"of it, or of its half, quarter or eighth, that holds a step."
        )
    return frame
