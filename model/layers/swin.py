"""Swin transformer layers (Liu et al. 2021), as HTS-AT uses them: windows of tokens on a map.

A map's `size` is its height and width in tokens; one number stands for a square.

Between blocks the tokens of a map, (B, L, C), stand in the order of windows: those of a window one after another. All
but attention looks at each token alone, so only the change between shifted and unshifted windows moves tokens, by one
gather, where the published code rolls, cuts and joins the map in every block.
"""

import os
from typing import Any, Optional, Union

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

# The attn_mask of published checkpoints holds -100 between tokens that are no neighbours. exp(-100) is a subnormal
# number, which CPUs are slow with; 100 times as much gives an exact 0 and the same outputs.
MASK_SCALE = 100.0

# Attention by the kernels of window_attention.py, on a GPU: off until it is measured to win (benchmarks/gpu.sh).
TRITON_ATTENTION = os.environ.get("HTSAT_TRITON_ATTENTION") == "1"
if TRITON_ATTENTION:
    from model.layers.window_attention import Windows, attend_windows, fits

Size = Union[int, tuple[int, int]]


def height_and_width(size: Size) -> tuple[int, int]:
    """Both sides of a map, or both strides; one number stands for two equal ones."""
    return (size, size) if isinstance(size, int) else size


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
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    """(B, 1, S, S) image -> (B, L, C) tokens, row by row: one convolution, then LayerNorm.

    L is S / stride along each axis: patches larger than their stride overlap, and the padding keeps their number.
    """

    def __init__(self, patch_size: int, stride: Size, channels: int) -> None:
        super().__init__()
        down, right = height_and_width(stride)
        padding = ((patch_size - down) // 2, (patch_size - right) // 2)
        self.proj = nn.Conv2d(1, channels, patch_size, (down, right), padding=padding)
        self.norm = nn.LayerNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


def window_order(size: Size, window: int, shift: int) -> Tensor:
    """(L,) long: the place, row by row, of each token when the tokens stand in the order of windows.

    The map is rolled by -shift along both axes before it is cut.
    """
    height, width = height_and_width(size)
    places = torch.arange(height * width).view(height, width).roll((-shift, -shift), dims=(0, 1))
    return rearrange(places, "(h i) (w j) -> (h w i j)", i=window, j=window)


def change_of_order(now: Tensor, wanted: Tensor) -> Tensor:
    """(L,) long: what to gather from tokens in the order `now` to have them in the order `wanted`."""
    return torch.argsort(now)[wanted]


class _Gather(torch.autograd.Function):
    """x[:, index] for a permutation; backwards it gathers again, where index_select would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(1, inverse), None, None


def gather(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """(B, L, C) with its tokens in the order of `index`, a permutation (L,); inverse: torch.argsort(index)."""
    return _Gather.apply(x, index, inverse) if x.requires_grad else x.index_select(1, index)


class PatchMerging(nn.Module):
    """(B, L, C) -> (B, L / 4, 2 C): four neighbours, which stand one after another, become one token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(x.unflatten(1, (-1, 4)).flatten(2)))


