"""The encoders of AudioTagging Done Right: golden numbers through files with published keys, sizes, time axes."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inference import Tagger
from model import Network, build_model
from model.opening import open_network
from settings import UserError, resolve
from tests.helpers import SIZES
from tests.model.test_ast import load_file
from tests.model.test_golden import FOLDER, golden
from tests.networks import noise, save_network

draw = load_file(FOLDER / "draw_clip.py")
SHAPES: dict[str, dict[str, list[int]]] = json.loads((FOLDER / "state_dict_shapes_clip.json").read_text())


class Case(NamedTuple):
    """A golden file. seconds: a step of its `framewise`. others: its further clip scores.

    Of each: encoder_options, and the beginning of the keys that its file lacks.
    """

    encoder: str
    seconds: float
    others: Mapping[str, tuple[str, str]] = {}


CASES = {
    "tal_a": Case("tal", 0.04),
    "tal_b": Case("tal", 0.1, {f"clipwise_{p}": (f"pooling={p}", "fc_att.") for p in ("max", "ave", "lin", "exp")}),
    "taltrans_a": Case("taltrans", 0.04),
    "taltrans_b": Case("taltrans", 0.1, {"clipwise_without_position": ("", "positional_encoding.")}),
    "transformer_b": Case("transformer", 0.1),
    "fnet_a": Case("fnet", 0.01),
    "linear_b": Case("linear", 0.025),
}
clip_encoders = pytest.mark.parametrize("name", sorted({case.encoder for case in CASES.values()}))


def published(case: str, path: Path, lacking: str = "") -> Path:
    """A file as published: what a network computes itself has any values, and TAL's convolutions have second names."""
    shapes = {key: shape for key, shape in SHAPES[case].items() if not lacking or not key.startswith(lacking)}
    drawn = {key: torch.from_numpy(value) for key, value in draw.draw_parameters(shapes).items()}
    content = {key: torch.zeros(shape) for key, shape in shapes.items()} | drawn
    twice = {
        re.sub(r"^conv\.(\d+)", lambda key: f"conv{int(key[1]) + 1}", key): value for key, value in content.items()
    }
    torch.save({f"module.{key}": value for key, value in (content | twice).items()}, path)
    return path


def waveforms(case: str) -> Tensor:
    front_end, seed = draw.CASES[case]
    return torch.from_numpy(golden.draw_waveforms(2, 10, 32000 if "32" in front_end else 16000, seed))


def opened(case: str, path: Path, options: str = "") -> Network:
    """From a file as published, without a flag but the options."""
    tagger = Tagger.from_checkpoint(path, "cpu", given={"encoder_options": options} if options else None)
    network, report = tagger.network, tagger.report
    assert isinstance(network, Network)
    assert report is not None
    assert (tagger.settings.encoder, tagger.labels[0]) == (CASES[case].encoder, "Speech")
    assert (report.share, report.unexpected, report.reshaped, report.missing) == (1, [], [], [])
    return network


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_published_file_gives_the_golden_numbers(case: str, tmp_path: Path) -> None:
    expected, sound = np.load(FOLDER / f"clip_{case}.npz"), waveforms(case)
    network = opened(case, published(case, tmp_path / "model.pth")).requires_grad_(True)
    outputs = network(sound)
    np.testing.assert_allclose(outputs.clip_logits.sigmoid().detach(), expected["clipwise"], rtol=0, atol=2e-5)
    steps = np.arange(0, expected["framewise_shape"][1], expected["framewise_step"]) * CASES[case].seconds
    frames = outputs.frame_logits.sigmoid().detach()[:, np.rint(steps / network.frame_seconds).astype(int)]
    np.testing.assert_allclose(frames, expected["framewise"], rtol=0, atol=5e-5)

    targets = torch.from_numpy(golden.draw_targets(2, 527, draw.CASES[case][1] + 1))
    loss = F.binary_cross_entropy_with_logits(outputs.clip_logits, targets)
    assert loss.item() == pytest.approx(float(expected["bce_loss"]), abs=1e-5)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in network.named_parameters() if p.grad is not None}
    keys = expected["grad_norm_keys"].tolist()
    assert all(key.endswith(("att.bias", "w_ks.bias")) for key in norms.keys() - set(keys)), "they shift a softmax"
    deviation = np.abs(np.array([norms[key] for key in keys]) / expected["grad_norms"] - 1)
    assert deviation.max() < 0.01, keys[deviation.argmax()]
    assert np.median(deviation) < 0.001
    for name, (options, lacking) in CASES[case].others.items():
        other = opened(case, published(case, tmp_path / "other.pth", lacking), options)
        with torch.inference_mode():
            found = other(sound).clip_logits.sigmoid()
        np.testing.assert_allclose(found[:, ::2], expected[name], rtol=0, atol=2e-5, err_msg=name)


