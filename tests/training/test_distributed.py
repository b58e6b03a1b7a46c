"""4 processes (gloo, as torchrun starts them) learn what one process learns, and test as it does."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from data.clip_store import Clip, ClipStoreWriter, Event
from model import build_model
from prepare.demo import LABELS
from settings import resolve
from tests.helpers import ROOT, SMALL, call, flags, forkserver, last_checkpoint
from training.devices import average_statistics

pytestmark = pytest.mark.slow

STEPS, BATCH_SIZE = 8, 4
PLAIN = {  # without anything random
    **SMALL, "htsat_dim": 8, "max_epoch": 2, "learning_rate": 1e-2, "htsat_drop_path": 0, "spec_augment": False,
    "mixup_alpha": 0,
}  # fmt: skip
TOLERANCE = 1e-5  # absolute; the weights have a standard deviation of 0.02 or more


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 clips to train, 4 steps an epoch; 7 to test, which 4 processes do not share evenly; in few/ one."""
    folder = tmp_path_factory.mktemp("distributed")
    rng = np.random.default_rng(0)
    sizes = {"demo": {"train": STEPS // 2 * BATCH_SIZE, "validation": 5, "test": 7}, "few": {"test": 1}}
    for name, splits in sizes.items():
        store = folder / "workspace" / "data" / name / "demo.h5"
        store.parent.mkdir(parents=True)
        with ClipStoreWriter(store, clip_samples=8000, sample_rate=32000, labels=LABELS) as writer:
            for split, number in ((split, number) for split, count in splits.items() for number in range(count)):
                tone = 3000 * np.sin(np.arange(8000) * (0.02 + 0.01 * (number % 10)))
                waveform, events = (tone + rng.normal(0, 300, 8000)).astype(np.int16), [Event(number % 10, 0.0, 0.2)]
                writer.add(Clip(f"{split}_{number}.wav", waveform, [number % 10], split=split, events=events))
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def one_of(rank: int, world: int, port: int, folder: str) -> None:
    """What torchrun starts: one process, which trains and then tests."""
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
    os.chdir(folder)
    torch.set_num_threads(1)
    name = f"of_{world}"
    call("train", *flags(PLAIN), "--devices", str(world), "--exp_name", name)
    last = f"workspace/runs/{name}/checkpoints/last.ckpt"
    tested = {"accelerator": "cpu", "devices": world, "batch_size": BATCH_SIZE, "performance": "manual"}
    words = ["test", "--resume_checkpoint", last, "--fl_local", "True", *flags(tested)]
    call(*words)
    call(*words, "--dataset_path", "workspace/data/few", "--test_file", "few")


@pytest.fixture(scope="module")
def runs(workspace: Path) -> dict[int, Path]:
    """Run folders by number of processes: each began from the same weights with the same clips in each step."""
    forkserver()
    for world in (1, 4):
        arguments = (world, free_port(), str(workspace))
        mp.start_processes(one_of, args=arguments, nprocs=world, start_method="forkserver")
    return {world: workspace / "workspace" / "runs" / f"of_{world}" for world in (1, 4)}


@pytest.mark.usefixtures("runs")
def test_the_same_weights_as_one_process(workspace: Path) -> None:
    one, several = (last_checkpoint(f"of_{n}", workspace) for n in (1, 4))
    assert one["global_step"] == several["global_step"] == STEPS
    torch.manual_seed(resolve(PLAIN).random_seed)
    start = build_model(resolve(PLAIN)).state_dict()
    moved = max((one["state_dict"][f"sed_model.{k}"] - v).abs().max().item() for k, v in start.items())
    assert moved > 10 * TOLERANCE  # what is compared was learned
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(several["state_dict"][name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_the_same_loss_is_logged_as_of_one_process(runs: dict[int, Path]) -> None:
    """The mean over the processes, of whole batches and of the epoch."""
    one, several = (
        [
            [float(row[name]) for row in csv.DictReader((runs[n] / "logs/version_0/metrics.csv").open()) if row[name]]
            for name in ("train_loss_step", "train_loss_epoch", "val_loss")
        ]
        for n in (1, 4)
    )
    assert len(one[1]) == 2
    for first, second in zip(one, several, strict=True):
        assert second == pytest.approx(first, abs=1e-4)


def averages(rank: int, world: int, port: int) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 3), nn.BatchNorm1d(3))
    for name, value in network.named_buffers():
        value.fill_({"running_mean": 1, "running_var": 3}.get(name[2:], 7) + 2 * rank)
    average_statistics(network)
    wanted = {"running_mean": 2, "running_var": 4, "num_batches_tracked": 7 + 2 * rank}
    for name, value in network.named_buffers():
        assert torch.equal(value, torch.full_like(value, wanted[name[2:]])), name
    torch.distributed.destroy_process_group()


def test_statistics_of_batch_norms_are_averaged() -> None:
    forkserver()
    mp.start_processes(averages, args=(2, free_port()), nprocs=2, start_method="forkserver")


KILLED = """
import os, signal, sys, torch
import main, sed_model
whole = sed_model.SEDWrapper.training_step
def training_step(self, batch, batch_idx):
    if str(self.global_rank) == os.environ["KILLED"] and self.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, batch, batch_idx)
sed_model.SEDWrapper.training_step = training_step
torch.set_num_threads(1)
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(workspace: Path, killed: int) -> None:
    """With one message, unless it was the first process that was killed, which would have printed it."""
    script = workspace / f"killed_{killed}.py"
    script.write_text(KILLED)
    words = [sys.executable, str(script), "train", *flags(PLAIN), "--devices", "2", "--exp_name", script.stem]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILLED": str(killed)}
    process = subprocess.Popen(
        words, cwd=workspace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = process.communicate(timeout=120)[0]  # until the last process has ended, all of which write there
    assert process.returncode == (-signal.SIGKILL if killed == 0 else 2), said
    assert said.count("error:") == killed, said
    assert "Traceback" not in said


def test_the_same_scores_as_one_process(runs: dict[int, Path]) -> None:
    """In few/, the processes without clips wait for nothing and count nothing."""
    with h5py.File(runs[1] / "scores/test.h5") as a, h5py.File(runs[4] / "scores/test.h5") as b:
        assert a["audio_name"][:].tolist() == b["audio_name"][:].tolist()
        np.testing.assert_allclose(a["framewise"][:], b["framewise"][:], atol=1e-5)
    for name, clips in (("test", 7), ("few", 1)):
        one, several = (json.loads((runs[n] / f"scores/{name}.json").read_text())["metrics"] for n in (1, 4))
        assert [(metric["name"], metric["clips"]) for metric in one] == [(n, clips) for n in ("mAP", "mAUC", "d_prime")]
        for first, second in zip(one, several, strict=True):
            assert second["value"] == pytest.approx(first["value"], abs=1e-6)
            assert {**second, "value": 0, "interval": 0} == {**first, "value": 0, "interval": 0}
    assert (one[0]["value"], one[0]["classes"]) == (1.0, 1)
