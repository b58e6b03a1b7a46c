"""Every augmentation moves the labels with the sound: a burst put where an event is must be found where the target is.

The bursts are short tones over faint noise, one a clip, of the clip's own class. After the augmentation the burst is
located in the sound (or the spectrogram) by its energy, and the step where it lies must be the target's largest.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data.frame_targets import Events, Targets, rasterize, resample_steps
from model.frontend import LogMel, Spectrogram
from settings import UserError
from training import augment
from utils import do_mixup

CLIPS, RATE, SECONDS, STEPS, BURST = 6, 8000, 10.0, 32, 0.2
SAMPLES = int(RATE * SECONDS)
GRID: dict[str, Any] = {"clips": CLIPS, "classes": CLIPS, "steps": STEPS, "seconds": SECONDS}


def bursts(seed: int) -> tuple[Tensor, Events]:
    """(B, samples) float32 clips with a burst each, and the events that say where."""
    torch.manual_seed(seed)
    clips = torch.arange(CLIPS)
    onset = torch.rand(CLIPS) * (SECONDS - BURST)
    time = torch.arange(SAMPLES) / RATE - onset[:, None]
    tone = torch.sin(2 * torch.pi * (500 + 400 * clips[:, None]) * time) * torch.sin(torch.pi * time / BURST) ** 2
    inside = (time >= 0) & (time < BURST)
    waveform = 0.5 * tone * inside + 1e-4 * torch.randn(CLIPS, SAMPLES)
    return waveform, Events(clips, clips, onset, onset + BURST)


def middle(waveform: Tensor) -> Tensor:
    """(B,) seconds at which the bursts are, by their energy; round the clip's end as well."""
    energy = waveform.float() ** 2
    angle = torch.arange(energy.shape[1]) * (2 * torch.pi / energy.shape[1])
    turn = torch.atan2((energy * angle.sin()).sum(dim=1), (energy * angle.cos()).sum(dim=1))
    return turn.remainder(2 * torch.pi) / (2 * torch.pi) * energy.shape[1] / RATE


def assert_at(seconds: Tensor, targets: Tensor, length: float = SECONDS) -> None:
    """The target of class k in clip k is largest in the step of clip k's second, or beside it where they share it.

    A burst may lie across an edge of two steps: its middle is then in the one that has more of it.
    """
    steps = targets.shape[1]
    own = targets[torch.arange(len(targets)), :, torch.arange(len(targets))]  # (B, steps)
    step = (seconds * (steps / length)).long().clamp(max=steps - 1)
    found = own[torch.arange(len(own)), step]
    assert (found > 0).all()
    assert (found >= own.amax(dim=1) - 0.02).all()
    assert torch.equal(targets.sum(dim=(1, 2)), own.sum(dim=1))  # and no other class anywhere


def spectrograms(waveform: Tensor) -> Tensor:
    """(B, samples) -> (B, 32, 1001) log-mel, normalized over each band as bn0 does."""
    mel = LogMel(RATE, 512, 32, 50.0, 4000.0)(Spectrogram(512, 80)(waveform)).transpose(1, 2)
    return ((mel - mel.mean(dim=(0, 2), keepdim=True)) / mel.std(dim=(0, 2), keepdim=True)).detach()


