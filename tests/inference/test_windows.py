"""Windows of a recording, and their scores on one time axis."""

from collections.abc import Iterator

import numpy as np
import pytest

from inference.windows import OverlapAverage, cut_windows, into_bins, taper


def cut(samples: int, sizes: int, overlap: float = 0.5) -> list[tuple[int, np.ndarray, int | None]]:
    recording = np.arange(1, samples + 1, dtype=np.float32)
    blocks = [recording[k : k + sizes] for k in range(0, samples, sizes)]
    found = cut_windows(blocks, window=100, overlap=overlap, short_clips="pad")
    return [(window.start, window.samples, window.recording) for window in found]


@pytest.mark.parametrize("samples", [1, 99, 100, 101, 149, 150, 151, 1000, 1033])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.95])
def test_windows_cover_every_sample(samples: int, overlap: float) -> None:
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


def test_windows_do_not_depend_on_the_blocks() -> None:
    whole = cut(1033, 1033)
    for size in (1, 7, 100, 500):
        found = cut(1033, size)
        assert [start for start, *_ in found] == [start for start, *_ in whole]
        np.testing.assert_array_equal(np.stack([w for _, w, _ in found]), np.stack([w for _, w, _ in whole]))


def test_a_short_recording_is_padded_or_repeated_and_none_is_refused() -> None:
    short = [np.array([1, 2, 3], np.float32)]
    (padded,) = cut_windows(short, window=7, overlap=0.5, short_clips="pad")
    (repeated,) = cut_windows(short, window=7, overlap=0.5, short_clips="repeat")
    assert padded.samples.tolist() == [1, 2, 3, 0, 0, 0, 0]
    assert repeated.samples.tolist() == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="no samples"):
        list(cut_windows([], window=7, overlap=0.5, short_clips="pad"))


def test_a_day_of_blocks_is_not_held() -> None:
    """Blocks are made as they are asked for: at no time are more than a window and two blocks alive."""
    alive: list[np.ndarray] = []

    def blocks() -> Iterator[np.ndarray]:
        for number in range(2000):
            alive.append(np.full(50, number, np.float32))
            yield alive[-1]

    reach = max(
        len(alive) * 50 - window.start for window in cut_windows(blocks(), window=100, overlap=0.5, short_clips="pad")
    )
    assert reach <= 200


def test_scores_are_averaged_at_their_times() -> None:
    """Two windows of 4 frames of 1 sample, the second 2 later: in between, the nearer middle counts more."""
    average = OverlapAverage(4)
    average.add(np.zeros((4, 1)), 0)
    average.add(np.ones((4, 1)), 2, recording=6)
    weights = taper(4)
    assert weights.tolist() == [0.25, 0.75, 0.75, 0.25]
    np.testing.assert_allclose(average.result()[:, 0], [0, 0, 0.25, 0.75, 1, 1])


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
    assert len(found) == max(1, int(np.ceil(samples / step - 1e-9)))
    np.testing.assert_allclose(found[:, 0], 1, rtol=1e-6)
    begins = np.arange(len(found)) * step
    middles = (begins + np.minimum(begins + step, samples)) / 2
    assert np.abs(found[:, 1] - middles).max() <= step / 2 + 1e-3


def test_a_single_window_is_left_as_it_is() -> None:
    scores = np.random.default_rng(0).random((32, 5)).astype(np.float32)
    average = OverlapAverage(320)
    average.add(scores, 0, recording=320)
    np.testing.assert_array_equal(average.result(), scores)


def test_bins() -> None:
    frames = np.array([[0.0], [1.0], [2.0], [3.0]])
    where = {"seconds_per_frame": 1.0, "duration": 3.5}
    assert into_bins(frames, **where, seconds_per_bin=2.0, by="mean")[:, 0] == pytest.approx([0.5, (2 + 1.5) / 1.5])
    assert into_bins(frames, **where, seconds_per_bin=2.0, by="max")[:, 0].tolist() == [1, 3]
    assert into_bins(frames, **where, seconds_per_bin=1.5, by="mean")[:, 0] == pytest.approx([1 / 3, 5 / 3, 3])
    assert into_bins(frames, **where, seconds_per_bin=0.5, by="max")[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert into_bins(frames, **where, seconds_per_bin=10, by="mean").shape == (1, 1)
