"""Events -> frame targets against a grid of milliseconds, there and back with decoding, and one grid on another."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.frame_targets import Events, rasterize, resample_steps, step_shares, touched_steps
from data.tables import EVENT_COLUMNS
from evaluation.postprocess import decode_events

STEPS, STEP_MS = 20, 512  # a step of 2^9 ms: milliseconds are whole ticks of it


def random_events(generator: np.random.Generator, *, count: int, clips: int, classes: int, length: int) -> np.ndarray:
    """(count, 4) whole numbers: clip, class, onset, offset; some begin before 0, some end after `length`."""
    onset = generator.integers(-length // 10, length, count)
    offset = onset + generator.integers(0, length // 3, count)
    return np.stack([generator.integers(clips, size=count), generator.integers(classes, size=count), onset, offset], 1)


def as_events(rows: np.ndarray, seconds_per_unit: float) -> Events:
    clip, label = torch.from_numpy(rows[:, 0]), torch.from_numpy(rows[:, 1])
    onset, offset = (torch.from_numpy(rows[:, column] * seconds_per_unit).float() for column in (2, 3))
    return Events(clip, label, onset, offset)


def on_the_grid(rows: np.ndarray, clips: int, classes: int, length: int) -> np.ndarray:
    """(clips, length, classes) bool, one event after another."""
    active = np.zeros((clips, length, classes), dtype=bool)
    for clip, label, onset, offset in rows.tolist():
        active[clip, max(onset, 0) : max(offset, 0), label] = True
    return active


@pytest.mark.parametrize("seed", range(30))
def test_coverage_is_that_of_a_grid_of_milliseconds(seed: int) -> None:
    """Dense enough that events of one class overlap, lie within one another, touch, and cross the clip's ends."""
    generator = np.random.default_rng(seed)
    clips, classes, length = 3, 2, STEPS * STEP_MS
    rows = random_events(generator, count=int(generator.integers(0, 40)), clips=clips, classes=classes, length=length)
    shares = on_the_grid(rows, clips, classes, length).reshape(clips, STEPS, STEP_MS, classes).mean(axis=2)
    grid: dict[str, Any] = {"clips": clips, "classes": classes, "steps": STEPS, "seconds": length / 1000}
    events = as_events(rows, 0.001)
    covered = rasterize(events, **grid)
    assert covered.dtype == torch.float32
    np.testing.assert_array_equal(covered.numpy(), shares.astype(np.float32))
    whole = rasterize(events, **grid, fractional=False)
    np.testing.assert_array_equal(whole.numpy(), (shares >= 0.5).astype(np.float32))


def test_steps_that_events_touch_are_those_of_the_published_encoder() -> None:
    """Numbers of PretrainedSED's label encoder: events of a class, and its active steps of 40 ms."""
    published = [
        ([(0.0, 10.0)], [(0, 250)]),
        ([(0.04, 0.08), (0.28, 0.32)], [(1, 2), (7, 8)]),
        ([(0.0, 0.001)], [(0, 1)]),
        ([(9.99, 10.0), (3.0, 12.5)], [(75, 250)]),
        ([(5.0, 5.0)], []),
        ([(0.56, 0.6), (1.12, 1.16), (2.28, 2.3)], [(14, 15), (28, 29), (57, 58)]),
        ([(1.0, 2.0), (1.5, 3.0), (3.0, 3.5), (3.6, 4.0), (0.2, 6.0)], [(5, 150)]),
        ([(1.2, 1.3), (1.31, 1.4000000000000001)], [(30, 35)]),
        ([(0.597, 4.21)], [(14, 106)]),
        ([(7.367, 9.557)], [(184, 239)]),
    ]
    for events, runs in published:
        wanted = np.zeros(250)
        for first, last in runs:
            wanted[first:last] = 1
        rows = np.array([(0, 0, onset, offset) for onset, offset in events])
        onset, offset = (torch.tensor(rows[:, column], dtype=torch.float32) for column in (2, 3))
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        found = Events(zeros, zeros, onset, offset)
        targets = rasterize(found, clips=1, classes=1, steps=250, seconds=10.0, touched=True)
        np.testing.assert_array_equal(targets[0, :, 0].numpy(), wanted, err_msg=str(events))
        assert touched_steps(found, classes=1, steps=250, seconds=10.0)[2].sum() == wanted.sum()