def merging_order(size: Size, order: Tensor) -> Tensor:
    """(L,) long: the place, row by row, of the tokens that merge, four by four, into a map in the order `order`.

    Of the map's tokens, four neighbours stand down first, then to the right, as the published weights have it.
    """
    height, width = height_and_width(size)
    places = rearrange(torch.arange(height * width), "(h i w j) -> (h w) (j i)", h=height // 2, i=2, j=2)
    return places[order].flatten()


def relative_position_index(window: int) -> Tensor:
    """(N, N) long, N = window ** 2: row of the bias table for each pair of tokens of a window."""
    axis = torch.arange(window)
    row, column = (part.flatten() for part in torch.meshgrid(axis, axis, indexing="ij"))
    rows = row[:, None] - row[None, :] + window - 1
    columns = column[:, None] - column[None, :] + window - 1
    return rows * (2 * window - 1) + columns


def shifted_window_mask(size: Size, window: int, shift: int) -> Tensor:
    """(windows, N, N) float: 0 between tokens that were neighbours before the roll by `shift`, -100 elsewhere."""
    rows, columns = (torch.zeros(side) for side in height_and_width(size))
    for region in (rows, columns):
        region[-window:] = 1
        region[-shift:] = 2
    regions = rows[:, None] * 3 + columns[None, :]  # nine regions of the rolled map
    tokens = rearrange(regions, "(h i) (w j) -> (h w) (i j)", i=window, j=window)
    return torch.where(tokens[:, :, None] == tokens[:, None, :], 0.0, -100.0)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias by relative position."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.map: tuple[int, int, int] = (0, 0, 0)  # height, width and shift, for TRITON_ATTENTION: SwinBlock sets it
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window))
        # The term of evaluation, and what it was made from: the table too, so that its address is not given away.
        self._kept: Optional[tuple[Any, Tensor, Tensor]] = None

    def train(self, mode: bool = True) -> "WindowAttention":
        self._kept = None
        return super().train(mode)

    def term(self, mask: Optional[Tensor]) -> Tensor:
        """(1 or W, heads, N, N): what is added to the scores, the bias and the mask.

        In evaluation it is kept, until the table changes, moves, or the module changes its mode.
        """
        table = self.relative_position_bias_table
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._make_term(mask)
        source = (table.data_ptr(), 0 if table.is_inference() else table._version, table.device, table.dtype)
        if self._kept is None or self._kept[0] != source:
            self._kept = source, self._make_term(mask), table.detach()
        return self._kept[1]

    def _make_term(self, mask: Optional[Tensor]) -> Tensor:
        # By indexing the same, but its backward pass takes several times as long on a CPU.
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table).permute(2, 0, 1)[None]
        return (bias if mask is None else bias + MASK_SCALE * mask[:, None]).contiguous()

    def forward(
        self, x: Tensor, windows: int, mask: Optional[Tensor], need_weights: bool = False
    ) -> tuple[Tensor, Optional[Tensor]]:
        """x: (B, W * N, C), W windows a clip one after another; mask: (W, N, N) or None.

        Returns the same shape, and with need_weights the attention (B * W, heads, N, N), else None.
        """
        projected = self.qkv(x)
        if TRITON_ATTENTION and not need_weights and self.map[0]:
            height, width, shift = self.map
            cut = Windows(height, width, self.window, shift)
            if fits(projected, self.heads, cut):
                mixed = attend_windows(projected, self.relative_position_bias_table, self.heads, cut)
                return self.proj(mixed), None
        qkv = rearrange(projected, "b (w n) (three h d) -> three (b w) h n d", w=windows, three=3, h=self.heads)
        query, key, value = qkv.unbind(0)
        term = self.term(mask).to(query.dtype)
        if need_weights or (self.training and query.device.type == "cpu"):
            mixed, weights = attend(query, key, value, term)
        else:
            mixed, weights = attend_fused(query, key, value, term), None
        mixed = rearrange(mixed, "(b w) h n d -> b (w n) (h d)", w=windows)
        return self.proj(mixed), weights if need_weights else None


class TracedAttention(nn.Module):
    """WindowAttention for an export: the term of bias and mask is a constant, the products are written out."""

    def __init__(self, attention: WindowAttention, mask: Optional[Tensor]) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj
        self.register_buffer("term", attention.term(mask).detach().clone())

    def forward(
        self, x: Tensor, windows: int, mask: Optional[Tensor], need_weights: bool = False
    ) -> tuple[Tensor, Optional[Tensor]]:
        """As WindowAttention; the mask is in the term already."""
        # One axis moves, then the tensor is cut: onnxruntime takes twice as long for the order of WindowAttention.
        qkv = rearrange(self.qkv(x), "b (w n) (three h d) -> (b w) (three h) n d", w=windows, three=3, h=self.heads)
        query, key, value = qkv.chunk(3, dim=1)
        mixed, weights = attend(query, key, value, self.get_buffer("term"))
        mixed = rearrange(mixed, "(b w) h n d -> b (w n) (h d)", w=windows)
        return self.proj(mixed), weights if need_weights else None


