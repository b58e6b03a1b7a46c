"""A stream of sound -> tags and events while it lasts: inference.Tagger over a sliding window."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import soxr

from data.audio import mono_waveform
from inference.tagger import Tagged, Tagger
from inference.windows import SlidingAverage, frame_count, step_count
from settings import UserError

if TYPE_CHECKING:
    from evaluation.postprocess import PostProcessing

DEFAULT_HOP_SECONDS, DEFAULT_RELEASE = 1.0, 0.8


@dataclass(frozen=True)
class Event:
    """A finished event. Times in seconds since the first sample; known_at: the time at which it was final.

    threshold: above which its class's score begins an event.
    """

    label: str
    onset: float
    offset: float
    peak: float  # the highest of its scores
    known_at: float
    threshold: float


@dataclass(frozen=True)
class Update:
    """The result of one evaluation. sound_seconds: the length of the sound so far."""

    sound_seconds: float
    window: Tagged  # of the last window
    active: list[str]  # classes that are on in the last settled frame
    events: list[Event]  # finished and final
    seconds: float  # how long the evaluation took


class Listener:
    """A Tagger for sound that arrives block by block.

    The last clip_samples are kept, and tagged every hop_seconds. The frame scores of the windows that overlap are
    averaged as Tagger averages them; a frame is settled, once and for all, delay_seconds after its end. The scores are
    then smoothed as the post-processing says, and become events with hysteresis. The result does not depend on the
    lengths of the blocks, and memory does not grow. With hop_seconds of Tagger's windows, a delay of a whole window and
    release = 1, the events are Tagger's.
    """

    def __init__(
        self,
        tagger: Tagger,
        *,
        sample_rate: Optional[int] = None,
        hop_seconds: float = DEFAULT_HOP_SECONDS,
        delay_seconds: Optional[float] = None,
        release: float = DEFAULT_RELEASE,
        postprocessing: "Optional[PostProcessing]" = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """sample_rate: of the samples, in Hz; None: the network's. hop_seconds is rounded to whole steps of its scores.

        delay_seconds: from 0 to a window; None: half a window, when each moment has been in the middle of one.
        release: an event begins when its class's score rises above the threshold, and lasts until the score falls to
        this share of it. postprocessing: thresholds and filters; None: the Tagger's. Raises UserError for values that
        are not allowed.
        """
        self.tagger, self.clock = tagger, clock
        self.rate, self.window = tagger.settings.sample_rate, tagger.settings.clip_samples
        window_seconds = self.window / self.rate
        self.delay_seconds = window_seconds / 2 if delay_seconds is None else delay_seconds
        _check(hop_seconds, self.delay_seconds, release, window_seconds, sample_rate)
        silence = tagger.tag(np.zeros(self.window, np.float32))  # for the frames; also, the first pass is the slowest
        self.frames = len(silence.framewise)  # of a window; 0: the encoder has no time axis, there are tags alone
        self.step_seconds = silence.seconds_per_frame or hop_seconds
        self.hop_seconds = self.step_seconds * max(1, round(hop_seconds / self.step_seconds))
        chosen = postprocessing or tagger.postprocessing
        if chosen.convention == "centres":
            raise UserError(
                f"The post-processing {chosen.source} times events by the centres of frames, which is for recordings "
                f"alone: give another fl_postprocessing."
            )
        self.resampler = (
            None if sample_rate in (None, self.rate) else soxr.ResampleStream(sample_rate, self.rate, 1, "float32")
        )
        self.scores = SlidingAverage(self.window)
        self.smoother = Smoother(chosen, self.step_seconds)
        self.tracker = EventTracker(chosen, self.step_seconds / chosen.interpolation, release)
        self.buffer, self.filled = np.zeros(2 * self.window, np.float32), 0
        self.samples, self.settled_until = 0, -1  # samples so far; the end of the last full window that was scored
        before = frame_count(window_seconds, self.hop_seconds) - 1  # evaluations of less than a window
        self.hops = -before  # the first full window has number 0
        self.finished = False
        self.evaluations, self.busy_seconds, self.slowest_seconds = 0, 0.0, 0.0

    @property
    def real_time_factor(self) -> float:
        """Computing time over the sound's time: below 1, the machine keeps up."""
        return self.busy_seconds / (self.evaluations * self.hop_seconds) if self.evaluations else 0.0

    @property
    def sound_seconds(self) -> float:
        """The length of the sound so far."""
        return self.samples / self.rate

    def feed(self, samples: Any) -> list[Update]:
        """Take the next (samples,) or (channels, samples): float in [-1, 1] or int16, of any number, also none.

        Returns an update for each hop that is complete now. Before the first window is full, updates have tags of the
        shorter sound, and no events. Raises UserError for samples that are not finite, and after `finish`.
        """
        if self.finished:
            raise UserError("This Listener has finished: make a new one.")
        array = np.asarray(samples)
        if array.size == 0:
            return []
        block = mono_waveform(array, self.rate, self.rate)  # channels averaged; the rate is seen to below
        return self._take(block if self.resampler is None else self.resampler.resample_chunk(block))

    def finish(self) -> list[Update]:
        """The sound is over: the last window, which ends with it, and all events that were still open."""
        updates = []
        if self.resampler is not None and not self.finished:
            updates = self._take(self.resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        if self.samples and not self.finished:
            updates.append(self._evaluate(last=True))
        self.finished = True
        return updates

    def _take(self, block: np.ndarray) -> list[Update]:
        updates = []
        while len(block):
            due = self.window + round(self.hops * self.hop_seconds * self.rate)
            part, block = np.split(block, [min(due - self.samples, len(block))])
            self._hold(part)
            if self.samples == due:
                updates.append(self._evaluate(last=False))
                self.hops += 1
        return updates

    def _hold(self, part: np.ndarray) -> None:
        """Put samples, at most a window, behind the others; the last window always lies there in one piece."""
        if self.filled + len(part) > len(self.buffer):
            kept = self.buffer[self.filled - self.window : self.filled]
            self.buffer[: self.window], self.filled = kept, self.window
        self.buffer[self.filled : self.filled + len(part)] = part
        self.filled += len(part)
        self.samples += len(part)

    def _evaluate(self, *, last: bool) -> Update:
        begin = self.clock()
        held = self.buffer[max(0, self.filled - self.window) : self.filled]
        tagged = self.tagger.tag(held)
        events: list[Event] = []
        if self.frames and (last or self.samples >= self.window):
            if self.settled_until != self.samples:
                missing = self.frames - len(tagged.framewise)  # of a sound that is shorter than a window
                scores = np.pad(tagged.framewise, ((0, missing), (0, 0)), mode="edge")
                self.scores.add(scores, self.samples - len(held), self.samples if last else None)
            self.settled_until = self.samples
            events = self._settle(last)
        seconds = self.clock() - begin
        self.evaluations += 1
        self.busy_seconds += seconds
        self.slowest_seconds = max(self.slowest_seconds, seconds)
        return Update(self.sound_seconds, tagged, self.tracker.active_labels(), events, seconds)

    def _settle(self, last: bool) -> list[Event]:
        """Events of the frames whose delay is over."""
        step = self.window / self.frames
        until = self.samples - self.delay_seconds * self.rate
        frames = self.scores.take(step_count(self.samples, step) if last else int(until / step + 1e-6))
        smooth = self.smoother.feed(frames, self.sound_seconds if last else None)
        return self.tracker.feed(smooth, self.sound_seconds, last)


def _check(hop: float, delay: float, release: float, window: float, sample_rate: Optional[int]) -> None:
    if not 0 < hop <= window:
        raise UserError(f"hop_seconds = {hop:g} is not allowed: it must lie above 0 and be at most {window:g}.")
    if not 0 <= delay <= window:
        raise UserError(f"delay_seconds = {delay:g} is not allowed: it must lie between 0 and {window:g}.")
    if not 0 < release <= 1:
        raise UserError(f"release = {release:g} is not allowed: it must lie above 0 and be at most 1.")
    if sample_rate is not None and not 1000 <= sample_rate <= 768_000:
        raise UserError(f"A sample rate of {sample_rate} Hz is not allowed: 1000 to 768000 Hz are.")


class Smoother:
    """PostProcessing.smooth for scores that arrive piece by piece: each frame waits for those its filter looks at."""

    def __init__(self, processing: "PostProcessing", step_seconds: float) -> None:
        self.processing, self.step_seconds = processing, step_seconds
        interpolates = processing.interpolation > 1
        self.margin = max(processing.median_filter) // 2 + int(interpolates)  # frames on either side
        self.held = np.zeros((0, len(processing.labels)), np.float32)
        self.before = 0  # frames of `held` that were given away and are neighbours of those that come

    def feed(self, frames: np.ndarray, duration: Optional[float] = None) -> np.ndarray:
        """(n, K) further frames -> (m * interpolation, K); duration: of the whole, in seconds, with its last frames."""
        self.held = np.concatenate([self.held, frames])
        until = len(self.held) - (0 if duration is not None else self.margin)
        if until <= self.before:
            return self.held[:0]
        seconds = np.array([len(self.held) * self.step_seconds])
        smooth, _ = self.processing.smooth(self.held[None], durations=seconds, seconds_per_frame=self.step_seconds)
        parts = self.processing.interpolation
        done = smooth[0, self.before * parts : until * parts]
        self.held = self.held[max(0, until - self.margin) :]
        self.before = min(until, self.margin)
        return done


@dataclass
class EventTracker:
    """Smoothed scores -> events, with hysteresis; joined and left out as evaluation.postprocess.decode_events does."""

    processing: "PostProcessing"
    step_seconds: float  # of a smoothed frame
    release: float
    position: int = 0  # smoothed frames seen
    on: np.ndarray = field(init=False)  # (K,) whether each class is on
    waiting: np.ndarray = field(init=False)  # (K,) whether it is off and may yet be joined to the next event

    def __post_init__(self) -> None:
        self.thresholds = np.array(self.processing.thresholds)
        self.low = np.minimum(self.thresholds, self.thresholds * self.release)
        self.gaps, self.shortest = np.array(self.processing.maximum_gap), np.array(self.processing.minimum_duration)
        classes = len(self.thresholds)
        self.on, self.waiting = np.zeros(classes, bool), np.zeros(classes, bool)
        self.onset, self.offset, self.peak = np.zeros(classes), np.zeros(classes), np.zeros(classes)

    def active_labels(self) -> list[str]:
        return [self.processing.labels[k] for k in np.flatnonzero(self.on)]

    def feed(self, scores: np.ndarray, until: float, last: bool) -> list[Event]:
        """The events that are final after (n, K) further frames; until: its length so far, the end if `last`."""
        events: list[Event] = []
        for frame in scores:
            begin, end = self.position * self.step_seconds, (self.position + 1) * self.step_seconds
            if last and self.position >= step_count(until, self.step_seconds):
                break
            self._frame(frame, begin)
            self.position += 1
            events += self._close(self.waiting & (end - self.offset > self.gaps + 1e-9), until)
        if last:
            self.offset[self.on] = until
            self.waiting |= self.on
            self.on[:] = False
            events += self._close(self.waiting.copy(), until)
        return events

    def _frame(self, scores: np.ndarray, begin: float) -> None:
        on = np.where(self.on, scores > self.low, scores > self.thresholds)
        started, stopped = on & ~self.on, self.on & ~on
        new = started & ~self.waiting
        self.onset[new], self.peak[new] = begin, scores[new]
        self.waiting[started] = False
        self.offset[stopped] = begin
        self.waiting[stopped] = True
        self.peak[on] = np.maximum(self.peak[on], scores[on])
        self.on = on

    def _close(self, chosen: np.ndarray, until: float) -> list[Event]:
        self.waiting[chosen] = False
        # Times are multiples of a step: an event of exactly the minimum may be shorter by a rounding error.
        long_enough = chosen & (self.offset - self.onset >= self.shortest - 1e-9)
        values = zip(np.flatnonzero(long_enough), self.onset[long_enough], self.offset[long_enough], strict=True)
        labels = self.processing.labels
        return [
            Event(labels[k], float(a), float(min(b, until)), float(self.peak[k]), until, float(self.thresholds[k]))
            for k, a, b in values
        ]
