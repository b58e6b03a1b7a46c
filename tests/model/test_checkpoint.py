"""Loading weights: what fits, what does not, and what the report says. Kinds of files: tests/test_foreign.py."""

import json
import warnings
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

import main
from commands.train import resolve_with_frontend
from commands.weight_average import average_checkpoints
from model.checkpoint import FrontendFrom, decided_settings, load_network, read_checkpoint
from model.encoders.htsat import HTSAT_Swin_Transformer
from prepare.demo import LABELS
from settings import resolve, section
from tests.helpers import TINY_FLAGS

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


@pytest.mark.parametrize(
    ("in_file", "in_data", "said"),
    [
        (list("abcde"), list("abcde"), "kept (the same labels)"),
        (list("abcde"), list("abced"), "new (other labels: 'd' in the file, 'e' in the data)"),
        (None, list("abcde"), "kept (the same shape; the labels of one side are unknown)"),
        (list("abcde"), None, "kept (the same shape; the labels of one side are unknown)"),
    ],
)
def test_fine_tuning_keeps_the_classifier_of_the_same_labels(
    in_file: Optional[list[str]], in_data: Optional[list[str]], said: str, tmp_path: Path
) -> None:
    source, target = HTSAT_Swin_Transformer(**SMALL), HTSAT_Swin_Transformer(**SMALL)
    checkpoint = read_checkpoint(save(tmp_path / "a.ckpt", source, labels=in_file))
    before = target.tscam_conv.weight.clone()
    report = load_network(target, checkpoint, new_classifier=True, labels=in_data)
    assert f"classifier {said}" in str(report)
    kept = said.startswith("kept")
    assert torch.equal(target.tscam_conv.weight, source.tscam_conv.weight if kept else before)
    assert ("tscam_conv.weight" in report.matched) is kept
    given = load_network(target, checkpoint, new_classifier=True, labels=in_data, file_labels=list("vwxyz"))
    assert given.classifier.startswith("new" if in_data else "kept")


@pytest.mark.parametrize("source", ["settings", "checkpoint"])
@pytest.mark.parametrize("new_classifier", [True, False])
def test_frontend_from_chooses(source: FrontendFrom, new_classifier: bool, tmp_path: Path) -> None:
    """A file for 32 kHz with a hop of 10 ms, a network for 16 kHz with one of 20 ms; the warning names both."""
    heard = {"sample_rate": 32000, "hop_size": 320, "fmax": 14000.0, "mel_bins": 64}
    path = save(tmp_path / "a.ckpt", HTSAT_Swin_Transformer(**SMALL), frontend=heard)
    network = HTSAT_Swin_Transformer(**SMALL, sample_rate=16000, hop_size=320, fmax=8000)
    ours = {"sample_rate": 16000, "hop_size": 320, "fmax": 8000.0, "mel_bins": 64}
    kept = "configured one is kept" if source == "settings" else "file's filterbank and window are used"
    with pytest.warns(UserWarning, match=rf"sample_rate 32000, configured 16000; fmax .*melW\): the {kept}"):
        report = load_network(
            network, read_checkpoint(path), new_classifier=new_classifier, frontend_from=source, configured=ours
        )
    same = torch.equal(network.logmel_extractor.melW, read_checkpoint(path).state_dict["logmel_extractor.melW"])
    assert same is (source == "checkpoint")
    assert ("front-end the file's" in str(report)) is same


def test_a_window_of_another_size(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", HTSAT_Swin_Transformer(**SMALL, window_size=512))
    with pytest.warns(UserWarning, match="another front-end"):
        report = load_network(HTSAT_Swin_Transformer(**SMALL), read_checkpoint(path), new_classifier=True)
    assert "front-end the network's" in str(report)
    with pytest.warns(UserWarning, match="another front-end"):
        with pytest.raises(ValueError, match="set window_size, or frontend_from = settings"):
            load_network(HTSAT_Swin_Transformer(**SMALL), read_checkpoint(path))


def test_the_same_front_end_gives_no_warning(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", HTSAT_Swin_Transformer(**SMALL), frontend={"sample_rate": 32000})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_network(HTSAT_Swin_Transformer(**SMALL), read_checkpoint(path), configured={"sample_rate": 32000})


def test_settings_that_a_checkpoint_decides(tmp_path: Path) -> None:
    saved = resolve({"sample_rate": 16000, "htsat_dim": 48}).model_dump()
    path = str(save(tmp_path / "a.ckpt", HTSAT_Swin_Transformer(**SMALL), settings=saved))
    checkpoint = read_checkpoint(path)
    assert checkpoint.frontend == {name: saved[name] for name in section("front-end")}
    found = resolve(checkpoint=decided_settings(checkpoint, "auto"))
    assert (found.sample_rate, found.clip_samples, found.htsat_dim) == (16000, 160000, 48)
    found = resolve(checkpoint=decided_settings(checkpoint, "settings"))
    assert (found.sample_rate, found.clip_samples, found.htsat_dim) == (32000, 320000, 48)
    given = {"resume_checkpoint": path}
    found = resolve_with_frontend(given)
    assert (found.sample_rate, found.clip_samples, found.htsat_dim) == (32000, 320000, 96)
    found = resolve_with_frontend({**given, "frontend_from": "checkpoint"})
    assert (found.sample_rate, found.clip_samples, found.htsat_dim) == (16000, 160000, 96)


def test_train_says_what_became_of_the_classifier(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    network = HTSAT_Swin_Transformer(**{**SMALL, "num_classes": 10})
    words = ["train", *TINY_FLAGS, "--max_epoch", "1", "--debug", "True", "--resume_checkpoint", "start.ckpt"]
    labels = {"same": list(LABELS), "other": sorted(LABELS, reverse=True)}
    for name, said in (("same", "classifier kept (the same labels)"), ("other", "classifier new (other labels: ")):
        save(demo_workspace / "start.ckpt", network, labels=labels[name])
        assert main.main([*words, "--exp_name", f"tuned_{name}"]) == 0
        record = json.loads((demo_workspace / f"workspace/runs/tuned_{name}/provenance.json").read_text())
        assert said in record[0]["fine-tuned_from"]


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
