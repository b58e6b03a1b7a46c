"""Layers over the sequence of steps: how they begin, what they learn from, fine-tuning into them, and their exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.onnx_runtime import OnnxNetwork, open_session
from model import build_model
from model.checkpoint import LoadReport, load_network, read_checkpoint, save_safetensors
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.export import Probabilities, build_onnx, join, save_onnx
from model.heads import AttentionBlock, SequenceHead, rotary_angles, rotate
from settings import resolve
from tests.helpers import TINY

SMALL: dict[str, Any] = {  # 8 steps of 16 frames
    **TINY, "htsat_spec_size": 64, "mel_bins": 32, "htsat_depth": [1, 1, 1], "htsat_num_head": [1, 2, 4],
    "sample_rate": 8000, "window_size": 256, "clip_samples": 10080, "fmax": 4000, "classes_num": 5,
    "htsat_drop_path": 0.0, "spec_augment": False,
}  # fmt: skip
HEADS = ["gru", "attention", "transformer"]
DIM = {"sequence_dim": 32}


def small(**changes: Any) -> HTSAT_Swin_Transformer:
    torch.manual_seed(0)
    network = build_model(resolve({**SMALL, **changes})).eval()
    with torch.no_grad():
        network.bn0.running_mean.fill_(-40.0)  # type: ignore[union-attr]
        network.bn0.running_var.fill_(300.0)  # type: ignore[union-attr]
    return network


def awake(network: HTSAT_Swin_Transformer) -> HTSAT_Swin_Transformer:
    """The network with something in place of the zeros that its new parts begin with."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("readout.", "sequence_head.")) and not parameter.any():
                parameter.normal_(0, 0.3)
    return network


def noise(clips: int = 2) -> Tensor:
    return 0.1 * torch.randn(clips, 10080, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tscam", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_begins_with_nothing_and_then_matters(kind: str, tscam: bool) -> None:
    plain, headed = small(enable_tscam=tscam), small(enable_tscam=tscam, sequence_head=kind, **DIM)
    headed.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        wanted, found = plain(noise()), headed(noise())
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    with torch.inference_mode():
        changed = awake(headed)(noise())
    assert (changed["framewise_logits"] - wanted["framewise_logits"]).abs().max() > 0.01
    assert torch.equal(changed["latent_output"], wanted["latent_output"])


@pytest.mark.parametrize("readout", [{}, {"htsat_readout_stage": 1, "htsat_time_stride": 2}], ids=["published", "fine"])
@pytest.mark.parametrize("kind", ["none", *HEADS])
def test_every_parameter_learns(kind: str, readout: dict[str, Any]) -> None:
    """In the second step: in the first, what stands before the zeros has no gradient yet."""
    network = small(sequence_head=kind, **DIM, **readout).train()
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    unused = {id(p) for p in network.unused_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    targets = torch.rand(2, network.steps, 5, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        optimizer.zero_grad()
        logits = network(noise())["framewise_logits"]
        nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
        optimizer.step()
    for name, parameter in parameters.items():
        if id(parameter) not in unused:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", HEADS)
def test_heads_carry_over_time(kind: Any) -> None:
    """What a step is told reaches the steps before and after it."""
    torch.manual_seed(0)
    head = SequenceHead(kind, channels=6, layers=2, dim=8, steps=10).eval()
    nn.init.normal_(head.out.weight)
    grid = torch.randn(1, 6, 2, 10, requires_grad=True)
    (head(grid) - grid)[0, :, :, 4].sum().backward()
    assert grid.grad is not None
    reached = grid.grad.abs().sum(dim=(0, 1, 2)) > 0
    assert reached.all()
    assert torch.equal(grid.grad[:, :, 0], grid.grad[:, :, 1])  # it hears the mean over frequency


def test_rotary_positions_are_rotations() -> None:
    """Su et al. 2021: pairs of channels as complex numbers, turned by exp(i t theta)."""
    steps, channels = 7, 8
    angles = rotary_angles(steps, channels)
    assert angles[3].tolist() == pytest.approx([3.0, 0.3, 0.03, 0.003])
    x = torch.randn(steps, channels, generator=torch.Generator().manual_seed(0))
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angles), angles)
    found = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], dim=1))

    same = x[:1].expand(steps, channels)  # the same vector at every step
    turned_same = rotate(same, angles.cos(), angles.sin())
    products = turned_same @ turned_same.T
    for distance in range(1, steps):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_attention_without_positions_would_not_know_the_order() -> None:
    torch.manual_seed(0)
    block, x = AttentionBlock(8, 6, with_mlp=False).eval(), torch.randn(1, 6, 8)
    backwards = block(x.flip(1)).flip(1)
    assert (block(x) - backwards).abs().max() > 1e-3
    block.sine.zero_()
    block.cosine.fill_(1.0)
    torch.testing.assert_close(block(x), block(x.flip(1)).flip(1))