# --- sizes and files --------------------------------------------------------------------------------------------------


def tiny(name: str, **changes: Any) -> Network:
    torch.manual_seed(0)
    return build_model(resolve({**SIZES[name], **changes})).eval()


@pytest.mark.parametrize(
    ("name", "options", "samples", "frames", "seconds"),
    [
        ("tal", "frontend=fbank128,dim=64,conv_layers=5", 16000, 25, 0.04),  # of 32 steps
        ("tal", "frontend=logmel64,dim=32,conv_layers=5", 16000, 10, 0.1),
        ("transformer", "dim=8,layers=1", 16800, 21, 0.05),  # a step of 0.1 s is two frames; the last step goes on
        ("fnet", "dim=8,layers=1", 16000, 100, 0.01),
        ("linear", "dim=8", 24400, 61, 0.025),
    ],
)
def test_time_axes(name: str, options: str, samples: int, frames: int, seconds: float) -> None:
    network = tiny(name, encoder_options=options, clip_samples=samples)
    assert (network.frames, network.frame_seconds) == (frames, seconds)
    with torch.inference_mode():
        logits = network(noise(1, samples)).frame_logits
    assert logits.shape[1] == frames
    if name == "transformer":
        assert torch.equal(logits[:, 0:20:2], logits[:, 1:20:2])
        assert torch.equal(logits[:, 19], logits[:, 20])


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("tal", {"clip_samples": 16001}, "clip_samples = 16001"),
        ("transformer", {"clip_samples": 1200}, "clip_samples = 1200"),
        ("tal", {"encoder_options": "frontend=logmel64,dim=33"}, "dim = 33"),
        ("tal", {"encoder_options": "dim=-128"}, "dim = -128"),
        ("taltrans", {"encoder_options": "conv_layers=6"}, "conv_layers = 6"),
        ("taltrans", {"encoder_options": "layers=0"}, "layers = 0"),
        ("transformer", {"encoder_options": "dim=12"}, "dim = 12"),
        ("transformer", {"encoder_options": "transformer_dropout=1"}, "transformer_dropout = 1"),
        ("fnet", {"encoder_options": "layers=101"}, "layers = 101"),
        ("linear", {"encoder_options": "deviation=0"}, "deviation = 0"),
        ("linear", {"sequence_head": "gru"}, "sequence_head"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny(name, **changes)


def test_a_file_does_not_tell_its_pooling(tmp_path: Path) -> None:
    path = save_network(tmp_path / "max.pth", tiny("linear", encoder_options="dim=8,pooling=max"), "module.")
    with pytest.raises(UserError, match="pooling"):
        open_network(path, {"clip_samples": 16000})
    assert open_network(path, {"clip_samples": 16000, "encoder_options": "pooling=max"}).report.share == 1


@pytest.mark.parametrize(("frontend", "dim", "samples"), [("fbank128", 64, 80000), ("logmel64", 32, 16000)])
def test_positions_tell_the_length_of_clips(frontend: str, dim: int, samples: int, tmp_path: Path) -> None:
    options = f"frontend={frontend},dim={dim},conv_layers=5"
    source = tiny("taltrans", encoder_options=options, clip_samples=samples)
    settings = open_network(save_network(tmp_path / "a.pth", source, "module.")).settings
    assert (settings.clip_samples, settings.encoder_options["frontend"]) == (samples, frontend)


@clip_encoders
def test_dropout_is_in_training_alone(name: str) -> None:
    network, sound = tiny(name, encoder_options=f"{SIZES[name]['encoder_options']},dropout=0.5"), noise(1, 16000)
    with torch.no_grad():
        assert torch.equal(network(sound).clip_logits, network(sound).clip_logits)
        network.train()
        assert not torch.equal(network(sound).clip_logits, network(sound).clip_logits)
