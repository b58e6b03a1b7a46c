"""Losses and schedule against their formulas."""

import math

import pytest
import torch

from model.losses import asl_loss, clip_bce, clip_ce
from sed_model import learning_rate_scale
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
