"""AST: the log-mel spectrogram in overlapping patches, read by a distilled DeiT.

Gong, Chung, Glass: AST: Audio Spectrogram Transformer, Interspeech 2021, arXiv 2104.01778. Front-end logmel64 and its
statistics: Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448. Shapes: B clips, F bands,
T frames, N patches, D channels, K classes.
"""

import re
from collections.abc import Mapping
from typing import Any, Optional

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import clip_network
from model.clip_network import BANDS, SAMPLE_RATE, ClipNetwork, clip_options, frame_count
from model.foreign import Weights
from model.network import Layer, Outputs
from model.registry import read_options
from settings import Config, UserError

PATCH = 16  # bands and frames
ESC50, SPEECH_COMMANDS = (-6.6268077, 5.358466), (-6.845978, 5.5654526)  # mean and deviation of fbank128


class AST(ClipNetwork):
    """The published network, with its state-dict names and shapes. It has no time axis.

    Raises UserError for sizes that do not fit together.
    """

    classifier = ("mlp_head.",)
    v: Any  # timm's VisionTransformerDistilled

    def __init__(
        self,
        *,
        frontend: str = "fbank128",
        frequency_stride: int = 10,
        time_stride: int = 10,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        **shared: Any,
    ) -> None:
        super().__init__(frontend=frontend, **shared)
        if heads < 1 or dim % heads or not 1 <= depth <= 100:
            raise UserError(
                f"encoder_options: dim = {dim} must be a multiple of heads = {heads}, and depth = {depth} 1 to 100."
            )
        self.channels = dim
        self.grid = patch_grid(frontend, self.clip_samples, frequency_stride, time_stride)  # rows, columns of patches

        v: Any = timm.create_model(
            "deit_base_distilled_patch16_384", in_chans=1, num_classes=0, embed_dim=dim, depth=depth, num_heads=heads
        )
        v.patch_embed.proj = nn.Conv2d(1, dim, PATCH, stride=(frequency_stride, time_stride))
        v.patch_embed.img_size = None  # of any size
        v.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], dim))
        nn.init.trunc_normal_(v.pos_embed, std=0.02)
        self.v = v
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, self.num_classes))

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, 2 + N, D): class token, distillation token, patches row by row."""
        return self.v.forward_features(features[:, None])

    def forward_head(self, maps: Tensor) -> Outputs:
        """(B, 2 + N, D) -> Outputs without frames."""
        embedding = maps[:, :2].mean(dim=1)
        return self.outputs_of_clip(embedding, self.mlp_head(embedding))

    def layers(self) -> list[Layer]:
        v = self.v
        below: list[Layer] = [[self.spectrum, v.patch_embed, v.cls_token, v.dist_token, v.pos_embed]]
        blocks: list[Layer] = [[block] for block in v.blocks[:-1]]
        return [*below, *blocks, [v.blocks[-1], v.norm], [self.mlp_head]]

    def adapted(
        self, state_dict: Mapping[str, Tensor], settings: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Tensor]:
        """Weights of ImageNet's DeiT or of another AST, with the table of positions for this grid of patches.

        settings: of the other network where its file holds them; else its grid follows from the number of patches.
        """
        table = state_dict.get("v.pos_embed")
        if table is None or table.shape[2] != self.channels:
            return dict(state_dict)
        return {
            **state_dict,
            "v.pos_embed": resize_positions(table, source_grid(table.shape[1] - 2, settings), self.grid),
        }


def patch_grid(frontend: str, samples: int, frequency_stride: int, time_stride: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises UserError where there are none."""
    frames = frame_count(frontend, samples)
    if min(frequency_stride, time_stride) < 1 or frames < PATCH:
        raise UserError(
            f"clip_samples = {samples} makes {frames} frames, in patches of {PATCH} frames with the strides "
            f"{frequency_stride} and {time_stride}: raise clip_samples, and give strides of 1 or more."
        )
    return (BANDS[frontend] - PATCH) // frequency_stride + 1, (frames - PATCH) // time_stride + 1


