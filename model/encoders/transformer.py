"""Transformer: each frame a token, without positions, and the largest of four steps.

Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448. Shapes: B clips, F bands, T frames, S
steps of 4 frames, E channels.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import BANDS, PooledNetwork, clip_options, count_blocks, described
from model.foreign import Weights
from model.layers.cnn import init_xavier
from model.layers.transformer import EncoderLayer
from model.network import Layer
from settings import Config, UserError

POOLED = 4  # frames of a step


class Transformer(PooledNetwork):
    """The published network, with its state-dict names.

    dim: E. dropout: around the layers; transformer_dropout: in them. Raises UserError for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        frontend: str = "logmel64",
        dim: int = 1024,
        layers: int = 2,
        dropout: float = 0.0,
        transformer_dropout: float = 0.25,
        **shared: Any,
    ) -> None:
        super().__init__(dim, frontend=frontend, **shared)
        if not 1 <= layers <= 100:
            raise UserError(f"encoder_options: layers = {layers} must be 1 to 100.")
        self.linear_in = nn.Linear(BANDS[frontend], dim)
        self.layer_norm_in = nn.LayerNorm(dim)
        self.layer_stack = nn.ModuleList(EncoderLayer(dim, 2 * dim, transformer_dropout) for _ in range(layers))
        self.dropout = dropout
        self.set_time_axis(self.spectrum.frames // POOLED, POOLED)
        init_xavier(self)

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, S, E)"""
        x = self.layer_norm_in(self.linear_in(features.transpose(1, 2)))
        x = F.dropout(x, self.dropout, self.layer_norm_in.training)
        for layer in self.layer_stack:
            x = layer(x)
        x = F.dropout(x, self.dropout, layer.training)
        return F.max_pool1d(x.transpose(1, 2), POOLED).transpose(1, 2)

    def layers(self) -> list[Layer]:
        below = [self.spectrum, self.linear_in, self.layer_norm_in]
        return [below, *([layer] for layer in self.layer_stack), self.heads()]


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of published files, and what they say."""
    dim, bands = weights["linear_in.weight"].shape
    return described(weights, "transformer", bands, dim=dim, layers=count_blocks(weights, "layer_stack."))


NETWORK, build_frontend, build_analysis = Transformer, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> Transformer:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return Transformer(**clip_options(settings))
