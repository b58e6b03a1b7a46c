"""PSLA: EfficientNet on log-mel spectrograms, with attention pooling over time by several heads.

Gong, Chung, Glass: PSLA: Improving Audio Tagging with Pretraining, Sampling, Labeling, and Aggregation, TASLP 2021,
arXiv 2102.01243; in this form: Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448; Tan,
Le: EfficientNet, ICML 2019, arXiv 1905.11946. Shapes: B clips, F bands, T frames, S steps, D channels, K classes.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from timm.models.efficientnet import EfficientNet, decode_arch_def, round_channels
from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import SAMPLE_RATE, ClipNetwork, clip_options
from model.foreign import Weights
from model.heads import AttentionPooling
from model.layers.cnn import NORM_MOMENTUM, set_norm_momentum
from model.network import Layer, Outputs
from settings import Config, UserError

LAST = 1280  # channels of the last map, of b0
STAGES = (  # of b0: blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


class Variant(NamedTuple):
    """Factors of b0's channels and blocks; and the side of the images that the network was made for, in pixels."""

    width: float
    depth: float
    side: int

    @property
    def depths(self) -> list[int]:
        """The blocks of each stage."""
        return [math.ceil(self.depth * blocks) for blocks, *_ in STAGES]


VARIANTS = {
    "b0": Variant(1.0, 1.0, 224), "b1": Variant(1.0, 1.1, 240), "b2": Variant(1.1, 1.2, 260),
    "b3": Variant(1.2, 1.4, 300), "b4": Variant(1.4, 1.8, 380), "b5": Variant(1.6, 2.2, 456),
    "b6": Variant(1.8, 2.6, 528), "b7": Variant(2.0, 3.1, 600),
}  # fmt: skip


class PSLA(ClipNetwork):
    """The published network. Its state-dict names are timm's behind `effnet.`, and the published ones of `attention.`.

    variant: b0 to b7. width: a further factor of the channels. heads: of the pooling, 0 for the mean over time. Raises
    UserError for sizes that are not allowed.
    """

    classifier = ("attention.",)
    not_in_images = ("effnet.conv_stem.",)
    effnet: Any  # timm's EfficientNet

    def __init__(
        self,
        *,
        variant: str = "b2",
        width: float = 1.0,
        heads: int = 4,
        norm_momentum: float = NORM_MOMENTUM,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if not 0 < width <= 10 or not 0 <= heads <= 64:
            raise UserError(f"encoder_options: width = {width} must be above 0, up to 10, and heads = {heads} 0 to 64.")
        self.effnet = build_effnet(variant, width)
        set_norm_momentum(self.effnet, norm_momentum)
        self.channels = self.effnet.num_features
        self.attention = AttentionPooling(self.channels, self.num_classes, heads)
        strided = pad_as_images(self.effnet, VARIANTS[variant].side)
        steps = self.spectrum.frames
        for convolution in strided:
            steps = convolution.size(steps)
        self.set_time_axis(steps, 2 ** len(strided))

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, D, S), the mean over frequency of the last map."""
        x = self.effnet.bn1(self.effnet.conv_stem(features[:, None]))
        for block in self.stages():
            x = block(x)
        return self.effnet.bn2(self.effnet.conv_head(x)).mean(dim=2)

    def forward_head(self, maps: Tensor) -> Outputs:
        return self.outputs_of_steps(maps.transpose(1, 2), *self.attention(maps))

    def stages(self) -> list[nn.Module]:
        """The blocks of all stages."""
        return [block for stage in self.effnet.blocks for block in stage]

    def layers(self) -> list[Layer]:
        *blocks, last = self.stages()
        below: list[Layer] = [[self.spectrum, self.effnet.conv_stem, self.effnet.bn1], *([block] for block in blocks)]
        return [*below, [last, self.effnet.conv_head, self.effnet.bn2], [self.attention]]


def build_effnet(variant: str, width: float) -> EfficientNet:
    """timm's tf_efficientnet of a variant for one channel, with the stochastic depth of the training."""
    stages = [
        [f"{'ds' if expansion == 1 else 'ir'}_r{blocks}_k{kernel}_s{stride}_e{expansion}_c{channels}_se0.25"]
        for blocks, kernel, stride, expansion, channels in STAGES
    ]
    rounded = partial(round_channels, multiplier=width * VARIANTS[variant].width)
    return EfficientNet(
        decode_arch_def(stages, VARIANTS[variant].depth),
        num_classes=0,
        num_features=rounded(LAST),
        in_chans=1,
        round_chs_fn=rounded,
        act_layer=nn.SiLU,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        drop_path_rate=0.2,
    )