def resize_positions(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """(1, 2 + N, D) positions of one grid -> those of another, as AST's code does: time first, then frequency.

    An axis that gets shorter is cut out of the middle, one that gets longer is interpolated. The first two stay.
    """
    image = table[:, 2:].transpose(1, 2).unflatten(2, grid)  # (1, D, rows, columns)
    for axis, size in ((3, wanted[1]), (2, wanted[0])):
        old = image.shape[axis]
        if size <= old:
            image = image.narrow(axis, old // 2 - size // 2, size)
        else:
            sizes = (image.shape[2], size) if axis == 3 else (size, image.shape[3])
            image = F.interpolate(image, size=sizes, mode="bilinear")
    return torch.cat([table[:, :2], image.flatten(2).transpose(1, 2)], dim=1)


def source_grid(patches: int, settings: Optional[Mapping[str, Any]]) -> tuple[int, int]:
    """Rows and columns of the grid that a file's positions are for. Raises UserError where nothing tells."""
    if settings is not None and "encoder_options" in settings and "clip_samples" in settings:
        options: Any = read_options("ast", settings.get("encoder_options", {}))
        return patch_grid(
            options["frontend"], settings["clip_samples"], options["frequency_stride"], options["time_stride"]
        )
    side = round(patches**0.5)
    if side in (14, 24) and side * side == patches:  # ImageNet's DeiT of 224 x 224 and of 384 x 384
        return side, side
    layout = published_layout(patches)
    if layout is None:
        raise UserError(f"{patches} positions are those of no published AST and of no DeiT.")
    return patch_grid(layout[0], layout[2], layout[1], layout[1])


def published_layout(patches: int) -> Optional[tuple[str, int, int]]:
    """Front-end, stride and clip_samples of a published file, whose number of patches tells them; or None."""
    lengths = [("fbank128", seconds * SAMPLE_RATE) for seconds in (10, 5, 1)] + [("logmel64", 10 * SAMPLE_RATE)]
    for frontend, samples in lengths:
        for stride in (10, 12, 14, 16) if frontend == "fbank128" else (4, 8):
            rows, columns = patch_grid(frontend, samples, stride, stride)
            if rows * columns == patches:
                return frontend, stride, samples
    return None


# --- files of others --------------------------------------------------------------------------------------------------

TRANSFORMERS = {  # of a layer in transformers' AST: its name here
    "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj", "layernorm_before": "norm1",
    "layernorm_after": "norm2", "intermediate.dense": "mlp.fc1", "mlp.fc1": "mlp.fc1", "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of AST's, transformers' and ImageNet's DeiT files under this network's names, and what they say.

    Raises UserError for a network that is none of these.
    """
    if any(key.endswith("embeddings.distillation_token") for key in weights):
        return described("AST of transformers", _of_transformers(weights))
    if "dist_token" in weights:
        v = {f"v.{key}": value for key, value in weights.items() if not key.startswith(("head.", "head_dist."))}
        v["v.patch_embed.proj.weight"] = v["v.patch_embed.proj.weight"].sum(dim=1, keepdim=True)
        return Weights("ImageNet DeiT", v, {"encoder_options": _sizes(v)}, images=True)
    return described("AST", {k: v for k, v in weights.items() if not k.startswith(("v.head.", "v.head_dist."))})


def described(kind: str, state_dict: dict[str, Tensor]) -> Weights:
    """Weights of an AST with the settings that follow from their shapes."""
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": _sizes(state_dict)}
    layout = published_layout(state_dict["v.pos_embed"].shape[1] - 2)
    if layout is not None:
        frontend, stride, samples = layout
        strides = {"frontend": frontend, "frequency_stride": str(stride), "time_stride": str(stride)}
        statistics = {80000: ESC50, 16000: SPEECH_COMMANDS}.get(samples)
        if statistics is not None:
            strides |= {"mean": str(statistics[0]), "deviation": str(statistics[1])}
        settings["encoder_options"] |= strides
        settings["clip_samples"] = samples
    if "mlp_head.1.weight" in state_dict:
        settings["classes_num"] = len(state_dict["mlp_head.1.weight"])
    return Weights(kind, state_dict, settings)


def _sizes(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """dim, depth and heads as encoder_options; DeiT's heads have 64 channels."""
    blocks = {int(found[1]) for key in state_dict if (found := re.match(r"v\.blocks\.(\d+)\.", key))}
    dim = state_dict["v.pos_embed"].shape[2]
    return {"dim": str(dim), "depth": str(len(blocks)), "heads": str(max(1, dim // 64))}


def _of_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps query, key and value apart; `encoder.layer.N` up to its version 4, then `layers.N`."""
    found = {key.removeprefix("audio_spectrogram_transformer."): value for key, value in weights.items()}
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # qkv of a block and kind: query, key, value
    for key, value in found.items():
        place = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", key)
        if place is None:
            renamed[_outside_of_blocks(key)] = value
            continue
        number, name, kind = place.groups()
        each = re.search(r"\b(query|key|value|q_proj|k_proj|v_proj)$", name)
        if each is not None:
            parts.setdefault(f"v.blocks.{number}.attn.qkv.{kind}", {})[each[1][0]] = value
        elif name in TRANSFORMERS:
            renamed[f"v.blocks.{number}.{TRANSFORMERS[name]}.{kind}"] = value
        else:
            raise UserError(f"it is an AST of transformers with an unknown layer, {key}")
    return renamed | {key: torch.cat([qkv[letter] for letter in "qkv"]) for key, qkv in parts.items()}


def _outside_of_blocks(key: str) -> str:
    for theirs, ours in (
        ("embeddings.cls_token", "v.cls_token"),
        ("embeddings.distillation_token", "v.dist_token"),
        ("embeddings.position_embeddings", "v.pos_embed"),
        ("embeddings.patch_embeddings.projection.", "v.patch_embed.proj."),
        ("layernorm.", "v.norm."),
        ("classifier.layernorm.", "mlp_head.0."),
        ("classifier.dense.", "mlp_head.1."),
    ):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


NETWORK, build_frontend, build_analysis = AST, clip_network.build_spectrum, clip_network.build_analysis


def build(settings: Config) -> AST:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    return AST(**clip_options(settings))
