"""linear: four linear layers with LayerNorms, frame by frame; the baseline of AudioTagging Done Right.

Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448. Shapes: B clips, F bands, T frames, D
channels.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import BANDS, PooledNetwork, clip_options, described
from model.foreign import Weights
from model.network import Layer
from settings import Config

LAYERS = 7  # linear ones, and LayerNorms between them


class Linear(PooledNetwork):
    """The published network, with its state-dict names. dim: D; dropout: before each layer."""

    def __init__(self, *, frontend: str = "logmel64", dim: int = 128, dropout: float = 0.1, **shared: Any) -> None:
        super().__init__(dim, frontend=frontend, **shared)
        self.linear = nn.ModuleList([nn.Linear(BANDS[frontend], dim)])
        self.linear.extend(nn.LayerNorm(dim) if n % 2 else nn.Linear(dim, dim) for n in range(1, LAYERS))
        self.dropout = dropout
        self.set_time_axis(self.spectrum.frames, 1)

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, T, D)"""
        x = features.transpose(1, 2)
        for layer in self.linear:
            x = layer(F.dropout(x, self.dropout, layer.training))
        return x

    def layers(self) -> list[Layer]:
        first, *others = self.linear
        return [[self.spectrum, first], *(others[n : n + 2] for n in range(0, len(others), 2)), self.heads()]


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of published files, and what they say."""
    dim, bands = weights["linear.0.weight"].shape
    return described(weights, "linear", bands, dim=dim)


NETWORK, build_frontend, build_analysis = Linear, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> Linear:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return Linear(**clip_options(settings))
