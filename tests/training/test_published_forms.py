"""Augmentations in PretrainedSED's forms against its numbers (tests/golden/augment.npz), and what a training draws."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from data.frame_targets import Targets, roll
from model import build_model
from sed_model import FrameSEDWrapper, SEDWrapper
from settings import UserError, resolve
from tests.helpers import LEAN, ROOT
from training import augment
from utils import do_mixup

STEPS = 20


@pytest.fixture(scope="module")
def golden() -> NpzFile:
    return np.load(ROOT / "tests" / "golden" / "augment.npz")


def inputs() -> tuple[Tensor, Targets]:
    """Features (3, 32, 80), and targets (3, 20, 5) of the labels and of a teacher."""
    state = np.random.RandomState(36)
    mel = state.standard_normal((3, 1, 32, 80))[:, 0]
    drawn = state.rand(3, 5, STEPS) < 0.3, state.rand(3, 5, STEPS)
    frames, teacher = (torch.from_numpy(part.astype(np.float32)).transpose(1, 2) for part in drawn)
    return torch.from_numpy(mel.astype(np.float32)), Targets(frames.amax(dim=1), frames, teacher=teacher)


def assert_golden(golden: NpzFile, case: str, features: Tensor, targets: Targets | None = None) -> None:
    np.testing.assert_allclose(features.numpy(), golden[f"{case}.mel"][:, 0], atol=1e-5)
    for name, part in () if targets is None else (("labels", targets.frames), ("pseudo", targets.teacher)):
        if f"{case}.{name}" in golden:
            assert part is not None
            np.testing.assert_allclose(part.transpose(1, 2).numpy(), golden[f"{case}.{name}"], atol=1e-6)


def mixing(golden: NpzFile, case: str) -> augment.Mixing:
    weight = torch.from_numpy(golden[f"{case}.beta"].astype(np.float32))
    return augment.Mixing(torch.from_numpy(golden[f"{case}.perm"]), torch.maximum(weight, 1 - weight))


def test_frame_shift(golden: NpzFile) -> None:
    features, targets = inputs()
    shifts = torch.from_numpy(golden["frame_shift.gauss"]).long()
    rolled = targets.rolled(augment.shift_on(shifts, 80, STEPS))
    assert_golden(golden, "frame_shift", roll(features, shifts.tolist(), dim=1), rolled)


def test_mixup_and_styles(golden: NpzFile) -> None:
    features, targets = inputs()
    partner, weight = mixing(golden, "mixup")
    assert_golden(golden, "mixup", do_mixup(features, weight, partner), targets.mixed(weight, partner))
    assert_golden(golden, "mixstyle", augment.with_style(features, mixing(golden, "mixstyle"), unbiased=True))


def test_time_mask_silences_labels_and_teacher(golden: NpzFile) -> None:
    features, targets = inputs()
    width, start = golden["time_mask.width_start"].tolist()
    features, left = augment.mask_stretch(features, start, width, STEPS)
    masked = targets.masked(left)
    assert_golden(golden, "time_mask", features, masked)
    assert masked.teacher is not None
    assert not masked.teacher[:, start : start + width].any()  # the published code forgets it


def test_filter_and_frequency_warp(golden: NpzFile) -> None:
    features, _ = inputs()
    inner, gain = torch.from_numpy(golden["filter.randint"]), torch.from_numpy(golden["filter.uniform"])
    assert gain.shape[1] == golden["filter.n_bands"] + 1
    decibels = augment.joined_bands(inner, gain * 12 - 6, 32)
    assert_golden(golden, "filter", features * (10 ** (decibels / 20))[:, :, None])
    scale, offset = golden["freq_warp.scale_offset"]
    assert_golden(golden, "freq_warp", augment.zoom(features, int(scale * 32), int(offset)))


def test_what_is_drawn_for_a_batch() -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 40, 100)
    shifts = augment.draw_shifts(4000, 1000, 0.125).double()
    assert shifts.std().item() == pytest.approx(125, rel=0.05)
    for _ in range(50):
        first, width = augment.draw_stretch(250, 0.2)
        assert 12 <= width < 50
        assert 0 <= first < 250 - width
    styled = [augment.mix_style(features, 0.5, 0.4, of_batch=True) for _ in range(40)]
    assert 10 <= sum(torch.equal(each, features) for each in styled) <= 30  # all clips of a batch or none
    filtered = augment.filter_augment(features, 6.0, torch.ones(40), of_batch=True)
    gain = (filtered / features).log10() * 20
    assert gain.std(dim=2).max() < 1e-3
    assert 3 < gain.abs().max() <= 6
    assert augment.warp_frequency(features, 0.4, of_batch=True).shape == features.shape
    with pytest.raises(UserError, match="filter_augment"):
        for _ in range(20):
            augment.filter_augment(features[:, :20], 6.0, torch.ones(20), of_batch=True)


def test_mixed_waveforms_have_no_mean_and_single_ones_are_left_alone() -> None:
    waveform = torch.randn(3, 1000) + torch.tensor([[1.0], [2.0], [3.0]])
    mixed = augment.mix_waveforms(waveform, augment.Mixing(torch.tensor([2, 0, 1]), torch.tensor([0.7, 1.0, 0.6])))
    centred = waveform - waveform.mean(dim=1, keepdim=True)
    torch.testing.assert_close(mixed[0], 0.7 * centred[0] + 0.3 * centred[2], atol=1e-5, rtol=0)
    assert torch.equal(mixed[1], waveform[1])
    assert mixed[2].mean().abs() < 1e-6


@pytest.mark.parametrize("by", ["clips", "batches"])
def test_targets_follow_every_augmentation_in_its_order(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, in training on clips and on frames; targets stay between 0 and 1."""
    changes: dict[str, Any] = {
        "wavmix": 0.5, "mixup_alpha": 0.2, "frame_shift": 0.125, "frequency_warp": 0.4, "filter_augment": 6.0,
        "mix_style": 1.0, "time_mask": 0.3, "augment_by": by, "loss_type": "frame_bce", "spec_augment": False,
    }  # fmt: skip
    settings = resolve({**LEAN, **changes})
    network = build_model(settings)
    called: list[str] = []

    def listed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            called.append(name)
            return function(*words, **more)

        return call

    for name in ("warp_frequency", "with_style", "mask_stretch"):
        monkeypatch.setattr(augment, name, listed(name, getattr(augment, name)))
    monkeypatch.setattr("sed_model.do_mixup", listed("mixup", do_mixup))
    for kind in (SEDWrapper, FrameSEDWrapper):
        wrapper = kind(network, settings, [])
        frames = torch.rand(6, network.frames, 10)
        called.clear()
        waveform, targets = wrapper.wavmix(torch.randn(6, 320000) * 0.1, Targets(frames.amax(dim=1), frames))
        features, targets = wrapper.augment_features(network.features(waveform), targets)
        own = ["warp_frequency", "with_style", "mask_stretch", "mixup"]
        assert called == (own if by == "clips" else ["mixup", "with_style", "mask_stretch", "warp_frequency"])
        assert features.isfinite().all()
        assert targets.frames is not None
        assert 0 <= targets.frames.min() <= targets.frames.max() <= 1