class ImageConv2d(nn.Conv2d):
    """A convolution of stride 2 whose zeros beyond the ends are those that an image of `side` pixels needs.

    The published package pads so whatever the input's size; TensorFlow's own networks pad by that.
    """

    def __init__(self, given: nn.Conv2d, side: int) -> None:
        kernel = given.kernel_size[0]
        super().__init__(given.in_channels, given.out_channels, kernel, stride=2, groups=given.groups, bias=False)
        self.weight = given.weight
        total = max((-(-side // 2) - 1) * 2 + kernel - side, 0)
        self.beyond = (total // 2, total - total // 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.beyond * 2))

    def size(self, size: int) -> int:
        """Of the output along an axis, for one of the input."""
        return (size + sum(self.beyond) - self.kernel_size[0]) // 2 + 1


def pad_as_images(effnet: EfficientNet, side: int) -> list[ImageConv2d]:
    """Put an ImageConv2d in place of each strided convolution; from below."""
    found: list[ImageConv2d] = []
    for name, module in list(effnet.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            found.append(ImageConv2d(module, side))
            parent, _, own = name.rpartition(".")
            setattr(effnet.get_submodule(parent), own, found[-1])
            side = -(-side // 2)
    return found


# --- files of others --------------------------------------------------------------------------------------------------

NAMES = {  # of the published package, and timm's: outside of the blocks, in those of the first stage, in the others
    "": {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"},
    "first": {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    "others": {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    },
}  # fmt: skip
SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
STEM, HEAD, OLD_HEAD = (f"effnet.{name}.weight" for name in ("conv_stem", "conv_head", "_conv_head"))


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PSLA's files and of ImageNet's EfficientNets, of timm or the published package, under these names.

    The numbers of blocks, channels and heads tell the sizes; which front-end they are for, nothing does. Raises
    UserError for a network that is none of b0 to b7.
    """
    found = {key if key.startswith(("effnet.", "attention.")) else f"effnet.{key}": v for key, v in weights.items()}
    places = (re.match(r"effnet\.(?:_blocks\.\d+|blocks\.\d+\.\d+)\.", key) for key in found)
    blocks = len({place[0] for place in places if place})
    variant = find_variant(blocks, len(next(found[key] for key in (HEAD, OLD_HEAD) if key in found)))
    found = {_timm_name(key, VARIANTS[variant].depths): value for key, value in found.items()}
    width = len(found[HEAD]) / LAST / VARIANTS[variant].width
    options = {"variant": variant, "width": f"{width:.6g}"}
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": options}
    if found[STEM].shape[1] == 3:
        out = (STEM, "effnet._fc.", "effnet.classifier.")
        kept = {key: value for key, value in found.items() if not key.startswith(out)}
        return Weights("ImageNet EfficientNet", kept, settings, images=True)
    scores = [key for key in found if re.match(r"attention\.cla\.(\d+\.)?weight", key)]
    if scores:
        several = len(scores) > 1
        options["heads"] = str(len(scores) if several else int("attention.att.weight" in found))
        settings["classes_num"] = len(found[scores[0]])
    return Weights("PSLA", found, settings)


def find_variant(blocks: int, channels: int) -> str:
    """That with so many blocks, and of b1 and b2, which have as many, with so many channels behind them.

    Raises UserError for an EfficientNet that is none of b0 to b7.
    """
    found = [name for name, each in VARIANTS.items() if sum(each.depths) == blocks]
    if not found:
        raise UserError(f"it is an EfficientNet of {blocks} blocks, and those of b0 to b7 have other numbers")
    return min(found, key=lambda name: abs(LAST * VARIANTS[name].width - channels))


def _timm_name(key: str, depths: list[int]) -> str:
    """Of a key of the published package."""
    place = re.fullmatch(r"effnet\.(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", key)
    if place is None:
        return key
    number, name, kind = place.groups()
    if number is None:
        return f"effnet.{NAMES[''].get(name, name)}.{kind}"
    stage, index = 0, int(number)
    while index >= depths[stage]:
        index, stage = index - depths[stage], stage + 1
    names = {**NAMES["others" if stage else "first"], **SQUEEZE}
    return f"effnet.blocks.{stage}.{index}.{names[name]}.{kind}"


NETWORK, build_frontend, build_analysis = PSLA, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> PSLA:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return PSLA(**clip_options(settings))
