"""Layers over the sequence of steps, between the grid of features and the frame scores; poolings of these over time.

A sequence head adds something to the grid that is zero at first: a network that has been trained without one starts as
it was. Shapes: B clips, C channels, f frequency bins, T steps, D channels of the head, K classes.
"""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model.layers.swin import Mlp
from settings import UserError

HEAD_CHANNELS = 64  # of one attention head
DROPOUT = 0.1  # of each residual branch, and between the layers of a GRU, in training

Kind = Literal["gru", "lstm", "attention", "transformer"]
RNNS = {"gru": nn.GRU, "lstm": nn.LSTM}
LEAST = 1e-7  # of a probability or a share, and of what it lacks to 1


class SequenceHead(nn.Module):
    """(B, C, f, T) -> the same, with what a sequence model of its mean over frequency adds.

    kind: a bidirectional gru or lstm, attention (self-attention with rotary positions), or transformer (the same with
    an MLP in each layer). layers: how many; dim: D; steps: T. Raises UserError for a dim that the kind cannot have.
    """

    def __init__(self, kind: Kind, *, channels: int, layers: int, dim: int, steps: int) -> None:
        super().__init__()
        _check_dim(kind, dim)
        self.project = nn.Linear(channels, dim)
        if kind in RNNS:
            self.layers: nn.Module = BidirectionalRNN(kind, dim, layers)
        else:
            blocks = (AttentionBlock(dim, steps, with_mlp=kind == "transformer") for _ in range(layers))
            self.layers = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, grid: Tensor) -> Tensor:
        sequence = self.project(grid.mean(dim=2).transpose(1, 2))  # (B, T, D)
        added = self.out(self.norm(self.layers(sequence)))
        return grid + rearrange(added, "b t c -> b c 1 t")


class BidirectionalRNN(nn.Module):
    """(B, T, D) -> (B, T, D): half of the channels read forwards, half backwards. kind: gru or lstm."""

    def __init__(self, kind: str, dim: int, layers: int) -> None:
        super().__init__()
        dropout = DROPOUT if layers > 1 else 0.0
        rnn = RNNS[kind](dim, dim // 2, layers, batch_first=True, dropout=dropout, bidirectional=True)
        self.add_module(kind, rnn)

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)[0]


class FrameRNN(nn.Module):
    """(B, T, C) -> (B, T, 2 dim): a bidirectional gru, or an lstm with a linear layer, as in PretrainedSED's files."""

    def __init__(self, kind: str, channels: int, *, layers: int, dim: int) -> None:
        super().__init__()
        self.rnn = RNNS[kind](channels, dim, layers, batch_first=True, bidirectional=True)
        self.embedding = nn.Linear(2 * dim, 2 * dim) if kind == "lstm" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(x)[0]
        return x if self.embedding is None else self.embedding(x)


class AttentionBlock(nn.Module):
    """(B, T, D) -> (B, T, D): self-attention, and with_mlp an MLP, each after its LayerNorm and with a residual."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, dim: int, steps: int, *, with_mlp: bool) -> None:
        super().__init__()
        self.heads = max(1, dim // HEAD_CHANNELS)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim) if with_mlp else None
        self.mlp = Mlp(dim, 4 * dim) if with_mlp else None
        self.dropout = nn.Dropout(DROPOUT)
        angles = rotary_angles(steps, dim // self.heads)  # not in the state dict: weights serve any number of steps
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self._attend(self.norm1(x)))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.dropout(self.mlp(self.norm2(x)))
        return x

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads).unbind(0)
        query, key = (rotate(each, self.cosine, self.sine) for each in (query, key))
        return self.proj(rearrange(F.scaled_dot_product_attention(query, key, value), "b h t d -> b t (h d)"))


def rotary_angles(steps: int, channels: int) -> Tensor:
    """(steps, channels / 2) float32, in radians: step t turns pair k by t / 10000 ** (2 k / channels).

    Su et al. 2021, RoFormer, arXiv 2104.09864, equation 15.
    """
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
    return torch.outer(torch.arange(steps).float(), frequencies)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(..., T, d) with its pairs of channels turned by the angles (T, d / 2); channel k is paired with k + d / 2.

    A product of two vectors that have been turned depends on their distance in time only.
    """
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def _check_dim(kind: Kind, dim: int) -> None:
    if dim % 2:
        raise UserError(f"sequence_dim {dim} must be even, for sequence_head = {kind}.")
    if kind not in RNNS and dim > HEAD_CHANNELS and dim % HEAD_CHANNELS:
        raise UserError(
            f"sequence_dim {dim} must be a multiple of {HEAD_CHANNELS}, the channels of an attention head, or an even "
            f"number below it, for sequence_head = {kind}."
        )


