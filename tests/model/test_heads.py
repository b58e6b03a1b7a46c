"""Layers over the sequence of steps: how they begin, what they know, fine-tuning into them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model.checkpoint import load_network, read_checkpoint
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.heads import AttentionBlock, SequenceHead, rotary_angles, rotate
from settings import UserError
from tests.networks import awake, htsat, noise, save_network

HEADS = ["gru", "attention", "transformer"]
NEW = ("readout.", "sequence_head.")


def small(kind: str = "none", **changes: Any) -> HTSAT_Swin_Transformer:
    return htsat(sequence_head=kind, **{"sequence_dim": 32, **changes})


@pytest.mark.parametrize("tscam", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_begins_with_nothing_and_then_matters(kind: str, tscam: bool) -> None:
    plain, headed = small(enable_tscam=tscam), small(kind, enable_tscam=tscam)
    headed.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        wanted = plain(noise())
        for found, value in zip(headed(noise()), wanted, strict=True):
            assert torch.equal(found, value)
        assert headed.sequence_head is not None
        awake(headed.sequence_head)
        changed = headed(noise())
    assert (changed.frame_logits - wanted.frame_logits).abs().max() > 0.01
    assert torch.equal(changed.embedding, wanted.embedding)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_carry_over_time(kind: Any) -> None:
    """A step reaches the steps before and after it."""
    torch.manual_seed(0)
    head = SequenceHead(kind, channels=6, layers=2, dim=8, steps=10).eval()
    nn.init.normal_(head.out.weight)
    grid = torch.randn(1, 6, 2, 10, requires_grad=True)
    (head(grid) - grid)[0, :, :, 4].sum().backward()
    assert grid.grad is not None
    assert (grid.grad.abs().sum(dim=(0, 1, 2)) > 0).all()
    assert torch.equal(grid.grad[:, :, 0], grid.grad[:, :, 1])  # its input is the mean over frequency


def test_rotary_positions_are_rotations() -> None:
    """Su et al. 2021: pairs of channels as complex numbers, turned by exp(i t theta)."""
    steps, channels = 7, 8
    angles = rotary_angles(steps, channels)
    assert angles[3].tolist() == pytest.approx([3.0, 0.3, 0.03, 0.003])
    x = torch.randn(steps, channels, generator=torch.Generator().manual_seed(0))
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angles), angles)
    found = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], dim=1))

    same = rotate(x[:1].expand(steps, channels), angles.cos(), angles.sin())  # the same vector at every step
    for distance in range(1, steps):
        diagonal = (same @ same.T).diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_attention_without_positions_would_not_know_the_order() -> None:
    torch.manual_seed(0)
    block, x = AttentionBlock(8, 6, with_mlp=False).eval(), torch.randn(1, 6, 8)
    assert (block(x) - block(x.flip(1)).flip(1)).abs().max() > 1e-3
    block.sine.zero_()
    block.cosine.fill_(1.0)
    torch.testing.assert_close(block(x), block(x.flip(1)).flip(1))


def test_heads_of_attention_have_64_channels() -> None:
    blocks = [AttentionBlock(dim, 4, with_mlp=False) for dim in (32, 64, 192)]
    assert [block.heads for block in blocks] == [1, 1, 3]
    assert blocks[2].cosine.shape == (4, 32)


@pytest.mark.parametrize(("kind", "dim"), [("attention", 96), ("transformer", 33), ("gru", 33)])
def test_dimensions_that_do_not_fit_are_refused(kind: str, dim: int) -> None:
    with pytest.raises(UserError, match=f"sequence_dim {dim}.*{kind}"):
        small(kind, sequence_dim=dim)


def test_layers_dropout_and_the_state_dict() -> None:
    two, three = small("transformer"), small("transformer", sequence_layers=3)
    assert len([k for k in three.state_dict() if k.endswith("mlp.fc1.weight")]) == 3 + 3  # of the backbone, of the head
    network = awake(two)
    network.train()
    grid = torch.randn(1, 64, 2, 8)
    assert network.sequence_head is not None
    assert not torch.equal(network.sequence_head(grid), network.sequence_head(grid))
    network.eval()
    assert torch.equal(network.sequence_head(grid), network.sequence_head(grid))
    finer = small("transformer", htsat_readout_stage=2, htsat_time_stride=2)
    assert not [key for key in finer.state_dict() if "cosine" in key]
    finer.load_state_dict(two.state_dict(), strict=False)  # the same head at any number of steps


def test_fine_tuning_a_published_network_with_new_parts(tmp_path: Path) -> None:
    published, network = small(), small("transformer", htsat_readout_stage=2)
    with torch.no_grad():
        network.norm.weight.zero_()
    own = {key: value.clone() for key, value in network.state_dict().items()}
    checkpoint = read_checkpoint(save_network(tmp_path / "published.ckpt", published))
    with pytest.raises(UserError, match=r"needed: readout\."):
        load_network(network, checkpoint)  # to be evaluated, nothing may be missing
    report = load_network(network, checkpoint, new_classifier=True)
    new = [key for key in own if key.startswith(NEW)]
    assert (report.fresh, report.missing, report.reshaped, report.share) == (new, [], [], 1)
    assert f"{len(new)} fresh (readout.laterals.0.norm.weight, " in str(report)
    for key, value in network.state_dict().items():
        assert torch.equal(value, own[key] if key in new else published.state_dict()[key]), key


def test_fine_tuning_a_network_that_has_the_parts(tmp_path: Path) -> None:
    source = awake(small("gru"))
    checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", source))
    same, other = small("gru", classes_num=3), small("gru", sequence_dim=16)
    report = load_network(same, checkpoint, new_classifier=True)
    assert report.fresh == []
    assert torch.equal(same.sequence_head.out.weight, source.sequence_head.out.weight)  # type: ignore[union-attr]
    assert report.classifier.startswith("new")
    report = load_network(other, checkpoint, new_classifier=True)
    assert {key.split(".")[0] for key in report.fresh} == {"sequence_head"}
    assert not other.sequence_head.out.weight.any()  # type: ignore[union-attr]
    assert report.reshaped == []
