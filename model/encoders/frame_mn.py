"""Frame MobileNets: MobileNetV3-large whose frequency axis shrinks to 1, while time stays at 40 ms.

Schmid et al.: Effective Pre-Training of Audio Transformers for Sound Event Detection, arXiv 2409.09546; their
EfficientAT: arXiv 2211.04772; Howard et al.: Searching for MobileNetV3, arXiv 1905.02244. Shapes: B clips, F bands, T
frames, C channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from model.foreign import Weights
from model.frame_network import FrameNetwork, builders, described, find
from model.frontend import CentredLogMel, kaldi_filterbank
from model.network import Layer
from settings import UserError

BANDS = 128
DIVISOR = 8  # of every number of channels
LAST = 6  # channels of the last convolution, in those of the last block
NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
WIDTHS = {0.6: "frame_mn06", 1.0: "frame_mn10"}


class Shape(NamedTuple):
    """Of a block: kernel, stride in frequency and time, and channels at width 1."""

    kernel: int
    stride: tuple[int, int]
    expanded: int
    out: int
    squeeze: bool
    activation: type[nn.Module]


R, H = nn.ReLU, nn.Hardswish
BLOCKS = (
    Shape(3, (1, 1), 16, 16, False, R),
    Shape(3, (2, 2), 64, 24, False, R),
    Shape(3, (2, 1), 72, 24, False, R),
    Shape(5, (1, 1), 72, 40, True, R),
    Shape(5, (1, 1), 120, 40, True, R),
    Shape(5, (2, 1), 120, 40, True, R),
    Shape(3, (1, 1), 240, 80, False, H),
    Shape(3, (2, 1), 200, 80, False, H),
    Shape(3, (1, 1), 184, 80, False, H),
    Shape(3, (1, 1), 184, 80, False, H),
    Shape(3, (2, 1), 480, 112, True, H),
    Shape(3, (1, 1), 672, 112, True, H),
    Shape(5, (1, 1), 672, 160, True, H),
    Shape(5, (1, 1), 960, 160, True, H),
    Shape(5, (2, 1), 960, 160, True, H),
)


class FrameMobileNet(FrameNetwork):
    """The published network. width: factor of the channels."""

    mean, scale = -4.5, 5.0

    def __init__(self, *, width: float = 1.0, **shared: Any) -> None:
        if not 0 < width <= 10:
            raise UserError(f"encoder_options: width = {width} must be above 0, up to 10.")
        out = divisible(width * BLOCKS[-1].out)
        super().__init__(build_bank(), LAST * out, **shared)
        features = build_features(width).apply(init_convolutions)
        for parameter in features.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)  # a fifth faster on CPUs
        self.frame_mn = nn.ModuleDict({"features": features})

    def encode(self, features: Tensor) -> Tensor:
        x = features[:, None].contiguous(memory_format=torch.channels_last)
        return self.frame_mn["features"](x)[:, :, 0].transpose(1, 2)

    def encoder_layers(self) -> list[Layer]:
        first, *others = self.frame_mn["features"].children()
        return [[first], *([part] for part in others)]


def build_features(width: float) -> nn.Sequential:
    """(B, 1, 128, T) -> (B, 6 C, 1, T / 4)."""
    channels = divisible(width * BLOCKS[0].out)
    parts: list[nn.Module] = [convolution(1, channels, 3, stride=2, activation=H)]
    for shape in BLOCKS:
        parts.append(Block(channels, shape, width))
        channels = divisible(width * shape.out)
    return nn.Sequential(*parts, convolution(channels, LAST * channels, 1, activation=H))


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


def init_convolutions(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")


def divisible(channels: float) -> int:
    """The nearest multiple of 8 that is no less than 0.9 of so many channels."""
    found = max(DIVISOR, int(channels + DIVISOR / 2) // DIVISOR * DIVISOR)
    return found if found >= 0.9 * channels else found + DIVISOR


def build_bank() -> CentredLogMel:
    """As Frame-PaSST's, but with a symmetric window."""
    window, bands = torch.hann_window(400, periodic=False), kaldi_filterbank(BANDS, 0.0, 7000.0)
    return CentredLogMel(window, bands, fft=512, hop=160, floor=1e-7, preemphasis=0.97)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PretrainedSED's files under this network's names; the number of channels tells the width."""
    width = find(weights, "features.16.0.weight").shape[0] / LAST / BLOCKS[-1].out
    nearest = min(WIDTHS, key=lambda known: abs(known - width))
    sizes = {} if divisible(nearest * BLOCKS[-1].out) == round(width * BLOCKS[-1].out) else {"width": width}
    return replace(described("frame MobileNet", "frame_mn.", weights, sizes), encoder=WIDTHS[nearest])


NETWORK = FrameMobileNet
build, build_frontend, build_analysis = builders(FrameMobileNet, build_bank)
