"""Recordings of any length as windows of one length, and the windows' scores back on one time axis."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np

from settings import UserError

FRAMES_PUT_AWAY = 4096  # in a block of finished frames: 20 minutes
SMALLEST, LAST_DIGIT = 1e-30, 6e-8  # of a probability in float32, and of its distance from 1


@dataclass(frozen=True)
class Window:
    """A part of a recording that goes through the network at once."""

    samples: np.ndarray  # (window,) float32
    start: int  # its place in the recording, in samples
    recording: Optional[int] = None  # samples of the whole recording, known with its last window


def cut_windows(
    blocks: Iterable[np.ndarray],
    *,
    window: int,
    overlap: float,
    short_clips: Literal["pad", "repeat"],
    last_window: Literal["aligned", "filled"] = "aligned",
) -> Iterator[Window]:
    """Windows over (samples,) blocks of a recording, each as soon as it is complete; they cover every sample.

    window: in samples; overlap: share of a window that the next one covers again. The last window ends with the
    recording, or (filled) begins where it is its turn. What is shorter than a window is padded with zeros or repeated.
    Holds a window and a block at most.
    """
    hop = max(1, round(window * (1 - overlap)))
    held, first, at = np.zeros(0, np.float32), 0, 0  # `held` begins at sample `first`, the next window at `at`
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
    rest = held[at - first :] if last_window == "filled" else held[-window:]
    filled = np.resize(rest, window) if short_clips == "repeat" else np.pad(rest, (0, window - len(rest)))
    yield Window(filled, total - len(rest), total)


def taper(steps: int) -> np.ndarray:
    """(steps,) weights of a window's scores: a triangle without zeros, for averages without steps at window borders.

    At its border a window has context on one side only; the middle of another window counts more.
    """
    middle = np.arange(steps) + 0.5
    return np.minimum(middle, steps - middle) / (steps / 2)


class SlidingAverage:
    """The weighted mean of overlapping windows' scores at their absolute times.

    Frame t begins at t * window / steps samples. Its score is that of its middle, averaged over the windows that
    were added before `take` returned it. window: in samples.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.first = 0  # the frame with which `total` begins
        self.total = np.zeros((0, 0))  # (frames, K), sums of weight * score
        self.weight = np.zeros((0, 1))

    def add(self, scores: np.ndarray, start: int, recording: Optional[int] = None) -> None:
        """(steps, K) of the window that begins at sample `start`, in the order of time.

        recording: samples of the whole, given with the last window.
        """
        steps, classes = scores.shape
        step = self.window / steps
        begin = max(self.first, frame_after(start, step))
        end = frame_after(start + self.window, step) if recording is None else step_count(recording, step)
        frames = np.arange(begin, end)
        stops = (frames + 1) * step
        if recording is not None:
            stops[-1:] = recording
        place = np.clip(np.floor(((frames * step + stops) / 2 - start) / step).astype(int), 0, steps - 1)
        weight = taper(steps)[place, None]
        missing = max(0, end - self.first - len(self.total))
        self.total = np.pad(self.total.reshape(-1, classes), ((0, missing), (0, 0)))
        self.weight = np.pad(self.weight, ((0, missing), (0, 0)))
        here = slice(begin - self.first, end - self.first)
        self.total[here] += weight * scores[place].astype(np.float64)
        self.weight[here] += weight

    def take(self, until: int) -> np.ndarray:
        """(frames, K) float32: the frames before `until` that were not taken yet."""
        count = min(max(0, until - self.first), len(self.total))
        assert np.all(self.weight[:count] > 0), "the windows leave a gap"
        taken = (self.total[:count] / self.weight[:count]).astype(np.float32)
        self.total, self.weight, self.first = self.total[count:], self.weight[count:], self.first + count
        return taken


class OverlapAverage(SlidingAverage):
    """SlidingAverage over a whole recording, of which finished frames are kept as float32."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.finished: list[np.ndarray] = []  # (FRAMES_PUT_AWAY, K) each, the last one up to `filled`
        self.filled = 0

    def add(self, scores: np.ndarray, start: int, recording: Optional[int] = None) -> None:
        """As SlidingAverage.add; frames that neither this window nor a later one covers are finished."""
        self._put_away(self.take(frame_after(start, self.window / len(scores))))
        super().add(scores, start, recording)

    def result(self) -> np.ndarray:
        """(T, K) float32, over the whole recording."""
        self._put_away(self.take(self.first + len(self.total)))
        return np.concatenate([*self.finished[:-1], self.finished[-1][: self.filled]])

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


def frame_count(length: float, step: float) -> int:
    """How many frames of `step` cover all of `length`, both in samples or both in seconds."""
    return max(1, int(np.ceil(length / step - 1e-9)))


def step_count(length: float, step: float) -> int:
    """How many steps `length` has, at least one. The last step lasts from half a step to one and a half.

    Where less than half a step is left at the end, it counts to the one before: no step is some milliseconds long.
    """
    return max(1, int(np.floor(length / step + 0.5 + 1e-9)))


def pool_sound(clipwise: np.ndarray, frames: np.ndarray, share: float, *, softmax: bool) -> np.ndarray:
    """(K,) clip probabilities of a padded window as those of the steps that hold sound.

    frames: (steps, K or more) probabilities of the window, of which the sound has a `share` from the start on. The
    clip's logits are the mean of the steps' (so in HTS-AT): they are moved by the difference between the mean of the
    steps with sound and that of all. softmax: whether the probabilities sum to 1. Without a time axis, or where
    all steps hold sound, clipwise is returned as it is.
    """
    steps, classes = len(frames), len(clipwise)
    inside = step_count(share * steps, 1.0)
    if inside >= steps:
        return clipwise
    of_steps = _logits(frames[:, :classes], softmax)
    with_sound = of_steps[:inside]
    logits = _logits(clipwise, softmax) + with_sound.mean(axis=0) - of_steps.mean(axis=0)
    if softmax:
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()
    # Where an encoder pools in another way, the difference is no mean: the clip's score stays among those of its steps.
    return 1 / (1 + np.exp(-np.clip(logits, with_sound.min(axis=0), with_sound.max(axis=0))))


def _logits(probabilities: np.ndarray, softmax: bool) -> np.ndarray:
    """float64 logits; those of a softmax but for a number that all classes share."""
    inside = np.clip(probabilities.astype(np.float64), SMALLEST, 1 - LAST_DIGIT)
    return np.log(inside) if softmax else np.log(inside) - np.log1p(-inside)


def frame_after(place: float, step: float) -> int:
    """The first frame of `step` whose middle does not lie before `place`, both in samples or both in seconds."""
    return int(np.ceil(place / step - 0.5))


def into_bins(
    framewise: np.ndarray,
    *,
    seconds_per_frame: float,
    duration: float,
    seconds_per_bin: float,
    by: Literal["mean", "max"],
) -> np.ndarray:
    """(T, K) frame scores -> (bins, K): the mean over each bin's time, or the maximum of the frames in it."""
    count = step_count(duration, seconds_per_bin)
    edges = np.append(np.arange(count) * seconds_per_bin, duration)
    frames = len(framewise)
    begins = np.arange(frames) * seconds_per_frame
    ends = np.append(begins[1:], duration)
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
