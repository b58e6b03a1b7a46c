"""ResNet50 on log-mel spectrograms, with attention pooling over time.

Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448, whose code mixes the axes of the last
map: here the mean over frequency is pooled, as in PSLA; He et al.: Deep Residual Learning for Image Recognition, CVPR
2016, arXiv 1512.03385. Shapes: B clips, F bands, T frames, S steps, D channels, K classes.
"""

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import SAMPLE_RATE, ClipNetwork, clip_options
from model.foreign import Weights
from model.heads import AttentionPooling
from model.network import Layer, Outputs
from settings import Config, UserError

STEP = 32  # spectrogram frames
PLANES = 64  # channels within the first blocks at width 1, doubled by each further stage


class ResNet50(ClipNetwork):
    """torchvision's network for one channel under its state-dict names, without `fc`. width: of the blocks' channels.

    Raises UserError for sizes that are not allowed.
    """

    classifier = ("attention.",)
    not_in_images = ("conv1.",)

    def __init__(self, *, width: float = 1.0, **shared: Any) -> None:
        super().__init__(**shared)
        if not 0 < width <= 10:
            raise UserError(f"encoder_options: width = {width} must be above 0, up to 10.")
        planes = [max(1, round(width * PLANES)) * 2**number for number in range(4)]
        resnet: Any = timm.create_model("resnet50", in_chans=1, num_classes=0, channels=planes, zero_init_last=False)
        self.channels = resnet.num_features
        self.conv1, self.bn1 = resnet.conv1, resnet.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4
        self.attention = AttentionPooling(self.channels, self.num_classes)
        self.set_time_axis(-(-self.spectrum.frames // STEP), STEP)

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, D, S), the mean over frequency of the last map."""
        x = F.max_pool2d(self.bn1(self.conv1(features[:, None])).relu(), 3, 2, 1)
        for block in self.stages():
            x = block(x)
        return x.mean(dim=2)

    def forward_head(self, maps: Tensor) -> Outputs:
        return self.outputs_of_steps(maps.transpose(1, 2), *self.attention(maps))

    def stages(self) -> list[nn.Module]:
        """The blocks of all stages."""
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def layers(self) -> list[Layer]:
        return [[self.spectrum, self.conv1, self.bn1], *([block] for block in self.stages()), [self.attention]]


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of AudioTagging's files, whose names are the network's, and of ImageNet's.

    The number of channels tells the width; which front-end they are for, nothing does.
    """
    width = len(weights["layer1.0.conv1.weight"]) / PLANES
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": {"width": f"{width:g}"}}
    if weights["conv1.weight"].shape[1] == 3:
        kept = {key: value for key, value in weights.items() if not key.startswith(("conv1.", "fc."))}
        return Weights("ImageNet ResNet50", kept, settings, images=True)
    if "attention.cla.weight" in weights:
        settings["classes_num"] = len(weights["attention.cla.weight"])
    return Weights("ResNet50", dict(weights), settings)


NETWORK, build_frontend, build_analysis = ResNet50, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> ResNet50:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return ResNet50(**clip_options(settings))
