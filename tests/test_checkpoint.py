"""Loading weights: what fits, what does not, and what would run code."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.weight_average import average_checkpoints
from model.checkpoint import load_network, read_checkpoint
from model.htsat import HTSAT_Swin_Transformer

SMALL: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "num_classes": 5}


def save(path: Path, network: torch.nn.Module, prefix: str = "sed_model.", **more: object) -> Path:
    torch.save({"state_dict": {prefix + k: v for k, v in network.state_dict().items()}, **more}, path)
    return path


def test_published_layout_loads(tmp_path: Path) -> None:
    source, target = HTSAT_Swin_Transformer(**SMALL), HTSAT_Swin_Transformer(**SMALL)
    report = load_network(target, read_checkpoint(save(tmp_path / "a.ckpt", source, epoch=3)))
    assert not report.missing + report.unexpected + report.reshaped
    assert report.share == 1
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_bare_state_dict_without_head_loads(tmp_path: Path) -> None:
    network = HTSAT_Swin_Transformer(**SMALL)
    weights = {k: v for k, v in network.state_dict().items() if not k.startswith("head.")}
    torch.save(weights, tmp_path / "bare.ckpt")
    report = load_network(HTSAT_Swin_Transformer(**SMALL), read_checkpoint(tmp_path / "bare.ckpt"))
    assert report.missing == ["head.weight", "head.bias"]
    assert "2 missing (head.weight, head.bias)" in str(report)


def test_new_classifier_only_where_asked(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", HTSAT_Swin_Transformer(**SMALL))
    other = HTSAT_Swin_Transformer(**{**SMALL, "num_classes": 7})
    with pytest.raises(ValueError, match="another number of classes"):
        load_network(other, read_checkpoint(path))
    before = other.tscam_conv.weight.clone()
    report = load_network(other, read_checkpoint(path), new_classifier=True)
    assert "tscam_conv.weight" in report.reshaped
    assert torch.equal(other.tscam_conv.weight, before)
    assert torch.equal(other.norm.weight, read_checkpoint(path).state_dict["norm.weight"])


def test_another_frontend_is_not_taken_over_silently(tmp_path: Path) -> None:
    """A 32 kHz checkpoint in a 16 kHz network: fine-tuning keeps the configured filterbank, evaluation the file's."""
    path = save(tmp_path / "a.ckpt", HTSAT_Swin_Transformer(**SMALL))
    given = read_checkpoint(path).state_dict["logmel_extractor.melW"]
    for new_classifier in (True, False):
        network = HTSAT_Swin_Transformer(**SMALL, sample_rate=16000, hop_size=160, fmax=8000)
        with pytest.warns(UserWarning, match="holds another front-end"):
            load_network(network, read_checkpoint(path), new_classifier=new_classifier)
        assert torch.equal(network.logmel_extractor.melW, given) is not new_classifier


def test_a_linear_classifier_must_come_from_the_file(tmp_path: Path) -> None:
    source = HTSAT_Swin_Transformer(**SMALL, enable_tscam=False)
    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith("head.")}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"needed: head\.weight"):
        load_network(HTSAT_Swin_Transformer(**SMALL, enable_tscam=False), read_checkpoint(tmp_path / "a.ckpt"))


def test_another_network_is_refused(tmp_path: Path) -> None:
    wide = save(tmp_path / "wide.ckpt", HTSAT_Swin_Transformer(**{**SMALL, "embed_dim": 32}))
    with pytest.raises(ValueError, match="other sizes: set htsat_dim"):
        load_network(HTSAT_Swin_Transformer(**SMALL), read_checkpoint(wide), new_classifier=True)
    foreign = save(tmp_path / "foreign.ckpt", torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="another architecture"):
        load_network(HTSAT_Swin_Transformer(**SMALL), read_checkpoint(foreign), new_classifier=True)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Malicious(tmp_path / "was_here")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="could run code: refused"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "was_here").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "missing.ckpt")
    (tmp_path / "text.ckpt").write_text("no weights")
    with pytest.raises(ValueError, match="it is no file of torch"):
        read_checkpoint(tmp_path / "text.ckpt")
    whole = save(tmp_path / "whole.ckpt", HTSAT_Swin_Transformer(**SMALL)).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off"):
        read_checkpoint(tmp_path / "cut.ckpt")
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_checkpoint(tmp_path / "empty.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_average_of_one_and_of_two(tmp_path: Path) -> None:
    networks = [HTSAT_Swin_Transformer(**SMALL) for _ in range(2)]
    networks[1].bn0.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    paths = [save(tmp_path / f"{n}.ckpt", network, labels=["a"] * 5) for n, network in enumerate(networks)]
    one, two = average_checkpoints(paths[:1])["state_dict"], average_checkpoints(paths)["state_dict"]
    for key, first in networks[0].state_dict().items():
        second = networks[1].state_dict()[key]
        assert torch.equal(one["sed_model." + key], first)
        if first.is_floating_point():
            expected = ((first.double() + second.double()) / 2).float()
            assert torch.equal(two["sed_model." + key], expected)
        else:
            assert torch.equal(two["sed_model." + key], first)
    other = save(tmp_path / "other.ckpt", networks[0], labels=["b"] * 5)
    with pytest.raises(ValueError, match="different labels"):
        average_checkpoints([paths[0], other])
