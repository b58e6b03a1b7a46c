"""The mean teacher: its arithmetic by hand, what reaches the optimizer, and what a checkpoint keeps of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import Network
from model.checkpoint import load_network, read_checkpoint
from sed_model import FrameSEDWrapper
from settings import resolve
from tests.networks import SMALL, htsat, noise
from training.losses import MeanTeacher, RunningAverage
from training.performance import Performance, speed_up
from training.schedule import ramp_up


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def step(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_updates_are_the_mean_at_first_and_then_decay() -> None:
    student = small_network()
    teacher, restored = MeanTeacher(student, 0.75), MeanTeacher(student, 0.75)
    expected = torch.zeros_like(weights(student))
    for number, keep in enumerate([0, 1 / 2, 2 / 3, 3 / 4, 3 / 4]):  # 1 - 1 / (number + 1), at most the decay
        step(student)
        student.train()(torch.randn(8, 2))  # moves the running statistics, which are copied
        expected = keep * expected + (1 - keep) * weights(student)
        if number == 3:
            restored.load_state_dict(teacher.state_dict())
        teacher.update_parameters(student)
        torch.testing.assert_close(weights(teacher), expected)
        for ours, theirs in zip(teacher.module.buffers(), student.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        if number == 3:  # a run that is resumed
            restored.update_parameters(student)
            for name, value in teacher.state_dict().items():
                assert torch.equal(value, restored.state_dict()[name]), name


def test_nothing_trains_the_teacher() -> None:
    student = small_network()
    teacher = MeanTeacher(student, 0.9)
    holder = nn.ModuleDict({"sed_model": student, "teacher": teacher}).train()
    assert student.training
    assert not any(module.training for module in teacher.modules())
    trained = [name for name, parameter in holder.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("sed_model.") for name in trained)
    sound = torch.randn(4, 2)
    answer = teacher(sound)
    assert not answer.requires_grad
    (student(sound) - answer).square().sum().backward()
    before = weights(teacher)
    nn.utils.clip_grad_norm_(holder.parameters(), 1e-3)
    torch.optim.SGD(holder.parameters(), lr=1.0).step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(weights(teacher), before)


def test_teacher_and_network_agree_at_the_start() -> None:
    network = htsat()
    with torch.no_grad():
        for ours, theirs in zip(MeanTeacher(network, 0.999)(noise()), network(noise()), strict=True):
            assert torch.equal(ours, theirs)


def wrapper_with_teacher() -> FrameSEDWrapper:
    settings = resolve({**SMALL, "loss_type": "frame_bce", "mean_teacher": 1.0})
    return FrameSEDWrapper(htsat(), settings, list("abcde"))


def test_a_reader_of_the_checkpoint_takes_the_network_alone(tmp_path: Path) -> None:
    wrapper, path = wrapper_with_teacher(), tmp_path / "with_teacher.ckpt"
    assert wrapper.teacher is not None
    nn.init.zeros_(next(wrapper.teacher.parameters()))
    torch.save({"state_dict": wrapper.state_dict(), "settings": resolve(SMALL).model_dump()}, path)
    checkpoint, other = read_checkpoint(path), htsat(classes_num=5)
    assert checkpoint.state_dict.keys() == wrapper.sed_model.state_dict().keys()
    assert not load_network(other, checkpoint).unexpected
    assert torch.equal(weights(other), weights(wrapper.sed_model))


def test_checkpoints_of_earlier_versions_are_resumed() -> None:
    """They call the copy teacher.network, and do not count its updates."""
    wrapper = wrapper_with_teacher()
    assert wrapper.teacher is not None
    assert isinstance(wrapper.teacher.module, Network)
    keys = wrapper.teacher.module.state_dict()
    old = {f"sed_model.{key}": value for key, value in keys.items()}
    old |= {f"teacher.network.{key}": value + 1 for key, value in keys.items() if value.is_floating_point()}
    old |= {f"teacher.network.{key}": value for key, value in keys.items() if not value.is_floating_point()}
    checkpoint: dict[str, Any] = {"state_dict": old, "global_step": 12}
    wrapper.on_load_checkpoint(checkpoint)
    wrapper.load_state_dict(checkpoint["state_dict"])
    assert int(wrapper.teacher.n_averaged) == 12
    torch.testing.assert_close(weights(wrapper.teacher.module), weights(wrapper.sed_model) + 1)


def test_the_teacher_is_compiled_as_the_network() -> None:
    wrapper = wrapper_with_teacher()
    speed_up(wrapper, Performance("32", "default", False, False, False))
    assert wrapper.teacher is not None
    for network in (wrapper.sed_model, wrapper.teacher.module):
        assert isinstance(network, Network)
        assert all(part._compiled_call_impl is not None for part in network.compiled_parts())


def test_a_running_average_is_torchs() -> None:
    """Over steps, and over a checkpoint that is loaded between them."""
    network, moving = small_network(), get_ema_multi_avg_fn(0.9)
    theirs, ours = AveragedModel(network, multi_avg_fn=moving), RunningAverage(network, moving)
    for number in range(5):
        step(network)
        network.get_buffer("1.running_mean").add_(1)
        theirs.update_parameters(network)
        ours.update_parameters(network)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        if number == 2:
            loaded = RunningAverage(network, moving)
            loaded.updates = 0
            loaded.load_state_dict(ours.state_dict())
            ours = loaded


def test_ramp_up() -> None:
    assert ramp_up(0, 10) == pytest.approx(math.exp(-5))
    assert ramp_up(5, 10) == pytest.approx(math.exp(-1.25))
    assert ramp_up(10, 10) == ramp_up(25.5, 10) == 1
    rising = [ramp_up(number / 7, 10) for number in range(71)]
    assert rising == sorted(rising)
