"""MobileNetV2 on log-mel spectrograms. It has no time axis.

Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448; Sandler et al.: MobileNetV2, CVPR
2018, arXiv 1801.04381. Shapes: B clips, F bands, T frames, D channels.
"""

from collections.abc import Mapping
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from model import clip_network
from model.clip_network import SAMPLE_RATE, ClipNetwork, clip_options
from model.foreign import Weights
from model.network import Layer, Outputs
from settings import Config, UserError

FIRST, CLASSIFIER = "mobilenet.features.0.0.", "mobilenet.classifier."
WIDEST = 320  # channels of the last block at width 1


class MobileNetV2(ClipNetwork):
    """torchvision's network for one channel; its state-dict names stand behind `mobilenet.`. width: of its channels.

    The classifier reads the mean over frequency and time. Raises UserError for a width that is not allowed.
    """

    classifier = (CLASSIFIER,)
    not_in_images = (FIRST,)

    def __init__(self, *, width: float = 1.0, **shared: Any) -> None:
        super().__init__(**shared)
        if not 0 < width <= 10:
            raise UserError(f"encoder_options: width = {width} must be above 0, up to 10.")
        mobilenet = torchvision.models.mobilenet_v2(width_mult=width)
        self.channels = mobilenet.last_channel
        first = mobilenet.features[0][0].out_channels
        mobilenet.features[0] = Conv2dNormActivation(1, first, stride=2, activation_layer=nn.ReLU6)
        nn.init.kaiming_normal_(mobilenet.features[0][0].weight, mode="fan_out")
        mobilenet.classifier = nn.Linear(self.channels, self.num_classes)
        self.mobilenet = mobilenet

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, D, F / 32, T / 32)."""
        return self.mobilenet.features(features[:, None])

    def forward_head(self, maps: Tensor) -> Outputs:
        embedding = maps.mean(dim=(2, 3))
        return self.outputs_of_clip(embedding, self.mobilenet.classifier(embedding))

    def layers(self) -> list[Layer]:
        first, *blocks = self.mobilenet.features.children()
        return [[self.spectrum, first], *([block] for block in blocks), [self.mobilenet.classifier]]


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of AudioTagging's and of torchvision's ImageNet files under this network's names.

    The number of channels tells the width; which front-end they are for, nothing does.
    """
    found = {key if key.startswith("mobilenet.") else f"mobilenet.{key}": value for key, value in weights.items()}
    width = len(found["mobilenet.features.17.conv.2.weight"]) / WIDEST
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": {"width": f"{width:g}"}}
    if found[f"{FIRST}weight"].shape[1] == 3:
        kept = {key: value for key, value in found.items() if not key.startswith((FIRST, CLASSIFIER))}
        return Weights("ImageNet MobileNetV2", kept, settings, images=True)
    if f"{CLASSIFIER}weight" in found:
        settings["classes_num"] = len(found[f"{CLASSIFIER}weight"])
    return Weights("MobileNetV2", found, settings)


NETWORK, build_frontend, build_analysis = MobileNetV2, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> MobileNetV2:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return MobileNetV2(**clip_options(settings))
