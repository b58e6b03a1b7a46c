"""Going on with a run: after a kill anywhere, in another folder, and what must not have changed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main
from model import build_model
from model.checkpoint import store_in_checkpoint
from runs.resume import find_resumed
from settings import Config, UserError, resolve
from tests.helpers import ROOT, TINY, TINY_FLAGS
from training.callbacks import link_or_copy


def tiny(workspace: Path, **changes: Any) -> Config:
    return resolve({**TINY, "workspace": str(workspace / "workspace"), **changes})


def run_folder(workspace: Path, name: str) -> Path:
    return workspace / "workspace" / "runs" / name


def last_checkpoint(workspace: Path, name: str) -> dict[str, Any]:
    return torch.load(run_folder(workspace, name) / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums over several threads round differently from machine to machine, and from process to process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv.pop(1))
step = int(sys.argv.pop(1))
import main, sed_model
whole = sed_model.SEDWrapper.training_step
def killed(self, batch, batch_idx):
    if self.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, batch, batch_idx)
sed_model.SEDWrapper.training_step = killed
torch.set_num_threads(1)
main.main(sys.argv[1:])
"""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_a_run_killed_anywhere_goes_on(
    demo_workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], averaging: str
) -> None:
    """SIGKILL in three random ones of 16 steps, 4 an epoch: the weights are those of the unbroken run, bit for bit."""
    monkeypatch.chdir(demo_workspace)
    words = ["train", *TINY_FLAGS, "--max_epoch", "4", "--resume", "auto", "--num_workers", "1", "--mixup_alpha", "0.5"]
    words += ["--checkpoint_every_steps", "3", "--weight_averaging", averaging, "--ema_decay", "0.5"]
    points = np.random.default_rng(len(averaging)).choice(np.arange(1, 16), 3 if averaging == "none" else 1, False)
    names = {int(step): f"killed_{averaging}_{step}" for step in points}
    killed = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(ROOT), str(step), *words, "--exp_name", name])
        for step, name in names.items()
    ]
    assert [process.wait() for process in killed] == [-signal.SIGKILL] * len(names)
    assert main.main([*words, "--exp_name", f"unbroken_{averaging}"]) == 0
    unbroken = last_checkpoint(demo_workspace, f"unbroken_{averaging}")
    for step, name in names.items():
        last = run_folder(demo_workspace, name) / "checkpoints" / "last.ckpt"
        assert not last.exists() or last_checkpoint(demo_workspace, name)["global_step"] <= step
        capsys.readouterr()
        assert main.main([*words, "--exp_name", name]) == 0
        assert ("resumed from" in capsys.readouterr().out) == (step >= 3)
        resumed = last_checkpoint(demo_workspace, name)
        assert resumed["global_step"] == unbroken["global_step"] == 16
        assert resumed["epoch"] == unbroken["epoch"] == 3
        assert resumed["lr_schedulers"] == unbroken["lr_schedulers"]
        for key, value in unbroken["state_dict"].items():
            assert torch.equal(resumed["state_dict"][key], value), (step, key)


def test_another_fold_is_another_run(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, exp_name="fold", dataset_type="esc-50", esc_fold=1)
    folder = run_folder(demo_workspace, "fold") / "checkpoints"
    folder.mkdir(parents=True)
    weights = build_model(settings).state_dict()
    content = {"state_dict": weights, "settings": settings.model_dump(), "epoch": 0, "optimizer_states": []}
    torch.save(content, folder / "last.ckpt")
    again = tiny(demo_workspace, exp_name="fold", dataset_type="esc-50", esc_fold=2, resume="auto")
    with pytest.raises(ValueError, match=r"esc_fold = 1 \(now 2\)"):
        find_resumed(again)
    assert find_resumed(tiny(demo_workspace, exp_name="fold", dataset_type="esc-50", resume="auto")) is not None


