"""FNet: tokens mixed by Fourier transforms over time and channels, in place of attention.

Lee-Thorp et al.: FNet: Mixing Tokens with Fourier Transforms, arXiv 2105.03824; as in Li, Qu, Huang, Metze:
AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448. Shapes: B clips, F bands, T frames, D channels, K classes.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import BANDS, ClipNetwork, clip_options, count_blocks, described
from model.foreign import Weights
from model.heads import probabilities, shares
from model.network import Layer, Network, Outputs
from settings import Config, UserError

EPS = 1e-12  # of each LayerNorm


class FNet(ClipNetwork):
    """The published network, with its state-dict names, and a sigmoid before its scores are bounded.

    Without the sigmoid, as published, scores beyond 0 and 1 have no gradient. dim: D; dropout: of the input and of each
    MLP. Raises UserError for sizes that do not fit.
    """

    classifier = ("pooler.",)

    def __init__(
        self,
        *,
        frontend: str = "fbank128",
        dim: int = 256,
        layers: int = 50,
        dropout: float = 0.1,
        **shared: Any,
    ) -> None:
        super().__init__(frontend=frontend, **shared)
        if dim < 1 or not 1 <= layers <= 100:
            raise UserError(f"encoder_options: dim = {dim} must be at least 1, and layers = {layers} 1 to 100.")
        self.channels = dim
        self.input = Input(BANDS[frontend], dim, dropout)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(FourierLayer(dim, dropout) for _ in range(layers))})
        self.pooler = nn.ModuleDict({name: nn.Linear(dim, self.num_classes) for name in ("att", "fc")})
        self.set_time_axis(self.spectrum.frames, 1)

    def blocks(self) -> list[nn.Module]:
        return list(self.encoder["layer"].children())

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, T, D)"""
        x = self.input(features.transpose(1, 2))
        for layer in self.blocks():
            x = layer(x)
        return x

    def forward_head(self, maps: Tensor) -> Outputs:
        """(B, T, D) -> Outputs: the mean of the frames' probabilities, weighted by a softmax over time."""
        logits = self.pooler["fc"](maps)
        weights = shares(self.pooler["att"](maps).float().softmax(dim=1))
        return self.outputs_of_steps(maps, logits, (weights * probabilities(logits)).sum(dim=1))

    def layers(self) -> list[Layer]:
        return [
            [self.spectrum, self.input],
            *([layer] for layer in self.blocks()),
            [self.pooler["att"], self.pooler["fc"]],
        ]

    def compiled_parts(self) -> list[nn.Module]:
        """None: torch.compile has no complex numbers."""
        return []

    def for_export(self, log_mel: Tensor) -> Network:
        """With products of matrices for Fourier transforms, which the ONNX standard has in one dimension alone."""
        network = super().for_export(log_mel)
        mixing = FourierMatrices(log_mel.shape[1], self.channels)
        for layer in network.blocks():
            assert isinstance(layer, FourierLayer)
            layer.mixing = mixing
        return network


class Input(nn.Module):
    """(B, T, F) -> (B, T, D)."""

    def __init__(self, bands: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(bands, eps=EPS)
        self.hidden_mapping = nn.Linear(bands, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.hidden_mapping(self.layer_norm(x)))


class FourierLayer(nn.Module):
    """(B, T, D) -> (B, T, D): Fourier mixing, then an MLP of 2 D channels, each with a residual, then a LayerNorm."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.mixing: nn.Module = FourierMixing()
        self.mixing_layer_norm = nn.LayerNorm(dim, eps=EPS)
        self.feed_forward, self.output_dense = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.output_layer_norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixing_layer_norm(x + self.mixing(x))
        return self.output_layer_norm(x + self.dropout(self.output_dense(F.gelu(self.feed_forward(x)))))


class FourierMixing(nn.Module):
    """(B, T, D) -> (B, T, D) float32: the real part of the Fourier transform over both."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.fft.fft2(x.float(), dim=(1, 2)).real


class FourierMatrices(nn.Module):
    """FourierMixing of so many frames and channels: cos(a + b) = cos(a) cos(b) - sin(a) sin(b)."""

    def __init__(self, frames: int, channels: int) -> None:
        super().__init__()
        for name, size in (("time", frames), ("channel", channels)):
            steps = torch.outer(torch.arange(size), torch.arange(size)) % size
            angles = steps.double() * (2 * math.pi / size)
            self.register_buffer(f"{name}_cosine", angles.cos().float())
            self.register_buffer(f"{name}_sine", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            self.get_buffer(f"time_{name}") @ (x @ self.get_buffer(f"channel_{name}")) for name in ("cosine", "sine")
        )
        return next(parts) - next(parts)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of published files, and what they say."""
    dim, bands = weights["input.hidden_mapping.weight"].shape
    return described(weights, "fnet", bands, dim=dim, layers=count_blocks(weights, "encoder.layer."))


NETWORK, build_frontend, build_analysis = FNet, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> FNet:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return FNet(**clip_options(settings))
