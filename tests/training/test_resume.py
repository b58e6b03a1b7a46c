"""Resuming a run: after a kill anywhere, in another folder, and what must not have changed."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment

import main
from runs.resume import RUN_SECTIONS, changes, find_resumed
from sed_model import SEDWrapper
from settings import UserError
from tests.helpers import LEAN_FLAGS, SMALL_FLAGS, call, forkserver, last_checkpoint, refused, save_network, tiny
from training.callbacks import RunCheckpoint, link_or_copy, read_curves
from training.trainer import build_trainer


@pytest.fixture(autouse=True)
def _workspace(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)


def stop_at(step: int, part: int | None = None) -> Callable[..., Any]:
    """A training_step that raises UserError in a step, or in one part of it."""
    whole = SEDWrapper.training_step

    def training_step(self: SEDWrapper, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step and (part is None or batch_idx % 2 == part):
            raise UserError("stopped")
        return whole(self, batch, batch_idx)

    return training_step


def killed(folder: Path, step: int, words: list[str]) -> None:
    """Train in a process of its own, which dies in a step."""
    whole = SEDWrapper.training_step

    def training_step(self: SEDWrapper, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, batch, batch_idx)

    multiprocessing.set_start_method("fork", force=True)  # as a command: the loader's workers end with it
    os.chdir(folder)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SEDWrapper, "training_step", training_step)
        main.main(words)


@pytest.mark.slow
@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_a_run_killed_anywhere_is_resumed(averaging: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL in three random ones of 16 steps, 4 an epoch: the weights are those of the unbroken run, bit for bit."""
    words = ["train", *SMALL_FLAGS, "--max_epoch", "4", "--resume", "auto", "--num_workers", "1"]
    words += ["--mixup_alpha", "0.5", "--checkpoint_every_steps", "3", "--weight_averaging", averaging]
    words += ["--ema_decay", "0.5", "--exp_name"]
    points = np.random.default_rng(len(averaging)).choice(np.arange(1, 16), 3 if averaging == "none" else 1, False)
    names = {int(step): f"killed_{averaging}_{step}" for step in points}
    processes = [
        forkserver().Process(target=killed, args=(Path.cwd(), step, [*words, name])) for step, name in names.items()
    ]
    for process in processes:
        process.start()
    call(*words, f"unbroken_{averaging}")
    unbroken = last_checkpoint(f"unbroken_{averaging}")
    for process, (step, name) in zip(processes, names.items(), strict=True):
        process.join()
        assert process.exitcode == -signal.SIGKILL
        last = Path("workspace/runs", name, "checkpoints/last.ckpt")
        assert not last.exists() or last_checkpoint(name)["global_step"] <= step
        capsys.readouterr()
        call(*words, name)
        assert ("resumed from" in capsys.readouterr().out) == (step >= 3)
        resumed = last_checkpoint(name)
        assert resumed["global_step"] == unbroken["global_step"] == 16
        assert resumed["epoch"] == unbroken["epoch"] == 3
        assert resumed["lr_schedulers"] == unbroken["lr_schedulers"]
        for key, value in unbroken["state_dict"].items():
            assert torch.equal(resumed["state_dict"][key], value), (step, key)
        for key, values in logged(f"unbroken_{averaging}").items():  # also of the epoch that was killed
            assert logged(name)[key] == pytest.approx(values, abs=1e-6), (step, key)


def logged(name: str) -> dict[str, dict[int, float]]:
    """Of each epoch: its losses and metrics."""
    curves = read_curves(Path("workspace/runs", name, "logs"))
    return {key: curves[key] for key in ("train_loss_epoch", "val_loss", "mAP")}


def test_another_fold_is_another_run(tmp_path: Path) -> None:
    settings = tiny(tmp_path, dataset_type="esc-50", exp_name="fold", resume="auto")
    folder = settings.run_folder / "checkpoints"
    folder.mkdir(parents=True)
    content = torch.load(save_network(tmp_path / "a.ckpt", dataset_type="esc-50", exp_name="fold"), weights_only=True)
    torch.save({**content, "epoch": 0, "optimizer_states": []}, folder / "last.ckpt")
    assert not changes(content["settings"], settings, *RUN_SECTIONS)
    with pytest.raises(UserError, match=r"esc_fold = 1 \(now 2\)"):
        find_resumed(settings.model_copy(update={"esc_fold": 2}))


