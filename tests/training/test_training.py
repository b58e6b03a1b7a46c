"""Training: it learns, it is deterministic, mixed precision, and two processes agree with one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.clip_store import Clip, ClipStoreWriter
from data_generator import load_training_data
from model import build_model
from prepare.demo import LABELS as DEMO_LABELS
from sed_model import SEDWrapper
from settings import UserError
from tests.helpers import SMALL, TINY_FLAGS, call, last_checkpoint, run_python, save_network, tiny


def test_eight_clips_are_learned_by_heart(demo_workspace: Path) -> None:
    recipe = {"spec_augment": False, "htsat_drop_path": 0.0, "learning_rate": 1e-2, "weight_decay": 0.0}
    settings = tiny(demo_workspace, **SMALL, **recipe)
    torch.manual_seed(0)
    data = load_training_data(settings, ("train",))
    batch = data.dataset("train").__getitems__(range(8))
    wrapper = SEDWrapper(build_model(settings), settings, data.tables["train"].labels).train()
    wrapper.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for _ in range(80):
        loss = wrapper.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.02


def test_recipe_of_the_optimizer(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, dataset_type="audioset", classes_num=10)
    wrapper = SEDWrapper(build_model(settings), settings, [])
    configured = wrapper.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.05)
    assert group["lr"] == pytest.approx(1e-3 * 0.02)
    assert len(group["params"]) == sum(p.requires_grad for p in wrapper.parameters())
    assert not any(p.requires_grad for p in wrapper.sed_model.unused_parameters())


def test_augmentations_of_the_settings(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, enable_time_shift=True, shift_max=50, crop_size=60, enable_token_label=True)
    wrapper = SEDWrapper(build_model(settings), settings, [])
    torch.manual_seed(0)
    waveform, targets = wrapper.augment_waveform(torch.arange(100.0).repeat(20, 1), {"target": torch.eye(20, 10)})
    assert waveform.shape == (20, 60)
    assert targets.frames is not None
    assert targets.frames.shape == (20, 32, 10)


def test_token_labels_train(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    words = ["--max_epoch", "1", "--exp_name", "token", "--debug", "True", "--enable_token_label", "True"]
    call("train", *TINY_FLAGS, *words, "--balanced_data", "True", "--class_filter", "siren,bell,hum")


def test_a_broken_loss_stops_the_run(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace)
    wrapper = SEDWrapper(build_model(settings), settings, [])
    wrapper.loss_func = lambda logits, targets: logits.sum() * float("nan")
    batch = load_training_data(settings, ("train",)).dataset("train").__getitems__([0, 1])
    with pytest.raises(UserError, match="learning_rate"):
        wrapper.training_step(batch, 0)


def test_the_same_seed_gives_the_same_weights(trained_run: Path, trained: Path) -> None:
    """In another process and another folder."""
    call("train", *TINY_FLAGS, "--max_epoch", "2", "--exp_name", "again")
    first = last_checkpoint("htsat_demo", trained_run)["state_dict"]
    second = last_checkpoint("again", trained)["state_dict"]
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_mixed_precision_trains(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    call("train", *TINY_FLAGS, "--max_epoch", "1", "--precision", "bf16-mixed", "--exp_name", "bf16", "--debug", "True")
    assert all(value.isfinite().all() for value in last_checkpoint("bf16")["state_dict"].values())


@pytest.mark.slow
def test_fewer_clips_than_processes(tmp_path: Path) -> None:
    """One test clip and two processes: the one without clips waits for nothing and counts nothing."""
    with ClipStoreWriter(tmp_path / "demo.h5", clip_samples=32000, sample_rate=32000, labels=DEMO_LABELS) as writer:
        writer.add(Clip("only.wav", np.ones(32000, np.int16), [3], split="test"))
    save_network(tmp_path / "tiny.ckpt")
    flags = ["--resume_checkpoint", "tiny.ckpt", "--dataset_path", ".", "--heatmap_dir", "scores", "--fl_local", "True"]
    run_python("main.py", "test", *flags, "--accelerator", "cpu", "--devices", "2", cwd=tmp_path)
    (mean_ap, *_) = json.loads((tmp_path / "scores" / "test.json").read_text())["metrics"]
    assert (mean_ap["value"], mean_ap["clips"], mean_ap["classes"]) == (1.0, 1, 1)


@pytest.mark.slow
def test_training_with_two_processes(demo_workspace: Path) -> None:
    flags = [*TINY_FLAGS, "--max_epoch", "1", "--devices", "2", "--exp_name", "two"]
    done = run_python("main.py", "train", *flags, cwd=demo_workspace)
    assert done.stdout.count("epoch   1/1") == 1  # one process speaks
    assert last_checkpoint("two", demo_workspace)["global_step"] == 4  # 14 clips, 4 a step over both processes
