"""Attention within windows as one Triton kernel forwards and one backwards, for NVIDIA GPUs.

The projections are read where the linear layer left them, (B, W * N, 3 * C), and the result is written where the next
one reads it. The bias comes from its table by the tokens' offset, the mask of shifted windows from the tokens' places
on the map: neither is in memory as a matrix. Backwards the weights are computed again, so nothing else is kept.

A program takes some windows of one head, one after another: scores of all N tokens of a window, at most 64, fit into
registers. Programs add up their windows' gradient of the bias, and a second kernel sums programs and equal offsets in
a fixed order: the result does not depend on which program is first.

Shapes: B clips, W windows of a map, N tokens of a window, R = (2 * side - 1) ** 2 offsets, C = heads * d channels.
TRITON_INTERPRET=1 computes the same on a CPU, for tests.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LONGEST_SIDE = 8  # of a window, in tokens: their scores stay in registers
LONGEST_EXACT_SIDE = 4
LARGEST_HEAD = 64  # channels
PROGRAMS = 2048  # at most, about: each loads its bias once, and leaves one gradient of it
TOGETHER = tl.constexpr(16)  # programs whose gradients of the bias are read together
MASKED = tl.constexpr(-1e30)  # score between tokens that were no neighbours before the shift
HALVES = (torch.bfloat16, torch.float16)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Windows(NamedTuple):
    """How a map of tokens is cut: height and width of the map, side of a window, shift; all in tokens."""

    height: int
    width: int
    side: int
    shift: int


def fits(qkv: Tensor, heads: int, windows: Windows) -> bool:
    """Whether the kernels take these projections (B, W * N, 3 * C).

    A GPU takes float32 with small windows alone: its exact products have no tensor cores, need too many registers with
    64 tokens, and take a minute to compile.
    """
    if not (qkv.is_cuda or INTERPRETED.value) or windows.side > LONGEST_SIDE:
        return False
    exact = qkv.dtype == torch.float32 and (INTERPRETED.value or windows.side <= LONGEST_EXACT_SIDE)
    return (exact or qkv.dtype in HALVES) and qkv.shape[2] <= 3 * heads * LARGEST_HEAD


@triton.jit
def _product(left, right, precision: tl.constexpr):
    """Matrix product, added up in float32."""
    if INTERPRETED:  # the interpreter has no products in bfloat16; these are the same numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=precision)


@triton.jit
def _places(number, height, width, side: tl.constexpr, shift: tl.constexpr, block: tl.constexpr):
    """Row and column in its window of each of `block` tokens, and its region of the rolled map."""
    token = tl.arange(0, block)
    row, column = token // side, token % side
    down = (number // (width // side)) * side + row
    right = (number % (width // side)) * side + column
    rows = (down >= height - side).to(tl.int32) + (down >= height - shift).to(tl.int32)
    columns = (right >= width - side).to(tl.int32) + (right >= width - shift).to(tl.int32)
    return row, column, rows * 3 + columns


@triton.jit
def _bias(table, head, heads, side: tl.constexpr, tokens: tl.constexpr, block: tl.constexpr):
    """(block, block) float32 from the table (R, heads); -inf for keys beyond the window."""
    token = tl.arange(0, block)
    row, column = token // side, token % side
    offset = (row[:, None] - row[None, :] + side - 1) * (2 * side - 1) + column[:, None] - column[None, :] + side - 1
    inside = (token[:, None] < tokens) & (token[None, :] < tokens)
    bias = tl.load(table + offset * heads + head, mask=inside, other=0.0).to(tl.float32)
    return tl.where(token[None, :] < tokens, bias, float("-inf"))


@triton.jit
def _weights(query, key, bias, region, scale, shift: tl.constexpr, precision: tl.constexpr):
    """(block, block) float32: the softmax over the keys."""
    scores = _product(query, tl.trans(key), precision) * scale + bias
    if shift > 0:
        # Finite, as a row beyond the window may have no key in its region: it would be NaN, and NaN times 0 is NaN.
        scores = tl.where(region[:, None] == region[None, :], scores, MASKED)
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _forward(
    qkv, table, out, count, heads, scale, height, width,
    each: tl.constexpr, side: tl.constexpr, shift: tl.constexpr, head_size: tl.constexpr, block: tl.constexpr,
    columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Program (head, group): the windows from group * each on, of `count` in all clips."""
    head, group = tl.program_id(0), tl.program_id(1)
    tokens: tl.constexpr = side * side
    token, channel = tl.arange(0, block), tl.arange(0, columns)
    inside = (token[:, None] < tokens) & (channel[None, :] < head_size)
    bias = _bias(table, head, heads, side, tokens, block)
    channels = heads * head_size
    of_map = (height // side) * (width // side)
    for step in range(each):
        number = group * each + step
        there = inside & (number < count)
        first = number.to(tl.int64) * tokens
        place = qkv + (first + token[:, None]) * (3 * channels) + head * head_size + channel[None, :]
        query = tl.load(place, mask=there, other=0.0)
        key = tl.load(place + channels, mask=there, other=0.0)
        value = tl.load(place + 2 * channels, mask=there, other=0.0)
        _, _, region = _places(number % of_map, height, width, side, shift, block)
        weights = _weights(query, key, bias, region, scale, shift, precision)
        mixed = _product(weights.to(value.dtype), value, precision)
        target = out + (first + token[:, None]) * channels + head * head_size + channel[None, :]
        tl.store(target, mixed.to(value.dtype), mask=there)


@triton.jit
def _backward(
    qkv, table, gradient, qkv_gradient, bias_gradient, count, heads, scale, height, width,
    each: tl.constexpr, side: tl.constexpr, shift: tl.constexpr, head_size: tl.constexpr, block: tl.constexpr,
    columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """As _forward. bias_gradient: (groups, heads, N, N) float32, of this program's windows together."""
    head, group = tl.program_id(0), tl.program_id(1)
    tokens: tl.constexpr = side * side
    token, channel = tl.arange(0, block), tl.arange(0, columns)
    inside = (token[:, None] < tokens) & (channel[None, :] < head_size)
    bias = _bias(table, head, heads, side, tokens, block)
    total = tl.zeros((block, block), dtype=tl.float32)
    channels = heads * head_size
    of_map = (height // side) * (width // side)
    for step in range(each):
        number = group * each + step
        there = inside & (number < count)
        first = number.to(tl.int64) * tokens
        rows = first + token[:, None]
        place = rows * (3 * channels) + head * head_size + channel[None, :]
        query = tl.load(qkv + place, mask=there, other=0.0)
        key = tl.load(qkv + place + channels, mask=there, other=0.0)
        value = tl.load(qkv + place + 2 * channels, mask=there, other=0.0)
        mixed = tl.load(gradient + rows * channels + head * head_size + channel[None, :], mask=there, other=0.0)
        _, _, region = _places(number % of_map, height, width, side, shift, block)
        weights = _weights(query, key, bias, region, scale, shift, precision)
        # Rows beyond the window have weights but no gradient: `mixed` is 0 there.
        of_value = _product(tl.trans(weights.to(mixed.dtype)), mixed, precision)
        of_weights = _product(mixed, tl.trans(value), precision)
        of_scores = weights * (of_weights - tl.sum(weights * of_weights, axis=1)[:, None])
        total += of_scores
        of_scores = (of_scores * scale).to(query.dtype)
        of_query = _product(of_scores, key, precision)
        of_key = _product(tl.trans(of_scores), query, precision)
        tl.store(qkv_gradient + place, of_query.to(query.dtype), mask=there)
        tl.store(qkv_gradient + place + channels, of_key.to(query.dtype), mask=there)
        tl.store(qkv_gradient + place + 2 * channels, of_value.to(query.dtype), mask=there)
    pair = token[:, None] * tokens + token[None, :]
    both = (token[:, None] < tokens) & (token[None, :] < tokens)
    tl.store(bias_gradient + (group * heads + head) * (tokens * tokens) + pair, total, mask=both)


@triton.jit
def _sum_of_offsets(
    bias_gradient, table_gradient, groups, heads, loops: tl.constexpr, side: tl.constexpr, block: tl.constexpr
):
    """Program (offset, head): the sum over all groups, some at a time, and all pairs of tokens with this offset."""
    offset, head = tl.program_id(0), tl.program_id(1)
    tokens: tl.constexpr = side * side
    down, right = offset // (2 * side - 1) - (side - 1), offset % (2 * side - 1) - (side - 1)
    token, some = tl.arange(0, block), tl.arange(0, TOGETHER)
    row, column = token // side - down, token % side - right  # of the key
    there = (token < tokens) & (row >= 0) & (row < side) & (column >= 0) & (column < side)
    pair = token * tokens + row * side + column
    total = tl.zeros((TOGETHER, block), dtype=tl.float32)
    for loop in range(loops):
        group = loop * TOGETHER + some[:, None]
        place = (group * heads + head) * (tokens * tokens) + pair[None, :]
        total += tl.load(bias_gradient + place, mask=(group < groups) & there[None, :], other=0.0)
    tl.store(table_gradient + offset * heads + head, tl.sum(tl.sum(total, axis=1), axis=0))


def _launch(qkv: Tensor, heads: int, windows: Windows) -> tuple[tuple[int, int], list[Any], dict[str, Any]]:
    """Grid, sizes and constants of both kernels. Raises ValueError for projections that do not fit."""
    tokens = windows.side**2
    count, left = divmod(qkv.shape[0] * qkv.shape[1], tokens)
    if left or qkv.shape[1] != windows.height * windows.width or not fits(qkv, heads, windows):
        raise ValueError(f"Projections {tuple(qkv.shape)} of {qkv.dtype} do not fit {heads} heads in {windows}.")
    head_size = qkv.shape[2] // (3 * heads)
    each = triton.next_power_of_2(triton.cdiv(count, max(1, PROGRAMS // heads)))  # few sizes: each is compiled
    constants = {
        "each": each,
        "side": windows.side,
        "shift": windows.shift,
        "head_size": head_size,
        "block": max(16, triton.next_power_of_2(tokens)),
        "columns": max(16, triton.next_power_of_2(head_size)),
        "precision": "ieee",  # float32 means float32
    }
    sizes = [count, heads, head_size**-0.5, windows.height, windows.width]
    return (heads, triton.cdiv(count, each)), sizes, constants


# An operator of its own: torch.compile leaves it as it is, between what it makes of its neighbours.
@torch.library.custom_op("htsat::window_attention", mutates_args=())
def _attention(qkv: Tensor, table: Tensor, heads: int, height: int, width: int, side: int, shift: int) -> Tensor:
    qkv, table = qkv.contiguous(), table.contiguous()
    grid, sizes, constants = _launch(qkv, heads, Windows(height, width, side, shift))
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    with torch.cuda.device_of(qkv):  # Triton launches on the current GPU
        _forward[grid](qkv, table, out, *sizes, **constants)
    return out


@_attention.register_fake
def _shape(qkv: Tensor, table: Tensor, heads: int, height: int, width: int, side: int, shift: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@torch.library.custom_op("htsat::window_attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor, qkv: Tensor, table: Tensor, heads: int, height: int, width: int, side: int, shift: int
) -> tuple[Tensor, Tensor]:
    gradient, qkv, table = gradient.contiguous(), qkv.contiguous(), table.contiguous()
    grid, sizes, constants = _launch(qkv, heads, Windows(height, width, side, shift))
    qkv_gradient, table_gradient = torch.empty_like(qkv), torch.empty_like(table)
    bias_gradient = qkv.new_empty((grid[1], heads, side**2, side**2), dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _backward[grid](qkv, table, gradient, qkv_gradient, bias_gradient, *sizes, **constants)
        _sum_of_offsets[(len(table), heads)](
            bias_gradient, table_gradient, grid[1], heads,
            loops=triton.cdiv(grid[1], TOGETHER.value), side=side, block=constants["block"],
        )  # fmt: skip
    return qkv_gradient, table_gradient


@_attention_backward.register_fake
def _shapes(
    gradient: Tensor, qkv: Tensor, table: Tensor, heads: int, height: int, width: int, side: int, shift: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, table, *sizes = inputs
    ctx.save_for_backward(qkv, table)
    ctx.sizes = sizes


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    qkv_gradient, table_gradient = _attention_backward(gradient, *ctx.saved_tensors, *ctx.sizes)
    return qkv_gradient, table_gradient, None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.htsat.window_attention)
def _flops(qkv: tuple[int, ...], table: Any, heads: int, height: int, width: int, side: int, *_: Any, **__: Any) -> int:
    """FLOP of two products, (N, d) by (d, N) and (N, N) by (N, d), of each head and window. qkv: its shape."""
    clips, tokens, channels = qkv
    return 2 * 2 * clips * tokens * side**2 * (channels // 3)


@register_flop_formula(torch.ops.htsat.window_attention_backward)
def _backward_flops(gradient: Any, *words: Any, **more: Any) -> int:
    """Of four products: weights that are computed again are no progress."""
    return 2 * _flops(*words, **more)


def attend_windows(qkv: Tensor, table: Tensor, heads: int, windows: Windows) -> Tensor:
    """Projections (B, W * N, 3 * C), bias table (R, heads) -> (B, W * N, C), before the last projection.

    The tokens stand in the order of windows, those of one after another (model/layers/swin.py). Raises ValueError for
    projections that do not fit.
    """
    return _attention(qkv, table, heads, *windows)
