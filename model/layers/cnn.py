"""Blocks of convolutions over time and frequency that encoders share."""

import re
from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

from settings import UserError

NORM_MOMENTUM = 0.01  # published, of networks with dozens of BatchNorms
POOLINGS = ((2, 2), (2, 2), (1, 2), (1, 2), (1, 2))  # of time and frequency, one each after as many layers


def set_norm_momentum(module: nn.Module, momentum: float) -> None:
    """Share of a step in the running statistics of each BatchNorm2d. Raises UserError outside of (0, 1].

    With 0.01 they keep 9 % of their initial values after 240 steps, and a network with dozens of them scores all clips
    alike in evaluation, however well it learns.
    """
    if not 0 < momentum <= 1:
        raise UserError(f"encoder_options: norm_momentum = {momentum} must be above 0, up to 1.")
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum


class ConvolutionStack(nn.ModuleList):
    """(B, 1, T, F) -> (B, T // 4, dim): 3 x 3 convolutions that halve the bands five times, the frames twice.

    With f bands, a layer has 2 dim / f channels; the last one's channels and bands make dim. layers: a multiple of 5.
    dropout: before each layer. Wang, Li, Metze, arXiv 1810.09050. Raises UserError for other sizes.
    """

    def __init__(self, bands: int, dim: int, layers: int = 10, dropout: float = 0.0) -> None:
        most = 2 * dim // bands
        if layers < 1 or layers > 100 or layers % len(POOLINGS) or most < 1 or 2 * dim % bands:
            raise UserError(
                f"encoder_options: conv_layers = {layers} must be a multiple of {len(POOLINGS)}, up to 100, and "
                f"dim = {dim} of {bands // 2}, half of the bands."
            )
        each = layers // len(POOLINGS)
        channels = [1, *(most * 2 ** (layer // each) for layer in range(layers))]
        poolings = [POOLINGS[n // each] if n % each == each - 1 else None for n in range(layers)]
        sizes = zip(pairwise(channels), poolings, strict=True)
        super().__init__(ConvolutionLayer(old, new, pooling, dropout) for (old, new), pooling in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x.transpose(1, 2).flatten(2)


class ConvolutionLayer(nn.Module):
    """(B, C, T, F) -> (B, C', T', F'): dropout, convolution, BatchNorm, ReLU, and max pooling where there is one."""

    def __init__(self, channels: int, out: int, pooling: tuple[int, int] | None, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(channels, out, 3, padding=1)
        self.bn = nn.BatchNorm2d(out)
        self.pool = nn.MaxPool2d(pooling) if pooling else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.bn(self.conv(self.dropout(x))).relu())


def init_xavier(module: nn.Module) -> None:
    """All parameters of two or more dimensions, by Xavier's uniform distribution."""
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter)


def of_published(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int, dict[str, int]]:
    """A published file with a ConvolutionStack `conv`: its weights, F, and the sizes that follow from their shapes.

    There, each convolution has two names, conv1. and conv.0. for the first.
    """
    found = {re.sub(r"^conv(\d+)\.", lambda key: f"conv.{int(key[1]) - 1}.", key): w for key, w in weights.items()}
    dim = found["fc_prob.weight"].shape[1]
    layers = {key.split(".")[1] for key in found if key.startswith("conv.")}
    return found, 2 * dim // len(found["conv.0.conv.weight"]), {"dim": dim, "conv_layers": len(layers)}
