"""What several tests share: tiny networks, and the command line in this process or in one of its own."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import main
from model import build_model
from model.registry import ENCODERS
from prepare.demo import LABELS
from runs import experiments
from settings import Config, resolve

ROOT = Path(__file__).parents[1]
TINY: dict[str, Any] = {  # a network of one block a stage
    "htsat_dim": "16",
    "htsat_depth": "1,1,1,1",
    "htsat_num_head": "1,2,4,8",
    "batch_size": "4",
    "accelerator": "cpu",
}
SIZES: dict[str, dict[str, Any]] = {  # of each encoder: the settings of a tiny network
    "htsat": TINY,
    **{
        name: {
            "encoder": name,
            "encoder_options": options,
            "clip_samples": str(ENCODERS[name].sample_rate),  # 1 s
            "batch_size": "4",
            "accelerator": "cpu",
        }
        for name, options in {
            "ast": "dim=128,depth=2,heads=2",
            "atst-f": "dim=64,depth=2,heads=1",
            "beats": "dim=64,depth=2,heads=1",
            "fpasst": "dim=64,depth=2,heads=1",
            "m2d": "dim=64,depth=2,heads=1",
            "asit": "dim=64,depth=2,heads=1",
            "psla": "variant=b0,width=0.25,heads=2",
            "resnet50": "width=0.125",
            "mobilenetv2": "width=0.25",
            "cnn14": "width=0.0625",
            "mn10": "width=0.2",
            "frame_mn06": "width=0.1",
            "frame_mn10": "width=0.85",
            "tal": "frontend=logmel64,dim=128,conv_layers=5",
            "taltrans": "frontend=logmel64,dim=128,conv_layers=5",
            "transformer": "dim=64",
            "fnet": "frontend=logmel64,dim=64,layers=3",
            "linear": "dim=64",
        }.items()
    },
}
LEAN: dict[str, Any] = {  # 32 steps of 10 s, as TINY, from an eighth of the frames
    **TINY, "htsat_depth": "1", "htsat_num_head": "1", "htsat_spec_size": "64", "mel_bins": "32", "hop_size": "2560",
}  # fmt: skip
SMALL: dict[str, Any] = {  # for clips of a quarter of a second, of 32 kHz
    **TINY, "htsat_depth": "1,1", "htsat_num_head": "1,2", "htsat_spec_size": "64", "mel_bins": "32",
    "clip_samples": "8000", "performance": "manual",
}  # fmt: skip


def flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as words of the command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


TINY_FLAGS, LEAN_FLAGS, SMALL_FLAGS = flags(TINY), flags(LEAN), flags(SMALL)


def tiny(folder: Path | None = None, **changes: Any) -> Config:
    """The settings of TINY, with the workspace of a folder."""
    workspace = {} if folder is None else {"workspace": str(folder / "workspace")}
    return resolve({**TINY, **workspace, **changes})


def assert_log_mel_close(found: Any, expected: np.ndarray, *, axis: int, decibel: float, atol: float = 1e-4) -> None:
    """Compare log-mel spectrograms. axis: of the bands; decibel: one, in the units of the spectrograms.

    A band 30 dB below the loudest of its frame may differ by ten times atol: there the rounding of a Fourier transform
    in float32 shows, which another CPU does otherwise.
    """
    weak = expected < expected.max(axis=axis, keepdims=True) - 30 * decibel
    excess = np.abs(np.asarray(found) - expected) - np.where(weak, 10 * atol, atol)
    assert excess.max() <= 0, f"{(excess > 0).sum()} of {excess.size} cells differ, by up to {excess.max()} too much"


def call(*words: str | Path) -> None:
    """`python main.py words...` in this process; it must succeed."""
    assert main.main(list(map(str, words))) == 0, words


def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let commands that start others run them in this process; the list has the words of each that was started."""
    started: list[list[str]] = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert Path(command[1]).name == "main.py"
        started.append(command[2:])
        return subprocess.CompletedProcess(command, main.main(command[2:]))

    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(run=run))
    return started


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What `python main.py words...` says of a user's mistake."""
    capsys.readouterr()
    assert main.main(list(map(str, words))) == 2, words
    return capsys.readouterr().err


def save_network(path: Path, labels: Sequence[str] = LABELS, *, seed: int = 0, **changes: Any) -> Path:
    """Write a network of its encoder's SIZES (and `changes`) with random weights as a checkpoint."""
    settings = resolve({**SIZES[changes.get("encoder", "htsat")], **changes})
    torch.manual_seed(seed)
    network = build_model(settings)
    weights = {f"sed_model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "settings": settings.model_dump(), "labels": list(labels)}, path)
    return path


def last_checkpoint(exp_name: str, folder: Path = Path()) -> dict[str, Any]:
    """The content of a run's last.ckpt."""
    path = folder / "workspace" / "runs" / exp_name / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


def forkserver() -> ForkServerContext:
    """Processes that a server forks which has imported torch: neither an import for each, nor forks of threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytorch_lightning", "torchmetrics", "scipy.stats"])
    return context


def run_python(*words: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python words...` in `cwd`, where the workspace is; words[0] is a script of the repository."""
    script, *rest = map(str, words)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