# --- poolings over time -----------------------------------------------------------------------------------------------


def probabilities(logits: Tensor) -> Tensor:
    """The sigmoid in float32, at least LEAST from 0 and 1."""
    return logits.float().sigmoid().clamp(LEAST, 1 - LEAST)


def shares(weights: Tensor) -> Tensor:
    """(B, T, K) in [0, 1] -> the same, at least LEAST from 0 and 1, then divided by their sum over time."""
    weights = weights.float().clamp(LEAST, 1 - LEAST)
    return weights / weights.sum(dim=1, keepdim=True)


# Of probabilities p (B, T, K) over time, for each class; a (B, T, K) is given to att alone. (B, K)
# Wang, Li, Metze: A Comparison of Five Multiple Instance Learning Pooling Functions, ICASSP 2019, arXiv 1810.09050.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": lambda p, _: p.amax(dim=1),
    "ave": lambda p, _: p.mean(dim=1),
    "lin": lambda p, _: p.square().sum(dim=1) / p.sum(dim=1),
    "exp": lambda p, _: (p * p.exp()).sum(dim=1) / p.exp().sum(dim=1),
    "att": lambda p, a: (p * a.float().softmax(dim=1)).sum(dim=1),
}


class AttentionPooling(nn.Module):
    """(B, C, T) -> class logits (B, T, K) of the steps, and probabilities (B, K): means over time by learned shares.

    heads: several have shares and scores of their own, which are added up with weights that are learned, too; as these
    are free, a sum may leave [0, 1]: it is to be clamped. 0: the mean over time. Gong, Chung, Glass: PSLA, arXiv
    2102.01243.
    """

    def __init__(self, channels: int, num_classes: int, heads: int = 1) -> None:
        super().__init__()
        scores, weights = ([nn.Conv2d(channels, num_classes, 1) for _ in range(max(1, heads))] for _ in range(2))
        several = heads > 1
        self.att: nn.Module | None = nn.ModuleList(weights) if several else weights[0] if heads else None
        self.cla: nn.Module = nn.ModuleList(scores) if several else scores[0]
        if several:
            self.head_weight = nn.Parameter(torch.full((heads,), 1 / heads))
            return
        bound = (6 / channels) ** 0.5
        for layer in (scores[0], weights[0]):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.constant_(layer.bias, 0.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.att, nn.ModuleList) and isinstance(self.cla, nn.ModuleList):
            steps = torch.stack([_of_steps(cla, x).sigmoid() for cla in self.cla], dim=-1)  # (B, T, K, heads)
            weights = torch.stack([shares(_of_steps(att, x).sigmoid()) for att in self.att], dim=-1)
            clips = (weights * steps).sum(dim=1) @ self.head_weight.float()
            return torch.logit(steps @ self.head_weight.float(), eps=LEAST), clips
        logits = _of_steps(self.cla, x)
        if self.att is None:
            return logits, logits.sigmoid().mean(dim=1)
        return logits, (shares(_of_steps(self.att, x).sigmoid()) * logits.sigmoid()).sum(dim=1)


def _of_steps(convolution: nn.Module, x: Tensor) -> Tensor:
    """(B, C, T) -> (B, T, K) of a 1 x 1 convolution, in float32."""
    return convolution(x[:, :, None])[:, :, 0].transpose(1, 2).float()
