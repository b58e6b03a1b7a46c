"""Networks and their weights. build_model is the one place where settings become a network."""

from model.network import Network, Outputs
from model.registry import encoder_module
from settings import Config

__all__ = ["Network", "Outputs", "build_model"]


def build_model(settings: Config) -> Network:
    """The network that `settings` describe. Raises UserError for sizes that do not fit together."""
    network: Network = encoder_module(settings.encoder).build(settings)
    network.set_gradient_checkpointing(settings.gradient_checkpointing)
    return network
