"""Files of weights of every kind: told by what they hold, loaded to the golden outputs, or refused with the reason."""

import argparse
import datetime
import io
import json
import os
import pickle
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import main
from commands.train import starting_weights
from inference import Tagger
from model import Outputs
from model.checkpoint import load_network, read_checkpoint, save_safetensors, store_in_checkpoint
from model.encoders.htsat import HTSAT_Swin_Transformer, attention_heads
from model.foreign import OWN, PICKLES, plain
from model.frontend import LogMel
from settings import UserError, resolve, section
from tests.helpers import TINY, TINY_FLAGS
from tests.model.test_golden import FOLDER, build
from tests.networks import htsat

ABOUT: dict[str, Any] = {
    "settings": resolve().model_dump(),
    "labels": [f"sound {k}" for k in range(50)],
    "frontend": {name: getattr(resolve(), name) for name in section("front-end")},
}
# Not among the weights of an ImageNet Swin.
AUDIO_ONLY = ("spectrogram_extractor.", "logmel_extractor.", "bn0.", "tscam_conv.", "head.")
Weights = dict[str, Tensor]


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def this_project(weights: Weights) -> dict[str, Any]:
    return {"state_dict": prefixed("sed_model.", weights), "epoch": 3, "optimizer_states": [{"state": {}}], **ABOUT}


def published(weights: Weights) -> dict[str, Any]:
    """What Lightning 1.5 writes."""
    return {
        "epoch": 7,
        "global_step": 100,
        "pytorch-lightning_version": "1.5.9",
        "state_dict": prefixed("sed_model.", weights),
        "callbacks": {"ModelCheckpoint{'monitor': 'mAP'}": {"best_model_score": torch.tensor(0.47), "best_k": {}}},
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}],
        "lr_schedulers": [{"last_epoch": 7}],
    }


def without_head(weights: Weights) -> dict[str, Any]:
    return published({key: value for key, value in weights.items() if not key.startswith("head.")})


def swin(weights: Weights) -> dict[str, Any]:
    """Three colours whose mean is the kernel, and a head for ImageNet's classes."""
    kept = {key: value for key, value in weights.items() if not key.startswith(AUDIO_ONLY)}
    kernel = kept["patch_embed.proj.weight"]
    colours = torch.cat([2 * kernel, kernel, 0 * kernel], dim=1)
    head = {"head.weight": torch.zeros(1000, len(kept["norm.weight"])), "head.bias": torch.zeros(1000)}
    return {"model": {**kept, "patch_embed.proj.weight": colours, **head}, "epoch": 299, "max_accuracy": 81.2}


def clap(weights: Weights, prefix: str = "module.") -> dict[str, Any]:
    """The audio branch with its filterbank for 48 kHz, among other keys of a CLAP."""
    bank = LogMel(48000, 1024, 64, 50.0, 14000.0).melW.detach()
    branch = prefixed(prefix + "audio_branch.", {**weights, "logmel_extractor.melW": bank})
    others = {"logit_scale_a": torch.tensor(2.0), "text_branch.embeddings.word_embeddings.weight": torch.zeros(4, 2)}
    return {"epoch": 45, "name": "clap", "state_dict": {**branch, **prefixed(prefix, others)}, "optimizer": {}}


def to_safetensors(path: Path, weights: Weights) -> None:
    save_safetensors(path, weights, **ABOUT)


def pickled(content: Callable[[Weights], Any], zipped: bool = True) -> Callable[[Path, Weights], None]:
    def write(path: Path, weights: Weights) -> None:
        torch.save(content(weights), path, _use_new_zipfile_serialization=zipped)

    return write


FORMATS: dict[str, tuple[str, Callable[[Path, Weights], None]]] = {  # name: (kind, how to write it)
    "this project": (OWN, pickled(this_project)),
    "published": ("published HTS-AT", pickled(published)),
    "published without head": ("published HTS-AT", pickled(without_head)),
    "before torch 1.6": ("published HTS-AT", pickled(published, zipped=False)),
    "state dict": ("state dict", pickled(dict)),
    "Swin": ("ImageNet Swin", pickled(swin)),
    "CLAP": ("LAION-CLAP", pickled(clap)),
    "CLAP, one device": ("LAION-CLAP", pickled(lambda weights: clap(weights, prefix="")["state_dict"])),
    "safetensors": (OWN, to_safetensors),
    "safetensors without metadata": ("state dict", lambda path, weights: save_file(weights, path)),
}
Full = tuple[HTSAT_Swin_Transformer, Tensor, Weights, Outputs]


