"""Loading weights: what fits, what does not, and what the report says. Kinds of files: test_foreign.py."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch

from inference import Tagger
from model.checkpoint import FrontendFrom, decided_settings, load_network, read_checkpoint
from model.foreign import OWN
from model.opening import open_network
from prepare.demo import LABELS
from runs.resume import resolve_training
from settings import UserError, resolve, section
from tests.helpers import SMALL as SMALL_SIZES
from tests.helpers import SMALL_FLAGS, TINY, call
from tests.model.test_golden import FOLDER
from tests.networks import htsat, save_network

small = partial(htsat, {**TINY, "classes_num": 5})
at_16_khz = partial(small, sample_rate=16000, fmax=8000)


@pytest.mark.parametrize("tscam", [True, False])
def test_a_file_without_head(tmp_path: Path, tscam: bool) -> None:
    """With the token-semantic convolution nothing uses the head; without it, the head is the classifier."""
    network = small(enable_tscam=tscam)
    torch.save({k: v for k, v in network.state_dict().items() if not k.startswith("head.")}, tmp_path / "bare.ckpt")
    if not tscam:
        with pytest.raises(UserError, match=r"needed: head\.weight"):
            load_network(network, read_checkpoint(tmp_path / "bare.ckpt"))
        return
    report = load_network(network, read_checkpoint(tmp_path / "bare.ckpt"))
    assert report.missing == ["head.weight", "head.bias"]
    assert "2 missing (head.weight, head.bias)" in str(report)


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
    source, target = small(), small()
    torch.nn.init.ones_(source.tscam_conv.weight)
    checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", source, labels=in_file))
    before = target.tscam_conv.weight.clone()
    report = load_network(target, checkpoint, new_classifier=True, labels=in_data)
    assert f"classifier {said}" in str(report)
    kept = said.startswith("kept")
    assert torch.equal(target.tscam_conv.weight, source.tscam_conv.weight if kept else before)
    assert ("tscam_conv.weight" in report.matched) is kept
    given = load_network(target, checkpoint, new_classifier=True, labels=in_data, file_labels=list("vwxyz"))
    assert given.classifier.startswith("new" if in_data else "kept")


@pytest.mark.parametrize("source", ["auto", "settings", "checkpoint"])
@pytest.mark.parametrize("new_classifier", [True, False])
def test_frontend_from_chooses(source: FrontendFrom, new_classifier: bool, tmp_path: Path) -> None:
    """A file for 32 kHz with a hop of 10 ms, a network for 16 kHz with one of 20 ms; the warning names what differs.

    auto: fine-tuning keeps the configured filterbank, evaluation takes the file's.
    """
    theirs = {"sample_rate": 32000, "hop_size": 320, "fmax": 14000.0, "mel_bins": 64}
    checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", small(), frontend=theirs))
    network = at_16_khz(hop_size=320)
    ours = {"sample_rate": 16000, "hop_size": 320, "fmax": 8000.0, "mel_bins": 64}
    with pytest.warns(UserWarning, match=r"sample_rate 32000, configured 16000; fmax .*melW"):
        report = load_network(network, checkpoint, new_classifier=new_classifier, frontend_from=source, configured=ours)
    from_file = source == "checkpoint" or (source == "auto" and not new_classifier)
    given = checkpoint.state_dict["logmel_extractor.melW"]
    assert torch.equal(network.logmel_extractor.melW, given) is from_file
    assert ("front-end the file's" in str(report)) is from_file


def test_another_front_end_without_a_description(tmp_path: Path) -> None:
    """The tensors differ: noticed, too. Fine-tuning cannot take them without the rate and bands that they are for."""
    checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", small()))
    with pytest.warns(UserWarning, match="melW"):
        load_network(at_16_khz(), checkpoint)
    with pytest.raises(UserError, match="frontend_from = checkpoint"):
        load_network(at_16_khz(), checkpoint, new_classifier=True, frontend_from="checkpoint")


def test_a_window_of_another_size(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", small(window_size=512)))
    with pytest.warns(UserWarning, match="front-end"):
        report = load_network(small(), checkpoint, new_classifier=True)
    assert report.frontend == "the network's"
    with pytest.warns(UserWarning, match="front-end"), pytest.raises(UserError, match="window_size"):
        load_network(small(), checkpoint)


def test_the_same_front_end_gives_no_warning(tmp_path: Path) -> None:
    path = save_network(tmp_path / "a.ckpt", small(), frontend={"sample_rate": 32000})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_network(small(), read_checkpoint(path), configured={"sample_rate": 32000})


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    network = small()
    torch.nn.init.constant_(network.norm.bias, torch.nan)
    with pytest.raises(UserError, match=r"norm\.bias"):
        load_network(small(), read_checkpoint(save_network(tmp_path / "a.ckpt", network)))


def test_a_checkpoint_of_the_code_before_the_registry() -> None:
    """Its settings name no encoder: open_network knows it, and the numbers are those that that code gave."""
    path, expected = FOLDER / "htsat_old.ckpt", np.load(FOLDER / "htsat_old.npz")
    opened = open_network(path)
    assert opened.checkpoint.settings is not None
    assert "encoder" not in opened.checkpoint.settings
    assert (opened.settings.encoder, opened.report.kind, opened.report.share) == ("htsat", OWN, 1)
    assert (opened.settings.sample_rate, opened.settings.clip_samples, opened.labels) == (8000, 10000, list(LABELS))
    waveform = (0.1 * np.random.RandomState(0).standard_normal(25000)).astype(np.float32)
    tagger = Tagger.from_checkpoint(path, device="cpu", precision="32")
    with torch.inference_mode():
        window = tagger.network.probabilities(torch.from_numpy(waveform[None, :10000]))
    for found, name in zip(window, ("clipwise", "framewise", "embedding"), strict=True):
        np.testing.assert_allclose(found[0], expected[name], rtol=0, atol=1e-5)
    tagged = tagger.tag(waveform, frame_embeddings=True)
    for name in ("clipwise", "framewise", "embedding", "frame_embeddings"):
        np.testing.assert_allclose(getattr(tagged, name), expected[f"tagged_{name}"], rtol=0, atol=1e-5)
    assert (tagged.seconds_per_frame, tagged.duration) == (expected["seconds_per_frame"], expected["duration"])


def test_settings_that_a_checkpoint_decides(tmp_path: Path) -> None:
    saved = resolve({"sample_rate": 16000, "htsat_dim": 48}).model_dump()
    path = str(save_network(tmp_path / "a.ckpt", small(), settings=saved))
    checkpoint = read_checkpoint(path)
    assert checkpoint.frontend == {name: saved[name] for name in section("front-end")}
    given = {"resume_checkpoint": path}
    for found, wanted in (
        (resolve(checkpoint=decided_settings(checkpoint, "auto")), (16000, 160000, 48)),
        (resolve(checkpoint=decided_settings(checkpoint, "settings")), (32000, 320000, 48)),
        (resolve_training(given), (32000, 320000, 48)),
        (resolve_training({**given, "htsat_dim": "32"}), (32000, 320000, 32)),
        (resolve_training({**given, "frontend_from": "checkpoint"}), (16000, 160000, 48)),
    ):
        assert (found.sample_rate, found.clip_samples, found.htsat_dim) == wanted


def test_train_says_what_became_of_the_classifier(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    start = save_network(Path("start.ckpt"), htsat(SMALL_SIZES, classes_num=10), labels=list(LABELS))
    call("train", *SMALL_FLAGS, "--max_epoch", "1", "--exp_name", "tuned", "--resume_checkpoint", start)
    record = json.loads(Path("workspace/runs/tuned/provenance.json").read_text())
    assert "classifier kept (the same labels)" in record[0]["fine-tuned_from"]


def test_another_network_is_refused(tmp_path: Path) -> None:
    files = {"htsat_dim": small(htsat_dim=32), "another architecture": torch.nn.Linear(3, 3)}
    for said, network in files.items():
        checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", network))
        with pytest.raises(UserError, match=said):
            load_network(small(), checkpoint, new_classifier=True)


NO_WEIGHTS: list[dict[Any, Any]] = [{}, {"epoch": 3}, {"state_dict": {}}, {3: torch.zeros(1)}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no checkpoint"),
        (b"no weights", "no file of torch"),
        *((content, "no weights") for content in NO_WEIGHTS),
        ([1], "list"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=said):
        read_checkpoint(path)
