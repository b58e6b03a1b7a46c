"""Front-ends: from the waveform to log-mel spectrograms; and the folded image that HTS-AT reads."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, Optional

import torch
import torch.distributed as dist
import torchaudio
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.compliance import kaldi

from settings import UserError

POWER_FLOOR = 1e-10  # of the mel power, before the logarithm: -100 dB


def mel_filterbank(bins: int, fmin: float, fmax: float, bands: int, sample_rate: int, scale: str = "slaney") -> Tensor:
    """(bins, bands) mel filterbank: Slaney's scale and norm, or htk, which has no norm.

    On the meta device, where build_model measures a network, it has a shape alone.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(bins, bands)
    norm = "slaney" if scale == "slaney" else None
    return torchaudio.functional.melscale_fbanks(bins, fmin, fmax, bands, sample_rate, norm=norm, mel_scale=scale)


def kaldi_filterbank(bands: int, fmin: float, fmax: float, fft: int = 512, sample_rate: int = 16000) -> Tensor:
    """(fft // 2 + 1, bands) Kaldi's triangles, the last bin without weight; fmax 0: half the sample rate."""
    triangles, _ = kaldi.get_mel_banks(bands, fft, float(sample_rate), fmin, fmax, 100.0, -500.0, 1.0)
    return F.pad(triangles, (0, 1)).T.contiguous()


class Analysis(NamedTuple):
    """What a front-end measures, before the logarithm: for pictures of sounds of any length.

    power: (B, samples) -> (B, T, bins), a frame every `hop` samples. bands: (bins, F), their mel bands, from 0 Hz to
    half the sample rate. shortest: samples; beyond: samples behind a frame's hop that it needs.
    """

    power: Callable[[Tensor], Tensor]
    bands: Tensor
    hop: int
    shortest: int
    beyond: int = 0


class FillUp(nn.Module):
    """(B, up to `samples`) -> (B, samples), zeros behind a clip that is shorter."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples

    def forward(self, waveform: Tensor) -> Tensor:
        if waveform.shape[1] > self.samples:
            raise UserError(
                f"A waveform of {waveform.shape[1]} samples is longer than the network's {self.samples}: cut it into "
                f"windows."
            )
        return F.pad(waveform, (0, self.samples - waveform.shape[1]))


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
        bands = mel_filterbank(window_size // 2 + 1, fmin, fmax, mel_bins, sample_rate)
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


class KaldiFbank(nn.Module):
    """(B, samples) at 16 kHz -> (B, T, bands): Kaldi's log filter bank, as torchaudio.compliance.kaldi.fbank.

    Frames of 25 ms every 10 ms without padding; each loses its mean and is pre-emphasized; symmetric window (hanning or
    povey), FFT of 512, HTK mel bands from 20 Hz, natural logarithm. gain: of the samples, 32768 for 16-bit integers. No
    buffer is in the state dict.
    """

    length, hop, fft, floor, preemphasis = 400, 160, 512, 1.1920929e-07, 0.97
    decibel = math.log(10) / 10  # one decibel, in the units of the spectrogram

    def __init__(self, bands: int, *, window: str = "hanning", gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        taper = torch.hann_window(self.length, periodic=False) ** {"hanning": 1.0, "povey": 0.85}[window]
        self.register_buffer("window", taper, persistent=False)
        self.register_buffer("bands", kaldi_filterbank(bands, 20.0, 0.0), persistent=False)  # (bins, bands)

    def forward(self, waveform: Tensor) -> Tensor:
        if waveform.shape[1] < self.length:
            raise UserError(
                f"A waveform of {waveform.shape[1]} samples is too short: a frame of 25 ms has {self.length}."
            )
        return torch.log(torch.clamp(self.power(waveform) @ self.get_buffer("bands"), min=self.floor))

    def power(self, waveform: Tensor) -> Tensor:
        """(B, samples) -> (B, T, bins)."""
        frames = self.emphasized(waveform.unfold(1, self.length, self.hop)) * self.get_buffer("window")
        spectrum = torch.fft.rfft(frames, n=self.fft)
        return spectrum.real**2 + spectrum.imag**2

    def analysis(self) -> Analysis:
        return Analysis(self.power, self.get_buffer("bands"), self.hop, self.length, self.length - self.hop)

    def traced(self, samples: int) -> nn.Module:
        """The same for clips of so many samples, in operators of the ONNX standard."""
        window, bands = self.get_buffer("window"), self.get_buffer("bands")
        return TracedLogMel(
            window,
            bands,
            self.hop,
            samples,
            pad=0,
            size=self.fft,
            scale=math.log(10),
            floor=self.floor,
            before=self.emphasized,
        )

    def emphasized(self, frames: Tensor) -> Tensor:
        """(..., length) frames without their mean, and with less of each sample's predecessor."""
        frames = self.gain * (frames - frames.mean(dim=-1, keepdim=True))
        return frames - self.preemphasis * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)


