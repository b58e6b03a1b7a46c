"""Frame scores to events: against plain loops, by hand, and with the true events as scores."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.signal import medfilt

from data.clip_store import SPLITS
from evaluation.postprocess import PostProcessing, active_runs, choose_postprocessing, decode_events, smooth_scores
from prepare.demo import LABELS, synthesize_clip
from settings import UserError, resolve
from tests.evaluation.examples import STEP, clip_names, measured, on_grid, rows, score_store

Rows = list[tuple[str, float, float, str]]


def decode_in_loops(framewise: np.ndarray, seconds_per_frame: float, thresholds: np.ndarray) -> Rows:
    """Events clip by clip, class by class, frame by frame."""
    found: Rows = []
    for clip, frames in enumerate(framewise):
        for label in range(frames.shape[1]):
            start = None
            for number in range(len(frames) + 1):
                on = number < len(frames) and frames[number, label] > thresholds[label]
                if on and start is None:
                    start = number
                if not on and start is not None:
                    found.append((f"{clip}.wav", start * seconds_per_frame, number * seconds_per_frame, "abc"[label]))
                    start = None
    return found


def decode(post: PostProcessing, framewise: np.ndarray, step: float, seconds: float = 10.0) -> Rows:
    clips = len(framewise)
    durations = np.full(clips, seconds)
    return rows(post.decode(framewise, names=clip_names(clips), durations=durations, seconds_per_frame=step))


def test_runs_of_frames() -> None:
    active = np.array([[1, 0], [1, 0], [0, 1], [1, 1]], dtype=bool)
    runs = zip(*(column.tolist() for column in active_runs(active[None])), strict=True)
    assert list(runs) == [(0, 0, 0, 2), (0, 0, 3, 4), (0, 1, 2, 4)]
    post, framewise = PostProcessing(("a", "b")), active[None].astype(float)
    assert decode(post, framewise, 0.5, 1.75) == [
        ("0.wav", 0, 1, "a"),
        ("0.wav", 1.5, 1.75, "a"),
        ("0.wav", 1, 1.75, "b"),
    ]
    assert decode(post, framewise, 0.5, 1.0) == [("0.wav", 0, 1, "a")]  # frames after the end are left out


@pytest.mark.parametrize(("frames", "seconds"), [(32, 10.0), (250, 10.0), (7, 2.1)])
def test_events_as_loops_find_them(frames: int, seconds: float) -> None:
    framewise = np.random.default_rng(0).random((40, frames, 3)).astype(np.float32)
    thresholds = np.array([0.2, 0.5, 0.8])
    found = decode_events(
        framewise, names=clip_names(40), labels=list("abc"), durations=np.full(40, seconds),
        seconds_per_frame=seconds / frames, thresholds=thresholds,
    )  # fmt: skip
    assert len(found) > 100
    for one, other in zip(rows(found), decode_in_loops(framewise, seconds / frames, thresholds), strict=True):
        assert one == (other[0], pytest.approx(other[1]), pytest.approx(other[2]), other[3])


def test_published_output_on_the_repeated_map() -> None:
    """Thresholds on the map of 1,024 frames, nothing else: the events are those of the 32 steps."""
    steps = np.random.default_rng(1).random((5, 32, 3)).astype(np.float32)
    repeated = np.repeat(steps, 32, axis=1)
    post = PostProcessing(("a", "b", "c"), thresholds=(0.3, 0.5, 0.7))
    found = decode(post, repeated, STEP / 32)
    assert found == decode_in_loops(repeated, STEP / 32, np.array(post.thresholds))
    assert found == decode(post, steps, STEP)


def test_median_filter_of_each_class() -> None:
    framewise = np.random.default_rng(2).random((4, 32, 3))
    found = smooth_scores(framewise, np.full(4, 10.0), STEP, np.array([1, 3, 7]), 1)
    for label, length in enumerate((1, 3, 7)):
        for clip in range(4):
            padded = np.pad(framewise[clip, :, label], length, mode="edge")
            np.testing.assert_allclose(found[clip, :, label], medfilt(padded, length)[length:-length])


def test_padding_after_a_short_clip_is_not_used() -> None:
    framewise = np.zeros((1, 32, 1))
    framewise[0, 10:16] = 1  # up to the end of a clip of 5 s
    assert smooth_scores(framewise, np.array([5.0]), STEP, np.array([5]), 1)[0, 10:16].all()
    assert decode(PostProcessing(("a",), median_filter=(5,), interpolation=4), framewise, STEP, 5.0)[0][2] == 5.0


def test_interpolation_between_the_middles() -> None:
    framewise = np.random.default_rng(3).random((2, 8, 2))
    found = smooth_scores(framewise, np.full(2, 8.0), 1.0, np.array([1, 1]), 4)
    middles, fine = np.arange(8) + 0.5, (np.arange(32) + 0.5) / 4
    for clip in range(2):
        for label in range(2):
            np.testing.assert_allclose(found[clip, :, label], np.interp(fine, middles, framewise[clip, :, label]))
    ramp = np.array([0.0, 0.0, 1.0, 1.0])[None, :, None]  # crosses 0.5 between the second and the third middle
    ((_, onset, offset, _),) = decode(PostProcessing(("a",), interpolation=10), ramp, 1.0, 4.0)
    assert (onset, offset) == (pytest.approx(2.0), 4.0)


def test_gaps_are_closed_before_short_events_go() -> None:
    framewise = np.zeros((2, 20, 2))
    framewise[0, [2, 4], 0] = 1  # two frames of 0.5 s with 0.5 s between
    framewise[0, 15, 0] = 1
    framewise[0, [2, 4], 1] = 1  # class b closes no gaps
    framewise[1, 0, 0] = 1  # of another clip: not joined with the last event of the clip before
    post = PostProcessing(("a", "b"), maximum_gap=(0.5, 0.0), minimum_duration=(1.0, 0.5))
    assert decode(post, framewise, 0.5) == [
        ("0.wav", 1.0, 2.5, "a"),
        ("0.wav", 1.0, 1.5, "b"),
        ("0.wav", 2.0, 2.5, "b"),
    ]


@pytest.mark.parametrize("interpolation", [1, 4])
@pytest.mark.parametrize(("seconds", "frames"), [(2.001, 8), (2.4, 8), (2.001, 2), (2.4, 2), (2.5, 3), (2.9, 3)])
def test_no_event_lies_in_a_rest_of_the_last_frame(seconds: float, frames: int, interpolation: int) -> None:
    """Frames of a second, of the clip or also of the padding behind it: the last one ends with the clip."""
    post = PostProcessing(("a",), interpolation=interpolation)
    last = int(seconds + 0.5) - 1
    scores = np.zeros((1, frames, 1), np.float32)
    scores[0, last + 1 :] = 1.0  # the padding
    found = decode(post, scores, 1.0, seconds)
    assert all(offset - onset >= 0.49 / interpolation for _, onset, offset, _ in found)
    scores[0, last] = 1.0
    ((_, onset, offset, _),) = decode(post, scores, 1.0, seconds)
    assert (onset, offset) == (pytest.approx(last, abs=0.5), seconds)


def test_no_events_and_a_full_clip() -> None:
    post = PostProcessing(("a",), maximum_gap=(1.0,), minimum_duration=(0.1,))
    assert decode(post, np.zeros((2, 4, 1)), 1.0, 4.0) == []
    assert decode(post, np.ones((1, 4, 1)), 1.0, 3.5) == [("0.wav", 0.0, 3.5, "a")]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"median_filter": (4,)}, "median_filter"),
        ({"median_filter": (0,)}, "median_filter"),
        ({"thresholds": (0.1, 0.2)}, "thresholds"),
        ({"thresholds": (float("nan"),)}, "thresholds"),
        ({"minimum_duration": (-1.0,)}, "minimum_duration"),
        ({"interpolation": 0}, "interpolation"),
    ],
)
def test_values_that_are_not_allowed(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        PostProcessing(("a", "b", "c"), **values)


def test_kept_as_plain_values() -> None:
    post = PostProcessing(("a", "b"), (0.2, 0.7), (1, 5), (0.0, 0.4), (0.1, 0.0), 2, "by hand")
    assert PostProcessing.from_dict(json.loads(json.dumps(post.as_dict()))) == post
    turned = post.for_labels(["b", "a"])
    assert (turned.thresholds, turned.median_filter, turned.source) == ((0.7, 0.2), (5, 1), "by hand")
    with pytest.raises(UserError, match="classes c"):
        post.for_labels(["a", "c"])
    with pytest.raises(UserError, match="treshold"):
        PostProcessing.from_dict({"labels": ["a"], "treshold": 1})


def test_settings_replace_stored_values() -> None:
    labels = ("a", "b", "c")
    calibrated = PostProcessing(labels, (0.1, 0.2, 0.3), (1, 3, 5), source="calibrated")
    assert choose_postprocessing(calibrated, labels, resolve()) == calibrated
    chosen = choose_postprocessing(calibrated, labels, resolve({"fl_threshold": [0.7], "fl_maximum_gap": "0,0,1"}))
    assert (chosen.thresholds, chosen.median_filter, chosen.maximum_gap) == ((0.7, 0.7, 0.7), (1, 3, 5), (0, 0, 1))
    assert "fl_threshold, fl_maximum_gap" in chosen.source
    assert choose_postprocessing(None, labels, resolve()) == PostProcessing(labels)


def test_true_events_on_the_grid_score_nearly_everything() -> None:
    """The oracle: the demo's test split, rounded to frames of 312.5 ms, through decoding and metrics."""
    place = SPLITS.index("test")
    clips = [synthesize_clip(f"{n}.wav", "test", 16000, np.random.default_rng([970131, place, n])) for n in range(60)]
    true = [[(e.label, e.onset, e.offset) for e in clip.events] for clip in clips]
    oracle = score_store(on_grid(true, (60, 32, 10)), true, labels=LABELS)
    metrics, post = ("intersection F1", "collar F1", "PSDS1"), PostProcessing(tuple(LABELS))
    found = measured(oracle, post)
    assert [found[name].macro > least for name, least in zip(metrics, (0.97, 0.9, 0.95), strict=True)] == [True] * 3
    silent = measured(replace(oracle, framewise=np.zeros((60, 32, 10))), post)
    assert [silent[name].macro for name in metrics] == [0, 0, 0]
