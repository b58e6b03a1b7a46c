"""TALtrans: TAL's convolutions, then one transformer layer, applied several times with the same weights.

Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448. Shapes: B clips, F bands, T frames, S
steps of 4 frames, E channels.
"""

import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import BANDS, PooledNetwork, clip_options, described
from model.foreign import Weights
from model.layers.cnn import ConvolutionStack, init_xavier, of_published
from model.layers.transformer import EncoderLayer
from model.network import Layer
from settings import Config, UserError

SCALE = 8.0  # of the features beside their positions
TABLE = "positional_encoding.pe"


class TALtrans(PooledNetwork):
    """The published network, with its state-dict names.

    dim: E, None: 16 a band. layers: how often the layer is applied. addpos: yes, a code of time is added to the
    features. dropout: around the layers; transformer_dropout: in them. Raises UserError for other sizes.
    """

    computed = (TABLE,)

    def __init__(
        self,
        *,
        frontend: str = "fbank128",
        dim: Optional[int] = None,
        conv_layers: int = 10,
        layers: int = 2,
        addpos: str = "yes",
        dropout: float = 0.0,
        transformer_dropout: float = 0.25,
        **shared: Any,
    ) -> None:
        bands = BANDS[frontend]
        dim = 16 * bands if dim is None else dim
        super().__init__(dim, frontend=frontend, **shared)
        if not 1 <= layers <= 100:
            raise UserError(f"encoder_options: layers = {layers} must be 1 to 100.")
        self.passes = layers
        self.positional_encoding = Positions(self.spectrum.frames, bands) if addpos == "yes" else None
        self.conv = ConvolutionStack(bands, dim, conv_layers, dropout)
        self.set_time_axis(self.spectrum.frames // 4, 4)
        self.enc_layer = EncoderLayer(dim, dim, transformer_dropout)
        self.dropout = dropout
        init_xavier(self)

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, S, E)"""
        x = features.transpose(1, 2)
        if self.positional_encoding is not None:
            x = self.positional_encoding(x)
        x = F.dropout(self.conv(x[:, None]), self.dropout, self.enc_layer.training)
        for _ in range(self.passes):
            x = self.enc_layer(x)
        return F.dropout(x, self.dropout, self.enc_layer.training)

    def layers(self) -> list[Layer]:
        first, *others = self.conv
        positions = [] if self.positional_encoding is None else [self.positional_encoding]
        return [[self.spectrum, *positions, first], *([layer] for layer in others), [self.enc_layer], self.heads()]


class Positions(nn.Module):
    """(B, T, F) -> the same, 8 times, with sines and cosines of time over the bands. arXiv 1706.03762, section 3.5."""

    def __init__(self, frames: int, bands: int) -> None:
        super().__init__()
        rates = torch.exp(torch.arange(0, bands, 2).float() * (-math.log(10000.0) / bands))
        angles = torch.outer(torch.arange(frames).float(), rates)
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None])

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * x + self.get_buffer("pe")


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of published files, and what they say; not how often the layer is applied."""
    found, bands, sizes = of_published(weights)
    frames = found[TABLE].shape[1] if TABLE in found else None
    return described(found, "taltrans", bands, frames=frames, **sizes, addpos="no" if frames is None else "yes")


NETWORK, build_frontend, build_analysis = TALtrans, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> TALtrans:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return TALtrans(**clip_options(settings))
