"""Losses and schedule against their formulas."""

import math

import pytest
import torch

from data.clip_store import STRONG, UNLABELLED, WEAK
from settings import resolve
from training import losses
from training.losses import (
    LOSSES,
    StepLosses,
    asl_loss,
    clip_bce,
    clip_ce,
    consistency,
    distillation_bce,
    frame_bce,
    weak_strong_bce,
)
from training.schedule import cosine_scale, learning_rate_scale, rate_scale, schedule_warnings
from utils import d_prime, do_mixup, float32_to_int16, get_mix_lambda, int16_to_float32


def test_losses_by_hand() -> None:
    logits, targets = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    p, q = (1 / (1 + math.exp(-x)) for x in (2.0, -1.0))
    assert clip_bce(logits, targets).item() == pytest.approx(-(math.log(p) + math.log(1 - q)) / 2)
    assert clip_ce(logits, targets).item() == pytest.approx(math.log(1 + math.exp(-3)))
    shifted = q - 0.05
    expected = -(math.log(p) + shifted**4 * math.log(1 - shifted)) / 2
    assert asl_loss(logits, targets).item() == pytest.approx(expected)
    easy = asl_loss(torch.tensor([[-4.0]]), torch.zeros(1, 1))
    assert easy.item() == 0  # a probability under the margin costs nothing


def test_schedule_is_the_published_one() -> None:
    scales = [learning_rate_scale(epoch, [10, 20, 30], [0.02, 0.05, 0.1]) for epoch in range(100)]
    assert scales[:4] == [0.02, 0.05, 0.1, 0.1]
    assert scales[10:12] == [0.1, 0.05]
    assert scales[20:22] == [0.05, 0.02]
    assert scales[30:32] == [0.02, 0.03]  # it rises, as measured
    assert set(scales[31:]) == {0.03}


def test_cosine_schedule() -> None:
    """Linear warm-up, then a cosine to 0; a warm-up of more steps than there are never ends, and is warned of."""
    scales = [cosine_scale(step, 10, 110) for step in range(111)]
    assert scales[:11] == pytest.approx([k / 10 for k in range(11)])
    assert [scales[35], scales[60], scales[85], scales[110]] == pytest.approx([0.853553, 0.5, 0.146447, 0], abs=1e-6)
    published = resolve({"lr_schedule": "cosine", "warm_up": 20000, "learning_rate": 7e-5})
    assert schedule_warnings(published, 46920) == []
    (warning,) = schedule_warnings(published, 11730)
    assert "11,730" in warning
    assert "4.1e-05" in warning
    assert schedule_warnings(resolve({"lr_schedule": "cosine"}), 10) == []


def test_milestones() -> None:
    """AST on AudioSet: 1000 steps of warm-up, two epochs at the full rate, then half of it after each further one."""
    settings = resolve({"lr_schedule": "milestones", "lr_milestones": "2,3", "warm_up": 1000, "max_epoch": 5})
    scale = rate_scale(settings, 50000)
    assert [scale(step) for step in (0, 500, 1000, 19999)] == [0, 0.5, 1, 1]
    assert [scale(step) for step in (20000, 29999, 30000, 49999)] == [0.5, 0.5, 0.25, 0.25]
    without = rate_scale(settings.model_copy(update={"warm_up": 0.0, "lr_factor": 0.85}), 50)
    assert [without(0), without(20), without(30)] == pytest.approx([1, 0.85, 0.85**2])
    assert schedule_warnings(settings, 50000) == []
    assert "warm_up" in schedule_warnings(settings, 500)[0]


def test_mixup() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    mixed = do_mixup(x, torch.tensor([1.0, 0.5, 0.25]))
    assert mixed.tolist() == [[0.0, 1.0], [2.0, 3.0], [0.25 * 4 + 0.75 * 0, 0.25 * 5 + 0.75 * 1]]
    torch.manual_seed(0)
    drawn = get_mix_lambda(0.5, 20000)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / 8, abs=0.01)  # of Beta(0.5, 0.5)


def test_int16_and_back() -> None:
    wave = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0])
    packed = float32_to_int16(wave.numpy())
    assert packed.tolist() == [-32767, -16384, 0, 8192, 32767]
    torch.testing.assert_close(int16_to_float32(torch.from_numpy(packed)), wave, atol=1 / 32767, rtol=0)
    assert float32_to_int16(torch.tensor([2.0, -3.0]).numpy()).tolist() == [32767, -32767]
    with pytest.raises(ValueError, match="NaN"):
        float32_to_int16(torch.tensor([float("nan")]).numpy())


def test_d_prime() -> None:
    assert d_prime(0.5) == 0
    assert d_prime(0.9) == pytest.approx(math.sqrt(2) * 1.2815515655446004)


