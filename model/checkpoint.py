"""The one place that loads weights. What is loaded cannot run code, and every load says what matched."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

PREFIX = "sed_model."  # of the network's keys in a Lightning checkpoint
CLASSIFIER = ("tscam_conv.", "head.")  # keys whose shape follows the number of classes
COMPUTED = ("relative_position_index", "attn_mask", "num_batches_tracked")  # buffers that a file may leave out
FRONTEND = ("spectrogram_extractor.", "logmel_extractor.")
LEAST_MATCHED = 0.99  # share of the backbone's parameters below which a file is refused


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights: the network's state dict without prefix, and what the file says about itself."""

    path: Path
    state_dict: dict[str, Tensor]
    settings: Optional[dict[str, Any]] = None  # None: the file is not this project's, the settings must be given
    labels: Optional[list[str]] = None
    epoch: Optional[int] = None
    frontend: Optional[dict[str, Any]] = None


@dataclass(frozen=True)
class LoadReport:
    """What a load did, key by key. share: of the backbone's parameters, how many came from the file."""

    path: Path
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    share: float

    def __str__(self) -> str:
        text = f"{self.path}: {len(self.matched)} keys matched, {self.share:.1%} of the backbone's parameters"
        for name in ("missing", "unexpected", "reshaped"):
            keys = getattr(self, name)
            if keys:
                text += f"; {len(keys)} {name} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        return text


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of this project, a published HTS-AT checkpoint, or a bare state dict.

    Raises ValueError where there is no such file, where it is none of these, or where reading it would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}: give the path of a .ckpt file, as train prints it.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not (zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80"):
            raise ValueError(f"{path} is no checkpoint: it is no file of torch.save.") from None
        raise ValueError(
            f"{path} holds more than tensors and plain values, and loading it could run code: refused. "
            f"Save its state_dict alone, where you trust its source."
        ) from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no checkpoint, or it is cut off: {str(error).splitlines()[0]}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, where a checkpoint or a state dict is needed.")
    weights = content.get("state_dict", content)
    state_dict = {key.removeprefix(PREFIX): value for key, value in weights.items() if isinstance(value, Tensor)}
    if not state_dict:
        raise ValueError(f"{path} holds no weights: its keys are {', '.join(map(str, list(content)[:8]))}.")
    return Checkpoint(
        path, state_dict, content.get("settings"), content.get("labels"), content.get("epoch"), content.get("frontend")
    )


def load_network(network: nn.Module, checkpoint: Checkpoint, *, new_classifier: bool = False) -> LoadReport:
    """Copy a checkpoint's weights into a network.

    new_classifier: for fine-tuning, keep the network's own classifier where its shape differs. Otherwise every
    parameter must come from the file. Raises ValueError when too little matches.
    """
    own = network.state_dict()
    given = checkpoint.state_dict
    matched = [key for key in own if key in given and own[key].shape == given[key].shape]
    foreign = [key for key in matched if key.startswith(FRONTEND) and not _close(own[key], given[key])]
    if foreign:
        kept = (
            "the configured one is kept"
            if new_classifier
            else "the file's is used, which its weights were trained with"
        )
        warnings.warn(
            f"{checkpoint.path} holds another front-end than the settings describe ({', '.join(foreign)}): {kept}. "
            f"Its sample_rate, fmin or fmax differ.",
            stacklevel=2,
        )
        if new_classifier:
            matched = [key for key in matched if key not in foreign]
    reshaped = [key for key in own if key in given and own[key].shape != given[key].shape]
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own]
    report = LoadReport(checkpoint.path, matched, missing, unexpected, reshaped, _share(own, matched))

    needed = [key for key in reshaped + missing if not key.endswith(COMPUTED)]
    if new_classifier:
        needed = [key for key in needed if not key.startswith(CLASSIFIER)]
    spare = ("head.", *FRONTEND) if "tscam_conv.weight" in own else FRONTEND
    needed = [key for key in needed if not key.startswith(spare) or key in reshaped]
    if report.share < LEAST_MATCHED or needed:
        raise ValueError(
            f"{report}. This file does not fit the network. {_advice(reshaped)} "
            f"Keys that are needed: {', '.join(needed[:4])}{', ...' if len(needed) > 4 else ''}"
        )
    network.load_state_dict({**own, **{key: given[key] for key in matched}})
    return report


def _close(own: Tensor, given: Tensor) -> bool:
    """Whether two front-end tensors are the same but for how they were rounded."""
    return bool(torch.allclose(own.cpu(), given.cpu().to(own.dtype), rtol=1e-3, atol=1e-5))


def _share(own: Mapping[str, Tensor], matched: Sequence[str]) -> float:
    """Share of the backbone's elements (no classifier, front-end or computed buffer) that are among `matched`."""
    sizes = {
        key: value.numel()
        for key, value in own.items()
        if not key.startswith((*CLASSIFIER, *FRONTEND)) and not key.endswith(COMPUTED)
    }
    return sum(sizes.get(key, 0) for key in matched) / sum(sizes.values())


def _advice(reshaped: Sequence[str]) -> str:
    if reshaped and all(key.startswith(CLASSIFIER) for key in reshaped):
        return "Its classifier has another number of classes: set classes_num, or fine-tune from it with train."
    if reshaped:
        return "Its network has other sizes: set htsat_dim, htsat_depth and htsat_num_head as it was trained."
    return "It seems to hold another architecture."
