"""python main.py plan: its figures against a real run's, its warnings, and the exit status."""

import re
from pathlib import Path
from typing import Any

import pytest

import main
from commands.plan import (
    Plan,
    hours,
    learning_rates,
    make_plan,
    plan_disk,
    plan_memory,
    reading_rate,
)
from data_generator import load_training_data
from model import build_model
from model.opening import open_network
from runs.measure import saved_for_backward
from sed_model import SEDWrapper
from settings import Config, resolve
from tests.helpers import SMALL, SMALL_FLAGS, call, last_checkpoint, refused, save_network
from training.schedule import schedule_warnings


@pytest.fixture(autouse=True)
def _workspace(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)


def small(**changes: Any) -> Config:
    return resolve({**SMALL, "exp_name": "planned", **changes})


def wrapper(settings: Config) -> SEDWrapper:
    return SEDWrapper(build_model(settings), settings, [])


def planned(settings: Config) -> Plan:
    plan = Plan()
    make_plan(settings, plan, 0)
    return plan


def test_a_plan_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    call("plan", *SMALL_FLAGS, "--measure_steps", "2", "--exp_name", "nowhere", "--max_epoch", "40")
    shown = capsys.readouterr().out
    lines = ("parameters", "memory of a device", "space on disk", "MB/s", "waiting for data", "duration")
    for said in (*lines, "train 14, validation 3", "160 in all", "8% of the run", "0.0002", "The training can run."):
        assert said in shown, said
    assert not Path("workspace/runs/nowhere").exists()


def test_a_plan_of_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The network is the checkpoint's, as in the training."""
    path = save_network(tmp_path / "a.ckpt")
    weights = sum(parameter.numel() for parameter in open_network(path).network.parameters())
    words = ("plan", "--dataset_type", "demo", "--accelerator", "cpu", "--measure_steps", "0", "--exp_name", "tuned")
    call(*words, "--resume_checkpoint", path)
    (parameters,) = re.findall(r"([\d,]+) \([\d,]+ trained\)", capsys.readouterr().out)
    assert int(parameters.replace(",", "")) == weights
    assert "b.ckpt" in refused(capsys, *words, "--resume_checkpoint", tmp_path / "b.ckpt")


def test_steps_and_checkpoints_are_those_of_the_run() -> None:
    """The plan of a run, then the run."""
    settings = small(max_epoch=2, exp_name="as_planned", save_top_k=1)
    plan = planned(settings)
    assert plan.problems == []
    assert "4 an epoch of 4 clips each, 8 in all" in dict(plan.rows)["steps"]
    call("train", *SMALL_FLAGS, "--max_epoch", "2", "--exp_name", "as_planned", "--save_top_k", "1")
    assert last_checkpoint("as_planned")["global_step"] == 8
    (problem,) = planned(settings).problems  # the same run again, without --resume auto
    assert "as_planned" in problem

    module = wrapper(settings)
    weights = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    plan = Plan()
    plan_disk(resolve({"max_epoch": 2}), plan, load_training_data(settings), module, 50 * 2**20, 50 * 2**20)
    assert dict(plan.rows)["space on disk"].startswith("1.76 GiB for 3 checkpoints")  # 12 bytes a weight
    last = Path("workspace/runs/as_planned/checkpoints/last.ckpt")
    assert last.stat().st_size >= 4 * weights + 8 * trained


def test_activations_grow_with_the_network_and_shrink_with_checkpointing() -> None:
    def saved(**changes: Any) -> float:
        settings = small(precision="32", **changes)
        return saved_for_backward(settings, wrapper(settings))

    one = saved()
    tokens, channels = 16 * 16, 16
    assert one > 10 * 4 * tokens * channels  # at least ten maps of the first stage
    assert saved(htsat_depth="2,1") > 1.3 * one
    assert saved(gradient_checkpointing=True) < 0.7 * one


def test_too_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commands.plan.total_memory", lambda settings: 2**20)
    plan = Plan()
    assert plan_memory(small(), plan, wrapper(small()), 10**6, 10**6) is False
    assert "accumulate_batches" in plan.problems[0]


def test_too_little_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commands.plan.free_space", lambda folder: 1000)
    (problem,) = planned(small()).problems
    assert "save_top_k" in problem
    with pytest.raises(SystemExit) as left:
        main.main(["plan", *SMALL_FLAGS, "--measure_steps", "0", "--exp_name", "planned"])
    assert left.value.code == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 32}, "batch_size = 32"),
        ({"learning_rate": 1e-3}, "3.1e-05"),
        ({"max_epoch": 3}, "max_epoch = 3"),
        ({"max_epoch": 15}, "max_epoch = 15"),
        ({"lr_scheduler_epoch": "2,20,30"}, "scale 0.1"),
        ({"lr_schedule": "cosine", "warm_up": 20000, "max_epoch": 2, "epoch_clips": 20}, "after 10 steps"),
    ],
)
def test_warnings(changes: dict[str, Any], named: str) -> None:
    plan = planned(small(**changes))
    assert plan.problems == []
    (warning,) = plan.warnings
    assert named in warning


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dataset_path": "nowhere"}, "nowhere"),
        ({"htsat_num_head": "3,2"}, "heads"),
        ({"devices": 3}, "accumulate_batches"),
        ({"devices": 16, "batch_size": 16}, "16 processes"),
        ({"class_filter": "nobody"}, "nobody"),
    ],
)
def test_problems(changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commands.plan.resident_memory", lambda: 2**28)  # this process keeps what other tests used
    (problem,) = planned(small(**changes)).problems
    assert named in problem


def test_the_schedule_as_it_is_printed() -> None:
    assert schedule_warnings(resolve({"dataset_type": "audioset"})) == []
    assert learning_rates(resolve({"dataset_type": "audioset", "max_epoch": 31, "learning_rate": 1.0})) == [
        "epoch 1: 0.02", "epoch 2: 0.05", "epochs 3-11: 0.1", "epochs 12-21: 0.05", "epochs 22-31: 0.02",
    ]  # fmt: skip
    assert learning_rates(resolve({"max_epoch": 40, "learning_rate": 1.0}))[-1] == "epochs 32-40: 0.03 to 0.03"
    assert hours(3725.4) == "1:02:05"


def test_reading_rate_counts_the_clips_that_there_are() -> None:
    read = reading_rate(load_training_data(small(), ("train",)))
    assert (read.clips, read.bytes_per_clip) == (14, 16000)
    assert read.clips_per_second == pytest.approx(14 / read.seconds)
