"""Every encoder through the commands: trained on the demo for two epochs, whatever the sample rate of the store."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
import torch

from inference import Tagger, hear
from model.registry import ENCODERS, encoder_module
from tests.helpers import LEAN, SIZES, call, flags, last_checkpoint, refused, save_network

pytestmark = pytest.mark.slow
CPU = ("--accelerator", "cpu")
NETWORKS = {**SIZES, "htsat": LEAN}


@pytest.fixture(scope="module", params=ENCODERS)
def trained(request: pytest.FixtureRequest, demo_workspace: Path) -> tuple[str, Path]:
    """An encoder's name and its best checkpoint."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(demo_workspace)
        call("train", *flags(NETWORKS[name]), "--max_epoch", "2", "--exp_name", f"encoder_{name}")
    return name, demo_workspace / f"workspace/runs/encoder_{name}/checkpoints/best.ckpt"


@pytest.fixture(autouse=True)
def _workspace(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)


def scores(path: Path) -> dict[str, Any]:
    with h5py.File(path) as store:
        return {key: store[key][:] for key in ("clipwise", "framewise") if key in store}


def test_trained_tested_and_calibrated(trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, checkpoint = trained
    common = ("--resume_checkpoint", checkpoint, *CPU)
    call("test", *common)
    run = checkpoint.parents[1]
    assert scores(run / "scores/test.h5")["clipwise"].shape == (3, 10)
    for words in (["test", "--fl_local", "True", "--test_file", "local"], ["calibrate"], ["teach"]):
        if ENCODERS[name].frame_seconds is None:
            assert "time axis" in refused(capsys, words[0], *common, *words[1:])
        else:
            call(words[0], *common, *words[1:])
    call("weight_average", "--wa_folder", run, "--wa_model_path", run / "mean.ckpt", "--wa_test", "True", *CPU)
    anew = (
        "weight_average",
        "--wa_folder",
        run,
        "--wa_model_path",
        run / "anew.ckpt",
        "--wa_reestimate_bn",
        "True",
        *CPU,
    )
    mean = torch.load(run / "mean.ckpt", weights_only=True)["state_dict"]
    if any(key.endswith("running_var") for key in mean):
        call(*anew)
        changed = torch.load(run / "anew.ckpt", weights_only=True)["state_dict"]
        assert changed.keys() == mean.keys()
        for key, value in mean.items():
            measured = key.endswith(("running_mean", "running_var"))
            assert torch.equal(changed[key], value) != measured, key
    else:
        assert "BatchNorm" in refused(capsys, *anew)
    members = f"{checkpoint},{run / 'checkpoints/last.ckpt'}"
    call("esm_test", "--esm_model_pathes", members, *CPU, "--test_file", "two")
    call("plan", *flags(NETWORKS[name]), "--measure_steps", "1", "--exp_name", f"planned_{name}")


def test_tagged_with_and_exported(trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, checkpoint = trained
    monkeypatch.chdir(tmp_path)
    sound = 0.1 * np.random.RandomState(0).standard_normal(3 * 22050)
    soundfile.write("a.wav", sound, 22050)
    formats = ("--formats", "safetensors,onnx", "--output", "exported", "--clips", "2")
    call("export", "--resume_checkpoint", checkpoint, *formats)
    found = []
    for path in (checkpoint, Path("exported/model.safetensors"), Path("exported/model.onnx")):
        call("predict", "a.wav", "--resume_checkpoint", path, "--jsonl", "tags.jsonl", *CPU)
        tags = json.loads(Path("tags.jsonl").read_text().splitlines()[0])["tags"]
        found.append({tag["label"]: tag["score"] for tag in tags})
    assert found[1:] == [pytest.approx(found[0], abs=1e-3)] * 2
    tagger = Tagger.from_checkpoint(checkpoint, device="cpu")
    tagged = tagger.tag(sound, 22050)
    assert (len(tagged.framewise) > 0) == tagger.has_frames == (ENCODERS[name].frame_seconds is not None)
    model = hear.load_model(str(checkpoint))
    audio = torch.from_numpy(sound[None, : model.sample_rate]).float()
    assert hear.get_scene_embeddings(audio, model).shape == (1, model.scene_embedding_size)


def test_fine_tuned_from(trained: tuple[str, Path]) -> None:
    """Without naming the encoder: the checkpoint brings it. A classifier alone, then all layers at their own rates."""
    name, checkpoint = trained
    sizes = {key: value for key, value in NETWORKS[name].items() if not key.startswith("encoder")}
    start = ["train", *flags(sizes), "--max_epoch", "1", "--resume_checkpoint", str(checkpoint)]
    call(*start, "--exp_name", f"frozen_{name}", "--freeze_backbone", "True")
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    after = last_checkpoint(f"frozen_{name}")["state_dict"]
    changed = {key.removeprefix("sed_model.") for key in after if not torch.equal(after[key], before[key])}
    assert changed
    assert all(key.startswith(encoder_module(name).NETWORK.classifier) for key in changed)
    more = ["--layer_decay", "0.5", "--gradient_checkpointing", "True", "--weight_averaging", "ema"]
    call(*start, "--exp_name", f"tuned_{name}", *more)


def test_an_ensemble_over_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Members of 32 and of 16 kHz score the same clips; frame scores are those of the member with a time axis."""
    htsat = save_network(tmp_path / "htsat.ckpt")
    ast = save_network(tmp_path / "ast.ckpt", encoder="ast", clip_samples=160000)
    found = {}
    for name, members in {"htsat": [htsat], "ast": [ast], "both": [ast, htsat]}.items():
        words = ["--esm_model_pathes", ",".join(map(str, members)), *CPU, "--heatmap_dir", "scores"]
        local = ["--fl_local", "True"] if htsat in members else []
        call("esm_test", *words, *local, "--test_file", name)
        found[name] = scores(Path(f"scores/{name}.h5"))
    mean = (found["htsat"]["clipwise"] + found["ast"]["clipwise"]) / 2
    np.testing.assert_allclose(found["both"]["clipwise"], mean, atol=1e-5)
    np.testing.assert_allclose(found["both"]["framewise"], found["htsat"]["framewise"], atol=1e-5)
    short = save_network(tmp_path / "short.ckpt", encoder="ast")
    assert "short.ckpt" in refused(capsys, "esm_test", "--esm_model_pathes", f"{ast},{short}", *CPU)