def bce(logit: float, target: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def drawn_frames(clips: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (clips, 3, 2)  # steps and classes
    return torch.randn(shape, generator=generator).requires_grad_(), torch.rand(shape, generator=generator)


def test_frame_bce_by_hand() -> None:
    logits, targets = torch.tensor([[[2.0], [-1.0]], [[0.5], [3.0]]]), torch.tensor([[[1.0], [0.25]], [[0.0], [1.0]]])
    first, second = (bce(2, 1) + bce(-1, 0.25)) / 2, (bce(0.5, 0) + bce(3, 1)) / 2
    assert frame_bce(logits, targets).item() == pytest.approx((first + second) / 2)
    assert frame_bce(logits, targets, torch.tensor([1.0, 3.0])).item() == pytest.approx((first + 3 * second) / 4)
    assert frame_bce(logits, targets, torch.tensor([True, False])).item() == pytest.approx(first)


@pytest.mark.parametrize("loss", ["frame", "weak_strong", "distillation"])
def test_a_batch_without_labels_costs_nothing_and_keeps_the_graph(loss: str) -> None:
    logits, targets = drawn_frames(2)
    none = torch.zeros(2)
    if loss == "frame":
        value = frame_bce(logits, targets, none)
    elif loss == "distillation":
        value = distillation_bce(logits, targets, none.bool())
    else:
        value = weak_strong_bce(logits, targets, logits.mean(1), targets.mean(1), none.to(torch.int8), 0.5)
    assert value.item() == 0
    value.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_weak_strong_weighs_by_the_composition_of_the_batch() -> None:
    frame_logits, frame_targets = drawn_frames(4)
    clip_logits, clip_targets = frame_logits.mean(dim=1), frame_targets.amax(dim=1)
    labelling = torch.tensor([STRONG, UNLABELLED, WEAK, STRONG], dtype=torch.int8)
    found = weak_strong_bce(frame_logits, frame_targets, clip_logits, clip_targets, labelling, 0.5)
    strong = frame_bce(frame_logits[[0, 3]], frame_targets[[0, 3]])
    weak = clip_bce(clip_logits[2:3], clip_targets[2:3])
    assert found.item() == pytest.approx((2 / 3 * strong + 0.5 * 1 / 3 * weak).item())

    garbage = frame_targets.clone()
    garbage[1:3] = 0.5  # neither weak nor unlabelled clips have times
    same = weak_strong_bce(frame_logits, garbage, clip_logits, clip_targets, labelling, 0.5)
    assert same.item() == pytest.approx(found.item())
    only_strong = weak_strong_bce(
        frame_logits, frame_targets, clip_logits, clip_targets, torch.full((4,), STRONG), weak_weight=9.0
    )
    assert only_strong.item() == pytest.approx(frame_bce(frame_logits, frame_targets).item())


def test_labelling_is_the_clip_stores() -> None:
    assert (losses.WEAK, losses.STRONG) == (WEAK, STRONG)


def test_distillation_is_least_at_the_teachers_own_logits() -> None:
    logits, _ = drawn_frames(2)
    teacher = logits.detach().sigmoid()
    has_teacher = torch.tensor([True, False])
    loss = distillation_bce(logits, teacher, has_teacher)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-6
    assert distillation_bce(logits + 0.1, teacher, has_teacher) > loss
    other = teacher.clone()
    other[1] = 0  # of a clip without a teacher
    assert distillation_bce(logits, other, has_teacher).item() == pytest.approx(loss.item())


def test_consistency_teaches_the_student_only() -> None:
    student, teacher = torch.tensor([0.2, 0.9]).requires_grad_(), torch.tensor([0.5, 0.5]).requires_grad_()
    loss = consistency(student, teacher)
    assert loss.item() == pytest.approx((0.3**2 + 0.4**2) / 2)
    loss.backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, torch.tensor([-0.3, 0.4]))
    assert teacher.grad is None


@pytest.mark.parametrize("loss_type", ["frame_bce", "weak_strong_bce"])
def test_losses_of_frames_score_validation_clips_as_clips(loss_type: str) -> None:
    logits, targets = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    assert LOSSES[loss_type](logits, targets).item() == clip_bce(logits, targets).item()


def test_losses_are_read_one_time_later() -> None:
    """In order, and each once."""
    found = StepLosses()
    found.add(0, 2, torch.tensor(1.0))
    found.add(1, 2, torch.tensor(3.0, requires_grad=True))
    assert found.read(torch.neg, wait=False) == []
    assert (found.mean, found.latest) == (0.0, None)
    found.add(2, 4, torch.tensor(5.0))
    assert found.read(torch.neg, wait=False) == [(0, 2, -1.0), (1, 2, -3.0)]  # reduced by all processes
    assert found.mean == -2.0
    found.add(3, 2, torch.tensor(7.0))
    assert found.read(torch.neg, wait=True) == [(2, 4, -5.0), (3, 2, -7.0)]
    assert found.read(torch.neg, wait=True) == []
    found.count(1.0, 2)  # of a part that an interrupted run has trained
    assert (found.clips, found.latest) == (12, 1.0)
    assert found.mean == (2 * -1 + 2 * -3 + 4 * -5 + 2 * -7 + 2 * 1) / 12
