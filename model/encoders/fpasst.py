"""Frame-PaSST: convolutions in time down to 40 ms, then a transformer over frames that hold all mel bands.

Koutini et al.: Efficient Training of Audio Transformers with Patchout, Interspeech 2022, arXiv 2110.05069; its form
with frames: Schmid et al., arXiv 2409.09546. Shapes: B clips, F bands, T frames, L tokens, D channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.foreign import Weights
from model.frame_network import (
    FRAME_SAMPLES,
    LONGEST,
    FrameNetwork,
    Padded,
    check_sizes,
    described,
    find,
    network_options,
    transformer_sizes,
)
from model.frontend import Analysis, CentredLogMel, kaldi_filterbank
from model.layers.vit import EPS, init_linear, vit_blocks
from model.network import Layer
from settings import Config

BANDS = 128
TOKENS = 2  # class and distillation token


class FPaSST(FrameNetwork):
    """The published network. Of a clip shorter than 10 s, the first positions of the table are used."""

    mean, scale = -4.5, 5.0

    def __init__(
        self, *, dim: int = 768, depth: int = 12, heads: int = 12, drop_layers: int = 0, **shared: Any
    ) -> None:
        check_sizes(dim, depth, heads, drop_layers)
        super().__init__(build_bank(), dim, **shared)
        self.fpasst = FrameTransformer(dim, depth - drop_layers, heads)

    def encode(self, features: Tensor) -> Tensor:
        return self.fpasst(features)

    def encoder_layers(self) -> list[Layer]:
        own = self.fpasst
        blocks: list[Layer] = [[block] for block in own.blocks]
        below: list[nn.Module | nn.Parameter] = [own.conv_in_1, own.conv_in_2, own.conv_in_3, own.patch_embed]
        below += [own.cls_token, own.dist_token, own.new_pos_embed, own.freq_new_pos_embed, own.time_new_pos_embed]
        return [below, *blocks[:-1], [*blocks[-1], own.norm]]


class FrameTransformer(nn.Module):
    """(B, 128, T) -> (B, T / 4, D)."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, TOKENS, dim))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, dim, 1, LONGEST // FRAME_SAMPLES))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)
        self.conv_in_1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv_in_2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv_in_3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.patch_embed = PatchEmbed(dim)
        self.blocks = vit_blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Tensor:
        x = features[:, None]
        for convolution in (self.conv_in_1, self.conv_in_2, self.conv_in_3):
            x = F.gelu(convolution(x))  # (B, 64, F / 4, T / 4) in the end
        x = self.patch_embed(x.reshape(x.shape[0], 16, BANDS, -1))  # (B, D, 1, T / 4)
        x = x + self.time_new_pos_embed[..., : x.shape[3]] + self.freq_new_pos_embed
        tokens = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        x = torch.cat([tokens.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, TOKENS:]


class PatchEmbed(nn.Module):
    """(B, 16, 128, T) -> (B, D, 1, T): each column with the next one, zeros behind the last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(16, dim, (BANDS, 2), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)[..., 1:]


def build_bank() -> CentredLogMel:
    """128 Kaldi bands up to 7 kHz every 10 ms of the pre-emphasized sound, natural logarithm.

    In the published training its edges are drawn anew for each batch; here they are those of its evaluation.
    """
    window, bands = torch.hann_window(400), kaldi_filterbank(BANDS, 0.0, 7000.0)
    return CentredLogMel(window, bands, fft=512, hop=160, floor=1e-7, preemphasis=0.97)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PretrainedSED's files under this network's names."""
    dim = find(weights, "time_new_pos_embed").shape[1]
    return described("Frame-PaSST", "fpasst.", weights, transformer_sizes(weights, "blocks", dim))


NETWORK = FPaSST


def build(settings: Config) -> FPaSST:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return FPaSST(**network_options(settings))


def build_frontend(settings: Config) -> Padded:
    """Network.log_mel alone, without the network."""
    return Padded(build_bank(), settings.clip_samples)


def build_analysis(settings: Config) -> Analysis:
    """What the front-end measures, for pictures."""
    return build_bank().analysis()
