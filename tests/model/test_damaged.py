"""Files of weights that are wrong inside, or that ask for more memory than there is: refused by name."""

import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inference import Tagger
from model import build_model
from model.checkpoint import (
    EPOCH_SO_FAR,
    check_resumable,
    load_network,
    read_checkpoint,
    save_safetensors,
    write_checkpoint,
)
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.opening import open_network
from settings import UserError, resolve, section
from tests.helpers import SMALL

Content = dict[str, Any]
NETWORK: dict[str, Any] = {**SMALL, "classes_num": 3, "sample_rate": 8000, "clip_samples": 8000}
CALIBRATED = {
    "labels": ["a", "b", "c"], "thresholds": [0.5] * 3, "median_filter": [1] * 3, "minimum_duration": [0.0] * 3,
    "maximum_gap": [0.0] * 3, "interpolation": 1, "source": "calibrated",
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> HTSAT_Swin_Transformer:
    torch.manual_seed(0)
    made = build_model(resolve(NETWORK)).eval()
    assert isinstance(made, HTSAT_Swin_Transformer)
    return made


@pytest.fixture(scope="module")
def content(network: HTSAT_Swin_Transformer) -> Content:
    """What train writes."""
    settings = resolve(NETWORK).model_dump()
    progress: dict[str, Any] = {"fit_loop": {"epoch_progress": {}, "epoch_loop.batch_progress": {}}}
    state = {0: {"exp_avg": torch.ones(3)}}
    return {
        "state_dict": {f"sed_model.{key}": value.clone() for key, value in network.state_dict().items()},
        "settings": settings, "labels": ["a", "b", "c"], "postprocessing": CALIBRATED, "epoch": 0, "complete_epochs": 1,
        "frontend": {name: settings[name] for name in section("front-end")}, "global_step": 3, "callbacks": {},
        "loops": progress, "lr_schedulers": [{"last_epoch": 0}], EPOCH_SO_FAR: [0, 0.5, 4, 0],
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1}]}],
    }  # fmt: skip