@pytest.mark.usefixtures("trained")
def test_a_run_that_has_moved_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints are ranked with those that come; best.ckpt is the best of all."""
    folder = Path("workspace/runs/moved/checkpoints")
    Path("workspace/runs/htsat_demo").rename("workspace/runs/moved")
    best = torch.load(folder / "best.ckpt", weights_only=True)["epoch"]
    monkeypatch.setattr("sed_model.SEDWrapper.on_validation_epoch_end", lambda self: self.log("mAP", torch.tensor(0.0)))
    call("train", *LEAN_FLAGS, "--max_epoch", "3", "--exp_name", "moved", "--resume", "auto")  # no epoch is as good now
    assert torch.load(folder / "best.ckpt", weights_only=True)["epoch"] == best
    assert len(list(folder.glob("epoch_*.ckpt"))) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "2"], "clips a batch = 4"),
        (["--random_seed", "1"], "random_seed = 970131 (now 1)"),
        (["--layer_decay", "0.5"], "layer_decay = 1.0 (now 0.5)"),
        (["--weight_averaging", "ema"], "weight_averaging = 'none' (now 'ema')"),
        (["--resume_checkpoint", "a.ckpt"], "resume_checkpoint = None (now 'a.ckpt')"),
    ],
)
def test_what_must_not_change(
    stopped: tuple[str, ...], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refused(capsys, *stopped, "--resume", "auto", *words)


@pytest.mark.usefixtures("trained")
def test_what_may_change_is_used_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The other settings, as the sizes of the network, are those of the run's config.json."""
    words = ["--max_epoch", "3", "--learning_rate", "0.5", "--weight_decay", "0.25", "--lr_rate", "1,1,0.5"]
    call("train", "--resume", "auto", *words)
    shown = capsys.readouterr().out
    content = last_checkpoint("htsat_demo")
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"]) == (0.5, 0.25) == (
        content["settings"]["learning_rate"], content["settings"]["weight_decay"],
    )  # fmt: skip
    assert content["settings"]["htsat_dim"] == 16
    first, last = json.loads(Path("workspace/runs/htsat_demo/provenance.json").read_text())
    assert "changed" not in first
    for name in ("learning_rate", "weight_decay", "lr_rate", "max_epoch"):
        assert name in last["changed"]
        assert name in shown
    assert "lr 2.50e-01" in shown  # of the third epoch


@pytest.mark.usefixtures("trained")
def test_a_schedule_by_steps_is_resumed() -> None:
    """Two epochs of 4 steps with a rate for each epoch, then a third one by steps, which ends at 0."""
    call("train", "--resume", "auto", "--max_epoch", "3", "--lr_schedule", "cosine", "--warm_up", "0")
    content = last_checkpoint("htsat_demo")
    assert content["lr_schedulers"][0]["last_epoch"] == content["global_step"] == 12
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    call("train", "--resume", "auto", "--max_epoch", "4")
    content = last_checkpoint("htsat_demo")
    assert content["lr_schedulers"][0]["last_epoch"] == content["global_step"] == 16


@pytest.mark.usefixtures("trained")
def test_other_data_are_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    store = Path("workspace/data/demo/demo.h5")
    shutil.copyfile(store.resolve(), "other.h5")
    store.unlink()
    Path("other.h5").rename(store)
    words = ["train", "--resume", "auto", "--max_epoch", "3"]
    with h5py.File(store, "r+") as file:
        file["event_onset"][0] += 0.01
    assert str(store) in refused(capsys, *words)
    with h5py.File(store, "r+") as file:
        file["event_onset"][0] -= 0.01
        file.attrs["labels"] = file.attrs["labels"][::-1]
    assert str(store) in refused(capsys, *words)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", ["provenance.json", "config.json"])
def test_damaged_records_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("workspace/runs/htsat_demo", name)
    path.write_text(path.read_text()[:-9])
    assert name in refused(capsys, "train", "--resume", "auto", "--max_epoch", "3")


@pytest.mark.usefixtures("trained")
def test_the_end_of_a_complete_run_is_made_up_for() -> None:
    """Killed after its last checkpoint, or without its best one, which has a second name."""
    run = Path("workspace/runs/htsat_demo")
    card, best = (run / "README.md").read_text(), (run / "checkpoints/best.ckpt").read_bytes()
    (run / "README.md").unlink()
    (run / "checkpoints/best.ckpt").unlink()
    call("train", "--resume", "auto")
    assert (run / "checkpoints/best.ckpt").read_bytes() == best
    assert (run / "README.md").read_text() == card


