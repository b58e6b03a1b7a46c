"""Frame-PaSST: convolutions in time down to 40 ms, then a transformer over frames that hold all mel bands.

Koutini et al.: Efficient Training of Audio Transformers with Patchout, Interspeech 2022, arXiv 2110.05069; its form
with frames: Schmid et al., arXiv 2409.09546. Shapes: B clips, F bands, T frames, L tokens, D channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.foreign import Weights
from model.frame_network import (
    FRAME_SAMPLES,
    LONGEST,
    FrameNetwork,
    builders,
    check_sizes,
    described,
    find,
    transformer_sizes,
)
from model.frontend import CentredLogMel, kaldi_filterbank
from model.layers.vit import EPS, init_linear, vit_blocks
from model.network import Layer

BANDS = 128
TOKENS = 2  # class and distillation token


class FPaSST(FrameNetwork):
    """The published network. Of a clip shorter than 10 s, the first positions of the table are used."""

    mean, scale = -4.5, 5.0
    not_in_images = ("fpasst.conv_in_",)

    def __init__(
        self, *, dim: int = 768, depth: int = 12, heads: int = 12, drop_layers: int = 0, **shared: Any
    ) -> None:
        check_sizes(dim, depth, heads, drop_layers)
        super().__init__(build_bank(), dim, **shared)
        self.fpasst = FrameTransformer(dim, depth - drop_layers, heads)

    def encode(self, features: Tensor) -> Tensor:
        return self.fpasst(features)

    def encoder_layers(self) -> list[Layer]:
        own = self.fpasst
        blocks: list[Layer] = [[block] for block in own.blocks]
        below: list[nn.Module | nn.Parameter] = [own.conv_in_1, own.conv_in_2, own.conv_in_3, own.patch_embed]
        below += [own.cls_token, own.dist_token, own.new_pos_embed, own.freq_new_pos_embed, own.time_new_pos_embed]
        return [below, *blocks[:-1], [*blocks[-1], own.norm]]


class FrameTransformer(nn.Module):
    """(B, 128, T) -> (B, T / 4, D)."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, TOKENS, dim))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, dim, 1, LONGEST // FRAME_SAMPLES))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)
        self.conv_in_1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv_in_2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv_in_3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.patch_embed = PatchEmbed(dim)
        self.blocks = vit_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Tensor:
        x = features[:, None]
        for convolution in (self.conv_in_1, self.conv_in_2, self.conv_in_3):
            x = F.gelu(convolution(x))  # (B, 64, F / 4, T / 4) in the end
        x = self.patch_embed(x.reshape(x.shape[0], 16, BANDS, -1))  # (B, D, 1, T / 4)
        x = x + self.time_new_pos_embed[..., : x.shape[3]] + self.freq_new_pos_embed
        tokens = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        x = torch.cat([tokens.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, TOKENS:]


class PatchEmbed(nn.Module):
    """(B, 16, 128, T) -> (B, D, 1, T): each column with the next one, zeros behind the last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(16, dim, (BANDS, 2), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)[..., 1:]


def build_bank() -> CentredLogMel:
    """128 Kaldi bands up to 7 kHz every 10 ms of the pre-emphasized sound, natural logarithm.

    In the published training its edges are drawn anew for each batch; here they are those of its evaluation.
    """
    window, bands = torch.hann_window(400), kaldi_filterbank(BANDS, 0.0, 7000.0)
    return CentredLogMel(window, bands, fft=512, hop=160, floor=1e-7, preemphasis=0.97)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PretrainedSED's files, or of ImageNet's DeiT, under this network's names."""
    if not any(key.endswith("time_new_pos_embed") for key in weights):
        return replace(described("ImageNet DeiT", "fpasst.", *_of_deit(weights)), images=True)
    dim = find(weights, "time_new_pos_embed").shape[1]
    return described("Frame-PaSST", "fpasst.", weights, transformer_sizes(weights, "blocks", dim))


def _of_deit(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """DeiT's weights and sizes: its patches of 16 x 16 in three colours become columns of 128 x 2 in 16 channels."""
    kept = {key: value for key, value in weights.items() if not key.startswith(("head.", "head_dist.", "pos_embed"))}
    table, kernel = weights["pos_embed"], weights["patch_embed.proj.weight"]
    dim, colours = len(kernel), torch.arange(16) % kernel.shape[1]
    kept["patch_embed.proj.weight"] = (kernel[:, colours] * (kernel.shape[1] / 16)).reshape(dim, 16, BANDS, 2)
    side = round((table.shape[1] - TOKENS) ** 0.5)
    grid = table[:, TOKENS:].transpose(1, 2).unflatten(2, (side, side))
    times = F.interpolate(grid, size=(1, LONGEST // FRAME_SAMPLES), mode="bicubic")
    kept |= {
        "new_pos_embed": table[:, :TOKENS],
        "time_new_pos_embed": times,
        "freq_new_pos_embed": times.mean(dim=3, keepdim=True),
    }
    return kept, transformer_sizes(kept, "blocks", dim)


NETWORK = FPaSST
build, build_frontend, build_analysis = builders(FPaSST, build_bank)
