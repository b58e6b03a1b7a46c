"""ATST-Frame: a transformer over patches of 40 ms that hold all mel bands.

Li, Shao, Li: Self-supervised Audio Teacher-Student Transformer for Both Clip-level and Frame-level Tasks, TASLP 2024,
arXiv 2306.04186. Shapes: B clips, F bands, T frames, L tokens, D channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

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
from model.frontend import CentredLogMel, mel_filterbank
from model.layers.vit import EPS, init_linear, vit_blocks
from model.network import Layer

BANDS, PATCH = 64, 4  # mel bands; frames of a patch, 40 ms
DYNAMIC_RANGE = 80.0  # dB below the loudest cell
LIMITS = (-50.0, 80.0)  # dB


class ATST(FrameNetwork):
    """The published network. Its file's mask_embed, of the pre-training, has no part in it.

    floor: clip, no cell lies more than 80 dB below the loudest of its clip; batch: of the whole batch, as published,
    where a clip's features depend on its neighbours.
    """

    mean, scale = 130.3324 / 2 - 79.6482, 130.3324 / 2

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_layers: int = 0,
        floor: str = "clip",
        **shared: Any,
    ) -> None:
        check_sizes(dim, depth, heads, drop_layers)
        super().__init__(AtstDecibels(floor), dim, **shared)
        self.atst = ATSTFrame(dim, depth - drop_layers, heads)

    def encode(self, features: Tensor) -> Tensor:
        return self.atst(features)

    def encoder_layers(self) -> list[Layer]:
        blocks: list[Layer] = [[block] for block in self.atst.blocks]
        return [[self.atst.patch_embed, self.atst.pos_embed], *blocks[:-1], [*blocks[-1], self.atst.norm_frame]]


class ATSTFrame(nn.Module):
    """(B, 64, T) -> (B, T // 4, D)."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + LONGEST // FRAME_SAMPLES, dim))  # the first row is not used
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = vit_blocks(dim, depth, heads, qkv_bias=False)
        self.norm_frame = nn.LayerNorm(dim, eps=EPS)
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.patch_embed(features)
        x = tokens + self.pos_embed[:, 1 : 1 + tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm_frame(x)


class PatchEmbed(nn.Module):
    """(B, 64, T) -> (B, T // 4, D): the frames of a patch, band by band. What is left of T belongs to no patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(BANDS * PATCH, dim)

    def forward(self, features: Tensor) -> Tensor:
        whole = features.shape[2] // PATCH * PATCH
        return self.patch_embed(rearrange(features[:, :, :whole], "b f (t p) -> b t (f p)", p=PATCH))


class AtstDecibels(CentredLogMel):
    """(B, samples) -> (B, T, 64) in dB: 64 HTK bands from 60 to 7800 Hz, at most 80 dB below the loudest cell."""

    def __init__(self, floor: str = "clip") -> None:
        bands = mel_filterbank(513, 60.0, 7800.0, BANDS, 16000, "htk")
        super().__init__(torch.hann_window(1024), bands, fft=1024, hop=160, scale=10.0, floor=1e-10)
        self.limit = Limit(floor)

    def forward(self, waveform: Tensor) -> Tensor:
        return self.limit(super().forward(waveform))

    def traced(self, samples: int) -> nn.Module:
        return nn.Sequential(super().traced(samples), self.limit)


class Limit(nn.Module):
    """(B, T, F) dB -> the same, no lower than DYNAMIC_RANGE below the largest (of a clip or the batch), in LIMITS."""

    def __init__(self, floor: str) -> None:
        super().__init__()
        self.dims = (1, 2) if floor == "clip" else (0, 1, 2)

    def forward(self, decibels: Tensor) -> Tensor:
        loudest = decibels.amax(dim=self.dims, keepdim=True)
        return torch.maximum(decibels, loudest - DYNAMIC_RANGE).clamp(*LIMITS)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PretrainedSED's files under this network's names."""
    dim = find(weights, "patch_embed.patch_embed.weight").shape[0]
    return described("ATST-Frame", "atst.", weights, transformer_sizes(weights, "blocks", dim))


NETWORK = ATST
build, build_frontend, build_analysis = builders(ATST, AtstDecibels)
