"""BEATs: a transformer over patches of 16 bands and 16 frames, whose attention has gated relative positions.

Chen et al.: BEATs: Audio Pre-Training with Acoustic Tokenizers, ICML 2023, arXiv 2212.09058; the gate: Chen et al.,
WavLM, arXiv 2110.13900, section III-A; alpha: Wang et al., DeepNet, arXiv 2203.00555. Shapes: B clips, F bands, T
frames, L tokens, D channels, H heads.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from model.foreign import Weights
from model.frame_network import FrameNetwork, builders, check_sizes, described, find
from model.frontend import KaldiFbank
from model.network import Layer
from settings import UserError

BANDS, PATCH = 128, 16  # mel bands; bands and frames of a patch
PATCH_CHANNELS = 512
TAPS, GROUPS = 128, 16  # of the convolution of positions
BUCKETS, FARTHEST = 320, 800  # of relative positions; tokens from which on they share one
DROPOUT, LAYER_DROP = 0.1, 0.05


class BEATs(FrameNetwork):
    """The published network of iteration 3. Of the tokens of a time, 8 follow each other by frequency."""

    mean, scale = 15.41663, 2 * 6.55582

    def __init__(
        self, *, dim: int = 768, depth: int = 12, heads: int = 12, drop_layers: int = 0, **shared: Any
    ) -> None:
        check_sizes(dim, depth, heads, drop_layers)
        if dim % GROUPS:
            raise UserError(f"encoder_options: dim = {dim} must be a multiple of {GROUPS}.")
        super().__init__(build_bank(), dim, **shared)
        self.beats = PatchTransformer(dim, depth, heads, drop_layers)

    def encode(self, features: Tensor) -> Tensor:
        return self.beats(features)

    def encoder_layers(self) -> list[Layer]:
        beats, encoder = self.beats, self.beats.encoder
        patches: list[nn.Module] = [beats.patch_embedding, beats.layer_norm, beats.post_extract_proj]
        below = [*patches, beats.dropout, encoder.pos_conv, encoder.layer_norm, encoder.dropout]
        return [below, *([layer] for layer in encoder.layers)]


class PatchTransformer(nn.Module):
    """(B, 128, T) -> (B, T // 16 * 8, D): tokens by time, then by frequency."""

    def __init__(self, dim: int, depth: int, heads: int, drop_layers: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, PATCH_CHANNELS, PATCH, stride=PATCH, bias=False)
        self.layer_norm = nn.LayerNorm(PATCH_CHANNELS)
        self.post_extract_proj = nn.Linear(PATCH_CHANNELS, dim)
        self.dropout = nn.Dropout(DROPOUT)
        self.encoder = Encoder(dim, depth, heads, drop_layers)

    def forward(self, features: Tensor) -> Tensor:
        patches = self.patch_embedding(features.transpose(1, 2)[:, None]).flatten(2).transpose(1, 2)
        return self.encoder(self.dropout(self.post_extract_proj(self.layer_norm(patches))))


class Encoder(nn.Module):
    """(B, L, D) -> (B, L, D). The table of relative positions is the first layer's, and all use it."""

    def __init__(self, dim: int, depth: int, heads: int, drop_layers: int) -> None:
        super().__init__()
        convolution = nn.Conv1d(dim, dim, TAPS, padding=TAPS // 2, groups=GROUPS)
        nn.init.normal_(convolution.weight, std=math.sqrt(4 / (TAPS * dim)))
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        self.pos_conv = nn.Sequential(weight_norm(convolution, dim=2))
        self.layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(EncoderLayer(dim, depth, heads, number) for number in range(depth - drop_layers))

    def forward(self, x: Tensor) -> Tensor:
        positions = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = self.dropout(self.layer_norm(x + F.gelu(positions)))
        first: Any = self.layers[0]
        bias = first.self_attn.position_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return x


class EncoderLayer(nn.Module):
    """(B, L, D), (H, L, L) bias -> (B, L, D): normalized after each residual; in training, some are left out whole."""

    def __init__(self, dim: int, depth: int, heads: int, number: int) -> None:
        super().__init__()
        gain = (8 * depth) ** -0.25
        self.alpha, self.drop_prob = (2 * depth) ** 0.25, LAYER_DROP
        self.self_attn = GatedAttention(dim, heads, gain, with_table=number == 0)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(DROPOUT)
        init_linear(gain, self.fc1, self.fc2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.self_attn_layer_norm(self.alpha * x + self.dropout(self.self_attn(x, bias)))
        y = self.final_layer_norm(self.alpha * y + self.dropout(self.fc2(F.gelu(self.fc1(y)))))
        if self.training and self.drop_prob:
            # Computed all the same: every process then has a gradient for every parameter.
            y = torch.where(torch.rand((), device=x.device) < self.drop_prob, x, y)
        return y


class GatedAttention(nn.Module):
    """(B, L, D), (H, L, L) bias -> (B, L, D): the bias is scaled by a gate that each query sets."""

    def __init__(self, dim: int, heads: int, gain: float, *, with_table: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, DROPOUT
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.grep_linear = nn.Linear(dim // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))
        init_linear(1.0, self.q_proj, self.k_proj)
        init_linear(gain, self.v_proj, self.out_proj)
        nn.init.normal_(self.grep_linear.weight, std=0.02)
        nn.init.zeros_(self.grep_linear.bias)
        if with_table:
            self.relative_attention_bias = nn.Embedding(BUCKETS, heads)
            nn.init.normal_(self.relative_attention_bias.weight, std=0.02)

    def position_bias(self, tokens: int) -> Tensor:
        """(H, tokens, tokens), from the table."""
        place = torch.arange(tokens, device=self.grep_a.device)
        return self.relative_attention_bias(bucket(place[None, :] - place[:, None])).permute(2, 0, 1)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H, L, D / H)
        first, second = self.grep_linear(query).unflatten(3, (2, 4)).sum(dim=4).sigmoid().unbind(dim=3)  # (B, H, L)
        gate = first * (second * self.grep_a[..., 0] - 1) + 2
        mask = (gate[..., None] * bias).to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(found.transpose(1, 2).flatten(2))


def bucket(distance: Tensor) -> Tensor:
    """(...) tokens from query to key -> (...) row of the table: exact up to 79, then by logarithm, each direction."""
    half = BUCKETS // 2
    exact, far = half // 2, distance.abs()
    share = torch.log(far.clamp(min=1).float() / exact) / math.log(FARTHEST / exact)
    beyond = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return half * (distance > 0) + torch.where(far < exact, far, beyond)


def init_linear(gain: float, *layers: nn.Linear) -> None:
    """Xavier normal weights, biases 0."""
    for layer in layers:
        nn.init.xavier_normal_(layer.weight, gain=gain)
        nn.init.zeros_(layer.bias)


def build_bank() -> KaldiFbank:
    """Of samples as 16-bit integers, with Kaldi's povey window."""
    return KaldiFbank(BANDS, window="povey", gain=32768.0)


TABLE = re.compile(r"layers\.(\d+)\.self_attn\.relative_attention_bias\.weight$")


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PretrainedSED's and Microsoft's files under this network's names.

    The table of positions stands there once for each layer. Raises UserError where these differ.
    """
    found: dict[str, Tensor] = {}
    table = find(weights, "layers.0.self_attn.relative_attention_bias.weight")
    for key, value in weights.items():
        place = TABLE.search(key)
        if place is None or place[1] == "0":
            key = key.replace(".pos_conv.0.weight_g", ".pos_conv.0.parametrizations.weight.original0")
            found[key.replace(".pos_conv.0.weight_v", ".pos_conv.0.parametrizations.weight.original1")] = value
        elif not torch.equal(value, table):
            raise UserError(f"it is a BEATs whose layers have tables of positions of their own ({key})")
    depth = len({number[1] for key in found if (number := re.search(r"encoder\.layers\.(\d+)\.", key))})
    dim, heads = find(found, "post_extract_proj.weight").shape[0], table.shape[1]
    return described("BEATs", "beats.", found, {"dim": dim, "depth": depth, "heads": heads})


NETWORK = BEATs
build, build_frontend, build_analysis = builders(BEATs, build_bank)
