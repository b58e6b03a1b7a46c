"""Swin transformer layers (Liu et al. 2021), as HTS-AT uses them: windows of tokens on a square map."""

from typing import Optional

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The attn_mask of published checkpoints holds -100 between tokens that are no neighbours. exp(-100) is a subnormal
# number, which CPUs are slow with; 100 times as much gives an exact 0 and the same outputs.
MASK_SCALE = 100.0


class DropPath(nn.Module):
    """Stochastic depth: in training, a residual branch is left out for a clip with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        return branch * (branch.new_empty(shape).bernoulli_(keep) / keep)


class Mlp(nn.Module):
    """Linear, GELU, Linear on (..., C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """(B, 1, S, S) image -> (B, H, W, C) tokens: one convolution, then LayerNorm."""

    def __init__(self, patch_size: int, stride: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, channels, patch_size, stride, padding=(patch_size - stride) // 2)
        self.norm = nn.LayerNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(rearrange(self.proj(image), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2 C): four neighbours become one token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(rearrange(x, "b (h i) (w j) c -> b h w (j i c)", i=2, j=2)))


def relative_position_index(window: int) -> Tensor:
    """(N, N) long, N = window ** 2: row of the bias table for each pair of tokens of a window."""
    axis = torch.arange(window)
    row, column = (part.flatten() for part in torch.meshgrid(axis, axis, indexing="ij"))
    rows = row[:, None] - row[None, :] + window - 1
    columns = column[:, None] - column[None, :] + window - 1
    return rows * (2 * window - 1) + columns


def shifted_window_mask(size: int, window: int, shift: int) -> Tensor:
    """(windows, N, N) float: 0 between tokens that were neighbours before the roll by `shift`, -100 elsewhere."""
    region = torch.zeros(size)
    region[-window:] = 1
    region[-shift:] = 2
    regions = region[:, None] * 3 + region[None, :]  # nine regions of the rolled map
    tokens = rearrange(regions, "(h i) (w j) -> (h w) (i j)", i=window, j=window)
    return torch.where(tokens[:, :, None] == tokens[:, None, :], 0.0, -100.0)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias by relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))

    def bias(self) -> Tensor:
        """(1, heads, N, N)"""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]

    def forward(
        self, windows: Tensor, mask: Optional[Tensor], need_weights: bool = False
    ) -> tuple[Tensor, Optional[Tensor]]:
        """windows: (B * W, N, C), W windows a clip; mask: (W, N, N) or None.

        Returns the same shape, and with need_weights the attention (B * W, heads, N, N), else None.
        """
        qkv = rearrange(self.qkv(windows), "w n (three h d) -> three w h n d", three=3, h=self.heads)
        query, key, value = qkv.unbind(0)
        term = self.bias()
        if mask is not None:
            term = (term + MASK_SCALE * mask[:, None]).repeat(len(windows) // len(mask), 1, 1, 1)
        term = term.to(query.dtype)
        if need_weights:
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + term
            weights = scores.softmax(dim=-1)
            mixed = weights @ value
        else:
            weights = None
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=term)
        return self.proj(rearrange(mixed, "w h n d -> w n (h d)")), weights


class SwinBlock(nn.Module):
    """Window attention and MLP with residuals, on a (B, H, W, C) map; every second block's windows are shifted."""

    attn_mask: Optional[Tensor]

    def __init__(self, channels: int, size: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)
        self.drop_path = DropPath(drop_path)
        self.register_buffer("attn_mask", shifted_window_mask(size, window, shift) if shift else None)

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Optional[Tensor]]:
        mixed, weights = self._attend(self.norm1(x), need_weights)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x))), weights

    def _attend(self, x: Tensor, need_weights: bool) -> tuple[Tensor, Optional[Tensor]]:
        height = x.shape[1] // self.window
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = rearrange(x, "b (h i) (w j) c -> (b h w) (i j) c", i=self.window, j=self.window)
        windows, weights = self.attn(windows, self.attn_mask, need_weights)
        x = rearrange(windows, "(b h w) (i j) c -> b (h i) (w j) c", h=height, w=height, i=self.window)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x, weights


class Stage(nn.Module):
    """Swin blocks of one resolution, then patch merging but in the last stage."""

    def __init__(self, channels: int, size: int, heads: int, window: int, drop_path: list[float], merge: bool) -> None:
        """channels, size (side of the map in tokens) and heads of this stage; drop_path: the rate of each block."""
        super().__init__()
        self.gradient_checkpointing = False
        shift = window // 2
        if size <= window:  # the map is one window: nothing to shift
            window, shift = size, 0
        self.blocks = nn.ModuleList(
            SwinBlock(channels, size, heads, window, shift if number % 2 else 0, rate)
            for number, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(channels) if merge else None

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Optional[Tensor]]:
        """(B, H, W, C) -> the map, merged if this stage merges; and with need_weights (B, N): attention a token gets.

        Those weights are averaged over blocks, heads and queries, and need a map of one window.
        """
        received = []
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, weights = checkpoint(block, x, need_weights, use_reentrant=False)
            else:
                x, weights = block(x, need_weights)
            if weights is not None:
                received.append(weights.mean(dim=(1, 2)))  # (B * W, heads, query, key) -> (B * W, key)
        if self.downsample is not None:
            x = self.downsample(x)
        return x, torch.stack(received).mean(dim=0) if received else None
