"""The network computes what the published one computes (tests/golden/README.md)."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.encoders.htsat import HTSAT_Swin_Transformer

FOLDER = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("golden", FOLDER / "golden.py")
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
SHAPES = json.loads((FOLDER / "state_dict_shapes_527.json").read_text())


def build(case: str) -> tuple[HTSAT_Swin_Transformer, torch.Tensor, dict]:
    """The network of a case with its drawn parameters, its waveforms, and the settings of the call."""
    classes, seconds, sample_rate, hop_size, seed, clips, extra = golden.CASES[case]
    extra = dict(extra)
    call = {"infer_mode": extra.pop("infer_mode", False)}
    network = HTSAT_Swin_Transformer(
        num_classes=classes, sample_rate=sample_rate, hop_size=hop_size, fmax=14000.0, **extra
    )
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    drawn = {key: torch.from_numpy(value) for key, value in golden.draw_parameters(shapes).items()}
    unset = network.load_state_dict(drawn, strict=False)
    assert not unset.unexpected_keys
    assert all(any(part in key for part in golden.COMPUTED) for key in unset.missing_keys)
    return network.eval(), torch.from_numpy(golden.draw_waveforms(clips, seconds, sample_rate, seed)), call


def test_state_dict_is_the_published_one() -> None:
    network = HTSAT_Swin_Transformer()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == SHAPES
    assert sum(p.numel() for p in network.parameters()) == 31_325_143
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 30_241_687
    assert sum(p.numel() for p in network.unused_parameters()) == 278_256


@pytest.mark.parametrize("case", golden.CASES)
def test_outputs(case: str) -> None:
    network, waveforms, call = build(case)
    expected = np.load(FOLDER / f"{case}.npz")
    with torch.inference_mode():
        outputs = {name: value.numpy() for name, value in network.published_outputs(waveforms, **call).items()}
    assert outputs["framewise_output"].shape == tuple(expected["framewise_shape"])
    np.testing.assert_allclose(outputs["clipwise_output"], expected["clipwise_output"], rtol=0, atol=5e-4)
    every_32nd = outputs["framewise_output"][:, ::32]
    np.testing.assert_allclose(every_32nd, expected["framewise_output_every_32nd"], rtol=0, atol=5e-4)
    if "latent_output" in expected:
        np.testing.assert_allclose(outputs["latent_output"], expected["latent_output"], rtol=0, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients(gradient_checkpointing: bool) -> None:
    """Every parameter's gradient norm, in evaluation mode as they were measured."""
    network, waveforms, _ = build("audioset_10s")
    expected = np.load(FOLDER / "audioset_10s.npz")
    network.set_gradient_checkpointing(gradient_checkpointing)
    targets = torch.from_numpy(golden.draw_targets(2, 527, 2))
    loss = torch.nn.functional.binary_cross_entropy(network(waveforms).clip_logits.sigmoid(), targets)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["bce_loss"]), abs=5e-4)
    norms = {name: p.grad.norm().item() for name, p in network.named_parameters() if p.grad is not None}
    assert sorted(norms) == sorted(expected["grad_norm_keys"].tolist())
    reference = np.array(expected["grad_norms"], dtype=float)
    measured = np.array([norms[key] for key in expected["grad_norm_keys"].tolist()])
    deviation = np.abs(measured / reference - 1)
    assert deviation.max() < 0.01, expected["grad_norm_keys"][deviation.argmax()]
    assert np.median(deviation) < 0.001
