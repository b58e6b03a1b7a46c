"""Blocks of vision transformers: timm's, as the published encoders of sound have them."""

from functools import partial
from typing import Any

from timm.models.vision_transformer import Block
from torch import nn

EPS = 1e-6  # of each LayerNorm


def vit_blocks(dim: int, depth: int, heads: int, *, qkv_bias: bool = True) -> nn.ModuleList:
    """`depth` pre-norm blocks (B, L, dim) -> (B, L, dim): attention, and an MLP of 4 dim with exact GELU."""
    norm: Any = partial(nn.LayerNorm, eps=EPS)
    return nn.ModuleList(Block(dim, heads, 4.0, qkv_bias=qkv_bias, norm_layer=norm) for _ in range(depth))


def init_linear(module: nn.Module) -> None:
    """For nn.Module.apply: weights of linear layers from a truncated normal distribution of 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
