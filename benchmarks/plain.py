"""The published forward pass, written plainly: what the benchmarks of inference and training compare with.

As the paper's code computes it: the STFT as a convolution, BatchNorm2d, interpolate for the bicubic stretch, windows by
view and roll, attention as an explicit softmax whose maps are kept, a mask of -100, and the frame scores repeated in
memory. Its parameters have the names of model/encoders/htsat.py, so one state dict serves both.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainSpectrogram(nn.Module):
    """(B, samples) -> (B, 1, T, bins) power, by two convolutions."""

    def __init__(self, window_size: int, hop_size: int) -> None:
        super().__init__()
        bins = window_size // 2 + 1
        self.window_size = window_size
        kernels = {name: nn.Conv1d(1, bins, window_size, stride=hop_size, bias=False) for name in ("real", "imag")}
        self.stft = nn.ModuleDict({f"conv_{name}": kernel for name, kernel in kernels.items()})
        self.requires_grad_(False)

    def forward(self, waveform: Tensor) -> Tensor:
        padded = F.pad(waveform[:, None], (self.window_size // 2, self.window_size // 2), mode="reflect")
        real, imag = self.stft["conv_real"](padded), self.stft["conv_imag"](padded)
        return (real**2 + imag**2).transpose(1, 2)[:, None]


class PlainLogMel(nn.Module):
    """(B, 1, T, bins) -> (B, 1, T, F) in dB."""

    def __init__(self, window_size: int, mel_bins: int) -> None:
        super().__init__()
        self.melW = nn.Parameter(torch.empty(window_size // 2 + 1, mel_bins), requires_grad=False)

    def forward(self, power: Tensor) -> Tensor:
        return 10.0 * torch.log10(torch.clamp(torch.matmul(power, self.melW), min=1e-10))


def window_partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, window * window, C)"""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, channels)


def window_reverse(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """(B * windows, window * window, C) -> (B, H, W, C)"""
    batch = windows.shape[0] // (height // window * width // window)
    x = windows.view(batch, height // window, width // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


class PlainAttention(nn.Module):
    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", torch.empty(window**2, window**2, dtype=torch.long))

    def forward(self, x: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        rows, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        attention = (query * self.scale) @ key.transpose(-2, -1)
        index: Any = self.relative_position_index
        bias = self.relative_position_bias_table[index.view(-1)].view(tokens, tokens, -1)
        attention = attention + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            attention = attention.view(rows // windows, windows, self.heads, tokens, tokens) + mask[None, :, None]
            attention = attention.view(-1, self.heads, tokens, tokens)
        attention = attention.softmax(dim=-1)
        return self.proj((attention @ value).transpose(1, 2).reshape(rows, tokens, channels)), attention


class PlainBlock(nn.Module):
    def __init__(self, channels: int, size: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.size, self.window, self.shift, self.drop_rate = size, window, shift, drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = PlainAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(channels, 4 * channels), "fc2": nn.Linear(4 * channels, channels)})
        windows = (size // window) ** 2
        self.register_buffer("attn_mask", torch.empty(windows, window**2, window**2) if shift else None)

    def drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_rate == 0.0:
            return branch
        keep = 1 - self.drop_rate
        kept = torch.floor(keep + torch.rand(len(branch), 1, 1, dtype=branch.dtype, device=branch.device))
        return branch.div(keep) * kept

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, channels = x.shape
        shortcut = x
        x = self.norm1(x).view(batch, self.size, self.size, channels)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        mask: Any = self.attn_mask
        mixed, attention = self.attn(window_partition(x, self.window), mask)
        x = window_reverse(mixed, self.window, self.size, self.size)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + self.drop(x.view(batch, tokens, channels))
        x = x + self.drop(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))
        return x, attention


class PlainMerging(nn.Module):
    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, channels = x.shape
        x = x.view(batch, self.size, self.size, channels)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, dim=-1).view(batch, -1, 4 * channels)))


