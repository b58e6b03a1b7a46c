"""Windows of a recording, and their scores on one time axis."""

from collections.abc import Iterator

import numpy as np
import pytest

from inference.windows import OverlapAverage, SlidingAverage, cut_windows, into_bins, pool_sound, step_count, taper
from settings import UserError


def cut(samples: int, sizes: int, overlap: float = 0.5) -> list[tuple[int, np.ndarray, int | None]]:
    """Windows of 100 samples over the recording 1, 2, ..., which comes in blocks of `sizes`."""
    recording = np.arange(1, samples + 1, dtype=np.float32)
    blocks = [recording[k : k + sizes] for k in range(0, samples, sizes)]
    found = cut_windows(blocks, window=100, overlap=overlap, short_clips="pad")
    return [(window.start, window.samples, window.recording) for window in found]


@pytest.mark.parametrize("samples", [1, 99, 100, 101, 149, 150, 151, 1000, 1033])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.95])
def test_windows_cover_every_sample_whatever_the_blocks(samples: int, overlap: float) -> None:
    windows = cut(samples, 37, overlap)
    covered = np.zeros(max(samples, 100), dtype=int)
    for start, values, _ in windows:
        covered[start : start + 100] += 1
        inside = np.arange(start, min(start + 100, samples))
        np.testing.assert_array_equal(values[: len(inside)], inside + 1)
        assert not values[len(inside) :].any()
    assert covered.min() >= 1
    assert windows[-1][0] + 100 == max(samples, 100)
    assert [total for *_, total in windows] == [None] * (len(windows) - 1) + [samples]
    starts = [start for start, *_ in windows]
    assert starts == sorted(set(starts))
    for size in (1, 100, samples):
        assert [start for start, *_ in cut(samples, size, overlap)] == starts


