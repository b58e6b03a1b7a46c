"""Layers by oneDNN: no weight is kept that has changed, and what oneDNN cannot compute torch's layer does."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.layers.onednn import OneDNNConv2d, OneDNNLinear, use_onednn
from model.network import ONEDNN_LIMIT
from tests.helpers import ROOT

HALF = """
import torch
from torch import nn
from model.layers.onednn import use_onednn
layers = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1)).eval()
use_onednn(layers)
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
    assert layers(torch.ones(4, 8)).dtype == torch.bfloat16
"""


def pair(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A layer, and the same by oneDNN."""
    ours = nn.Sequential(copy.deepcopy(layer))
    use_onednn(ours)
    assert isinstance(ours[0], (OneDNNLinear, OneDNNConv2d))
    return layer, ours[0]


def fused_step(layer: nn.Module) -> None:
    """It leaves no trace in the version of a weight."""
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def doubled(layer: nn.Module) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


@pytest.mark.parametrize("change", [fused_step, doubled], ids=lambda change: change.__name__)
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 4, 2)], ids=lambda layer: type(layer).__name__)
def test_no_weight_is_kept_that_has_changed(layer: nn.Module, change: Callable[[nn.Module], None]) -> None:
    """As in a training whose validation puts the mode back without a call of train()."""
    theirs, ours = pair(layer)
    x = torch.randn(2, 3, 5, 6)
    for module in (theirs, ours):
        module.eval()
        with torch.no_grad():
            module(x)
        module.training = True
        module(x).sum().backward()
        change(module)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_frozen_layer_keeps_no_input_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    _, ours = pair(nn.Linear(6, 5).requires_grad_(False))
    x = torch.randn(7, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ours(x)
    assert [tensor.shape for tensor in kept] == [(5, 6)]
    y.sum().backward()
    torch.testing.assert_close(x.grad, ours.get_parameter("weight").sum(dim=0).expand(7, 6))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 5), torch.randn(6)),
        (nn.Linear(6, 5), torch.randn(0, 6)),
        (nn.Linear(6, 5), torch.randn(6, 4).t()),
        (nn.Linear(8, 2), torch.randn(2, 3, 8)),
        (nn.Linear(8, 2), torch.randn(0, 8)),
        (nn.Linear(6, 5, bias=False).double(), torch.randn(2, 6).double()),
        (nn.Conv2d(3, 4, 2), torch.randn(3, 5, 6)),
        (nn.Conv2d(3, 4, 2, stride=2, padding=1, bias=False), torch.randn(2, 5, 6, 3).permute(0, 3, 1, 2)),
        (nn.Conv2d(3, 4, (2, 3), stride=(2, 3)), torch.randn(2, 3, 5, 7)),
        (nn.Conv2d(3, 4, 2, stride=2, bias=False), torch.randn(0, 3, 4, 4)),
        (nn.Conv2d(4, 4, 2, stride=2, groups=2), torch.randn(2, 4, 4, 6)),
    ],
)
def test_inputs_of_every_form(layer: nn.Module, x: Tensor, grad: bool) -> None:
    given = [(side, x.clone().requires_grad_(grad)) for side in pair(layer.eval())]
    with torch.set_grad_enabled(grad):
        wanted, found = (side(own) for side, own in given)
    torch.testing.assert_close(found, wanted)
    if grad:
        weights = torch.rand(wanted.shape, dtype=wanted.dtype)
        gradients = (
            torch.autograd.grad((weights * y).sum(), [own, *side.parameters()])
            for (side, own), y in zip(given, (wanted, found), strict=True)
        )
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 5), torch.randn(2, 7)),
        (nn.Linear(6, 5), torch.randn(2, 6).double()),
        (nn.Linear(6, 5).bfloat16(), torch.randn(2, 6)),
        (nn.Conv2d(3, 4, 2), torch.randn(2, 4, 5, 6)),
        (nn.Conv2d(3, 4, (1, 4), stride=(1, 4)), torch.randn(2, 3, 5, 3)),
    ],
)
def test_torch_refuses_what_does_not_fit(layer: nn.Module, x: Tensor) -> None:
    theirs, ours = pair(layer.eval())
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as wanted:
            theirs(x)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as found:
            ours(x)
        assert str(found.value) == str(wanted.value)


def test_layers_with_something_of_their_own_stay() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 1, 3, padding="same"), nn.Linear(4, 4))
    layers[0].register_forward_hook(lambda *_: None)
    layers[1].forward = lambda x: x
    use_onednn(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear, nn.Conv2d, OneDNNLinear]


def test_bfloat16_without_its_instructions() -> None:
    """torch's layers compute it, slowly; oneDNN refuses to pack."""
    environment = os.environ | {ONEDNN_LIMIT: "AVX2", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", HALF], check=True, env=environment)
