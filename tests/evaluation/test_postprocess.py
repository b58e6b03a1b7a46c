"""Frame scores to events: against plain loops, by hand, and with the true events as scores."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.signal import medfilt

from data.clip_store import SPLITS
from evaluation.postprocess import EVENT_COLUMNS, PostProcessing, decode_events, detected_frames, smooth_scores
from evaluation.scores import Scores, load_scores
from fl_evaluate import evaluate
from prepare.demo import LABELS, synthesize_clip

STEP = 10 / 32
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


def rows(table: pd.DataFrame) -> Rows:
    return [tuple(row) for row in table[EVENT_COLUMNS].to_numpy().tolist()]


def where(clips: int, seconds: float = 10.0) -> dict:
    return {"names": [f"{clip}.wav" for clip in range(clips)], "durations": np.full(clips, seconds)}


def test_events_as_loops_find_them() -> None:
    framewise = np.random.default_rng(0).random((40, 32, 3)).astype(np.float32)
    thresholds = np.array([0.2, 0.5, 0.8])
    found = decode_events(framewise, labels=list("abc"), seconds_per_frame=STEP, thresholds=thresholds, **where(40))
    expected = decode_in_loops(framewise, STEP, thresholds)
    assert len(expected) > 500
    assert rows(found) == expected


def test_published_output_on_the_repeated_map() -> None:
    """Thresholds on the map of 1,024 frames, nothing else: the events are those of the 32 steps."""
    steps = np.random.default_rng(1).random((5, 32, 3)).astype(np.float32)
    repeated = np.repeat(steps, 32, axis=1)
    post = PostProcessing(("a", "b", "c"), thresholds=(0.3, 0.5, 0.7))
    frames = post.decode(repeated, seconds_per_frame=STEP / 32, **where(5))
    assert rows(frames) == decode_in_loops(repeated, STEP / 32, np.array(post.thresholds))
    assert rows(frames) == rows(post.decode(steps, seconds_per_frame=STEP, **where(5)))


def test_median_filter_of_each_class() -> None:
    framewise = np.random.default_rng(2).random((4, 32, 3))
    found = smooth_scores(framewise, np.full(4, 10.0), STEP, np.array([1, 3, 7]), 1)
    for label, length in enumerate((1, 3, 7)):
        for clip in range(4):
            padded = np.pad(framewise[clip, :, label], length, mode="edge")
            np.testing.assert_allclose(found[clip, :, label], medfilt(padded, length)[length:-length])


def test_what_follows_a_short_clip_counts_for_nothing() -> None:
    framewise = np.zeros((1, 32, 1))
    framewise[0, 10:16] = 1  # up to the end of a clip of 5 s
    lengths = np.array([5])
    assert smooth_scores(framewise, np.array([5.0]), STEP, lengths, 1)[0, 10:16].all()
    post = PostProcessing(("a",), median_filter=(5,), interpolation=4)
    assert rows(post.decode(framewise, seconds_per_frame=STEP, **where(1, 5.0)))[0][2] == 5.0


def test_interpolation_between_the_middles() -> None:
    framewise = np.random.default_rng(3).random((2, 8, 2))
    found = smooth_scores(framewise, np.full(2, 8.0), 1.0, np.array([1, 1]), 4)
    middles, fine = np.arange(8) + 0.5, (np.arange(32) + 0.5) / 4
    for clip in range(2):
        for label in range(2):
            np.testing.assert_allclose(found[clip, :, label], np.interp(fine, middles, framewise[clip, :, label]))
    ramp = np.array([0.0, 0.0, 1.0, 1.0])[None, :, None]  # crosses 0.5 between the second and the third middle
    post = PostProcessing(("a",), interpolation=10)
    ((_, onset, offset, _),) = rows(post.decode(ramp, seconds_per_frame=1.0, **where(1, 4.0)))
    assert (onset, offset) == (pytest.approx(2.0), 4.0)


def test_gaps_are_closed_before_short_events_go() -> None:
    framewise = np.zeros((2, 20, 2))
    framewise[0, [2, 4], 0] = 1  # two frames of 0.5 s with 0.5 s between
    framewise[0, 15, 0] = 1
    framewise[0, [2, 4], 1] = 1  # class b closes no gaps
    framewise[1, 0, 0] = 1  # of another clip: not joined with what the clip before ends with
    post = PostProcessing(("a", "b"), maximum_gap=(0.5, 0.0), minimum_duration=(1.0, 0.5))
    found = rows(post.decode(framewise, seconds_per_frame=0.5, **where(2)))
    assert found == [("0.wav", 1.0, 2.5, "a"), ("0.wav", 1.0, 1.5, "b"), ("0.wav", 2.0, 2.5, "b")]


def test_no_events_and_a_full_clip() -> None:
    post = PostProcessing(("a",), maximum_gap=(1.0,), minimum_duration=(0.1,))
    assert post.decode(np.zeros((2, 4, 1)), seconds_per_frame=1.0, **where(2, 4.0)).columns.tolist() == EVENT_COLUMNS
    (only,) = rows(post.decode(np.ones((1, 4, 1)), seconds_per_frame=1.0, **where(1, 3.5)))
    assert only == ("0.wav", 0.0, 3.5, "a")


def test_events_back_to_frames() -> None:
    framewise = (np.random.default_rng(4).random((6, 32, 3)) > 0.6).astype(float)
    post = PostProcessing(("a", "b", "c"))
    found = post.decode(framewise, seconds_per_frame=STEP, **where(6))
    names = where(6)["names"]
    again = detected_frames(found, names=names, labels=post.labels, frames=32, seconds_per_frame=STEP)
    np.testing.assert_array_equal(again, framewise)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"median_filter": (4,)}, "odd"),
        ({"median_filter": (0,)}, "odd"),
        ({"thresholds": (0.1, 0.2)}, "give 1, or one for each of the 3 classes"),
        ({"thresholds": (float("nan"),)}, "finite"),
        ({"minimum_duration": (-1.0,)}, "0 or more"),
        ({"interpolation": 0}, "interpolation = 0"),
    ],
)
def test_values_that_are_not_allowed(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PostProcessing(("a", "b", "c"), **values)


def test_kept_as_plain_values() -> None:
    post = PostProcessing(("a", "b"), (0.2, 0.7), (1, 5), (0.0, 0.4), (0.1, 0.0), 2, "by hand")
    assert PostProcessing.from_dict(json.loads(json.dumps(post.as_dict()))) == post
    turned = post.for_labels(["b", "a"])
    assert (turned.thresholds, turned.median_filter, turned.source) == ((0.7, 0.2), (5, 1), "by hand")
    with pytest.raises(ValueError, match="does not know the classes c"):
        post.for_labels(["a", "c"])
    with pytest.raises(ValueError, match="no post-processing"):
        PostProcessing.from_dict({"labels": ["a"], "treshold": 1})


def test_true_events_on_the_grid_score_nearly_everything(tmp_path: Path) -> None:
    """The oracle: the demo's test split, rounded to the network's steps, through store, decoding and metrics."""
    place = SPLITS.index("test")
    clips = [synthesize_clip(f"{n}.wav", "test", 32000, np.random.default_rng([970131, place, n])) for n in range(60)]
    framewise = np.zeros((60, 32, 10))
    for number, clip in enumerate(clips):
        for event in clip.events:
            framewise[number, round(event.onset / STEP) : round(event.offset / STEP), event.label] = 1
    Scores(
        names=[clip.name for clip in clips],
        clipwise=framewise.max(axis=1),
        targets=framewise.max(axis=1) > 0,
        durations=np.full(60, 10.0),
        labels=LABELS,
        framewise=framewise,
        seconds_per_frame=STEP,
        events=[[(e.label, e.onset, e.offset) for e in clip.events] for clip in clips],
    ).save(tmp_path / "oracle.h5")
    _, metrics = evaluate(load_scores(tmp_path / "oracle.h5"), PostProcessing(tuple(LABELS)))
    assert metrics[0].name.startswith("intersection F1")
    assert metrics[0].macro > 0.97