@pytest.mark.parametrize(("steps", "seconds"), [(250, 10), (750, 30), (3000, 120), (32, 10)])
def test_steps_that_begin_at_any_millisecond_are_touched(steps: int, seconds: int) -> None:
    """Every onset and offset, in whole numbers of microseconds; in float32, where an edge is hardly ever exact."""
    onset = np.arange(0, seconds * 1000)
    offset = np.minimum(onset + 1 + onset % 97, seconds * 1000)
    clip = torch.arange(len(onset))
    times = (torch.from_numpy(time / 1000).float() for time in (onset, offset))
    counts = touched_steps(Events(clip, torch.zeros_like(clip), *times), classes=1, steps=steps, seconds=seconds)[2]
    first, last = onset * 1000 * steps // (seconds * 10**6), -(-offset * 1000 * steps // (seconds * 10**6))
    np.testing.assert_array_equal(counts.numpy(), last - first)


def test_the_order_of_events_does_not_count() -> None:
    generator = np.random.default_rng(5)
    rows = random_events(generator, count=300, clips=8, classes=5, length=10000)
    grid: dict[str, Any] = {"clips": 8, "classes": 5, "steps": 32, "seconds": 10.0}
    first = rasterize(as_events(rows, 0.001), **grid)
    assert torch.equal(first, rasterize(as_events(generator.permutation(rows), 0.001), **grid))
    assert torch.equal(first, rasterize(as_events(np.concatenate([rows, rows[::2]]), 0.001), **grid))


@pytest.mark.parametrize(("steps", "seconds"), [(32, 10.0), (64, 10.0), (24, 10.0), (250, 10.0), (7, 0.9)])
def test_frames_decoded_and_rasterized_are_the_same_frames(steps: int, seconds: float) -> None:
    generator = np.random.default_rng(steps)
    frames = (generator.random((4, steps, 3)) < 0.5).astype(np.float32)
    found = decode_events(
        frames,
        names=list("abcd"),
        labels=list("xyz"),
        durations=np.full(4, seconds),
        seconds_per_frame=seconds / steps,
        thresholds=np.array([0.5]),
    )
    events = Events(
        torch.tensor(["abcd".index(name) for name in found["filename"]]),
        torch.tensor(["xyz".index(label) for label in found["event_label"]]),
        torch.tensor(found["onset"].to_numpy(), dtype=torch.float32),
        torch.tensor(found["offset"].to_numpy(), dtype=torch.float32),
    )
    grid: dict[str, Any] = {"clips": 4, "classes": 3, "steps": steps, "seconds": seconds}
    np.testing.assert_array_equal(rasterize(events, **grid, fractional=False).numpy(), frames)
    np.testing.assert_allclose(rasterize(events, **grid).numpy(), frames, atol=1e-4)


@pytest.mark.parametrize("fractional", [True, False])
def test_events_rasterized_and_decoded_are_the_same_events(fractional: bool) -> None:
    """Events on the grid, a step apart at least: their edges come back."""
    generator = np.random.default_rng(3)
    rows = []
    for clip in range(5):
        for label in range(3):
            edges = np.sort(generator.choice(33, size=8, replace=False))
            rows += [(clip, label, on, off) for on, off in edges.reshape(4, 2).tolist()]
    step = 10 / 32
    targets = rasterize(as_events(np.array(rows), step), clips=5, classes=3, steps=32, seconds=10.0)
    found = decode_events(
        targets.numpy() if fractional else targets.round().numpy(),
        names=[str(clip) for clip in range(5)],
        labels=list("012"),
        durations=np.full(5, 10.0),
        seconds_per_frame=step,
        thresholds=np.array([0.5]),
    )
    assert [
        (int(name), int(label), round(onset / step, 6), round(offset / step, 6))
        for name, onset, offset, label in found[EVENT_COLUMNS].itertuples(index=False)
    ] == rows