def loudest(logmel: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) seconds and (B,) band of the largest value in each spectrogram."""
    place = logmel.flatten(1).argmax(dim=1)
    return (place % logmel.shape[2] + 0.5) / logmel.shape[2] * SECONDS, place // logmel.shape[2]


def test_noise_on_features() -> None:
    """Each clip has a strength of its own; a seed gives the same noise."""
    torch.manual_seed(0)
    noise = augment.add_noise(torch.zeros(200, 8, 50), 0.1)
    assert 0 <= noise.min() <= noise.max() <= 0.1
    largest = noise.amax(dim=(1, 2))
    assert 0.04 < largest.mean() < 0.06
    assert largest.min() < 0.01
    torch.manual_seed(0)
    assert torch.equal(augment.add_noise(torch.zeros(200, 8, 50), 0.1), noise)


def test_a_burst_is_where_its_target_is() -> None:
    """Without any augmentation: what the tests below measure with."""
    for seed in range(5):
        waveform, events = bursts(seed)
        targets = rasterize(events, **GRID)
        assert_at(middle(waveform), targets)
        assert torch.allclose(targets.sum(dim=(1, 2)) * SECONDS / STEPS, torch.tensor(BURST), atol=1e-3)
        seconds, _ = loudest(spectrograms(waveform))
        assert torch.allclose(seconds, events.onset + BURST / 2, atol=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_time_shift(seed: int) -> None:
    waveform, events = bursts(seed)
    assert augment.shift_in_time(waveform, 5)[1].max() < 5
    moved, shifts = augment.shift_in_time(waveform, SAMPLES)
    assert torch.equal(moved, torch.stack([clip.roll(k) for clip, k in zip(waveform, shifts.tolist(), strict=True)]))
    targets = rasterize(augment.shift_events(events, shifts / RATE, SECONDS), **GRID)
    assert_at(middle(moved), targets)
    # A teacher's steps follow the same way: here those of the events themselves, on a fine grid.
    fine = rasterize(events, **(GRID | {"steps": 1000}))
    follows = resample_steps(fine, STEPS, SECONDS, shift=shifts / RATE)
    torch.testing.assert_close(follows, targets, atol=0.03, rtol=0)  # 10 ms of a step's 312.5


def test_events_round_the_clips_end() -> None:
    clip = torch.tensor([0, 1, 2])
    events = Events(clip, clip, torch.tensor([8.0, 0.0, 9.0]), torch.tensor([9.5, 10.0, 14.0]))
    moved = augment.shift_events(events, torch.tensor([1.0, 2.5, 0.0]), 10.0)
    spans = list(zip(moved.clip.tolist(), moved.onset.tolist(), moved.offset.tolist(), strict=True))
    assert [span for span in spans if span[2] > span[1]] == [
        (0, 9.0, 10.0),
        (1, 2.5, 10.0),
        (2, 9.0, 10.0),  # what was said about the time after the clip does not come round
        (0, 0.0, 0.5),
        (1, 0.0, 2.5),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_crop(seed: int) -> None:
    waveform, events = bursts(seed)
    assert torch.equal(augment.crop(waveform, SAMPLES)[0], waveform)
    length = 3 * SAMPLES // 5
    cropped, starts = augment.crop(waveform, length)
    inside = augment.crop_events(events, starts / RATE, length / RATE)
    targets = rasterize(inside, **(GRID | {"seconds": length / RATE}))
    for clip, start in enumerate(starts.tolist()):
        assert torch.equal(cropped[clip], waveform[clip, start : start + length])
    energy = (cropped**2).sum(dim=1) / (waveform**2).sum(dim=1)
    share = targets.sum(dim=(1, 2)) * length / RATE / STEPS / BURST
    assert ((energy > 0.9) == (share > 0.6)).all()  # the burst's middle is in the crop with its event, or neither is
    whole = share > 0.99
    assert whole.any()
    own = torch.where(whole[:, None, None], targets, torch.eye(CLIPS)[:, None])  # those cut off count as found
    assert_at(middle(cropped), own, length / RATE)
    fine = rasterize(events, **(GRID | {"steps": 1000}))
    follows = resample_steps(fine, STEPS, SECONDS, shift=-starts / RATE, length=length / RATE)
    torch.testing.assert_close(follows, targets, atol=0.06, rtol=0)  # 10 ms of a step's 187.5


def test_gain() -> None:
    waveform, events = bursts(0)
    louder = augment.random_gain(waveform, 6.0, torch.Generator().manual_seed(0))
    decibels = 20 * torch.log10(louder.abs().sum(dim=1) / waveform.abs().sum(dim=1))
    assert decibels.abs().max() <= 6.001
    assert decibels.max() - decibels.min() > 2
    assert torch.allclose(louder / louder[:, :1], waveform / waveform[:, :1], rtol=1e-4)  # one gain all through
    assert_at(middle(louder), rasterize(events, **GRID))


def assert_mixed(energy: Tensor, targets: Tensor, events: Events, weight: Tensor) -> None:
    """In the step of each clip's burst, its clip has the class with its weight, and its partner with the rest.

    energy: (B, steps); the bursts must be there in both.
    """
    for clip in range(CLIPS):
        partner = CLIPS - 1 - clip
        step = int((events.onset[clip] + BURST / 2) * STEPS / SECONDS)
        clean = rasterize(events, **GRID)[clip, step, clip]
        torch.testing.assert_close(targets[clip, step, clip], weight[clip] * clean)
        torch.testing.assert_close(targets[partner, step, clip], (1 - weight[partner]) * clean)
        quiet = energy.median(dim=1).values
        assert energy[clip, step] > quiet[clip]
        assert energy[partner, step] > quiet[partner]


@pytest.mark.parametrize("waveforms", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_mixup(seed: int, waveforms: bool) -> None:
    waveform, events = bursts(seed)
    weight = 0.2 + 0.6 * torch.rand(CLIPS)
    if waveforms:
        mixed = do_mixup(waveform, weight)
        torch.testing.assert_close(mixed, weight[:, None] * waveform + (1 - weight[:, None]) * waveform.flip(0))
        energy = (mixed**2).unflatten(1, (STEPS, -1)).sum(dim=2)
    else:
        mixed = do_mixup(spectrograms(waveform), weight)
        energy = mixed.amax(dim=1)[:, :-1].unfold(1, 31, 31)[:, :STEPS].amax(dim=2)  # 1001 frames: 31.25 a step
    frames = rasterize(events, **GRID)
    targets = Targets(torch.eye(CLIPS), frames, teacher=frames).mixed(weight)
    torch.testing.assert_close(targets.clips.diagonal(), weight)
    assert targets.frames is not None
    assert targets.teacher is not None
    assert torch.equal(targets.frames, targets.teacher)
    assert_mixed(energy, targets.frames, events, weight)


@pytest.mark.parametrize("seed", range(5))
def test_frequency_warp_moves_bands_and_not_time(seed: int) -> None:
    waveform, events = bursts(seed)
    logmel = spectrograms(waveform)
    warped = augment.warp_frequency(logmel, 0.3)
    before, band_before = loudest(logmel)
    after, band_after = loudest(warped)
    torch.testing.assert_close(after, before, atol=0.06, rtol=0)
    assert_at(after, rasterize(events, **GRID))
    moved = (band_after - band_before).abs()
    assert (moved > 0).any()
    assert (moved <= 0.3 / 0.7 * 32).all()
    assert warped.min() >= logmel.min()  # between what was there
    assert warped.max() <= logmel.max()


def test_frequency_warp_is_a_stretch_about_one_band() -> None:
    """A spectrogram that says its own band: the result must be a line of slope 1 / factor, through the pivot."""
    torch.manual_seed(0)
    place = torch.arange(64.0)[None, :, None].repeat(50, 1, 3)
    warped = augment.warp_frequency(place, 0.2)
    assert torch.equal(warped[:, :, 0], warped[:, :, 2])
    slope = (warped[:, 33, 0] - warped[:, 31, 0]) / 2
    assert 1 / 1.2 - 1e-3 <= slope.min() < 0.9
    assert 1.1 < slope.max() <= 1 / 0.8 + 1e-3
    inside = (warped[:, 1:-1] > 0.01) & (warped[:, 1:-1] < 62.99)
    bend = (warped[:, 2:] - 2 * warped[:, 1:-1] + warped[:, :-2]).abs()
    assert bend[inside & (warped[:, 2:] < 62.99) & (warped[:, :-2] > 0.01)].max() < 1e-3
    with pytest.raises(UserError, match="frequency_warp"):
        augment.warp_frequency(place, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_filters_are_lines_over_the_bands_and_leave_time(seed: int) -> None:
    waveform, events = bursts(seed)
    logmel = torch.cat([spectrograms(waveform)] * 2, dim=1)  # 64 bands
    scale = torch.linspace(0.05, 0.1, 64)
    filtered = augment.filter_augment(logmel, 6.0, scale)
    curve = (filtered - logmel) / scale[:, None]
    assert torch.allclose(curve, curve[:, :, :1], atol=1e-3)  # one filter all through the clip
    curve = curve[:, :, 0]
    assert curve.abs().max() <= 6.001
    assert (curve.amax(dim=1) - curve.amin(dim=1) > 0.5).all()
    bends = ((curve[:, 2:] - 2 * curve[:, 1:-1] + curve[:, :-2]).abs() > 1e-3).sum(dim=1)
    assert (bends <= 2 * 5).all()  # at most 5 inner edges, each between two bands
    assert ((curve[:, 1:] - curve[:, :-1]).abs() <= 12 / augment.NARROWEST_BAND + 1e-3).all()  # no jumps
    seconds, band = loudest(logmel)
    same_band = filtered[torch.arange(CLIPS), band]
    assert torch.equal(same_band.argmax(dim=1), logmel[torch.arange(CLIPS), band].argmax(dim=1))
    assert_at(seconds, rasterize(events, **GRID))
    with pytest.raises(UserError, match="filter_augment"):
        augment.filter_augment(logmel[:, :6], 6.0, scale[:6])


@pytest.mark.parametrize("seed", range(3))
def test_style_moves_no_sound(seed: int) -> None:
    """The order of a band's values over time stays: the burst is where it was."""
    waveform, events = bursts(seed)
    logmel = spectrograms(waveform)
    mixed = augment.mix_style(logmel, 1.0)
    _, band = loudest(logmel)
    rows = torch.arange(CLIPS)
    frames = mixed[rows, band].argmax(dim=1)
    assert torch.equal(frames, logmel[rows, band].argmax(dim=1))
    assert_at((frames + 0.5) / 1001 * SECONDS, rasterize(events, **GRID))