def attend(query: Tensor, key: Tensor, value: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with its weights: (B * W, heads, N, d) each, term (1 or W, heads, N, N).

    For training on a CPU, where scaled_dot_product_attention takes a slower way if the term needs a gradient.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    scores = (scores.unflatten(0, (-1, len(term))) + term).flatten(0, 1)
    weights = scores.softmax(dim=-1)
    return weights @ value, weights


def attend_fused(query: Tensor, key: Tensor, value: Tensor, term: Tensor) -> Tensor:
    """The same, by torch's fused kernel, without the weights."""
    clips = len(query) // len(term)
    if len(term) == 1 or clips == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=term)
    if query.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        # Clip by clip: joining the results costs less than a copy of the term for each clip.
        parts = zip(query.chunk(clips), key.chunk(clips), value.chunk(clips), strict=True)
        return torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=term) for q, k, v in parts])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=term.repeat(clips, 1, 1, 1))


class SwinBlock(nn.Module):
    """Window attention and MLP with residuals; every second block's windows are shifted.

    (B, L, C) -> the same, the tokens in the order of this block's windows (`window_order`).
    """

    attn_mask: Optional[Tensor]

    def __init__(self, channels: int, size: Size, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        height, width = height_and_width(size)
        self.windows = (height // window) * (width // window)
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.attn.map = (height, width, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, 4 * channels)
        self.drop_path = DropPath(drop_path)
        self.register_buffer("attn_mask", shifted_window_mask(size, window, shift) if shift else None)

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Optional[Tensor]]:
        mixed, weights = self.attn(self.norm1(x), self.windows, self.attn_mask, need_weights)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x))), weights


class Stage(nn.Module):
    """Swin blocks of one resolution, then patch merging but in the last stage."""

    def __init__(self, channels: int, size: Size, heads: int, window: int, drop_path: list[float], merge: bool) -> None:
        """channels, size of the map and heads of this stage; drop_path: the rate of each block."""
        super().__init__()
        shift, shorter = window // 2, min(height_and_width(size))
        if shorter <= window:
            # One window covers that side, where a shift would only join the ends of the map. Then nothing is shifted
            # along the other side either, as in Swin, although it may have several windows.
            window, shift = shorter, 0
        self.blocks = nn.ModuleList(
            SwinBlock(channels, size, heads, window, shift if number % 2 else 0, rate)
            for number, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(channels) if merge else None
        self._register_gathers(size, [window_order(size, window, shift if k % 2 else 0) for k in range(len(drop_path))])

    def _register_gathers(self, size: Size, orders: list[Tensor]) -> None:
        """What to gather before each block, and after the last: None where the tokens stand as they should.

        orders: of the tokens in each block.
        """
        height, width = height_and_width(size)
        now = torch.arange(height * width)
        after = merging_order(size, torch.arange(height * width // 4)) if self.downsample is not None else now
        for number, wanted in enumerate([*orders, after]):
            same = not now.is_meta and torch.equal(now, wanted)  # on the meta device there are no values to compare
            index = None if same else change_of_order(now, wanted)
            self.register_buffer(f"gather{number}", index, persistent=False)
            self.register_buffer(f"inverse{number}", None if same else change_of_order(wanted, now), persistent=False)
            now = wanted

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """(B, L, C), row by row -> the map for the next stage, this stage's own, and the attention that a token gets.

        For the next stage the map is merged, if this one merges, and row by row; its own is as before the merging, in
        `merging_order`, or the same where nothing merges. The attention is (B, L) with need_weights, averaged over
        blocks, heads and queries, else None; it needs a map of one window.
        """
        received = []
        for number, block in enumerate(self.blocks):
            x = self._gather(x, number)
            x, weights = block(x, need_weights)
            if weights is not None:
                received.append(weights.mean(dim=(1, 2)))  # (B, heads, query, key) -> (B, key)
        own = x = self._gather(x, len(self.blocks))
        if self.downsample is not None:
            x = self.downsample(x)
        return x, own, torch.stack(received).mean(dim=0) if received else None

    def _gather(self, x: Tensor, number: int) -> Tensor:
        index = self.get_buffer(f"gather{number}")
        return x if index is None else gather(x, index, self.get_buffer(f"inverse{number}"))
