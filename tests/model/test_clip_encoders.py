"""Encoders of clips: golden numbers through files with published keys, sizes, time axes, files of others."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from inference import Tagger
from model import Network, Outputs, build_model
from model.checkpoint import decided_settings, load_network, read_checkpoint
from model.encoders.psla import VARIANTS, build_effnet, pad_as_images
from model.frontend import LogMel, Spectrogram
from model.heads import AttentionPooling
from model.opening import open_network
from model.registry import ENCODERS
from settings import UserError, resolve
from tests.helpers import SIZES
from tests.model.test_ast import load_file
from tests.model.test_golden import FOLDER, golden
from tests.networks import noise, save_network

draw = load_file(FOLDER / "draw_clip.py")
SHAPES: dict[str, dict[str, list[int]]] = json.loads((FOLDER / "state_dict_shapes_clip.json").read_text())


class Case(NamedTuple):
    """A golden file. seconds: a step of its `framewise`. options: what its published file does not tell.

    others: its further clip scores; of each, encoder_options, and the beginning of the keys that its file lacks.
    """

    encoder: str
    seconds: float = 0.0
    others: Mapping[str, tuple[str, str]] = {}
    options: str = ""


CASES = {
    "tal_a": Case("tal", 0.04),
    "tal_b": Case("tal", 0.1, {f"clipwise_{p}": (f"pooling={p}", "fc_att.") for p in ("max", "ave", "lin", "exp")}),
    "taltrans_a": Case("taltrans", 0.04),
    "taltrans_b": Case("taltrans", 0.1, {"clipwise_without_position": ("", "positional_encoding.")}),
    "transformer_b": Case("transformer", 0.1),
    "fnet_a": Case("fnet", 0.01),
    "linear_b": Case("linear", 0.025),
    "psla_a": Case("psla", 0.32),
    "resnet_a": Case("resnet50", 0.32),
    "resnet_b": Case("resnet50", 0.8, options="frontend=logmel64"),
    "mobilenet_a": Case("mobilenetv2"),
    "cnn14": Case("cnn14"),
    "cnn14_max": Case("cnn14", 0.01, options="pooling=decision_max"),
    "mn10": Case("mn10"),
}
OF_THEIR_OWN = ("cnn14", "cnn14_max", "mn10")  # files without the prefix `module.`
with_dropout = pytest.mark.parametrize(
    "name", sorted({case.encoder for case in CASES.values()} - {"resnet50", "mobilenetv2"})
)


def published(case: str, path: Path, lacking: str = "") -> Path:
    """A file as published: what a network computes itself has any values, and TAL's convolutions have second names."""
    shapes = {key: shape for key, shape in SHAPES[case].items() if not lacking or not key.startswith(lacking)}
    drawn = {key: torch.from_numpy(value) for key, value in draw.draw_parameters(shapes).items()}
    content = {key: torch.zeros(shape) for key, shape in shapes.items()} | drawn
    if case in OF_THEIR_OWN:
        log_mel = {f"spectrogram_extractor.{key}": value for key, value in Spectrogram(1024, 320).state_dict().items()}
        log_mel["logmel_extractor.melW"] = LogMel(32000, 1024, 64, 50.0, 14000.0).melW.detach()
        content |= {key: value for key, value in log_mel.items() if key in content}
        torch.save({"model": content, "iteration": 1} if "cnn14" in case else content, path)
        return path
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
    network = opened(case, published(case, tmp_path / "model.pth"), CASES[case].options).requires_grad_(True)
    features = network.features(sound)
    outputs = network.forward_head(network.forward_features(features))
    for name, found in {
        "logits": outputs.clip_logits,
        "embedding": outputs.embedding,
        "mel_every_100th": features[..., ::100],
    }.items():
        if name in expected:
            np.testing.assert_allclose(found.detach(), expected[name], rtol=0, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(outputs.clip_logits.sigmoid().detach(), expected["clipwise"], rtol=0, atol=2e-5)
    assert ("framewise" in expected) == (network.frames > 0)
    if network.frames:
        steps = np.arange(0, expected["framewise_shape"][1], expected["framewise_step"]) * CASES[case].seconds
        frames = outputs.frame_logits.sigmoid().detach()[:, np.rint(steps / network.frame_seconds).astype(int)]
        np.testing.assert_allclose(frames, expected["framewise"], rtol=0, atol=5e-5)
    if "bce_loss" in expected:
        check_gradients(case, network, outputs, expected)
    for name, (options, lacking) in CASES[case].others.items():
        other = opened(case, published(case, tmp_path / "other.pth", lacking), options)
        with torch.inference_mode():
            scores = other(sound).clip_logits.sigmoid()
        np.testing.assert_allclose(scores[:, ::2], expected[name], rtol=0, atol=2e-5, err_msg=name)


def check_gradients(case: str, network: Network, outputs: Outputs, expected: Mapping[str, Any]) -> None:
    """Of the loss of the clips, by parameter."""
    targets = torch.from_numpy(golden.draw_targets(2, 527, draw.CASES[case][1] + 1))
    loss = F.binary_cross_entropy_with_logits(outputs.clip_logits, targets)
    assert loss.item() == pytest.approx(float(expected["bce_loss"]), abs=1e-5)
    loss.backward()
    learned = {name: p for name, p in network.named_parameters() if not name.startswith(network.frontend)}
    norms = {name: p.grad.norm().item() for name, p in learned.items() if p.grad is not None}
    keys = expected["grad_norm_keys"].tolist()
    assert all(key.endswith(("att.bias", "w_ks.bias")) for key in norms.keys() - set(keys)), "they shift a softmax"
    deviation = np.abs(np.array([norms[key] for key in keys]) / expected["grad_norms"] - 1)
    assert deviation.max() < 0.01, keys[deviation.argmax()]
    assert np.median(deviation) < 0.001


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
        ("resnet50", "width=0.125", 48000, 75, 0.04),  # steps of 0.32 s
        ("resnet50", "width=0.125,frontend=logmel64", 48000, 15, 0.2),  # steps of 0.8 s
        ("psla", "variant=b0,width=0.25", 51200, 10, 0.32),
        ("cnn14", "width=0.0625,pooling=decision_max", 32000, 25, 0.04),
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
        ("psla", {"encoder_options": "variant=b0,heads=-1"}, "heads = -1"),
        ("psla", {"encoder_options": "variant=b0,width=0"}, "width = 0"),
        ("resnet50", {"encoder_options": "width=-1"}, "width = -1"),
        ("resnet50", {"clip_samples": 16001}, "clip_samples = 16001"),
        ("mobilenetv2", {"encoder_options": "width=11"}, "width = 11"),
        ("cnn14", {"encoder_options": "width=nan"}, "width = nan"),
        ("cnn14", {"clip_samples": 8000}, "clip_samples = 8000"),
        ("cnn14", {"clip_samples": 32001, "encoder_options": "pooling=decision_max"}, "clip_samples = 32001"),
        ("cnn14", {"sequence_head": "gru"}, "sequence_head"),
        ("mn10", {"encoder_options": "width=0"}, "width = 0"),
        ("mn10", {"clip_samples": 100}, "clip_samples = 100"),
        ("mn10", {"sequence_head": "gru"}, "sequence_head"),
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


@with_dropout
def test_dropout_is_in_training_alone(name: str) -> None:
    rate = ",dropout=0.5" if "dropout" in ENCODERS[name].options else ""
    network = tiny(name, encoder_options=SIZES[name]["encoder_options"] + rate)
    sound = noise(2, network.clip_samples)
    with torch.no_grad():
        assert torch.equal(network(sound).clip_logits, network(sound).clip_logits)
        network.train()
        assert not torch.equal(network(sound).clip_logits, network(sound).clip_logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_efficientnets_are_timms(variant: str) -> None:
    """Of images, too, whose size their padding is for."""
    side, small = VARIANTS[variant].side, variant in ("b0", "b2")
    torch.manual_seed(0)
    with torch.device("cpu" if small else "meta"):
        theirs: Any = timm.create_model(f"tf_efficientnet_{variant}", in_chans=1, num_classes=0).eval()
        ours = build_effnet(variant, 1.0).eval()
    theirs_by_name, ours_by_name = theirs.state_dict(), ours.state_dict()
    assert {key: v.shape for key, v in ours_by_name.items()} == {key: v.shape for key, v in theirs_by_name.items()}
    if small:
        ours.load_state_dict(theirs_by_name)
        assert len(pad_as_images(ours, side)) == 5
        image = torch.randn(1, 1, side, side)
        with torch.inference_mode():
            torch.testing.assert_close(ours.forward_features(image), theirs.forward_features(image))


@pytest.mark.parametrize(
    ("name", "make", "first"),
    [
        ("psla", lambda: timm.create_model("tf_efficientnet_b0"), "effnet.conv_stem.weight"),
        ("resnet50", torchvision.models.resnet50, "conv1.weight"),
        ("mobilenetv2", torchvision.models.mobilenet_v2, "mobilenet.features.0.0.weight"),
    ],
)
def test_a_training_starts_from_imagenets_weights(
    name: str, make: Callable[[], nn.Module], first: str, tmp_path: Path
) -> None:
    """All but the first convolution, which has three channels there."""
    torch.save(make().state_dict(), tmp_path / "images.pth")
    checkpoint = read_checkpoint(tmp_path / "images.pth")
    assert (checkpoint.images, checkpoint.encoder) == (True, name)
    given = decided_settings(checkpoint, "auto", fine_tuning=True)
    network = build_model(resolve({"clip_samples": 16000}, checkpoint=given))
    own = network.state_dict()[first].clone()
    report = load_network(network, checkpoint, new_classifier=True)
    assert report.unexpected == report.reshaped == []
    assert first in report.missing
    assert all(key == first or key.startswith(network.classifier) for key in report.missing + report.fresh)
    assert torch.equal(network.state_dict()[first], own)
    with pytest.raises(UserError, match="ImageNet"):
        load_network(network, checkpoint)


def test_names_of_the_published_efficientnet(tmp_path: Path) -> None:
    """Without a classifier and with three channels, as that of ImageNet."""
    shapes = {key: shape for key, shape in SHAPES["psla_a"].items() if key.startswith("effnet.")}
    shapes["effnet._conv_stem.weight"] = [32, 3, 3, 3]
    torch.save({key.removeprefix("effnet."): torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.images, checkpoint.encoder) == (True, "psla")
    with torch.device("meta"):
        wanted = build_effnet("b2", 1.0).state_dict()
    assert checkpoint.state_dict.keys() == {f"effnet.{key}" for key in wanted} - {"effnet.conv_stem.weight"}


def test_several_heads_may_leave_the_probabilities() -> None:
    pooling = AttentionPooling(4, 3, heads=2)
    with torch.no_grad():
        pooling.head_weight.copy_(torch.tensor([2.0, 1.0]))
        frames, clips = pooling(torch.full((1, 4, 5), 50.0))
    assert frames.isfinite().all()
    assert clips.max() > 1
    network = tiny("psla")
    with torch.no_grad():
        network.get_parameter("attention.head_weight").fill_(5.0)
        outputs = network(noise(1, 16000))
    assert outputs.clip_logits.isfinite().all()
    assert outputs.frame_logits.isfinite().all()
