"""Recordings of any length as windows of one length, and the windows' scores back on one time axis."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np

from settings import UserError

FRAMES_PUT_AWAY = 4096  # in a block of finished frames: 20 minutes


@dataclass(frozen=True)
class Window:
    """A stretch of a recording, as the network is given it."""

    samples: np.ndarray  # (window,) float32
    start: int  # its place in the recording, in samples
    recording: Optional[int] = None  # samples of the whole recording, known with its last window


def cut_windows(
    blocks: Iterable[np.ndarray], *, window: int, overlap: float, short_clips: Literal["pad", "repeat"]
) -> Iterator[Window]:
    """Windows over (samples,) blocks of a recording, each as soon as it is complete; they cover every sample.

    window: in samples; overlap: share of a window that the next one covers again. The last window ends with the
    recording. One that is shorter than a window is padded with zeros or repeated. Holds a window and a block at most.
    """
    hop = max(1, round(window * (1 - overlap)))
    held, first, at = np.zeros(0, np.float32), 0, 0  # what is held begins at sample `first`; the next window at `at`
    for block in blocks:
        held = np.concatenate([held, block.astype(np.float32, copy=False)])
        while first + len(held) > at + window:
            yield Window(held[at - first : at - first + window], at)
            at += hop
        # The last window may begin anywhere after the one before, so the last `window` samples stay.
        drop = min(at - first, len(held) - window)
        if drop > 0:
            held, first = held[drop:], first + drop
    total = first + len(held)
    if total == 0:
        raise UserError("The recording holds no samples.")
    if total < window:
        filled = np.resize(held, window) if short_clips == "repeat" else np.pad(held, (0, window - total))
        yield Window(filled, 0, total)
    else:
        yield Window(held[len(held) - window :], total - window, total)


def taper(steps: int) -> np.ndarray:
    """(steps,) weights of a window's scores: a triangle that is nowhere 0, so that no seam shows where windows meet.

    At the edge of a window the network has heard one side of a moment only; the middle of another counts more.
    """
    middle = np.arange(steps) + 0.5
    return np.minimum(middle, steps - middle) / (steps / 2)


class OverlapAverage:
    """The weighted mean of windows' scores at their absolute times, window after window.

    Frame t of the result begins at t * window / steps samples. It takes from each window that covers its middle the
    score there. Frames that no later window can reach are put away as float32.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.finished: list[np.ndarray] = []  # (FRAMES_PUT_AWAY, K) each, the last one up to `filled`
        self.filled = 0
        self.first = 0  # the frame with which `total` begins
        self.total = np.zeros((0, 0))  # (frames, K), sums of weight * score
        self.weight = np.zeros((0, 1))

    def add(self, scores: np.ndarray, start: int, recording: Optional[int] = None) -> None:
        """(steps, K) of the window that begins at sample `start`, in the order of time.

        recording: samples of the whole, given with the last window.
        """
        steps = len(scores)
        step = self.window / steps  # in samples
        begin = int(np.ceil(start / step - 0.5))
        end = int(np.ceil((start + self.window) / step - 0.5))
        if recording is not None:
            end = frame_count(recording, step)
        frames = np.arange(begin, end)
        stops = (frames + 1) * step if recording is None else np.minimum((frames + 1) * step, recording)
        place = np.clip(np.floor(((frames * step + stops) / 2 - start) / step).astype(int), 0, steps - 1)
        weight = taper(steps)[place, None]
        self._finish_until(begin, scores.shape[1])
        missing = end - self.first - len(self.total)
        if missing > 0:
            self.total = np.pad(self.total, ((0, missing), (0, 0)))
            self.weight = np.pad(self.weight, ((0, missing), (0, 0)))
        self.total[: len(frames)] += weight * scores[place].astype(np.float64)
        self.weight[: len(frames)] += weight

    def result(self) -> np.ndarray:
        """(T, K) float32, over the whole recording."""
        self._finish_until(self.first + len(self.total), self.total.shape[1])
        return np.concatenate([*self.finished[:-1], self.finished[-1][: self.filled]])

    def _finish_until(self, frame: int, classes: int) -> None:
        if self.total.shape[1] != classes:
            self.total = np.zeros((0, classes))
        done = frame - self.first
        if done > 0:
            assert done <= len(self.weight), "the windows leave a gap"
            assert self.weight[:done].min() > 0, "the windows leave a gap"
            self._put_away(self.total[:done] / self.weight[:done])
            self.total, self.weight, self.first = self.total[done:], self.weight[done:], frame

    def _put_away(self, scores: np.ndarray) -> None:
        """Keep (frames, K) in large blocks: a small piece for each window would scatter them over the whole heap."""
        while len(scores):
            if not self.finished or self.filled == FRAMES_PUT_AWAY:
                self.finished.append(np.empty((FRAMES_PUT_AWAY, scores.shape[1]), np.float32))
                self.filled = 0
            count = min(FRAMES_PUT_AWAY - self.filled, len(scores))
            self.finished[-1][self.filled : self.filled + count] = scores[:count]
            self.filled += count
            scores = scores[count:]


def frame_count(samples: int, step: float) -> int:
    """How many frames of `step` samples cover `samples`; the last one may reach beyond."""
    return max(1, int(np.ceil(samples / step - 1e-9)))


def into_bins(
    framewise: np.ndarray,
    *,
    seconds_per_frame: float,
    duration: float,
    seconds_per_bin: float,
    by: Literal["mean", "max"],
) -> np.ndarray:
    """(T, K) frame scores -> (bins, K): the mean over each bin's time, or the highest of the frames that it touches."""
    count = frame_count(round(duration * 1e9), seconds_per_bin * 1e9)
    edges = np.minimum(np.arange(count + 1) * seconds_per_bin, duration)
    frames = len(framewise)
    begins = np.arange(frames) * seconds_per_frame
    ends = np.minimum(begins + seconds_per_frame, duration)
    binned = np.empty((count, framewise.shape[1]), np.float32)
    for number in range(count):
        low, high = edges[number], edges[number + 1]
        first = min(int(np.floor(low / seconds_per_frame + 1e-9)), frames - 1)
        stop = min(max(int(np.ceil(high / seconds_per_frame - 1e-9)), first + 1), frames)
        inside = slice(first, stop)
        if by == "max":
            binned[number] = framewise[inside].max(axis=0)
            continue
        shares = np.maximum(np.minimum(ends[inside], high) - np.maximum(begins[inside], low), 0) + 1e-12
        binned[number] = shares @ framewise[inside] / shares.sum()
    return binned
