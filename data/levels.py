"""What is odd about the samples of a sound: silence, clipping, integers for floats, channels that cancel each other."""

from typing import NamedTuple

import numpy as np

from utils import INT16_SCALE

SILENT_PEAK = 10 ** (-60 / 20)  # a sound that nowhere rises above -60 dB of full scale is silent
LOUDEST = 10.0  # +20 dB of full scale: above it, samples are integers, not shares of full scale
FULL_SCALE = (INT16_SCALE - 1.5) / INT16_SCALE  # a sample of 16 bits from here on is at full scale
CLIPPED_SHARE = 0.001  # a sound with a larger share of its samples at full scale is clipped
CANCELLED = 0.01  # a mix to mono with less than this share of its channels' span has lost them

TOO_LOUD = "too loud"
SILENT = ("silent", "constant", "cancelled")  # kinds of remarks on sounds whose mix to mono is silent


class Remark(NamedTuple):
    """Something that is odd about a file. kind: one word or a few, for counts; text: a clause about the file."""

    kind: str
    text: str


class Levels:
    """The levels of a sound, block by block."""

    def __init__(self) -> None:
        self.values, self.full = 0, 0
        self.low, self.high = np.inf, -np.inf  # of the channels
        self.mono_low, self.mono_high = np.inf, -np.inf

    def add(self, channels: np.ndarray, mono: np.ndarray) -> None:
        """Samples of all channels in any shape, and their mean; full scale is 1."""
        low, high = float(channels.min()), float(channels.max())
        if max(-low, high) >= FULL_SCALE:
            self.full += int(np.count_nonzero(channels >= FULL_SCALE) + np.count_nonzero(channels <= -FULL_SCALE))
        self.values += channels.size
        self.low, self.high = min(self.low, low), max(self.high, high)
        if mono is not channels:
            low, high = float(mono.min()), float(mono.max())
        self.mono_low, self.mono_high = min(self.mono_low, low), max(self.mono_high, high)

    def remarks(self) -> list[Remark]:
        """What is odd; nothing where there are no samples."""
        if self.values == 0:
            return []
        peak, span, mono_span = max(-self.low, self.high), self.high - self.low, self.mono_high - self.mono_low
        if peak > LOUDEST:
            text = f"it has samples of {peak:g} times full scale: floats must lie in [-1, 1]; divide 16 bits by 32768"
            return [Remark(TOO_LOUD, text)]
        if peak <= SILENT_PEAK:
            return [Remark(SILENT[0], "it is silent: no sample lies above -60 dB of full scale")]
        if span <= 2e-6:
            return [Remark(SILENT[1], f"all its samples are {self.high:.3g}: it is silent but for an offset")]
        if mono_span < CANCELLED * span:
            return [Remark(SILENT[2], "its channels cancel each other in the mix to mono, which is silent")]
        if self.full > CLIPPED_SHARE * self.values:
            share = self.full / self.values
            return [Remark("clipped", f"it is clipped: {share:.1%} of its samples lie at full scale or beyond")]
        return []