def test_style_is_mixed_with_that_of_another_clip() -> None:
    """With a concentration so high that all weights are 1/2, each clip's statistics lie half way to some clip's."""
    torch.manual_seed(0)
    logmel = torch.randn(5, 8, 200) * torch.rand(5, 8, 1) + torch.randn(5, 8, 1)
    mixed = augment.mix_style(logmel, 1.0, alpha=1e8)
    mean, deviation = logmel.mean(dim=2), logmel.std(dim=2)
    partners = []
    for clip in range(5):
        half_mean, half_deviation = (mean[clip] + mean) / 2, (deviation[clip] + deviation) / 2
        apart = (mixed[clip].mean(dim=1) - half_mean).abs().amax(dim=1)
        partners.append(int(apart.argmin()))
        assert apart.min() < 1e-3
        assert torch.allclose(mixed[clip].std(dim=1), half_deviation[partners[-1]], atol=1e-3)
    assert sorted(partners) == list(range(5))
    torch.manual_seed(0)
    many = augment.mix_style(torch.cat([logmel] * 100), 0.3)
    changed = (many != torch.cat([logmel] * 100)).flatten(1).any(dim=1).float().mean()
    assert changed.item() == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("seed", range(10))
def test_time_masks_silence_the_target(seed: int) -> None:
    """Masks of up to 2.5 s each, so that some bursts are under one: there, and only there, the target falls."""
    waveform, events = bursts(seed)
    logmel, clean = spectrograms(waveform) + 100, rasterize(events, **GRID)  # no value of its own is 0
    masked, kept = augment.mask_time(logmel, count=2, longest=250)
    assert torch.equal((masked == 0), ~kept[:, None].expand_as(masked))
    left = augment.left_of_steps(kept, STEPS)
    found = Targets(torch.eye(CLIPS), clean, teacher=clean).masked(left)
    assert found.frames is not None
    assert found.teacher is not None
    assert torch.equal(found.frames, found.teacher)
    assert torch.equal(found.clips, torch.eye(CLIPS))
    share = kept.float().repeat_interleave(STEPS, dim=1).unflatten(1, (STEPS, -1)).mean(dim=2)  # (B, steps)
    torch.testing.assert_close(found.frames, clean * share[:, :, None], atol=1e-5, rtol=0)
    assert torch.equal(found.frames[share == 1], clean[share == 1])
    seconds = events.onset + BURST / 2
    frame, step = (seconds * 1001 / SECONDS).long(), (seconds * STEPS / SECONDS).long()
    rows = torch.arange(CLIPS)
    hidden = (masked[rows, :, frame] == 0).all(dim=1)  # the burst's middle
    assert ((found.frames[rows, step, rows] < clean[rows, step, rows]) | ~hidden).all()


