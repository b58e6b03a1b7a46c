"""Frame MobileNets: MobileNetV3-large whose frequency axis shrinks to 1, while time stays at 40 ms.

Schmid et al.: Effective Pre-Training of Audio Transformers for Sound Event Detection, arXiv 2409.09546; their
EfficientAT: arXiv 2211.04772; Howard et al.: Searching for MobileNetV3, arXiv 1905.02244. Shapes: B clips, F bands, T
frames, C channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.foreign import Weights
from model.frame_network import FrameNetwork, builders, described, find
from model.frontend import CentredLogMel, kaldi_filterbank
from model.layers.cnn import NORM_MOMENTUM
from model.layers.mobilenet import LAST, Shape, build_features, divisible
from model.network import Layer
from settings import UserError

BANDS = 128
WIDTHS = {0.6: "frame_mn06", 1.0: "frame_mn10"}
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
    """The published network. width: factor of the channels; norm_momentum: of the BatchNorms."""

    mean, scale = -4.5, 5.0

    def __init__(self, *, width: float = 1.0, norm_momentum: float = NORM_MOMENTUM, **shared: Any) -> None:
        if not 0 < width <= 10:
            raise UserError(f"encoder_options: width = {width} must be above 0, up to 10.")
        out = divisible(width * BLOCKS[-1].out)
        super().__init__(build_bank(), LAST * out, **shared)
        self.frame_mn = nn.ModuleDict({"features": build_features(width, BLOCKS, norm_momentum)})

    def encode(self, features: Tensor) -> Tensor:
        x = features[:, None].contiguous(memory_format=torch.channels_last)
        return self.frame_mn["features"](x)[:, :, 0].transpose(1, 2)

    def encoder_layers(self) -> list[Layer]:
        first, *others = self.frame_mn["features"].children()
        return [[first], *([part] for part in others)]


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
