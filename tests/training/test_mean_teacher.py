"""The mean teacher: its arithmetic by hand, what reaches the optimizer, and what a checkpoint keeps of it."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from model import build_model
from model.checkpoint import load_network, read_checkpoint
from settings import Config, resolve
from tests.helpers import TINY
from training.mean_teacher import MeanTeacher, ramp_up


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def tiny_settings() -> Config:
    return resolve({**TINY, "dataset_type": "demo"})


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_updates_are_the_mean_at_first_and_then_decay() -> None:
    student = small_network()
    teacher = MeanTeacher(student, 0.75)
    expected = torch.zeros_like(weights(student))
    for step, keep in enumerate([0, 1 / 2, 2 / 3, 3 / 4, 3 / 4]):  # 1 - 1 / (step + 1), at most the decay
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        expected = keep * expected + (1 - keep) * weights(student)
        teacher.update(student, step)
        torch.testing.assert_close(weights(teacher), expected)


def test_buffers_are_copied() -> None:
    student = small_network()
    teacher = MeanTeacher(student, 0.9)
    student.train()(torch.randn(8, 2))  # moves the running statistics
    teacher.update(student, 100)
    for ours, theirs in zip(teacher.network.buffers(), student.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert int(teacher.network[1].num_batches_tracked) == 1  # type: ignore[index]


def test_nothing_trains_the_teacher() -> None:
    student = small_network()
    holder = nn.ModuleDict({"sed_model": student, "teacher": MeanTeacher(student, 0.9)}).train()
    assert student.training
    assert not any(module.training for module in holder["teacher"].modules())
    trained = [name for name, parameter in holder.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("sed_model.") for name in trained)
    sound = torch.randn(4, 2)
    answer = holder["teacher"](sound)
    assert not answer.requires_grad
    (student(sound) - answer).square().sum().backward()
    before = [parameter.clone() for parameter in holder["teacher"].parameters()]
    nn.utils.clip_grad_norm_(holder.parameters(), 1e-3)
    torch.optim.SGD(holder.parameters(), lr=1.0).step()
    for old, new in zip(before, holder["teacher"].parameters(), strict=True):
        assert new.grad is None
        assert torch.equal(old, new)


def test_the_state_dict_goes_on_bit_for_bit() -> None:
    student = small_network()
    first, second = MeanTeacher(student, 0.9), MeanTeacher(small_network(), 0.9)
    for step in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.1)
        first.update(student, step)
    second.load_state_dict(first.state_dict())
    for teacher in (first, second):
        teacher.update(student, 3)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_teacher_and_network_agree_at_the_start() -> None:
    network = build_model(tiny_settings())
    teacher = MeanTeacher(network, 0.999)
    waveform = torch.randn(1, 32000)
    with torch.no_grad():
        expected = network.eval()(waveform)["framewise_logits"]
    assert torch.equal(teacher(waveform)["framewise_logits"], expected)


def test_a_reader_of_the_checkpoint_takes_the_network_alone(tmp_path: Path) -> None:
    settings = tiny_settings()
    network, path = build_model(settings), tmp_path / "with_teacher.ckpt"
    teacher = MeanTeacher(network, 0.999)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    keys = {f"sed_model.{key}": value for key, value in network.state_dict().items()}
    keys |= {f"teacher.{key}": value for key, value in teacher.state_dict().items()}
    torch.save({"state_dict": keys, "settings": settings.model_dump(), "labels": [str(k) for k in range(10)]}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.state_dict.keys() == network.state_dict().keys()
    other = build_model(settings)
    report = load_network(other, checkpoint)
    assert not report.unexpected
    assert torch.equal(weights(other), weights(network))


def test_ramp_up() -> None:
    assert ramp_up(0, 10) == pytest.approx(math.exp(-5))
    assert ramp_up(5, 10) == pytest.approx(math.exp(-1.25))
    assert ramp_up(10, 10) == 1
    assert ramp_up(25.5, 10) == 1
    rising = [ramp_up(step / 7, 10) for step in range(71)]
    assert rising == sorted(rising)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_makes_no_average_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="mean_teacher_decay"):
        MeanTeacher(small_network(), decay)