def test_heads_of_attention_have_64_channels() -> None:
    blocks = [AttentionBlock(dim, 4, with_mlp=False) for dim in (32, 64, 192)]
    assert [block.heads for block in blocks] == [1, 1, 3]
    assert blocks[2].cosine.shape == (4, 32)


@pytest.mark.parametrize(
    ("kind", "dim", "said"),
    [
        ("attention", 96, "sequence_dim 96 must be a multiple of 64"),
        ("transformer", 33, "sequence_dim 33 must be even"),
        ("gru", 33, "sequence_dim 33 must be even, for sequence_head = gru"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(kind: str, dim: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(sequence_head=kind, sequence_dim=dim)


def test_layers_dropout_and_the_state_dict() -> None:
    two, three = small(sequence_head="transformer", **DIM), small(sequence_head="transformer", sequence_layers=3, **DIM)
    assert len([k for k in three.state_dict() if k.endswith("mlp.fc1.weight")]) == 3 + 3  # of the backbone, of the head
    network = awake(two).train()
    grid = torch.randn(1, 64, 2, 8)
    assert network.sequence_head is not None
    assert not torch.equal(network.sequence_head(grid), network.sequence_head(grid))
    network.eval()
    assert torch.equal(network.sequence_head(grid), network.sequence_head(grid))
    finer = small(sequence_head="transformer", htsat_readout_stage=2, htsat_time_stride=2, **DIM)
    assert not [key for key in finer.state_dict() if "cosine" in key]
    finer.load_state_dict(two.state_dict(), strict=False)  # the same head at any number of steps


def test_new_parts_belong_to_the_classifier() -> None:
    network = small(sequence_head="gru", htsat_readout_stage=2, **DIM)
    numbers = {id(parameter): number for number, parameter in network.parameters_by_layer()}
    found = {name: numbers[id(parameter)] for name, parameter in network.named_parameters()}
    new = {name for name in found if name.startswith(("readout.", "sequence_head."))}
    assert {found[name] for name in new} == {found["tscam_conv.weight"]} == {max(numbers.values())}
    network.train().freeze_backbone()
    learns = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learns == new | {"tscam_conv.weight", "tscam_conv.bias", "head.weight", "head.bias"}
    assert network.sequence_head is not None
    assert network.sequence_head.training
    assert not network.layers.training


@pytest.mark.parametrize("kind", HEADS)
def test_half_precision(kind: str) -> None:
    network = awake(small(sequence_head=kind, htsat_readout_stage=2, **DIM))
    with torch.inference_mode():
        plain = network(noise())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = network(noise())
    assert mixed["framewise_logits"].dtype == torch.float32
    assert (plain["clipwise_output"] - mixed["clipwise_output"]).abs().max() < 0.05


def load(source: HTSAT_Swin_Transformer, target: HTSAT_Swin_Transformer, folder: Path, **how: Any) -> LoadReport:
    """Load one network's weights into another, from a published kind of file."""
    path = folder / "weights.ckpt"
    torch.save({"state_dict": {f"sed_model.{key}": value for key, value in source.state_dict().items()}}, path)
    return load_network(target, read_checkpoint(path), **how)


def test_fine_tuning_a_published_network_with_new_parts(tmp_path: Path) -> None:
    published, network = small(), small(sequence_head="transformer", htsat_readout_stage=2, random_seed=1, **DIM)
    with torch.no_grad():
        network.norm.weight.zero_()
    own = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"Keys that are needed: readout\."):
        load(published, network, tmp_path)  # to be evaluated, nothing may be missing
    report = load(published, network, tmp_path, new_classifier=True)
    new = [key for key in own if key.startswith(("readout.", "sequence_head."))]
    assert (report.fresh, report.missing, report.reshaped, report.share) == (new, [], [], 1)
    assert f"{len(new)} fresh (readout.laterals.0.norm.weight, " in str(report)
    for key, value in network.state_dict().items():
        assert torch.equal(value, own[key] if key in new else published.state_dict()[key]), key


def test_fine_tuning_a_network_that_has_the_parts(tmp_path: Path) -> None:
    source = awake(small(sequence_head="gru", **DIM))
    same, other = small(sequence_head="gru", classes_num=3, **DIM), small(sequence_head="gru", sequence_dim=16)
    report = load(source, same, tmp_path, new_classifier=True)
    assert report.fresh == []
    assert torch.equal(same.sequence_head.out.weight, source.sequence_head.out.weight)  # type: ignore[union-attr]
    assert report.classifier.startswith("new")
    report = load(source, other, tmp_path, new_classifier=True)
    assert {key.split(".")[0] for key in report.fresh} == {"sequence_head"}
    assert not other.sequence_head.out.weight.any()  # type: ignore[union-attr]
    assert report.reshaped == []


def test_safetensors_keep_the_new_parts(tmp_path: Path) -> None:
    changes = {"sequence_head": "attention", "htsat_readout_stage": 2, "htsat_time_stride": 2, **DIM}
    network = awake(small(**changes))
    saved = resolve({**SMALL, **changes}).model_dump()
    frontend = {"sample_rate": 8000}
    save_safetensors(tmp_path / "a", network.state_dict(), settings=saved, labels=list("abcde"), frontend=frontend)
    checkpoint = read_checkpoint(tmp_path / "a")
    again = build_model(resolve({}, checkpoint=checkpoint.settings)).eval()
    load_network(again, checkpoint)
    with torch.inference_mode():
        for found, wanted in zip(again.probabilities(noise()), network.probabilities(noise()), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["attention", "transformer"])
def test_graph_to_export(kind: str) -> None:
    network = awake(small(sequence_head=kind, htsat_readout_stage=1, htsat_time_stride=2, **DIM))
    with torch.no_grad():
        wanted = network.probabilities(noise())
        found = Probabilities(network)(network.logmel_extractor(network.spectrogram_extractor(noise())))
    assert found[1].shape == (2, network.steps, 5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class Untouched(nn.Module):
    """In place of a Swin block, whose export takes most of the time and is tested elsewhere (tests/test_export.py)."""

    def forward(self, x: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        return x, None


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"sequence_head": "gru"}, 8),
        ({"sequence_head": "transformer", "htsat_readout_stage": 1, "htsat_time_stride": 2}, 64),
    ],
    ids=str,
)
def test_onnx(changes: dict[str, Any], steps: int, tmp_path: Path) -> None:
    changes = {**changes, **DIM, "sequence_layers": 1}
    network = awake(small(**changes))
    for stage in network.layers:
        stage.blocks = nn.ModuleList([Untouched()])
    save_onnx(join(*build_onnx(network, 10080)), tmp_path / "model.onnx", {})
    exported = OnnxNetwork(open_session(tmp_path / "model.onnx"), resolve({**SMALL, **changes}))
    for clips in (1, 3):  # any number of them
        with torch.inference_mode():
            wanted = network.probabilities(noise(clips))
        for ours, theirs in zip(exported.probabilities(noise(clips)), wanted, strict=True):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-4
    assert wanted[1].shape == (3, steps, 5)