@pytest.fixture(scope="module")
def full() -> Full:
    """The golden network, its waveforms, its weights, and what it gives when loaded directly."""
    network, waveforms, _ = build("esc50_ce_10s")
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.inference_mode():
        return network, waveforms, weights, network(waveforms)


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_gives_the_golden_outputs(name: str, tmp_path: Path, full: Full) -> None:
    network, waveforms, weights, direct = full
    kind, write = FORMATS[name]
    path = tmp_path / "weights.bin"  # the name tells nothing
    write(path, weights)
    imagenet, at_48_khz = kind == "ImageNet Swin", kind == "LAION-CLAP"  # the golden waveforms are at 32 kHz
    kept = AUDIO_ONLY if imagenet else AUDIO_ONLY[:2] if at_48_khz else ()
    own = {key: value for key, value in weights.items() if key.startswith(kept) or key.endswith(network.computed)}
    with torch.no_grad():
        for key, value in network.state_dict().items():  # nothing may be left of what it knew
            value.copy_(own.get(key, torch.zeros_like(value)))

    checkpoint = read_checkpoint(path)
    assert (checkpoint.kind, checkpoint.encoder) == (kind, "htsat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the zeros in the front-end
        source: Any = "settings" if at_48_khz else "auto"
        report = load_network(network, checkpoint, new_classifier=imagenet, frontend_from=source)
    assert report.share > 0.9999
    assert report.kind == kind
    with torch.inference_mode():
        outputs = network(waveforms)
    golden = np.load(FOLDER / "esc50_ce_10s.npz")
    rounded = 5e-4 if imagenet else 1e-6  # the mean of three colours is rounded
    for output, expected in zip(outputs, direct, strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=rounded)
    np.testing.assert_allclose(outputs.clip_logits.numpy(), golden["clipwise_output"], rtol=0, atol=5e-4)


@pytest.fixture(scope="module")
def small() -> Weights:
    return htsat(TINY, classes_num=527).state_dict()


def test_what_a_file_says_about_itself(tmp_path: Path, small: Weights) -> None:
    for name in ("this project", "safetensors"):
        FORMATS[name][1](tmp_path / "a", small)
        checkpoint = read_checkpoint(tmp_path / "a")
        assert {"settings": checkpoint.settings, "labels": checkpoint.labels, "frontend": checkpoint.frontend} == ABOUT
    assert read_checkpoint(tmp_path / "a").epoch is None
    torch.save(published(small), tmp_path / "b")
    foreign = read_checkpoint(tmp_path / "b")
    assert (foreign.settings, foreign.labels, foreign.frontend, foreign.epoch) == (None, None, None, None)


@pytest.mark.parametrize(
    "wrapper",
    [
        "module.", "_orig_mod.", "model.", "network.", "module._orig_mod.", "_orig_mod.module.sed_model.",
        "sed_model._orig_mod.", "model.module.network._orig_mod.", "module.sed_model.module.",
    ],
)  # fmt: skip
def test_wrappers_and_averages_change_no_key(wrapper: str, tmp_path: Path, small: Weights) -> None:
    content = {"n_averaged": torch.tensor(3), **prefixed(wrapper, small)}
    for weights in (content, {"state_dict": content}, {"model": {"state_dict": prefixed("module.", content)}}):
        torch.save(weights, tmp_path / "a.pt")
        found = read_checkpoint(tmp_path / "a.pt")
        assert found.state_dict.keys() == small.keys()
        assert found.kind == ("published HTS-AT" if "sed_model" in wrapper else "state dict")
    own = {**this_project(small), "state_dict": content, "labels": None}
    torch.save(own, tmp_path / "own.ckpt")
    assert read_checkpoint(tmp_path / "own.ckpt").state_dict.keys() == small.keys()


def test_a_compiled_part_and_two_networks(tmp_path: Path, small: Weights) -> None:
    torch.save({key.replace("layers.0.", "layers.0._orig_mod."): each for key, each in small.items()}, tmp_path / "a")
    assert read_checkpoint(tmp_path / "a").state_dict.keys() == small.keys()
    twice = {**prefixed("model.", small), "module.norm.bias": small["norm.bias"]}
    torch.save(twice, tmp_path / "b")
    assert read_checkpoint(tmp_path / "b").state_dict.keys() == small.keys()
    torch.save({**twice, "module.norm.bias": small["norm.bias"] + 1}, tmp_path / "b")
    with pytest.raises(UserError, match=r"model\.norm\.bias and module\.norm\.bias"):
        read_checkpoint(tmp_path / "b")


BESIDE: dict[str, Any] = {  # what other trainers keep beside their weights
    "best": np.float64(0.4), "step": np.int32(7), "text": np.str_("a"),
    "curve": np.arange(6, dtype=">f4").reshape(2, 3),
    "names": np.array(["a", "bc"]), "objects": np.array([None, "a"], dtype=object), "kind": np.dtype("float32"),
    "args": argparse.Namespace(lr=1e-3, path=Path("data") / "a.wav"), "seen": defaultdict(list, {"a": [1]}),
    "when": datetime.datetime(2024, 1, 2, 3), "took": datetime.timedelta(seconds=1), "set": {1, 2}, "bytes": b"ab",
    "more": SimpleNamespace(a=OrderedDict(b=1)),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_beside_weights_in_every_protocol(
    protocol: int, zipped: bool, tmp_path: Path, small: Weights
) -> None:
    save = partial(torch.save, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    save({"state_dict": small, **BESIDE}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert all(torch.equal(value, small[key]) for key, value in found.state_dict.items())
    store_in_checkpoint(tmp_path / "a.pt", note="a")  # of plain values alone: torch reads it without our list
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (content["best"], content["step"], content["text"], content["kind"]) == (0.4, 7, "a", "f4")
    assert content["curve"].tolist() == BESIDE["curve"].tolist()
    assert (content["names"], content["objects"]) == (["a", "bc"], [None, "a"])
    assert content["args"] == {"lr": 1e-3, "path": "data/a.wav"}
    assert (content["seen"], content["set"], content["bytes"]) == ({"a": [1]}, {1, 2}, b"ab")
    assert (content["when"], content["more"]) == ("2024-01-02 03:00:00", {"a": {"b": 1}})


def test_weights_that_are_arrays_of_numpy(tmp_path: Path, small: Weights) -> None:
    torch.save({key: value.numpy() for key, value in small.items()}, tmp_path / "a.pt", pickle_protocol=4)
    found = read_checkpoint(tmp_path / "a.pt").state_dict
    assert all(torch.equal(value, small[key]) for key, value in found.items())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.0005, 0.5, 0.999])
def test_a_truncated_file_is_refused(name: str, share: float, tmp_path: Path, small: Weights) -> None:
    path = tmp_path / "cut"
    FORMATS[name][1](path, small)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="is no checkpoint"):
        read_checkpoint(path)


class Malicious:
    """Loading it as a pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (False, 2), (True, 4), (False, 5)])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda weights, bad: {**this_project(weights), "settings": bad},
        lambda weights, bad: {**published(weights), "callbacks": {"a": bad}},
        lambda weights, bad: {**weights, "norm.weight": bad},
        lambda weights, bad: {**swin(weights), "config": bad},
        lambda weights, bad: {**clap(weights), "optimizer": [bad]},
        lambda weights, bad: bad,
    ],
)
def test_a_file_that_would_run_code_is_refused(
    spoil: Callable[[Weights, Any], Any], zipped: bool, protocol: int, tmp_path: Path, small: Weights
) -> None:
    trace, path = tmp_path / "was_here", tmp_path / "bad.safetensors"
    save = partial(torch.save, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    save(spoil(small, Malicious(trace)), path)
    with pytest.raises(UserError, match=r"posix\.system.*could run code") as error:
        read_checkpoint(path)
    assert "torch.load" not in str(error.value), "no advice to run what the file holds"
    path.write_bytes(pickle.dumps(Malicious(trace), protocol=protocol))  # no file of torch.save at all
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists(), "the test's file does nothing"


class Changing:
    """Loading it as a pickle gives a global that is admitted another attribute."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), (None, {"__len__": 3})


@pytest.mark.parametrize(
    "steps",
    [
        pickle.dumps(Changing(), protocol=4),  # OrderedDict's own state has no effect
        b"\x80\x04ctorch\nSize\n}(X\x01\x00\x00\x00aK\x01ub.",  # a state for a class
        b"\x80\x02(ccollections\nOrderedDict\no.",  # OBJ, of an old protocol
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x09load.eval\x93.",
    ],
)
def test_pickles_change_nothing_that_is_there(steps: bytes) -> None:
    with suppress(pickle.UnpicklingError):
        assert plain(PICKLES.load(io.BytesIO(steps))) == {}
    assert (len(OrderedDict()), hasattr(torch.Size, "a")) == (0, False)


def test_a_damaged_description_is_refused(tmp_path: Path, small: Weights) -> None:
    save_file(small, tmp_path / "json", {"settings": "{"})
    save_file(small, tmp_path / "labels", {"labels": json.dumps("siren")})
    torch.save({**this_project(small), "settings": 3}, tmp_path / "number")
    for name, entry in (("json", "settings"), ("labels", "labels"), ("number", "settings")):
        with pytest.raises(UserError, match=f"{name} is damaged.*{entry}"):
            read_checkpoint(tmp_path / name)
    assert not list(tmp_path.glob("*.partial"))


def test_a_swin_with_other_heads_is_refused(tmp_path: Path) -> None:
    """Of Microsoft's Swins only C24 has the paper's heads: 24 channels each."""
    other = htsat(TINY, htsat_num_head="2,4,8,16").state_dict()
    assert attention_heads(other) == [[2], [4], [8], [16]]
    torch.save(swin(other), tmp_path / "swin.pth")
    with pytest.raises(UserError, match=r"2-4-8-16 attention heads, the network's 1-2-4-8.* Swin-T/C24"):
        load_network(htsat(TINY), read_checkpoint(tmp_path / "swin.pth"), new_classifier=True)
    torch.save(published(other), tmp_path / "audio.ckpt")
    with pytest.raises(UserError, match="htsat_num_head"):
        load_network(htsat(TINY), read_checkpoint(tmp_path / "audio.ckpt"))


def test_a_swin_leaves_the_networks_own_parts(tmp_path: Path, small: Weights) -> None:
    torch.save(swin(small), tmp_path / "swin.pth")
    network = htsat(TINY)
    torch.nn.init.constant_(network.bn0.running_mean, -30.0)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    checkpoint = read_checkpoint(tmp_path / "swin.pth")
    report = load_network(network, checkpoint, new_classifier=True)
    assert all(key.startswith(AUDIO_ONLY) for key in report.missing)
    assert not report.unexpected + report.reshaped
    assert (report.classifier, report.frontend) == ("new (the file has none)", "the network's")
    for key, value in network.state_dict().items():
        expected = before[key] if key.startswith(AUDIO_ONLY) else small[key]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    with pytest.raises(UserError, match="ImageNet Swin"):
        load_network(network, checkpoint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda keys: {**keys, "module.audio_branch.patch_embed.mel_conv2d.weight": torch.zeros(1)}, "feature fusion"),
        (lambda keys: {**keys, "module.audio_branch.fusion_model.local_att.0.bias": torch.zeros(1)}, "feature fusion"),
        (lambda keys: {"module.audio_branch.conv_block1.conv1.weight": torch.zeros(1)}, "no HTS-AT"),
    ],
)
def test_another_clap_is_refused(
    change: Callable[[Weights], Weights], said: str, tmp_path: Path, small: Weights
) -> None:
    torch.save({"state_dict": change(clap(small)["state_dict"])}, tmp_path / "clap.pt")
    with pytest.raises(UserError, match=f"clap.pt.*LAION-CLAP.*{said}"):
        read_checkpoint(tmp_path / "clap.pt")


