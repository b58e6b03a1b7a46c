"""From waveform to the image that the Swin transformer reads: log-mel, SpecAugment, stretch, fold."""

import math
from functools import lru_cache

import torch
import torch.distributed as dist
import torchaudio
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from settings import UserError

POWER_FLOOR = 1e-10  # of the mel power, before the logarithm: -100 dB


class STFTKernels(nn.Module):
    """The windowed Fourier kernels that published checkpoints carry. Only their first row, the window, is used.

    At frequency 0 the real kernel is the window itself, so a loaded file decides which window the FFT applies.
    """

    def __init__(self, window_size: int) -> None:
        super().__init__()
        bins = window_size // 2 + 1
        window = torch.hann_window(window_size, periodic=True, dtype=torch.float64)
        steps = torch.outer(torch.arange(bins), torch.arange(window_size)) % window_size
        angle = steps.double() * (2 * math.pi / window_size)
        self.conv_real = nn.Conv1d(1, bins, window_size, bias=False)
        self.conv_imag = nn.Conv1d(1, bins, window_size, bias=False)
        self.conv_real.weight.data = (torch.cos(angle) * window).float()[:, None]
        self.conv_imag.weight.data = (-torch.sin(angle) * window).float()[:, None]
        self.requires_grad_(False)

    @property
    def window(self) -> Tensor:
        """(window_size,)"""
        return self.conv_real.weight[0, 0]


class Spectrogram(nn.Module):
    """Power spectrogram by FFT: Hann window, centred, reflect padding (paper, section 2.1).

    (B, samples) -> (B, T, window_size // 2 + 1) with T = samples // hop_size + 1.
    """

    def __init__(self, window_size: int, hop_size: int) -> None:
        super().__init__()
        self.hop_size = hop_size
        self.stft = STFTKernels(window_size)

    def forward(self, waveform: Tensor) -> Tensor:
        window = self.stft.window
        if waveform.shape[-1] <= len(window) // 2:
            raise UserError(
                f"A waveform of {waveform.shape[-1]} samples is too short: the STFT needs more than {len(window) // 2}."
            )
        spectrum = torch.stft(
            waveform, len(window), self.hop_size, window=window, center=True, pad_mode="reflect", return_complex=True
        )
        return (spectrum.real**2 + spectrum.imag**2).transpose(1, 2)


class LogMel(nn.Module):
    """(B, T, bins) power -> (B, T, mel_bins) in dB: Slaney mel bands, 10 log10(max(power, 1e-10))."""

    def __init__(self, sample_rate: int, window_size: int, mel_bins: int, fmin: float, fmax: float) -> None:
        super().__init__()
        bands = torchaudio.functional.melscale_fbanks(
            window_size // 2 + 1, fmin, fmax, mel_bins, sample_rate, norm="slaney", mel_scale="slaney"
        )
        self.melW = nn.Parameter(bands, requires_grad=False)

    def forward(self, power: Tensor) -> Tensor:
        return 10.0 * torch.log10(torch.clamp(power @ self.melW, min=POWER_FLOOR))


class BandNorm(nn.BatchNorm1d):
    """BatchNorm over each mel band, (B, F, T) -> (B, F, T), in training with the statistics of all processes' clips.

    torch's SyncBatchNorm does so on CUDA only. This one also runs on the CPU; its input must need no gradient, which
    a log-mel spectrogram does not. The published network has a BatchNorm2d over (B, F, T, 1) here: same numbers, same
    names, but on the CPU torch 2.11 gets the gradients of that one wrong for some layouts.
    """

    def forward(self, x: Tensor) -> Tensor:
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        if alone or not self.training:
            return super().forward(x)
        assert not x.requires_grad, "the statistics pass no gradient"
        values = x.double()
        count = values.new_full((1,), x.shape[0] * x.shape[2])
        sums = torch.cat([values.sum(dim=(0, 2)), values.square().sum(dim=(0, 2)), count])
        dist.all_reduce(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = square - mean**2
        unbiased = variance * (sums[-1] / (sums[-1] - 1))
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(x.dtype), self.momentum or 0.1)
        self.running_var.lerp_(unbiased.to(x.dtype), self.momentum or 0.1)
        return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), self.weight, self.bias, eps=self.eps)


class SpecAugment(nn.Module):
    """Mask stretches of time and frequency with 0 in training (Park et al. 2019; paper, section 3.1).

    (B, F, T) -> (B, F, T); each clip has its own masks.
    """

    def __init__(self, time_width: int = 64, time_masks: int = 2, band_width: int = 8, band_masks: int = 2) -> None:
        super().__init__()
        self.time_width, self.time_masks = time_width, time_masks
        self.band_width, self.band_masks = band_width, band_masks

    def forward(self, logmel: Tensor) -> Tensor:
        clips, bands, frames = logmel.shape
        keep_bands = self._keep(clips, bands, self.band_width, self.band_masks, logmel.device)
        keep_frames = self._keep(clips, frames, self.time_width, self.time_masks, logmel.device)
        return logmel * (keep_bands[:, :, None] & keep_frames[:, None, :])

    @staticmethod
    def _keep(clips: int, length: int, width: int, masks: int, device: torch.device) -> Tensor:
        """(clips, length) bool: False under any of the masks, which are 0 to width - 1 long."""
        size = torch.randint(0, min(width, length), (clips, masks, 1), device=device)
        start = (torch.rand(clips, masks, 1, device=device) * (length - size)).long()
        position = torch.arange(length, device=device)
        return ~((position >= start) & (position < start + size)).any(dim=1)


@lru_cache(maxsize=32)
def bicubic_matrix(size_in: int, size_out: int, device: torch.device) -> Tensor:
    """(size_out, size_in) matrix that does the bicubic stretch (align_corners=True) of one axis.

    As a matrix the stretch is deterministic on CUDA, where the backward pass of interpolate is not.
    """
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):  # it may be used in training later
        unit = torch.eye(size_in)[None, None]
        matrix = F.interpolate(unit, size=(size_out, size_in), mode="bicubic", align_corners=True)
        return matrix[0, 0].to(device)


def stretch(logmel: Tensor, bands: int, frames: int) -> Tensor:
    """(B, F, T) -> (B, bands, frames), bicubic. Raises UserError where it would have to shrink."""
    if logmel.shape[1] > bands or logmel.shape[2] > frames:
        raise UserError(
            f"The log-mel spectrogram has {logmel.shape[1]} bands and {logmel.shape[2]} frames; the network takes at "
            f"most {bands} and {frames}: lower mel_bins or raise htsat_spec_size."
        )
    with torch.autocast(logmel.device.type, enabled=False):
        if logmel.shape[2] != frames:
            logmel = logmel @ bicubic_matrix(logmel.shape[2], frames, logmel.device).T
        if logmel.shape[1] != bands:
            logmel = bicubic_matrix(logmel.shape[1], bands, logmel.device) @ logmel
    return logmel


def fold(logmel: Tensor, freq_ratio: int) -> Tensor:
    """(B, F, T) -> (B, 1, freq_ratio * F, T / freq_ratio): stretches of time stacked along frequency (paper, 2.1)."""
    return rearrange(logmel, "b f (c t) -> b 1 (c f) t", c=freq_ratio)


def stack(logmel: Tensor, freq_ratio: int, start: int) -> Tensor:
    """(B, F, T) -> (B, 1, freq_ratio * F, T / freq_ratio): one stretch of time from `start`, repeated (repeat mode)."""
    length = logmel.shape[2] // freq_ratio
    return repeat(logmel[:, :, start : start + length], "b f t -> b 1 (c f) t", c=freq_ratio)
