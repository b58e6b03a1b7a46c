"""What a file of weights holds: its kind, told from its keys, and its weights under this network's names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

from torch import Tensor

from settings import UserError

Kind = Literal["HTS-AT of this project", "published HTS-AT", "ImageNet Swin", "LAION-CLAP", "state dict"]

PREFIX = "sed_model."  # of the network's keys in a Lightning checkpoint
TEACHER = "teacher."  # of the mean teacher's keys beside them, which only a run that goes on needs
AUDIO_BRANCH = re.compile(r"^(?:module\.)?audio_branch\.")  # of the audio network's keys in a CLAP checkpoint
FUSION = (
    "mel_conv1d",
    "mel_conv2d",
    "fusion_model",
)  # layers of the CLAP variant that takes several stretches of a clip
PATCHES = "patch_embed.proj.weight"
BIAS_TABLE = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$")
# Wu et al. 2023, Large-Scale Contrastive Language-Audio Pretraining: audio of 10 s at 48 kHz, padded by repetition.
CLAP_SETTINGS = {
    "sample_rate": 48000, "window_size": 1024, "hop_size": 480, "mel_bins": 64, "fmin": 50.0, "fmax": 14000.0,
    "clip_samples": 480000, "short_clips": "repeat", "loss_type": "clip_bce", "task": "multilabel",
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The weights of a file under this network's names, and what kind of file they come from.

    settings: what the file's own settings, or its kind, say about the network; None where nothing does.
    """

    kind: Kind
    state_dict: dict[str, Tensor]
    settings: Optional[dict[str, Any]] = None


def identify(content: Mapping[Any, Any]) -> Weights:
    """Tell what kind of file `content` was, and rename its weights: {key: tensor}, tensors are not copied.

    content: what torch.load gave, or the tensors of a safetensors file beside its metadata. Raises UserError with the
    reason where there are no weights, or where they cannot work in this network.
    """
    weights = _tensors(content)
    if any(AUDIO_BRANCH.match(key) for key in weights):
        return _clap(weights)
    state_dict = {k.removeprefix(PREFIX): value for k, value in weights.items() if not k.startswith(TEACHER)}
    if content.get("settings") is not None:
        return Weights("HTS-AT of this project", state_dict, content["settings"])
    if any(key.startswith(PREFIX) for key in weights):
        return Weights("published HTS-AT", state_dict)
    if _is_swin(weights):
        return Weights("ImageNet Swin", _swin(weights))
    return Weights("state dict", state_dict)


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The weights in a file: below state_dict (Lightning, CLAP), below model (Swin), or all of it."""
    found = next((content[name] for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), content)
    weights = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        raise UserError(f"it holds no weights: its keys are {', '.join(map(str, list(content)[:8])) or 'none'}")
    return weights


def _is_swin(weights: Mapping[str, Tensor]) -> bool:
    """A Swin for pictures takes three channels: red, green and blue."""
    patches = weights.get(PATCHES)
    return (
        patches is not None
        and patches.ndim == 4
        and patches.shape[1] == 3
        and "layers.0.blocks.0.norm1.weight" in weights
    )


def _swin(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Microsoft's names are this network's; the patch kernel is averaged over its colours, the class head left out."""
    kept = {key: value for key, value in weights.items() if not key.startswith("head.")}
    return {**kept, PATCHES: weights[PATCHES].mean(dim=1, keepdim=True)}


def _clap(weights: Mapping[str, Tensor]) -> Weights:
    """The audio branch alone. Its front-end is another one than the paper's."""
    branch = {AUDIO_BRANCH.sub("", key): value for key, value in weights.items() if AUDIO_BRANCH.match(key)}
    fused = [key for key in branch if any(part in key for part in FUSION)]
    if fused:
        raise UserError(
            f"it is a LAION-CLAP with feature fusion ({fused[0]}), whose audio network looks at a whole recording and "
            f"three stretches of it at once; this network takes one stretch. Use a CLAP checkpoint without fusion"
        )
    classes = branch.get("tscam_conv.weight")
    if PATCHES not in branch or classes is None or not heads(branch):
        raise UserError("it is a LAION-CLAP whose audio branch is no HTS-AT. Use a CLAP checkpoint with HTSAT-tiny")
    found = heads(branch)
    sizes = {
        "classes_num": len(classes),
        "enable_tscam": True,
        "htsat_dim": len(branch[PATCHES]),
        "htsat_depth": [len(stage) for stage in found],
        "htsat_num_head": [stage[0] for stage in found],
    }
    return Weights("LAION-CLAP", branch, {**CLAP_SETTINGS, **sizes})


def heads(state_dict: Mapping[str, Tensor]) -> list[list[int]]:
    """Attention heads of each block of each stage, from the columns of the relative position bias tables."""
    stages: dict[int, dict[int, int]] = {}
    for key, value in state_dict.items():
        place = BIAS_TABLE.match(key)
        if place and value.ndim == 2:
            stages.setdefault(int(place[1]), {})[int(place[2])] = value.shape[1]
    return [[blocks[number] for number in sorted(blocks)] for _, blocks in sorted(stages.items())]