def test_clap_brings_its_sizes_and_front_end(tmp_path: Path, small: Weights) -> None:
    torch.save(clap(small), tmp_path / "clap.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the front-end is the file's own
        tagger = Tagger.from_checkpoint(tmp_path / "clap.pt", device="cpu")
    found = tagger.settings
    assert (found.sample_rate, found.hop_size, found.window_size, found.mel_bins) == (48000, 480, 1024, 64)
    assert (found.fmin, found.fmax, found.clip_samples, found.short_clips) == (50.0, 14000.0, 480000, "repeat")
    assert (found.htsat_dim, found.htsat_depth, found.htsat_num_head) == (16, [1, 1, 1, 1], [1, 2, 4, 8])
    assert tagger.labels[0] == "Speech"
    assert tagger.tag(np.zeros(48000, np.float32)).clipwise.shape == (527,)


def test_train_from_imagenet(
    demo_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_workspace)
    weights = htsat(TINY, classes_num=10).state_dict()
    picture, sound = str(tmp_path / "swin.pth"), str(tmp_path / "sound.ckpt")
    torch.save(swin(weights), picture)
    torch.save(published(weights), sound)
    words = ["train", *TINY_FLAGS, "--max_epoch", "1", "--debug", "True", "--exp_name", "imagenet"]
    for wrong in (
        [*words, "--swin_pretrain_path", sound],
        [*words, "--swin_pretrain_path", picture, "--resume_checkpoint", sound],
        ["test", *TINY_FLAGS, "--resume_checkpoint", picture],
    ):
        assert main.main(wrong) == 2
        assert wrong[-1] in capsys.readouterr().err
    assert main.main([*words, "--swin_pretrain_path", picture]) == 0
    provenance = json.loads((demo_workspace / "workspace/runs/imagenet/provenance.json").read_text())
    assert "(ImageNet Swin)" in provenance[0]["fine-tuned_from"]
    assert "100.0% of the backbone's" not in provenance[0]["fine-tuned_from"]  # bn0 is the network's own


def test_nothing_to_start_from() -> None:
    assert starting_weights(resolve(TINY)) is None