def test_no_events_and_what_is_no_grid() -> None:
    none = Events(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0))
    assert torch.equal(rasterize(none, clips=2, classes=3, steps=4, seconds=1.0), torch.zeros(2, 4, 3))
    assert none.to("cpu").onset.dtype == torch.float32
    for steps, seconds in ((0, 1.0), (4, 0.0)):
        with pytest.raises(ValueError, match="grid"):
            rasterize(none, clips=2, classes=3, steps=steps, seconds=seconds)
    with pytest.raises(ValueError, match="Events"):
        Events(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1), torch.zeros(2))


def finely(values: Tensor, parts: int, shift: Tensor, seconds: float) -> Tensor:
    """(B, T, K) -> (B, T * parts, K), each clip rolled by its shift, which is a whole number of parts."""
    fine = values.repeat_interleave(parts, dim=1)
    moved = (shift * fine.shape[1] / seconds).round().int().tolist()
    return torch.stack([clip.roll(parts, 0) for clip, parts in zip(fine, moved, strict=True)])


@pytest.mark.parametrize(("frames", "steps"), [(250, 32), (250, 250), (32, 64), (20, 30), (1, 5), (5, 1)])
def test_resampling_is_the_mean_over_a_fine_grid(frames: int, steps: int) -> None:
    torch.manual_seed(frames + steps)
    values, seconds = torch.randn(4, frames, 3), 10.0
    parts = 480  # 250 * 480, 20 * 480, ... are multiples of all the steps
    shift = torch.randint(-20000, 20000, (4,)) * (seconds / (frames * parts))
    fine = finely(values, parts, shift, seconds)
    expected = fine.unflatten(1, (steps, -1)).mean(dim=2)
    torch.testing.assert_close(resample_steps(values, steps, seconds, shift=shift), expected, atol=1e-4, rtol=0)


def test_resampling_keeps_steps_and_means_and_rolls_by_whole_steps() -> None:
    torch.manual_seed(0)
    values, none = torch.randn(3, 32, 4), torch.zeros(3)
    assert torch.equal(resample_steps(values, 32, 10.0, shift=none), values)
    moved = resample_steps(values.half(), 32, 10.0, shift=torch.tensor([0.3125, -0.625, 10.0]))
    rolled = [values[0].roll(1, 0), values[1].roll(-2, 0), values[2]]
    assert torch.equal(moved, torch.stack(rolled).half().float())
    for steps in (7, 32, 100):
        resampled = resample_steps(values, steps, 10.0, shift=torch.rand(3) * 20 - 10)
        torch.testing.assert_close(resampled.mean(dim=1), values.mean(dim=1))


def test_resampling_a_part_of_the_clip() -> None:
    """The 4 s from 2.5 s on, in 8 steps: each the mean of two of the clip's steps of 0.25 s."""
    values = torch.arange(40.0)[None, :, None].repeat(2, 1, 1)
    part = resample_steps(values, 8, 10.0, shift=torch.tensor([-2.5, 0.0]), length=4.0)
    assert torch.allclose(part[0, :, 0], 10.5 + 2 * torch.arange(8.0))
    assert torch.allclose(part[1, :, 0], 0.5 + 2 * torch.arange(8.0))
    with pytest.raises(ValueError, match="length"):
        resample_steps(values, 8, 10.0, shift=torch.zeros(2), length=11.0)


def test_shares_of_steps_sum_to_one_wherever_they_begin() -> None:
    torch.manual_seed(0)
    for frames, steps in ((250, 32), (32, 64), (3, 3), (1001, 32)):
        start = torch.cat([torch.randn(20) * frames, torch.tensor([0.0, -1e-9, float(frames)])])
        for width in (frames / steps, 0.4 * frames / steps, float(frames)):
            shares = step_shares(start, width, frames=frames, steps=steps)
            assert shares.min() >= 0
            torch.testing.assert_close(shares.sum(dim=2), torch.ones(23, steps), atol=2e-3, rtol=0)