def test_a_best_checkpoint_that_is_gone_has_no_rank(tmp_path: Path) -> None:
    names = [f"epoch_{number}.ckpt" for number in range(3)]
    (tmp_path / names[1]).touch()
    callback = RunCheckpoint(dirpath=str(tmp_path), monitor="mAP", mode="max", save_top_k=3)
    ranked = {f"/old/{name}": torch.tensor(value) for name, value in zip(names, (0.1, 0.2, 0.3), strict=True)}
    state = {"best_model_path": f"/old/{names[2]}", "best_model_score": torch.tensor(0.3), "best_k_models": ranked}
    callback.load_state_dict({**state, "kth_best_model_path": f"/old/{names[0]}", "kth_value": torch.tensor(0.1)})
    assert list(callback.best_k_models) == [str(tmp_path / names[1])]
    assert callback.best_model_path == callback.kth_best_model_path == str(tmp_path / names[1])
    assert callback.best_model_score == callback.kth_value == torch.tensor(0.2)


def test_a_job_of_slurm_resumes_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hpc_ckpt_1.ckpt").touch()  # as Lightning leaves it in the current folder
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    trainer = build_trainer(tiny(tmp_path), steps_per_epoch=1)
    assert trainer._checkpoint_connector._hpc_resume_path is None
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


def test_a_training_that_diverges_keeps_what_it_has(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the next epoch, with a checkpoint after each step: none with weights that are no numbers is written."""
    last = trained / "workspace/runs/htsat_demo/checkpoints/last.ckpt"
    before = last.read_bytes()

    def diverge(self: SEDWrapper, *_: Any, **__: Any) -> None:
        for parameter in self.sed_model.parameters():
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(SEDWrapper, "on_before_zero_grad", diverge)
    said = refused(capsys, "train", "--resume", "auto", "--max_epoch", "3", "--checkpoint_every_steps", "1")
    assert "learning_rate" in said
    assert str(last.relative_to(trained)) in said
    assert last.read_bytes() == before


def test_the_rate_of_an_epoch_is_its_own(trained_run: Path) -> None:
    shown = re.findall(r"lr (\S+)", (trained_run / "train.log").read_text())
    assert [float(rate) for rate in shown] == pytest.approx([0.01 * 0.02, 0.01 * 0.05])


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command of a run that stopped after the first two steps of its first epoch."""
    words = ("train", *SMALL_FLAGS, "--exp_name", "stopped", "--max_epoch", "2", "--checkpoint_every_steps", "1")
    if not Path("workspace/runs/stopped").exists():
        with monkeypatch.context() as patch:
            patch.setattr(SEDWrapper, "training_step", stop_at(2))
            assert main.main(list(words)) == 2
    assert last_checkpoint("stopped")["complete_epochs"] == 0
    return words


@pytest.mark.slow
def test_a_step_in_parts_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped twice inside a step of two parts: no checkpoint lies between them, and the end is the unbroken run's."""
    words = ["train", *SMALL_FLAGS, "--max_epoch", "2", "--accumulate_batches", "2", "--checkpoint_every_steps", "1"]
    words += ["--resume", "auto"]
    call(*words, "--exp_name", "parts_unbroken")
    for step in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(SEDWrapper, "training_step", stop_at(step, part=1))
            assert main.main([*words, "--exp_name", "parts_stopped"]) == 2
        last = last_checkpoint("parts_stopped")
        handed_out = last["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["handed_out"]
        assert (last["global_step"], handed_out) == (step, 2 * step)
    call(*words, "--exp_name", "parts_stopped")
    unbroken = last_checkpoint("parts_unbroken")["state_dict"]
    for key, value in last_checkpoint("parts_stopped")["state_dict"].items():
        assert torch.equal(value, unbroken[key]), key


def test_a_second_name_is_given_twice(tmp_path: Path) -> None:
    """The best checkpoint stays the best one: no third name is left, which the next writer would write through."""
    source, target = tmp_path / "epoch_000.ckpt", tmp_path / "best.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(3)}}, source)
    for _ in range(2):
        link_or_copy(source, target)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "epoch_000.ckpt"]
