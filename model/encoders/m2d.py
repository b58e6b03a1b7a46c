"""M2D: a vision transformer over patches of 16 bands and 16 frames, those of a time joined to one frame.

Niizumi et al.: Masked Modeling Duo, TASLP 2024, arXiv 2404.06095; M2D-CLAP, arXiv 2406.02032. Shapes: B clips, F bands,
T frames, L tokens, D channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from model.foreign import Weights
from model.frame_network import (
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

BANDS, PATCH = 80, 16  # mel bands; bands and frames of a patch
ROWS, STEPS = BANDS // PATCH, 62  # of the patches of 10 s


class M2D(FrameNetwork):
    """The published network: the patches of a time, 5 of 768 channels, are one token of 3840.

    Its file's norm_stats are not used: mean and deviation are constants.
    """

    mean, scale = -7.1, 4.2

    def __init__(
        self, *, dim: int = 768, depth: int = 12, heads: int = 12, drop_layers: int = 0, **shared: Any
    ) -> None:
        check_sizes(dim, depth, heads, drop_layers)
        super().__init__(build_bank(), ROWS * dim, **shared)
        self.m2d = nn.ModuleDict({"backbone": VisionTransformer(dim, depth - drop_layers, heads)})

    def encode(self, features: Tensor) -> Tensor:
        return self.m2d["backbone"](features)

    def encoder_layers(self) -> list[Layer]:
        backbone: Any = self.m2d["backbone"]
        blocks: list[Layer] = [[block] for block in backbone.blocks]
        below = [backbone.patch_embed, backbone.cls_token, backbone.pos_embed]
        return [below, *blocks[:-1], [*blocks[-1], backbone.norm]]


class VisionTransformer(nn.Module):
    """(B, 80, T) -> (B, T // 16, 5 D): the patches of a time side by side, the lowest first."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + ROWS * STEPS, dim))
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = PatchEmbed(dim)
        self.blocks = vit_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Tensor:
        grid = self.patch_embed(features)  # (B, 5, steps, D)
        grid = grid + self.pos_embed[:, 1:].unflatten(1, (ROWS, STEPS))[:, :, : grid.shape[2]]
        token = (self.cls_token + self.pos_embed[:, :1]).expand(grid.shape[0], -1, -1)
        x = torch.cat([token, grid.flatten(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x)
        return rearrange(self.norm(x)[:, 1:], "b (f t) d -> b t (f d)", f=ROWS)


class PatchEmbed(nn.Module):
    """(B, 80, T) -> (B, 5, T // 16, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, PATCH, stride=PATCH)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features[:, None]).permute(0, 2, 3, 1)


def build_bank() -> CentredLogMel:
    """80 Slaney bands from 50 to 8000 Hz every 10 ms, natural logarithm."""
    bands = mel_filterbank(201, 50.0, 8000.0, BANDS, 16000)
    return CentredLogMel(torch.hann_window(400), bands, fft=400, hop=160, offset=1.1920929e-07)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PretrainedSED's files under this network's names."""
    named = {f"m2d.{key}" if key.startswith("backbone.") else key: value for key, value in weights.items()}
    dim = find(named, "patch_embed.proj.weight").shape[0]
    return described("M2D", "m2d.", named, transformer_sizes(named, "blocks", dim))


NETWORK = M2D
build, build_frontend, build_analysis = builders(M2D, build_bank)
