"""Training: it learns, it is deterministic, it goes on after a kill, and two processes agree with one."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import main
from data.clip_store import Clip, ClipStoreWriter
from data_generator import load_training_data
from model import build_model
from model.frontend import BandNorm
from prepare.demo import LABELS as DEMO_LABELS
from sed_model import SEDWrapper
from settings import Config, resolve
from tests.helpers import TINY, TINY_FLAGS, run_python


def tiny(workspace: Path, **changes: Any) -> Config:
    return resolve({**TINY, "workspace": str(workspace / "workspace"), **changes})


def test_eight_clips_are_learned_by_heart(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, spec_augment=False, htsat_drop_path=0.0, learning_rate=3e-3, weight_decay=0.0)
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
    waveform, targets = wrapper._augment(torch.arange(100.0).repeat(20, 1), torch.eye(20, 10))
    assert waveform.shape == (20, 60)
    assert targets.shape == (20, 32, 10)


def test_token_labels_train(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    words = ["--max_epoch", "1", "--exp_name", "token", "--debug", "True", "--enable_token_label", "True"]
    assert main.main(["train", *TINY_FLAGS, *words, "--balanced_data", "True", "--class_filter", "siren,bell,hum"]) == 0


def test_a_broken_loss_stops_the_run(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace)
    wrapper = SEDWrapper(build_model(settings), settings, [])
    wrapper.loss_func = lambda logits, targets: logits.sum() * float("nan")
    batch = load_training_data(settings, ("train",)).dataset("train").__getitems__([0, 1])
    with pytest.raises(ValueError, match="The loss is nan in epoch 0"):
        wrapper.training_step(batch, 0)


def run_folder(workspace: Path, name: str) -> Path:
    return workspace / "workspace" / "runs" / name


def last_checkpoint(workspace: Path, name: str) -> dict[str, Any]:
    return torch.load(run_folder(workspace, name) / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_same_seed_gives_the_same_weights(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    for name in ("first", "second"):
        assert main.main(["train", *TINY_FLAGS, "--max_epoch", "1", "--exp_name", name]) == 0
    first, second = (last_checkpoint(demo_workspace, name)["state_dict"] for name in ("first", "second"))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_mixed_precision_trains(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    words = ["--max_epoch", "1", "--precision", "bf16-mixed", "--exp_name", "bf16", "--debug", "True"]
    assert main.main(["train", *TINY_FLAGS, *words]) == 0
    assert all(value.isfinite().all() for value in last_checkpoint(demo_workspace, "bf16")["state_dict"].values())


def test_fewer_clips_than_processes(demo_workspace: Path, tmp_path: Path) -> None:
    """One test clip and two processes: the one without clips waits for nothing and counts nothing."""
    with ClipStoreWriter(tmp_path / "demo.h5", clip_samples=32000, sample_rate=32000, labels=DEMO_LABELS) as writer:
        writer.add(Clip("only.wav", np.ones(32000, np.int16), [3], split="test"))
    settings = tiny(demo_workspace)
    labels = list(DEMO_LABELS)
    weights = {f"sed_model.{key}": value for key, value in build_model(settings).state_dict().items()}
    torch.save({"state_dict": weights, "settings": settings.model_dump(), "labels": labels}, tmp_path / "tiny.ckpt")
    flags = ["--resume_checkpoint", "tiny.ckpt", "--dataset_path", ".", "--heatmap_dir", "scores", "--fl_local", "True"]
    run_python("main.py", "test", *flags, "--accelerator", "cpu", "--devices", "2", cwd=tmp_path)
    (mean_ap, *_) = json.loads((tmp_path / "scores" / "test.json").read_text())["metrics"]
    assert (mean_ap["value"], mean_ap["clips"], mean_ap["classes"]) == (1.0, 1, 1)


def test_training_with_two_processes(demo_workspace: Path) -> None:
    flags = [*TINY_FLAGS, "--max_epoch", "1", "--devices", "2", "--exp_name", "two"]
    done = run_python("main.py", "train", *flags, cwd=demo_workspace)
    assert done.stdout.count("epoch   1/1") == 1  # one process speaks
    assert last_checkpoint(demo_workspace, "two")["global_step"] == 4  # 14 clips, 4 a step over both processes


def _band_norm_share(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch through BandNorm, forwards and backwards."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, weights = torch.load(f"{folder}/input.pt", weights_only=True)
    norm = BandNorm(8)
    share = slice(4 * rank, 4 * rank + 4)
    (norm(x[share]) * weights[share]).sum().backward()
    assert norm.weight.grad is not None
    torch.save({**norm.state_dict(), "grad": norm.weight.grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_band_norm_sees_the_clips_of_all_processes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(8, 8, 20) * torch.arange(1, 9)[:, None, None] - 40, torch.randn(8, 8, 20)
    torch.save([x, weights], tmp_path / "input.pt")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(_band_norm_share, args=(str(tmp_path),), nprocs=2)
    norm = BandNorm(8)
    (norm(x) * weights).sum().backward()
    assert norm.weight.grad is not None
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for share in shares:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(share[key], norm.state_dict()[key], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shares[0]["grad"] + shares[1]["grad"], norm.weight.grad, rtol=1e-4, atol=1e-4)
