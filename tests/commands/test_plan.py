"""python main.py plan: its figures against a real run's, its warnings, and the exit status."""

from pathlib import Path
from typing import Any

import pytest
import torch

import main
from commands.plan import (
    Plan,
    hours,
    learning_rates,
    make_plan,
    plan_disk,
    plan_memory,
    reading_rate,
    schedule_warnings,
)
from data_generator import load_training_data
from model import build_model
from runs.measure import saved_for_backward
from sed_model import SEDWrapper
from settings import Config, resolve
from tests.commands.test_benchmark_command import SMALL, SMALL_FLAGS


@pytest.fixture
def workspace(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(demo_workspace)
    return demo_workspace


def small(**changes: Any) -> Config:
    return resolve({**SMALL, **changes})


def planned(settings: Config, steps: int = 0) -> Plan:
    plan = Plan()
    make_plan(settings, plan, steps)
    return plan


def test_a_plan_of_the_demo(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--measure_steps", "2", "--exp_name", "planned", "--max_epoch", "40"]
    assert main.main(["plan", *SMALL_FLAGS, *words]) == 0
    shown = capsys.readouterr().out
    lines = ("parameters", "memory of a device", "space on disk", "MB/s", "waiting for data", "duration")
    for said in (*lines, "train 14, validation 3", "160 in all", "8% of the run", "0.0002", "The training can run."):
        assert said in shown, said
    assert not Path("workspace/runs/planned").exists()  # nothing is written


def test_steps_and_checkpoints_are_those_of_the_run(workspace: Path) -> None:
    """The plan of a run, then the run."""
    settings = small(max_epoch=2, exp_name="as_planned", save_top_k=1)
    plan = planned(settings)
    assert plan.problems == []
    assert "4 an epoch of 4 clips each, 8 in all" in dict(plan.rows)["steps"]
    words = ["--max_epoch", "2", "--exp_name", "as_planned", "--save_top_k", "1"]
    assert main.main(["train", *SMALL_FLAGS, *words]) == 0
    last = Path("workspace/runs/as_planned/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 8
    # The same run again would be refused; with --resume auto it is complete.
    (problem,) = planned(settings).problems
    assert "holds a run already" in problem

    module = SEDWrapper(build_model(settings), settings, [])
    weights = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    big = resolve({"max_epoch": 2})
    plan = Plan()
    data = load_training_data(settings, ("train", "validation"))
    plan_disk(big, plan, data, module, 50 * 2**20, 50 * 2**20)
    assert dict(plan.rows)["space on disk"].startswith("1.76 GiB for 3 checkpoints")  # 12 bytes a weight
    assert last.stat().st_size >= 4 * weights + 8 * trained


def test_activations_grow_with_the_network_and_shrink_with_checkpointing() -> None:
    def saved(**changes: Any) -> float:
        settings = small(precision="32", **changes)
        return saved_for_backward(settings, SEDWrapper(build_model(settings), settings, []))

    one = saved()
    tokens, channels = 16 * 16, 16
    assert one > 10 * 4 * tokens * channels  # at least ten maps of the first stage
    assert saved(htsat_depth="2,1") > 1.3 * one
    assert saved(gradient_checkpointing=True) < 0.7 * one


def test_too_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commands.plan.total_memory", lambda settings: 2**20)
    settings, plan = small(), Plan()
    assert plan_memory(settings, plan, SEDWrapper(build_model(settings), settings, []), 10**6, 10**6) is False
    assert "raise accumulate_batches" in plan.problems[0]


def test_too_little_disk_is_a_problem(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commands.plan.free_space", lambda folder: 1000)
    (problem,) = planned(small(exp_name="full_disk")).problems
    assert "make room" in problem
    with pytest.raises(SystemExit) as left:
        main.main(["plan", *SMALL_FLAGS, "--measure_steps", "0", "--exp_name", "full_disk"])
    assert left.value.code == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 32}, "batch_size = 32 is more than the 14 training clips"),
        ({"learning_rate": 1e-3}, "In proportion to the batch it would be 3.1e-05"),
        ({"max_epoch": 3}, "ends with the 3 warm-up epochs"),
        ({"max_epoch": 15}, "the plateau of scale 0.02 would begin after epoch 21"),
        ({"lr_scheduler_epoch": "2,20,30"}, "no epoch has the scale 0.1"),
    ],
)
def test_warnings(workspace: Path, changes: dict[str, Any], said: str) -> None:
    plan = planned(small(exp_name="warned", **changes))
    assert plan.problems == []
    assert len(plan.warnings) == 1
    assert said in plan.warnings[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_path": "nowhere"}, "There is no file"),
        ({"htsat_num_head": "3,2"}, "heads do not divide"),
        ({"devices": 3}, "must be a multiple of accumulate_batches"),
        ({"devices": 16, "batch_size": 16}, "14 training clips cannot be shared by 16 processes"),
        ({"class_filter": "nobody"}, "class_filter names nobody"),
    ],
)
def test_problems(workspace: Path, changes: dict[str, Any], said: str) -> None:
    (problem,) = planned(small(exp_name="problem", **changes)).problems
    assert said in problem


def test_the_schedule_as_it_is_said() -> None:
    assert schedule_warnings(resolve({"dataset_type": "audioset"})) == []
    assert learning_rates(resolve({"dataset_type": "audioset", "max_epoch": 31, "learning_rate": 1.0})) == [
        "epoch 1: 0.02", "epoch 2: 0.05", "epochs 3-11: 0.1", "epochs 12-21: 0.05", "epochs 22-31: 0.02",
    ]  # fmt: skip
    assert learning_rates(resolve({"max_epoch": 40, "learning_rate": 1.0}))[-1] == "epochs 32-40: 0.03 to 0.03"
    assert hours(3725.4) == "1:02:05"


def test_reading_rate_counts_the_clips_that_there_are(workspace: Path) -> None:
    read = reading_rate(load_training_data(small(), ("train",)))
    assert (read.clips, read.bytes_per_clip) == (14, 16000)
    assert read.clips_per_second == pytest.approx(14 / read.seconds)
    assert "14 random clips" in str(read)


def test_measure_steps_must_not_be_negative(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "--measure_steps", "-1"]) == 2
    assert "must be 0 or more" in capsys.readouterr().err
