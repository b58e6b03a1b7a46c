"""Training: deterministic, in mixed precision, with two processes. That it learns: tests/model/test_encoders.py."""

from pathlib import Path

import pytest
import torch

from data_generator import load_training_data
from model import build_model
from sed_model import SEDWrapper
from settings import UserError
from tests.helpers import LEAN_FLAGS, SMALL_FLAGS, call, last_checkpoint, run_python, tiny


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
    call("train", *LEAN_FLAGS, *words, "--balanced_data", "True", "--class_filter", "siren,bell,hum")


def test_a_broken_loss_stops_the_run(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace)
    wrapper = SEDWrapper(build_model(settings), settings, [])
    wrapper.loss_func = lambda logits, targets: logits.sum() * float("nan")
    batch = load_training_data(settings, ("train",)).dataset("train").__getitems__([0, 1])
    with pytest.raises(UserError, match="learning_rate"):
        wrapper.training_step(batch, 0)


def test_the_same_seed_gives_the_same_weights(trained_run: Path, trained: Path) -> None:
    """In another process and another folder."""
    call("train", *LEAN_FLAGS, "--max_epoch", "2", "--exp_name", "again")
    first = last_checkpoint("htsat_demo", trained_run)["state_dict"]
    second = last_checkpoint("again", trained)["state_dict"]
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_mixed_precision_trains(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    call("train", *LEAN_FLAGS, "--max_epoch", "1", "--precision", "bf16-mixed", "--exp_name", "bf16", "--debug", "True")
    assert all(value.isfinite().all() for value in last_checkpoint("bf16")["state_dict"].values())


@pytest.mark.slow
def test_training_with_two_processes(demo_workspace: Path) -> None:
    flags = [*SMALL_FLAGS, "--max_epoch", "1", "--devices", "2", "--exp_name", "two"]
    done = run_python("main.py", "train", *flags, cwd=demo_workspace)
    assert done.stdout.count("epoch   1/1") == 1  # one process speaks
    assert last_checkpoint("two", demo_workspace)["global_step"] == 4  # 14 clips, 4 a step over both processes
