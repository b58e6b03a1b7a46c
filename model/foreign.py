"""What a file of weights holds: the encoder, told from its keys, and the weights under that encoder's names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

from torch import Tensor

from model.registry import ENCODERS, UNNAMED, encoder_module
from settings import UserError

PREFIX = "sed_model."  # of the network's keys in a Lightning checkpoint
TEACHER = "teacher."  # of the mean teacher's keys beside them, which only a resumed run needs
WRAPPER = "module."  # of DataParallel
OWN = "checkpoint of this project"


@dataclass(frozen=True)
class Weights:
    """The weights of a file under the names of its encoder, and the kind of file.

    settings: what the file's own settings, or its kind, say about the network; None where nothing does. images: whether
    they were trained on images. encoder: name in the registry, None where the keys are those of none.
    """

    kind: str
    state_dict: dict[str, Tensor]
    settings: Optional[dict[str, Any]] = None
    images: bool = False
    encoder: Optional[str] = None


def identify(content: Mapping[Any, Any]) -> Weights:
    """Tell what kind of file `content` was, and rename its weights: {key: tensor}, tensors are not copied.

    content: what torch.load gave, or the tensors of a safetensors file beside its metadata. A file with settings is of
    this project; of any other, the registry's keys tell the encoder, whose file has a function `rename`. Raises
    UserError with the reason where there are no weights, or where they cannot work in that network.
    """
    weights = tensors(content)
    if content.get("settings") is not None:
        own = {k.removeprefix(PREFIX): value for k, value in weights.items() if not k.startswith(TEACHER)}
        settings = content["settings"]
        encoder = settings.get("encoder", UNNAMED) if isinstance(settings, Mapping) else None
        return Weights(OWN, own, settings, encoder=encoder)
    for name, row in ENCODERS.items():
        if any(re.match(pattern, key) for pattern in row.keys for key in weights):
            found: Weights = encoder_module(name).rename(weights)
            return replace(found, encoder=name)
    return Weights("state dict", {key.removeprefix(PREFIX): value for key, value in weights.items()})


def tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The weights in a file: below state_dict (Lightning, CLAP), below model (Swin, DeiT), or all of it."""
    found = next((content[name] for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), content)
    weights = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        raise UserError(f"it holds no weights: its keys are {', '.join(map(str, list(content)[:8])) or 'none'}")
    if all(key.startswith(WRAPPER) for key in weights):
        return {key.removeprefix(WRAPPER): value for key, value in weights.items()}
    return weights