class CentredLogMel(nn.Module):
    """(B, samples) -> (B, T, bands): scale * log10(max(mel power, floor) + offset) of frames centred on each hop.

    window: (length,), in the middle of a frame of `fft` samples; bands: (fft // 2 + 1, bands); pad_mode: what lies
    beyond the ends. preemphasis: share of each sample's predecessor that is taken away, which costs the clip one
    sample; 0: none. No buffer is in the state dict.
    """

    def __init__(
        self,
        window: Tensor,
        bands: Tensor,
        *,
        fft: int,
        hop: int,
        scale: float = math.log(10),
        floor: float = 0.0,
        offset: float = 0.0,
        pad_mode: str = "reflect",
        preemphasis: float = 0.0,
    ) -> None:
        super().__init__()
        self.fft, self.hop, self.scale, self.floor, self.offset = fft, hop, scale, floor, offset
        self.pad_mode, self.preemphasis = pad_mode, preemphasis
        self.decibel = scale / 10  # one decibel, in the units of the spectrogram
        spare = fft - len(window)
        self.register_buffer("window", F.pad(window, (spare // 2, spare - spare // 2)), persistent=False)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        power = self.power(self.emphasized(waveform)) @ self.get_buffer("bands")
        return self.scale * torch.log10(torch.clamp(power, min=self.floor) + self.offset)

    def emphasized(self, waveform: Tensor) -> Tensor:
        return waveform[:, 1:] - self.preemphasis * waveform[:, :-1] if self.preemphasis else waveform

    def power(self, waveform: Tensor) -> Tensor:
        """(B, samples) -> (B, T, bins)."""
        spectrum = torch.stft(
            waveform, self.fft, self.hop, window=self.get_buffer("window"), pad_mode=self.pad_mode, return_complex=True
        )
        return (spectrum.real**2 + spectrum.imag**2).transpose(1, 2)

    def analysis(self) -> Analysis:
        return Analysis(self.power, self.get_buffer("bands"), self.hop, max(self.hop, self.fft // 2 + 1))

    def traced(self, samples: int) -> nn.Module:
        """The same for clips of so many samples, in operators of the ONNX standard."""
        log_mel = TracedLogMel(
            self.get_buffer("window"),
            self.get_buffer("bands"),
            self.hop,
            samples - bool(self.preemphasis),
            pad=self.fft // 2,
            pad_mode=self.pad_mode,
            scale=self.scale,
            floor=self.floor,
            offset=self.offset,
        )
        return nn.Sequential(Emphasis(self), log_mel) if self.preemphasis else log_mel


class Emphasis(nn.Module):
    """The pre-emphasis of a CentredLogMel alone."""

    def __init__(self, analysis: CentredLogMel) -> None:
        super().__init__()
        self.emphasized = analysis.emphasized

    def forward(self, waveform: Tensor) -> Tensor:
        return self.emphasized(waveform)


class SlaneyDecibels(CentredLogMel):
    """(B, samples) -> (B, T, bands): 20 log10 of the mel power, as torchaudio's MelSpectrogram with Slaney's bands.

    Hann window of 1024 in frames of 4096 every 400 samples, zeros beyond the ends. The factor 20, for a power, is that
    of "AudioTagging Done Right": its statistics and weights are on this scale.
    """

    hop = 400

    def __init__(self, bands: int, sample_rate: int) -> None:
        triangles = mel_filterbank(4096 // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate)
        window = torch.hann_window(1024)
        super().__init__(window, triangles, fft=4096, hop=400, scale=20.0, floor=POWER_FLOOR, pad_mode="constant")


class TracedLogMel(nn.Module):
    """(B, samples) -> (B, T, F), `scale` times log10 of the mel power, in operators of the ONNX standard.

    The Fourier transform of N samples is taken in two steps of about sqrt(N) each (Cooley and Tukey 1965), as products
    with constant matrices: that takes an eighth of the operations of the convolution that published networks have, and
    onnxruntime half its time; ONNX's operator STFT is no faster there than the convolution, and fewer runtimes know it.
    With n = n1 R2 + n2 and k = k1 + R1 k2: X[k] = sum over n2 of exp(-2 pi i n2 k / N) (sum over n1 of
    exp(-2 pi i n1 k1 / R1) x[n]). k1 goes up to R1 / 2: the other frequencies mirror these, as the samples are real.
    """

    def __init__(
        self,
        window: Tensor,
        bands: Tensor,
        hop: int,
        samples: int,
        *,
        pad: int,
        size: Optional[int] = None,
        pad_mode: str = "reflect",
        scale: float = 10.0,
        floor: float = POWER_FLOOR,
        offset: float = 0.0,
        before: Optional[Callable[[Tensor], Tensor]] = None,
    ) -> None:
        """window: (length,); size: N, None: length; bands: (N // 2 + 1, F); samples: of a clip.

        pad: samples beyond each end. before: what is done to the frames (B, T, length) before the window.
        """
        super().__init__()
        window, bands = window.detach().cpu(), bands.detach().cpu()
        length, size = len(window), size or len(window)
        second = size // max(k for k in range(1, math.isqrt(size) + 1) if size % k == 0)
        first = size // second
        self.pad, self.pad_mode, self.before = pad, pad_mode, before
        self.scale, self.floor, self.offset = scale, floor, offset
        self.block = math.gcd(length, hop)  # the frames are put together from whole blocks
        self.frames, self.shape, self.fill = (samples + 2 * pad - length) // hop + 1, (first, second), size - length
        starts = torch.arange(self.frames) * (hop // self.block)
        self.register_buffer("blocks", (starts[:, None] + torch.arange(length // self.block)).flatten())
        self.register_buffer("window", window)

        k1, k2 = torch.arange(first // 2 + 1), torch.arange(second)
        angle = torch.outer(k1, torch.arange(first)).double() * (2 * math.pi / first)
        rows = torch.stack([angle.cos(), -angle.sin()], dim=1)  # (k1, real and imaginary, n1)
        self.register_buffer("first", rows.flatten(0, 1).float())
        frequency = k1[:, None] + first * k2  # (k1, k2)
        angle = (torch.arange(second)[:, None] * frequency[:, None] % size).double() * (2 * math.pi / size)
        real, imaginary = angle.cos(), -angle.sin()  # (k1, n2, k2)
        parts = torch.cat([real, imaginary], dim=2), torch.cat([-imaginary, real], dim=2)
        self.register_buffer("second", torch.cat(parts, dim=1).float())

        mirrored = torch.minimum(frequency, size - frequency).flatten()
        twice = torch.tensor([int(k) in mirrored[:place] for place, k in enumerate(mirrored)])
        weights = torch.where(twice[:, None], 0.0, bands[mirrored])  # each frequency counts once
        self.register_buffer("bands", weights.unflatten(0, frequency.shape).contiguous())  # (k1, k2, F)

    def forward(self, waveform: Tensor) -> Tensor:
        if self.pad:
            waveform = F.pad(waveform[:, None], (self.pad, self.pad), mode=self.pad_mode)[:, 0]
        whole = waveform.shape[1] // self.block * self.block
        blocks = waveform[:, :whole].unflatten(1, (-1, self.block)).index_select(1, self.get_buffer("blocks"))
        samples = blocks.reshape(-1, self.frames, len(self.get_buffer("window")))  # (B, T, length)
        if self.before is not None:
            samples = self.before(samples)
        samples = samples * self.get_buffer("window")
        if self.fill:
            samples = F.pad(samples, (0, self.fill))
        short = self.get_buffer("first") @ samples.unflatten(2, self.shape)  # (B, T, k1 and real or imaginary, n2)
        short = rearrange(short, "b t (k1 c) n2 -> b k1 t (c n2)", c=2)  # whole rows move: onnxruntime is fast at that
        real, imaginary = (short @ self.get_buffer("second")).chunk(2, dim=-1)  # (B, k1, T, k2)
        power = ((real**2 + imaginary**2) @ self.get_buffer("bands")).sum(dim=1)
        return self.scale * torch.log10(torch.clamp(power, min=self.floor) + self.offset)


@lru_cache(maxsize=32)
def resizing_matrix(
    size_in: int,
    size_out: int,
    device: torch.device,
    mode: Literal["bicubic", "bilinear", "mean"] = "bicubic",
    *,
    align_corners: bool = False,
) -> Tensor:
    """(size_out, size_in) matrix that resizes one axis as F.interpolate does; mean: as F.adaptive_avg_pool1d.

    As a matrix it is deterministic on CUDA, where the backward passes of those are not.
    """
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):  # it may be used in training later
        unit, size = torch.eye(size_in)[None, None], (size_out, size_in)
        if mode == "mean":
            matrix = F.adaptive_avg_pool2d(unit, size)
        else:
            matrix = F.interpolate(unit, size=size, mode=mode, align_corners=align_corners)
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
            logmel = logmel @ resizing_matrix(logmel.shape[2], frames, logmel.device, align_corners=True).T
        if logmel.shape[1] != bands:
            logmel = resizing_matrix(logmel.shape[1], bands, logmel.device, align_corners=True) @ logmel
    return logmel


def fold(logmel: Tensor, freq_ratio: int) -> Tensor:
    """(B, F, T) -> (B, 1, freq_ratio * F, T / freq_ratio): stretches of time stacked along frequency (paper, 2.1)."""
    return rearrange(logmel, "b f (c t) -> b 1 (c f) t", c=freq_ratio)


def stack(logmel: Tensor, freq_ratio: int, start: int) -> Tensor:
    """(B, F, T) -> (B, 1, freq_ratio * F, T / freq_ratio): one stretch of time from `start`, repeated (repeat mode)."""
    length = logmel.shape[2] // freq_ratio
    return repeat(logmel[:, :, start : start + length], "b f t -> b 1 (c f) t", c=freq_ratio)
