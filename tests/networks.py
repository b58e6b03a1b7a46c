"""Networks, files of their weights, and sounds for them, which several tests share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model import build_model
from model.encoders.htsat import HTSAT_Swin_Transformer
from settings import resolve
from tests.helpers import TINY

NetworkT = TypeVar("NetworkT", bound=nn.Module)
SMALL: dict[str, Any] = {  # at 8 kHz; a folded image of 64 x 64 from 32 bands and 128 frames: 8 steps of 16 frames
    **TINY, "htsat_depth": [1, 1, 1], "htsat_num_head": [1, 2, 4], "htsat_spec_size": 64, "mel_bins": 32,
    "sample_rate": 8000, "window_size": 256, "clip_samples": 10080, "fmax": 4000, "classes_num": 5,
    "htsat_drop_path": 0.0,
}  # fmt: skip


def noise(clips: int = 2, samples: int = 10080, seed: int = 1) -> Tensor:
    """(clips, samples) float32."""
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


def htsat(sizes: Mapping[str, Any] = SMALL, /, **changes: Any) -> HTSAT_Swin_Transformer:
    """An HTS-AT in eval mode, as it begins."""
    torch.manual_seed(0)
    network = build_model(resolve({**sizes, **changes})).eval()
    assert isinstance(network, HTSAT_Swin_Transformer)
    return network


def awake(network: NetworkT) -> NetworkT:
    """The network with something in place of what begins with zeros, and with statistics of a log-mel in decibels."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:  # else nothing passes before BatchNorm has learned
                nn.init.kaiming_normal_(module.weight)
        for name, parameter in network.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_(0, 0.5)
            elif parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.3)
        for name, buffer in network.named_buffers():
            if name == "bn0.running_mean":
                buffer.fill_(-40.0)
            elif name == "bn0.running_var":
                buffer.fill_(300.0)
    return network


def save_network(path: Path, network: nn.Module, prefix: str = "sed_model.", **content: Any) -> Path:
    """A file of a network's weights, with `content` (settings, labels, ...) beside them."""
    torch.save({"state_dict": {prefix + k: v for k, v in network.state_dict().items()}, **content}, path)
    return path
