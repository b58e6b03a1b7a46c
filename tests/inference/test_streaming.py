"""A Listener: blocks of any length give the same events, those of Tagger on the whole, and memory does not grow."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from evaluation.postprocess import PostProcessing
from inference import Tagger
from inference.streaming import Listener
from settings import UserError, resolve
from tests.levels import (
    EXACT,
    LABELS,
    STEP,
    FramelessTagger,
    events_of,
    levels,
    levels_tagger,
    rows,
    stretches,
    taggers_rows,
)  # fmt: skip


@pytest.mark.parametrize("rate", [8000, 11025, 48000])
def test_blocks_of_any_length_give_the_same_events(rate: int) -> None:
    sound, rng = levels(33.3, rate=rate), np.random.default_rng(1)
    found = []
    for longest in (rate // 50, rate, 7 * rate, 100 * rate):
        cuts = np.cumsum(rng.integers(0, longest + 1, size=20_000))
        found.append(events_of(Listener(levels_tagger(), sample_rate=rate), np.split(sound, cuts[cuts < len(sound)])))
    assert len(found[0]) > 5
    assert all(events == found[0] for events in found[1:])


def test_single_samples_are_blocks_too() -> None:
    sound, of = levels(25, rate=640), levels_tagger(640, window_size=64, hop_size=8)
    events = events_of(Listener(of), [sound])
    assert len(events) > 3
    assert events_of(Listener(of), np.split(sound, len(sound))) == events


@pytest.mark.parametrize("seconds", [0.01, 3.3, 9.99, 10, 10.01, 15, 20, 47.7])
@pytest.mark.parametrize("short_clips", ["pad", "repeat"])
def test_with_all_windows_the_events_are_taggers(seconds: float, short_clips: str) -> None:
    sound, of = levels(seconds, seed=3), levels_tagger(short_clips=short_clips)
    assert rows(events_of(Listener(of, **EXACT), np.array_split(sound, 13))) == taggers_rows(of, sound)


@pytest.mark.parametrize("interpolation", [1, 4])
@pytest.mark.parametrize("seconds", [4.1, 10, 33.3, 61])
def test_smoothing_and_joining_are_taggers(seconds: float, interpolation: int) -> None:
    of, sound = levels_tagger(), levels(seconds, seed=8)
    sound += 0.3 * np.random.default_rng(0).standard_normal(len(sound)).astype(np.float32)
    processing = PostProcessing(
        LABELS, thresholds=(0.4, 0.2), median_filter=(3, 7), minimum_duration=(0.6, 0.0), maximum_gap=(0.0, 0.9),
        interpolation=interpolation,
    )  # fmt: skip
    expected = taggers_rows(of, sound, processing)
    assert expected
    assert rows(events_of(Listener(of, postprocessing=processing, **EXACT), np.array_split(sound, 29))) == expected


@pytest.mark.parametrize("delay", [0.0, 2.5, None, 10.0])
@pytest.mark.parametrize("hop", [0.3, 1.0, 2.0, 10.0])
def test_events_lie_within_a_step_of_taggers(hop: float, delay: float | None) -> None:
    sound = stretches((2, 0.1), (3, 0.9), (4.4, 0.0), (6.1, -0.8), (7, 0.2), (5.3, 0.7), (14.2, 0.0))
    of = levels_tagger()
    found = rows(events_of(Listener(of, hop_seconds=hop, delay_seconds=delay), np.array_split(sound, 50)))
    expected = taggers_rows(of, sound)
    assert [label for label, *_ in found] == [label for label, *_ in expected] == ["down", "up", "up"]
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in expected], atol=STEP + 1e-6)


def test_events_are_certain_once_their_delay_is_over() -> None:
    listener = Listener(levels_tagger(), hop_seconds=1, delay_seconds=3)
    assert listener.hop_seconds == 3 * STEP
    updates = [update for block in np.array_split(levels(60), 600) for update in listener.feed(block)]
    for update in updates:
        assert not update.events or update.sound_seconds >= 10
        for event in update.events:
            late = event.known_at - event.offset
            assert 3 - STEP <= late <= max(3 + listener.hop_seconds + 2 * STEP, 10 - event.offset)
            assert event.known_at == update.sound_seconds
    assert len([event for update in updates for event in update.events]) > 5
    np.testing.assert_allclose(np.diff([update.sound_seconds for update in updates]), listener.hop_seconds, atol=1e-3)


@pytest.mark.parametrize("kind", [Tagger, FramelessTagger])
def test_tags_come_before_the_first_window_is_full(kind: type[Tagger]) -> None:
    listener = Listener(levels_tagger(short_clips="repeat", kind=kind))
    first, *_ = listener.feed(stretches((3, 0.6)))
    assert first.sound_seconds == pytest.approx(10 % listener.hop_seconds or listener.hop_seconds, abs=1e-3)
    assert first.window.top(1) == [("up", pytest.approx(0.6))]
    assert first.events == []


def test_without_a_time_axis_there_are_tags_alone() -> None:
    listener = Listener(levels_tagger(kind=FramelessTagger), hop_seconds=0.7)
    updates = listener.feed(stretches((20, 0.9))) + listener.finish()
    assert len(updates) == 30
    assert all((update.active, update.events) == ([], []) for update in updates)
    assert updates[-1].window.top(1) == [("up", pytest.approx(0.9))]


def test_hysteresis_bridges_a_dip_that_stays_above_the_lower_threshold() -> None:
    sound = stretches((5, 0), (2.5, 0.7), (2.5, 0.45), (2.5, 0.7), (2.5, 0.3), (2.5, 0.45), (7.5, 0))
    assert rows(events_of(Listener(levels_tagger(), **EXACT), [sound])) == [("up", 5, 7.5), ("up", 10, 12.5)]
    (event,) = events_of(Listener(levels_tagger(), **{**EXACT, "release": 0.8}), [sound])
    assert (event.label, event.onset, event.offset, event.peak) == ("up", 5, 12.5, pytest.approx(0.7))


def test_an_event_that_lasts_is_active_and_ends_with_the_sound() -> None:
    listener = Listener(levels_tagger())
    updates = listener.feed(stretches((5, 0), (20, -0.9)))
    assert updates[-1].active == ["down"]
    assert rows([event for update in listener.finish() for event in update.events]) == [("down", 5, 25)]


def test_an_hour_takes_no_more_memory_than_a_minute() -> None:
    listener = Listener(levels_tagger(800, window_size=64, hop_size=8), hop_seconds=10)
    minute = np.zeros(60 * 800, np.float32)
    listener.feed(minute)
    listener.feed(minute)
    tracemalloc.start()
    listener.feed(minute)
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(57):
        listener.feed(minute)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert listener.sound_seconds == 3600
    assert after - before < 20_000


def test_channels_are_averaged_and_int16_is_scaled() -> None:
    sound = levels(20)
    expected = rows(events_of(Listener(levels_tagger(), **EXACT), [sound]))
    halves = np.stack([sound * 2, np.zeros_like(sound)])
    assert rows(events_of(Listener(levels_tagger(), **EXACT), np.array_split(halves, 7, axis=1))) == expected
    integers = (sound * 32767).round().astype(np.int16)
    assert rows(events_of(Listener(levels_tagger(), **EXACT), [integers])) == expected


def test_the_real_time_factor_is_computing_time_over_sound() -> None:
    ticks = iter(np.arange(0, 1000, 0.25))
    listener = Listener(levels_tagger(), hop_seconds=1.25, clock=lambda: float(next(ticks)))
    assert listener.real_time_factor == 0
    updates = listener.feed(levels(20))
    assert {update.seconds for update in updates} == {0.25}
    assert listener.real_time_factor == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("hop_seconds", value) for value in (0, 10.5, float("nan"))),
        *(("delay_seconds", value) for value in (11, -1)),
        *(("release", value) for value in (0, 1.1)),
        ("sample rate", 10),
    ],
)
def test_values_that_are_not_allowed(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        Listener(levels_tagger(), **{name.replace(" ", "_"): value})


def test_samples_that_are_not_finite_and_the_end() -> None:
    listener = Listener(levels_tagger())
    with pytest.raises(UserError, match="finite"):
        listener.feed(np.array([0, np.nan], np.float32))
    assert listener.feed(np.zeros(0, np.float32)) == []
    assert listener.finish() == []
    with pytest.raises(UserError, match="finished"):
        listener.feed(np.zeros(10, np.float32))


class Six:
    """A network with 6 steps: of a window of 5,040 samples at 44.1 kHz, times that no binary number is exact for."""

    frames = 6

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        frames = waveform.unflatten(1, (6, -1)).mean(dim=2, keepdim=True).clamp(min=0).expand(-1, -1, 2)
        return frames.mean(dim=1), frames, frames.mean(dim=1)


def test_hops_that_divide_a_window_but_for_rounding() -> None:
    tagger = Tagger(Six(), resolve({"sample_rate": 44100, "clip_samples": 5040}), LABELS)
    listener = Listener(tagger, hop_seconds=5040 / 44100 / 2)
    assert [round(update.sound_seconds * 44100) for update in listener.feed(np.full(10_080, 0.5))] == [
        2520,
        5040,
        7560,
        10_080,
    ]
