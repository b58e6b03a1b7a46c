"""ASiT: a transformer over patches of 16 bands and 16 frames, with a class token among them.

Ahmed, Awais, Kittler et al.: ASiT: Local-Global Audio Spectrogram vIsion Transformer for Event Classification, TASLP
2024, arXiv 2211.13189. Shapes: B clips, F bands, T frames, L tokens, D channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
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
from model.frontend import KaldiFbank, resizing_matrix
from model.layers.vit import EPS, init_linear, vit_blocks
from model.network import Layer
from settings import UserError

BANDS, PATCH = 128, 16  # mel bands; bands and frames of a patch
STEPS, ROWS = 62, BANDS // PATCH  # of the patches of 10 s
# Published weights read the table of positions as 8 x 37 and stretch it to 62 x 8, although it was pre-trained as
# frequency x time: they have been trained so.
TABLE = (8, 37)


class ASiT(FrameNetwork):
    """The published network. The class token stays in the sequence: it comes first."""

    mean, scale = -4.2677393, 2 * 4.5689974

    def __init__(
        self, *, dim: int = 768, depth: int = 12, heads: int = 12, drop_layers: int = 0, **shared: Any
    ) -> None:
        check_sizes(dim, depth, heads, drop_layers)
        super().__init__(build_bank(), dim, **shared)
        self.asit = SpectrogramTransformer(dim, depth - drop_layers, heads)

    def encode(self, features: Tensor) -> Tensor:
        return self.asit(features)

    def encoder_layers(self) -> list[Layer]:
        asit = self.asit
        blocks: list[Layer] = [[block] for block in asit.blocks]
        return [[asit.patch_embed, asit.cls_token, asit.pos_embed], *blocks[:-1], [*blocks[-1], asit.norm]]


class SpectrogramTransformer(nn.Module):
    """(B, 128, T) -> (B, 1 + T // 16 * 8, D): the class token, then the patches, those of a time side by side."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TABLE[0] * TABLE[1], dim))
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.patch_embed = PatchEmbed(dim)
        self.blocks = vit_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Tensor:
        patches = self.patch_embed(features)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.positions(
            patches.shape[1]
        )
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def positions(self, patches: int) -> Tensor:
        """(1, 1 + patches, D) of the class token and the first patches of 10 s."""
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            grid = self.pos_embed[0, 1:].float().unflatten(0, TABLE)  # (8, 37, D)
            down, right = (
                resizing_matrix(size, wanted, grid.device) for size, wanted in zip(TABLE, (STEPS, ROWS), strict=True)
            )
            grid = torch.einsum("ti,ijd,fj->tfd", down, grid, right)  # (STEPS, ROWS, D)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(0, 1)[None, :patches]], dim=1)


class PatchEmbed(nn.Module):
    """(B, 128, T) -> (B, T // 16 * 8, D): patches, first by time, then by frequency."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, PATCH, stride=PATCH)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)


def build_bank() -> KaldiFbank:
    return KaldiFbank(BANDS)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PretrainedSED's files under this network's names. Raises UserError for another transformer."""
    table = find(weights, "pos_embed")
    if table.ndim != 3 or table.shape[1] != 1 + TABLE[0] * TABLE[1]:
        raise UserError(f"it is a vision transformer of {tuple(table.shape)} positions, and no encoder here has those")
    return described("ASiT", "asit.", weights, transformer_sizes(weights, "blocks", table.shape[2]))


NETWORK = ASiT
build, build_frontend, build_analysis = builders(ASiT, build_bank)