def test_a_run_that_has_moved_keeps_its_best(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints are ranked with those that come; best.ckpt is the best of all."""
    monkeypatch.chdir(demo_workspace)
    words = ["train", *TINY_FLAGS, "--learning_rate", "1e-2"]
    assert main.main([*words, "--max_epoch", "2", "--exp_name", "home"]) == 0
    shutil.move(run_folder(demo_workspace, "home"), run_folder(demo_workspace, "moved"))
    best = torch.load(run_folder(demo_workspace, "moved") / "checkpoints/best.ckpt", weights_only=True)["epoch"]
    monkeypatch.setattr("sed_model.clip_metrics", lambda *_: [])  # from now on no epoch is as good
    monkeypatch.setattr("sed_model.SEDWrapper.on_validation_epoch_end", lambda self: self.log("mAP", torch.tensor(0.0)))
    assert main.main([*words, "--max_epoch", "3", "--exp_name", "moved", "--resume", "auto"]) == 0
    folder = run_folder(demo_workspace, "moved") / "checkpoints"
    assert torch.load(folder / "best.ckpt", weights_only=True)["epoch"] == best
    assert len(list(folder.glob("epoch_*.ckpt"))) == 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "2"], "in the middle of an epoch with clips a batch = 4, and cannot go on with 2"),
        (["--random_seed", "1"], "random_seed = 970131 (now 1)"),
        (["--layer_decay", "0.5"], "layer_decay = 1.0 (now 0.5)"),
        (["--weight_averaging", "ema"], "weight_averaging = 'none' (now 'ema')"),
    ],
)
def test_what_must_not_change(
    demo_workspace: Path,
    stopped: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(demo_workspace)
    name = stopped
    assert main.main(["train", *TINY_FLAGS, "--exp_name", name, "--resume", "auto", "--max_epoch", "2", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(demo_workspace: Path) -> str:
    """A run that stopped after the first two steps of its first epoch, with two parts a step."""

    def stop(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise UserError("stopped")
        return whole(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(demo_workspace)
        from sed_model import SEDWrapper

        whole = SEDWrapper.training_step
        patch.setattr(SEDWrapper, "training_step", stop)
        words = ["--exp_name", "stopped", "--max_epoch", "2", "--checkpoint_every_steps", "1"]
        assert main.main(["train", *TINY_FLAGS, *words]) == 2
    assert last_checkpoint(demo_workspace, "stopped")["complete_epochs"] == 0
    return "stopped"


@pytest.mark.usefixtures("one_thread")
def test_a_step_in_parts_is_not_cut(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped twice inside a step of two parts: no checkpoint lies between them, and the end is the unbroken run's."""
    from sed_model import SEDWrapper

    monkeypatch.chdir(demo_workspace)
    words = ["train", *TINY_FLAGS, "--max_epoch", "2", "--accumulate_batches", "2", "--checkpoint_every_steps", "1"]
    words += ["--resume", "auto"]
    assert main.main([*words, "--exp_name", "parts_unbroken"]) == 0
    whole = SEDWrapper.training_step
    for stop_at in (1, 2):

        def stop(self: Any, batch: Any, batch_idx: int, at: int = stop_at) -> Any:
            if self.global_step == at and batch_idx % 2 == 1:
                raise UserError("stopped")
            return whole(self, batch, batch_idx)

        monkeypatch.setattr(SEDWrapper, "training_step", stop)
        assert main.main([*words, "--exp_name", "parts_stopped"]) == 2
        last = last_checkpoint(demo_workspace, "parts_stopped")
        handed_out = last["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["handed_out"]
        assert (last["global_step"], handed_out) == (stop_at, 2 * stop_at)
    monkeypatch.setattr(SEDWrapper, "training_step", whole)
    assert main.main([*words, "--exp_name", "parts_stopped"]) == 0
    unbroken = last_checkpoint(demo_workspace, "parts_unbroken")["state_dict"]
    for key, value in last_checkpoint(demo_workspace, "parts_stopped")["state_dict"].items():
        assert torch.equal(value, unbroken[key]), key


def test_a_second_name_is_given_twice(tmp_path: Path) -> None:
    """The best checkpoint stays the best one: no third name is left, which the next writer would write through."""
    source, target = tmp_path / "epoch_000.ckpt", tmp_path / "best.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(3)}}, source)
    for _ in range(2):
        link_or_copy(source, target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "epoch_000.ckpt"]
    os.link(source, tmp_path / "best.ckpt.partial")  # as an earlier version left it
    before = source.read_bytes()
    store_in_checkpoint(target, "postprocessing", {"thresholds": [0.5]})
    assert source.read_bytes() == before
    assert torch.load(target, weights_only=True)["postprocessing"] == {"thresholds": [0.5]}