def test_masks_in_numbers() -> None:
    """A mask of one step and a half leaves nothing of the one step, and half of the other."""
    keep = torch.ones(1, 40, dtype=torch.bool)
    keep[:, 10:25] = False
    torch.testing.assert_close(augment.left_of_steps(keep, 4), torch.tensor([[1.0, 0.0, 0.5, 1.0]]))
    torch.manual_seed(0)
    time, bands = (augment.mask_time(torch.ones(2000, 1, 1001))[0], augment.mask_bands(torch.ones(2000, 64, 1)))
    for masked, longest in ((time[:, 0], 64), (bands[:, :, 0], 8)):
        lengths = (masked == 0).sum(dim=1)
        assert lengths.max() <= 2 * (longest - 1)
        assert lengths.float().mean().item() == pytest.approx(longest - 1, rel=0.1)  # of two masks, which may overlap


def masked_in_time(logmel: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    masked, kept = augment.mask_time(logmel, longest=int(50 * strength))
    return masked, augment.left_of_steps(kept, 4)


AUGMENTATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {  # of (B, F, T), by a strength; 0 for none
    "gain": lambda x, strength: augment.random_gain(x.flatten(1), 6 * strength),
    "warp": lambda x, strength: augment.warp_frequency(x, 0.2 * strength),
    "filter": lambda x, strength: augment.filter_augment(x, 6 * strength, torch.ones(x.shape[1])),
    "style": lambda x, strength: augment.mix_style(x, strength),
    "masked bands": lambda x, strength: augment.mask_bands(x, widest=int(16 * strength)),
    "masked time": lambda x, strength: masked_in_time(x, strength)[0],
    "masked targets": lambda x, strength: masked_in_time(x, strength)[1],
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_nothing_at_strength_0_and_the_same_from_the_same_seed(name: str) -> None:
    torch.manual_seed(0)
    logmel = torch.randn(8, 64, 100)
    apply = AUGMENTATIONS[name]
    without = torch.ones(8, 4) if name == "masked targets" else logmel.flatten(1) if name == "gain" else logmel
    assert torch.equal(apply(logmel, 0.0), without)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(apply(logmel, 1.0))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], without)
    assert torch.isfinite(results[0]).all()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_arithmetic_of_the_network_does_not_matter(name: str) -> None:
    """Within autocast, where a matrix product would be rounded to bfloat16, the numbers are the same."""
    logmel = torch.randn(8, 64, 100)
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(AUGMENTATIONS[name](logmel, 1.0))
    assert results[1].dtype == torch.float32
    assert torch.equal(results[0], results[1])