@pytest.mark.parametrize("samples", [1, 99, 100, 101, 230, 300])
def test_windows_side_by_side_with_the_last_one_filled(samples: int) -> None:
    recording = np.arange(1, samples + 1, dtype=np.float32)
    blocks = [recording[k : k + 37] for k in range(0, samples, 37)]
    windows = list(cut_windows(blocks, window=100, overlap=0.0, short_clips="pad", last_window="filled"))
    count = -(-samples // 100)
    assert [window.start for window in windows] == [100 * k for k in range(count)]
    joined = np.concatenate([window.samples for window in windows])
    np.testing.assert_array_equal(joined, np.pad(recording, (0, 100 * count - samples)))
    average = OverlapAverage(100)
    for window in windows:
        average.add(window.samples[2::5, None], window.start, window.recording)
    inside = step_count(samples, 5.0)
    np.testing.assert_allclose(average.result()[:, 0], joined[2::5][:inside])


def test_a_short_recording_is_padded_or_repeated_and_none_is_refused() -> None:
    short = [np.array([1, 2, 3], np.float32)]
    (padded,) = cut_windows(short, window=7, overlap=0.5, short_clips="pad")
    (repeated,) = cut_windows(short, window=7, overlap=0.5, short_clips="repeat")
    assert padded.samples.tolist() == [1, 2, 3, 0, 0, 0, 0]
    assert repeated.samples.tolist() == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(UserError):
        list(cut_windows([], window=7, overlap=0.5, short_clips="pad"))


def test_a_day_of_blocks_is_not_held() -> None:
    """Blocks are made as they are asked for: at no time are more than a window and two blocks alive."""
    made = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal made
        for made in range(1, 2001):
            yield np.full(50, made, np.float32)

    windows = cut_windows(blocks(), window=100, overlap=0.5, short_clips="pad")
    assert max(made * 50 - window.start for window in windows) <= 200


@pytest.mark.parametrize("kind", [OverlapAverage, SlidingAverage])
def test_scores_are_averaged_at_their_times(kind: type[SlidingAverage]) -> None:
    """Two windows of 4 frames of 1 sample, the second 2 later: in between, the nearer middle counts more."""
    average = kind(4)
    average.add(np.zeros((4, 1)), 0)
    average.add(np.ones((4, 1)), 2, recording=6)
    found = average.result() if isinstance(average, OverlapAverage) else average.take(6)
    assert taper(4).tolist() == [0.25, 0.75, 0.75, 0.25]
    np.testing.assert_allclose(found[:, 0], [0, 0, 0.25, 0.75, 1, 1])


def test_a_frame_that_was_taken_stays() -> None:
    average = SlidingAverage(4)
    average.add(np.zeros((4, 1)), 0)
    assert average.take(3).tolist() == [[0], [0], [0]]
    average.add(np.ones((4, 1)), 2, recording=6)
    np.testing.assert_allclose(average.take(9)[:, 0], [0.75, 1, 1])
    assert average.take(9).shape == (0, 1)


@pytest.mark.parametrize(
    ("samples", "overlap"), [(1, 0.5), (99, 0.5), (100, 0.0), (101, 0.5), (1033, 0.3), (1234, 0.9)]
)
@pytest.mark.parametrize("steps", [1, 7, 32])
def test_a_constant_stays_and_a_ramp_is_in_its_place(samples: int, overlap: float, steps: int) -> None:
    average = OverlapAverage(100)
    step = 100 / steps
    for start, _, total in cut(samples, 60, overlap):
        middle = start + (np.arange(steps) + 0.5) * step  # the score of a frame is the time of its middle
        average.add(np.stack([np.ones(steps), middle], axis=1), start, total)
    found = average.result()
    assert len(found) == step_count(samples, step) == max(1, int(samples / step + 0.5 + 1e-9))
    np.testing.assert_allclose(found[:, 0], 1, rtol=1e-6)
    begins = np.arange(len(found)) * step
    middles = (begins + np.append(begins[1:], samples)) / 2
    assert np.abs(found[:, 1] - middles).max() <= step / 2 + 1e-3


def test_a_single_window_is_left_as_it_is() -> None:
    scores = np.random.default_rng(0).random((32, 5)).astype(np.float32)
    average = OverlapAverage(320)
    average.add(scores, 0, recording=320)
    np.testing.assert_array_equal(average.result(), scores)


@pytest.mark.parametrize(
    ("seconds", "by", "expected"),
    [
        (2.0, "mean", [0.5, (2 + 1.5) / 1.5]),
        (2.0, "max", [1, 3]),
        (1.5, "mean", [1 / 3, 2]),  # half a second is left: less than half of a bin
        (0.5, "max", [0, 0, 1, 1, 2, 2, 3]),
        (10, "mean", [(0 + 1 + 2 + 1.5) / 3.5]),
    ],
)
def test_bins(seconds: float, by: str, expected: list[float]) -> None:
    frames = np.array([[0.0], [1.0], [2.0], [3.0]])
    found = into_bins(frames, seconds_per_frame=1.0, duration=3.5, seconds_per_bin=seconds, by=by)  # type: ignore[arg-type]
    assert found[:, 0] == pytest.approx(expected)


@pytest.mark.parametrize("softmax", [False, True])
def test_padding_does_not_count_for_the_clip(softmax: bool) -> None:
    """Logits of a clip are the mean of those of its steps: of all in the network, then of those that hold sound."""

    def probabilities(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits)
        return powers / powers.sum(axis=-1, keepdims=True) if softmax else powers / (1 + powers)

    logits = np.random.default_rng(0).normal(0, 4, (32, 5))
    logits[20:] -= 15  # the padding
    frames, clipwise = probabilities(logits), probabilities(logits.mean(axis=0))
    for share, inside in ((0.6, 19), (0.61, 20), (0.001, 1)):
        found = pool_sound(clipwise, frames, share, softmax=softmax)
        np.testing.assert_allclose(found, probabilities(logits[:inside].mean(axis=0)), rtol=1e-6)
    assert pool_sound(clipwise, frames, 1.0, softmax=softmax) is clipwise
    assert pool_sound(clipwise, frames[:0], 0.1, softmax=softmax) is clipwise