class PlainStage(nn.Module):
    def __init__(self, channels: int, size: int, heads: int, window: int, rates: Sequence[float], merge: bool) -> None:
        super().__init__()
        shift = 0 if size <= window else window // 2
        window = min(window, size)
        self.blocks = nn.ModuleList(
            PlainBlock(channels, size, heads, window, shift if number % 2 else 0, rate)
            for number, rate in enumerate(rates)
        )
        self.downsample = PlainMerging(channels, size) if merge else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for block in self.blocks:
            x, attention = block(x)
            maps.append(attention)  # the published code keeps all of a stage
        return (self.downsample(x) if self.downsample is not None else x), maps[-1]


class PlainHTSAT(nn.Module):
    """The token-semantic network for clips of up to 10.24 s, without mixup and SpecAugment."""

    def __init__(
        self,
        num_classes: int = 527,
        window_size: int = 1024,
        hop_size: int = 320,
        mel_bins: int = 64,
        spec_size: int = 256,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window: int = 8,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.spec_size, self.ratio = spec_size, spec_size // mel_bins
        self.spectrogram_extractor = PlainSpectrogram(window_size, hop_size)
        self.logmel_extractor = PlainLogMel(window_size, mel_bins)
        self.bn0 = nn.BatchNorm2d(mel_bins)
        patches = nn.Conv2d(1, embed_dim, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patches, "norm": nn.LayerNorm(embed_dim)})
        size = spec_size // patch_size
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.layers = nn.ModuleList(
            PlainStage(
                embed_dim * 2**k, size // 2**k, heads, window, [next(rates) for _ in range(depth)], k < len(depths) - 1
            )
            for k, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )
        channels, last = embed_dim * 2 ** (len(depths) - 1), size // 2 ** (len(depths) - 1)
        self.freq_bins, self.last, self.repeats = last // self.ratio, last, spec_size // last
        self.norm = nn.LayerNorm(channels)
        self.tscam_conv = nn.Conv2d(channels, num_classes, (self.freq_bins, 3), padding=(0, 1))
        self.head = nn.Linear(num_classes, num_classes)

    def image(self, x: Tensor) -> Tensor:
        """(B, 1, T, F) -> (B, 1, spec_size, spec_size)"""
        frames = self.spec_size * self.ratio
        if x.shape[2] < frames:
            x = F.interpolate(x, (frames, x.shape[3]), mode="bicubic", align_corners=True)
        x = x.permute(0, 1, 3, 2).contiguous()
        x = x.reshape(x.shape[0], x.shape[1], x.shape[2], self.ratio, frames // self.ratio)
        x = x.permute(0, 1, 3, 2, 4).contiguous()
        return x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3], x.shape[4])

    def forward(self, waveform: Tensor) -> dict[str, Tensor]:
        x = self.logmel_extractor(self.spectrogram_extractor(waveform))
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        x = self.patch_embed["norm"](self.patch_embed["proj"](self.image(x)).flatten(2).transpose(1, 2))
        maps = []
        for stage in self.layers:
            x, attention = stage(x)
            maps.append(attention)
        x = self.norm(x)
        batch, _, channels = x.shape
        x = x.permute(0, 2, 1).contiguous().reshape(batch, channels, self.last, self.last)
        x = x.reshape(batch, channels, self.ratio, self.freq_bins, self.last)
        x = x.permute(0, 1, 3, 2, 4).contiguous().reshape(batch, channels, self.freq_bins, -1)
        latent = F.adaptive_avg_pool1d(x.flatten(2), 1).flatten(1)
        logits = self.tscam_conv(x).flatten(2)  # (B, K, steps)
        frames = torch.sigmoid(logits).permute(0, 2, 1).contiguous()
        frames = frames[:, :, None].repeat(1, 1, self.repeats, 1).reshape(batch, -1, frames.shape[2])
        clip = F.adaptive_avg_pool1d(logits, 1).flatten(1)
        return {
            "clipwise_output": torch.sigmoid(clip),
            "clipwise_logits": clip,
            "framewise_output": frames,
            "latent_output": latent,
        }
