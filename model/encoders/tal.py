"""TAL: ten convolutions, a bidirectional GRU, and class scores over time that are pooled.

Wang, Li, Metze: A Comparison of Five Multiple Instance Learning Pooling Functions for Sound Event Detection with Weak
Labeling, ICASSP 2019, arXiv 1810.09050; as in Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv
2203.13448. Shapes: B clips, F bands, T frames, S steps of 4 frames, E channels.
"""

from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import BANDS, PooledNetwork, clip_options, described
from model.foreign import Weights
from model.layers.cnn import ConvolutionStack, init_xavier, of_published
from model.network import Layer
from settings import Config


class TAL(PooledNetwork):
    """The published network, with its state-dict names. dim: E, None: 16 a band. Raises UserError for other sizes."""

    def __init__(
        self,
        *,
        frontend: str = "fbank128",
        dim: Optional[int] = None,
        conv_layers: int = 10,
        dropout: float = 0.0,
        **shared: Any,
    ) -> None:
        bands = BANDS[frontend]
        dim = 16 * bands if dim is None else dim
        super().__init__(dim, frontend=frontend, **shared)
        self.conv = ConvolutionStack(bands, dim, conv_layers, dropout)
        self.set_time_axis(self.spectrum.frames // 4, 4)
        self.gru = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)
        self.dropout = dropout
        init_xavier(self.conv)
        for name, parameter in self.gru.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter)
            elif name.startswith("bias_ih"):
                nn.init.zeros_(parameter)

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, S, E)"""
        x = self.conv(features.transpose(1, 2)[:, None])
        x = self.gru(F.dropout(x, self.dropout, self.gru.training))[0]
        return F.dropout(x, self.dropout, self.gru.training)

    def layers(self) -> list[Layer]:
        first, *others = self.conv
        return [[self.spectrum, first], *([layer] for layer in others), [self.gru], self.heads()]


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of published files, and what they say."""
    found, bands, sizes = of_published(weights)
    return described(found, "tal", bands, **sizes)


NETWORK, build_frontend, build_analysis = TAL, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> TAL:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return TAL(**clip_options(settings))
