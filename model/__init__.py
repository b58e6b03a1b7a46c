"""Networks and their weights. build_model is the one place where settings become a network."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from data.files import check_memory, memory_limit
from model.network import Network, Outputs
from model.registry import ENCODERS, encoder_module, within_published_size
from settings import Config, UserError

__all__ = ["Network", "Outputs", "build_model"]

MOST_TENSORS = 3_000  # of a network
CLIPS = 32  # at once in memory


def build_model(settings: Config) -> Network:
    """The network that `settings` describe. Raises UserError for sizes that do not fit together, or into memory."""
    _check_size(settings)
    network: Network = encoder_module(settings.encoder).build(settings)
    network.set_gradient_checkpointing(settings.gradient_checkpointing)
    return network


def _check_size(settings: Config) -> None:
    """Raise UserError for a network that memory does not hold. It is built without values, up to where that shows."""
    size, count, allowed = CLIPS * settings.clip_samples * torch.float32.itemsize, 0, memory_limit() // 2

    def add(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal size, count
        if isinstance(tensor, Tensor):
            size, count = size + tensor.numel() * tensor.element_size(), count + 1
        if size > allowed:
            check_memory(f"A network of these settings (encoder = {settings.encoder}, up to its {name})", size)
        if count > MOST_TENSORS:
            raise UserError(f"A network of these settings has more than {MOST_TENSORS} weights: lower its depth.")

    check_memory(f"clip_samples = {settings.clip_samples}", size)
    if within_published_size(settings):  # on the meta device torch takes seconds, as it imports its compiler
        known = 2 * ENCODERS[settings.encoder].parameters * torch.float32.itemsize  # with what is no parameter
        check_memory(f"A network of these settings (encoder = {settings.encoder})", size + known)
        return
    hooks = [register_module_parameter_registration_hook(add), register_module_buffer_registration_hook(add)]
    try:
        with torch.device("meta"):
            encoder_module(settings.encoder).build(settings)
    finally:
        for hook in hooks:
            hook.remove()