def tag(path: Path) -> np.ndarray:
    sound = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    return Tagger.from_checkpoint(path, device="cpu").tag(sound).clipwise


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"labels": ["a", "b"]}, "labels names 2 classes, and its network has 3"),
        ({"labels": []}, "labels names 0 classes, and its network has 3"),
        ({"labels": list("abcd")}, "labels names 4 classes"),
        ({"labels": ["a", "b", 3]}, "labels holds 3"),
        ({"labels": ["a", "b", "b"]}, "labels has the class 'b'"),
        ({"labels": {"a": 1}}, "labels is a dict"),
        ({"epoch": "x"}, "epoch is a str"),
        ({"complete_epochs": "x"}, "complete_epochs is a str"),
        ({"settings": [1]}, "settings is a list"),
        ({"frontend": 3}, "frontend is a int"),
        ({"frontend": {"mel_bins": torch.zeros(3)}}, "frontend/mel_bins is a Tensor"),
        ({"postprocessing": "x"}, "postprocessing is a str"),
        ({"postprocessing": {"labels": None}}, "postprocessing .*labels"),
        ({"postprocessing": {**CALIBRATED, "thresholds": ["x"] * 3}}, "thresholds"),
        ({"postprocessing": {**CALIBRATED, "thresholds": [[0.5], [0.5, 1], []]}}, "thresholds"),
        ({"postprocessing": {**CALIBRATED, "thresholds": [float("nan")] * 3}}, "thresholds"),
        ({"postprocessing": {**CALIBRATED, "source": 3}}, "source"),
        ({"postprocessing": {**CALIBRATED, "median_filter": [10**9 + 1] * 3}}, "median_filter"),
        ({"postprocessing": {**CALIBRATED, "interpolation": 10**9}}, "interpolation"),
        ({"postprocessing": {**CALIBRATED, "interpolation": [1]}}, "interpolation"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(entries: Content, said: str, content: Content, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", {**content, **entries})
    with pytest.raises(UserError, match=rf"a\.ckpt.*{said}"):
        Tagger.from_checkpoint(tmp_path / "a.ckpt", device="cpu")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"htsat_dim": "x"}, "htsat_dim"),
        ({"htsat_depth": [1, [1]]}, "htsat_depth"),
        ({"encoder": "vit"}, "vit"),
        ({"encoder": ["htsat"]}, "htsat"),
        ({"classes_num": 4}, "labels names 3 classes, and its network has 4"),
        ({"htsat_dim": 2**20}, "would take"),
        ({"htsat_depth": [10**6, 1]}, "htsat_depth"),
        ({"htsat_depth": [1000, 1]}, "htsat_depth"),
        ({"htsat_spec_size": 2**16}, "htsat_spec_size"),
        ({"window_size": 2**20, "clip_samples": 2**21, "hop_size": 2**20}, "would take"),
        ({"clip_samples": 10**10, "hop_size": 10**9}, "clip_samples .* would take"),
        ({"encoder": "ast", "encoder_options": {"depth": str(10**12)}}, "depth"),
        ({"encoder": "ast", "sample_rate": 16000, "encoder_options": {"depth": "1000"}}, "depth"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_memory_is_taken(
    settings: Content, said: str, content: Content, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "a.ckpt", {**content, "settings": {**content["settings"], **settings}})
    with pytest.raises(UserError, match=said):
        open_network(tmp_path / "a.ckpt")


def nested(levels: int) -> list[Any]:
    """Lists of ten times the same list: 10 ** levels values."""
    made: list[Any] = [1]
    for _ in range(levels):
        made = [made] * 10
    return made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: {**w, "sed_model.bomb": torch.zeros(1).expand(10**5, 10**5, 100)}, "bomb.*would take"),
        (lambda w: {**w, "module.sed_model.norm.bias": torch.zeros(1).expand(10**6, 10**6)}, "would take"),
        (lambda w: {**w, "sed_model.sparse": torch.eye(3).to_sparse()}, "sparse"),
        (lambda w: {**w, "sed_model.meta": torch.zeros(3, device="meta")}, "meta"),
        (lambda w: {k: v.reshape(-1)[:0].reshape(0, *v.shape[1:]) if v.ndim else v for k, v in w.items()}, "fit"),
        (lambda w: {k: v * torch.nan if v.is_floating_point() else v for k, v in w.items()}, "finite"),
    ],
)
def test_tensors_that_cannot_be(
    change: Callable[[Content], Content], said: str, content: Content, tmp_path: Path
) -> None:
    torch.save({**content, "state_dict": change(content["state_dict"]), "more": nested(30)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"a\.ckpt.*{said}"):
        open_network(tmp_path / "a.ckpt")


def test_buffers_that_follow_from_the_sizes_are_computed(content: Content, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "good.ckpt", content)
    wrong = {k: v + 10**6 if k.endswith("position_index") else v for k, v in content["state_dict"].items()}
    write_checkpoint(tmp_path / "a.ckpt", {**content, "state_dict": wrong})
    np.testing.assert_array_equal(tag(tmp_path / "a.ckpt"), tag(tmp_path / "good.ckpt"))


def test_a_turned_bit_is_refused(content: Content, network: HTSAT_Swin_Transformer, tmp_path: Path) -> None:
    """By the digests of safetensors files, and of what has been loaded and saved anew; by a zip file's checksums."""
    about = {name: content[name] for name in ("settings", "labels", "frontend", "postprocessing")}
    save_safetensors(tmp_path / "a.safetensors", network.state_dict(), **about)
    write_checkpoint(tmp_path / "a.ckpt", content)
    for name in ("a.safetensors", "a.ckpt"):
        wanted, whole = tag(tmp_path / name), (tmp_path / name).read_bytes()
        for place in np.random.default_rng(0).integers(len(whole), size=15):
            turned = bytearray(whole)
            turned[place] ^= 0x40
            (tmp_path / f"b_{name}").write_bytes(turned)
            try:
                found = tag(tmp_path / f"b_{name}")
            except UserError:
                continue
            np.testing.assert_array_equal(found, wanted)  # of a byte that nothing depends on
    changed = torch.load(tmp_path / "a.ckpt", weights_only=True)
    changed["state_dict"]["sed_model.norm.bias"][0] += 1
    torch.save(changed, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match=r"state_dict.*digests"):
        read_checkpoint(tmp_path / "c.ckpt")
    del changed["digests"]  # as files of earlier versions are
    torch.save(changed, tmp_path / "c.ckpt")
    load_network(network, read_checkpoint(tmp_path / "c.ckpt"))


def test_metadata_of_brackets(network: HTSAT_Swin_Transformer, tmp_path: Path) -> None:
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, tmp_path / "a", {"labels": "[" * 200_000 + "]" * 200_000})
    with pytest.raises(UserError, match="labels"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("loops",), {}), (("loops", "fit_loop"), 3), (("optimizer_states",), [1]), (("optimizer_states",), []),
        (("optimizer_states", 0, "param_groups"), {}), (("lr_schedulers",), None), (("global_step",), "x"),
        (("callbacks",), [1]), ((EPOCH_SO_FAR,), [0, "x", 4, 0]), ((EPOCH_SO_FAR,), []),
        (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(3)),
    ],
)  # fmt: skip
def test_a_run_is_not_resumed_from_wrong_entries(place: tuple, value: Any, content: Content, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.ckpt", content)
    check_resumable(read_checkpoint(tmp_path / "last.ckpt"))
    changed = torch.load(tmp_path / "last.ckpt", weights_only=True)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    torch.save(changed, tmp_path / "last.ckpt")
    damaged = read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=str(place[0])):
        check_resumable(damaged)


def test_an_archive_that_grows_is_refused(content: Content, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", content)
    with zipfile.ZipFile(tmp_path / "a.ckpt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/99", bytes(10**6))
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.fixture
def small_memory() -> Iterator[None]:
    """A process that may take another GiB."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    allowed = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, allowed[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, allowed)


def test_the_limit_follows_the_process(small_memory: None) -> None:
    with pytest.raises(UserError, match="would take"):
        build_model(resolve({**NETWORK, "htsat_dim": 4096}))
    build_model(resolve(NETWORK))
