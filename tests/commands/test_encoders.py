"""Every encoder through the commands: trained on the demo for two epochs, whatever the sample rate of the store."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
import torch

import main
from inference import Tagger, hear
from model.registry import ENCODERS
from tests.helpers import SIZES

pytestmark = pytest.mark.slow


def flags(values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def run(*words: object) -> int:
    return main.main([*map(str, words)])


@pytest.fixture(scope="module", params=ENCODERS)
def trained(request: pytest.FixtureRequest, demo_workspace: Path) -> tuple[str, Path]:
    """An encoder's name and its best checkpoint."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(demo_workspace)
        assert run("train", *flags(SIZES[name]), "--max_epoch", "2", "--exp_name", f"encoder_{name}") == 0
    return name, demo_workspace / f"workspace/runs/encoder_{name}/checkpoints/best.ckpt"


def scores(checkpoint: Path, file: str) -> dict[str, Any]:
    with h5py.File(checkpoint.parents[1] / "scores" / f"{file}.h5") as store:
        return {key: store[key][:] for key in ("clipwise", "framewise") if key in store}


def test_trained_tested_and_calibrated(
    trained: tuple[str, Path], demo_workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, checkpoint = trained
    monkeypatch.chdir(demo_workspace)
    timed = ENCODERS[name].frame_seconds is not None
    common: Sequence[str | Path] = ("--resume_checkpoint", checkpoint, "--accelerator", "cpu")
    assert run("test", *common) == 0
    assert scores(checkpoint, "test")["clipwise"].shape == (3, 10)
    for words in (["test", "--fl_local", "True", "--test_file", "local"], ["calibrate"], ["teach"]):
        assert run(words[0], *common, *words[1:]) == (0 if timed else 2), words
        assert timed or "time axis" in capsys.readouterr().err, words
    run_folder = checkpoint.parents[1]
    assert run("weight_average", "--wa_folder", run_folder, "--wa_model_path", run_folder / "mean.ckpt") == 0
    assert run("test", "--resume_checkpoint", run_folder / "mean.ckpt", "--accelerator", "cpu") == 0
    members = f"{checkpoint},{run_folder / 'checkpoints/last.ckpt'}"
    assert run("esm_test", "--esm_model_pathes", members, "--accelerator", "cpu", "--test_file", "two") == 0
    assert run("plan", *flags(SIZES[name]), "--measure_steps", "1", "--exp_name", f"planned_{name}") == 0


def test_tagged_with_and_exported(trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, checkpoint = trained
    monkeypatch.chdir(tmp_path)
    sound = 0.1 * np.random.RandomState(0).standard_normal(3 * 22050)
    soundfile.write("a.wav", sound, 22050)
    assert run("export", "--resume_checkpoint", checkpoint, "--output", "exported", "--clips", "2") == 0
    found = {}
    for path in (
        checkpoint,
        Path("exported/model.safetensors"),
        Path("exported/model.onnx"),
        Path("exported/model-mel.onnx"),
    ):
        words = ["--resume_checkpoint", path, "--jsonl", f"{path.stem}.jsonl", "--accelerator", "cpu"]
        assert run("predict", "a.wav", *words) == 0
        tags = json.loads(Path(f"{path.stem}.jsonl").read_text().splitlines()[0])["tags"]
        found[path.name] = {tag["label"]: tag["score"] for tag in tags} if isinstance(tags, list) else tags
    for other in found.values():
        assert other == pytest.approx(found["best.ckpt"], abs=1e-3)
    tagger = Tagger.from_checkpoint(checkpoint, device="cpu")
    tagged = tagger.tag(sound, 22050)
    assert (len(tagged.framewise) > 0) == tagger.has_frames == (ENCODERS[name].frame_seconds is not None)
    model = hear.load_model(str(checkpoint))
    audio = torch.from_numpy(sound[None, : model.sample_rate]).float()
    assert hear.get_scene_embeddings(audio, model).shape == (1, model.scene_embedding_size)


def test_fine_tuned_from(trained: tuple[str, Path], demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without naming the encoder: the checkpoint brings it. A classifier alone, then all layers at their own rates."""
    name, checkpoint = trained
    monkeypatch.chdir(demo_workspace)
    sizes = {key: value for key, value in SIZES[name].items() if not key.startswith("encoder")}
    start = ["train", *flags(sizes), "--max_epoch", "1", "--resume_checkpoint", checkpoint]
    assert run(*start, "--exp_name", f"frozen_{name}", "--freeze_backbone", "True") == 0
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    after = torch.load(f"workspace/runs/frozen_{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed
    assert len(changed) < len(after) / 4
    more = ["--layer_decay", "0.5", "--gradient_checkpointing", "True", "--weight_averaging", "ema"]
    assert run(*start, "--exp_name", f"tuned_{name}", *more) == 0


def test_an_ensemble_over_encoders(trained_run: Path, demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of 32 and of 16 kHz hear the same clips; frame scores are those of the member with a time axis."""
    monkeypatch.chdir(demo_workspace)
    htsat = trained_run / "workspace/runs/htsat_demo/checkpoints/best.ckpt"
    sizes = {**SIZES["ast"], "clip_samples": "160000", "max_epoch": "1", "exp_name": "ten_seconds"}
    assert run("train", *flags(sizes)) == 0
    ast = demo_workspace / "workspace/runs/ten_seconds/checkpoints/best.ckpt"
    found = {}
    for name, members in {"htsat": [htsat], "ast": [ast], "both": [ast, htsat]}.items():
        words = ["--esm_model_pathes", ",".join(map(str, members)), "--accelerator", "cpu", "--heatmap_dir", "scores"]
        local = ["--fl_local", "True"] if htsat in members else []
        assert run("esm_test", *words, *local, "--test_file", name) == 0
        with h5py.File(f"scores/{name}.h5") as store:
            found[name] = {key: store[key][:] for key in ("clipwise", "framewise") if key in store}
    mean = (found["htsat"]["clipwise"] + found["ast"]["clipwise"]) / 2
    np.testing.assert_allclose(found["both"]["clipwise"], mean, atol=1e-5)
    np.testing.assert_allclose(found["both"]["framewise"], found["htsat"]["framewise"], atol=1e-5)
    short = {**SIZES["ast"], "max_epoch": "1", "exp_name": "one_second"}
    assert run("train", *flags(short)) == 0
    other = demo_workspace / "workspace/runs/one_second/checkpoints/best.ckpt"
    assert run("esm_test", "--esm_model_pathes", f"{ast},{other}", "--accelerator", "cpu") == 2
