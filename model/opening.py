"""A checkpoint, by path or published name, and its network for evaluation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from torch import Tensor
from torch.nn import init

from data.labels import published_labels
from model import build_model
from model.checkpoint import Checkpoint, LoadReport, decided_settings, load_network, read_checkpoint
from model.network import Network
from settings import Config, Facts, requested, resolve

# Of torch.nn.init: what draws weights.
DRAWN = (
    "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
    "orthogonal_",
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A network with the weights of a file. labels: names of its classes, numbered where nothing tells them."""

    network: Network
    settings: Config
    labels: list[str]
    checkpoint: Checkpoint
    report: LoadReport


def open_network(path: str | Path, given: Optional[Mapping[str, Any]] = None) -> Opened:
    """The network of a file of weights, or of a name of assets/checkpoints.json, for evaluation.

    given: settings, as from flags; a file without settings of its own takes them from config.py and these. Raises
    UserError where the file is missing or does not fit.
    """
    checkpoint, settings = read_with_settings(path, given)
    network, report = build_with_weights(checkpoint, settings)
    labels = checkpoint.labels or published_labels(settings.dataset_type, settings.classes_num)
    return Opened(network, settings, labels, checkpoint, report)


def read_with_settings(
    path: str | Path, given: Optional[Mapping[str, Any]] = None, facts: Optional[Facts] = None
) -> tuple[Checkpoint, Config]:
    """The first half of open_network: a file, and the settings of its network. facts: as for settings.resolve."""
    checkpoint = read_checkpoint(path)
    given = {**checkpoint.brought, **(given or {})}
    decided = decided_settings(checkpoint, requested("frontend_from", given))
    return checkpoint, resolve(given, checkpoint=decided, facts=facts)


def build_with_weights(checkpoint: Checkpoint, settings: Config) -> tuple[Network, LoadReport]:
    """The second half of open_network: the network with the weights of the file, all of which it needs."""
    with without_random_weights():
        network = build_model(settings)
    configured = settings.model_dump()
    return network, load_network(network, checkpoint, frontend_from=settings.frontend_from, configured=configured)


@contextmanager
def without_random_weights() -> Iterator[None]:
    """Networks that are built meanwhile draw no random weights, which takes a second: a file replaces them."""
    drawn = {name: getattr(init, name) for name in DRAWN}

    def leave(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    try:
        for name in drawn:
            setattr(init, name, leave)
        yield
    finally:
        for name, function in drawn.items():
            setattr(init, name, function)
