"""Blocks of MobileNetV3, which two encoders share under the names of EfficientAT's files.

Howard et al.: Searching for MobileNetV3, arXiv 1905.02244; Schmid et al.: EfficientAT, arXiv 2211.04772. Shapes: B
clips, F bands, T frames, C channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from model.layers.cnn import set_norm_momentum

DIVISOR = 8  # of every number of channels
LAST = 6  # channels of the last convolution, in those of the last block
NORM = partial(nn.BatchNorm2d, eps=1e-3)


class Shape(NamedTuple):
    """Of a block: kernel, stride in frequency and time, and channels at width 1."""

    kernel: int
    stride: tuple[int, int]
    expanded: int
    out: int
    squeeze: bool
    activation: type[nn.Module]


def build_features(width: float, blocks: Sequence[Shape], norm_momentum: float) -> nn.Sequential:
    """(B, 1, F, T) -> (B, 6 C, F', T'): a strided convolution, the blocks, and LAST times the channels of the last."""
    channels = divisible(width * blocks[0].out)
    parts: list[nn.Module] = [convolution(1, channels, 3, stride=2, activation=nn.Hardswish)]
    for shape in blocks:
        parts.append(Block(channels, shape, width))
        channels = divisible(width * shape.out)
    parts.append(convolution(channels, LAST * channels, 1, activation=nn.Hardswish))
    features = nn.Sequential(*parts).apply(_init)
    set_norm_momentum(features, norm_momentum)
    for parameter in features.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)  # a fifth faster on CPUs
    return features


class Block(nn.Module):
    """(B, C, F, T) -> (B, C', F', T'): expand, convolve each channel, squeeze and excite, project."""

    def __init__(self, channels: int, shape: Shape, width: float) -> None:
        super().__init__()
        expanded, out = divisible(width * shape.expanded), divisible(width * shape.out)
        parts: list[nn.Module] = []
        if expanded != channels:
            parts.append(convolution(channels, expanded, 1, activation=shape.activation))
        depthwise = {"stride": shape.stride, "groups": expanded, "activation": shape.activation}
        parts.append(convolution(expanded, expanded, shape.kernel, **depthwise))
        if shape.squeeze:
            parts.append(SqueezeExcitations(expanded))
        self.block = nn.Sequential(*parts, convolution(expanded, out, 1, activation=None))
        self.residual = shape.stride == (1, 1) and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class SqueezeExcitations(nn.Module):
    """(B, C, F, T) -> the same, each channel weighted. Hu et al., arXiv 1709.01507; a list of one, by its key."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList([SqueezeExcitation(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.conc_se_layers[0](x)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = divisible(channels // 4)
        self.fc1, self.fc2 = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(self.fc1(x.mean(dim=(2, 3))).relu()).sigmoid()
        return x * weights[:, :, None, None]


def convolution(channels: int, out: int, kernel: int, **options: Any) -> Conv2dNormActivation:
    """With BatchNorm and an activation, without a bias."""
    activation = options.pop("activation")
    return Conv2dNormActivation(channels, out, kernel, norm_layer=NORM, activation_layer=activation, **options)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")


def divisible(channels: float) -> int:
    """The nearest multiple of 8 that is no less than 0.9 of so many channels."""
    found = max(DIVISOR, int(channels + DIVISOR / 2) // DIVISOR * DIVISOR)
    return found if found >= 0.9 * channels else found + DIVISOR
