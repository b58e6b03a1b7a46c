"""Metrics and post-processing of the frame-level encoders: their golden numbers, sed_eval, SciPy."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sed_eval
import torch
from scipy.ndimage import median_filter

from data.frame_targets import Events, rasterize
from evaluation.detection import System, measure
from evaluation.event_tables import GroundTruth
from evaluation.postprocess import PostProcessing, choose_postprocessing
from evaluation.scores import Scores
from evaluation.systems import CLIPS, evaluated_scores
from settings import UserError, resolve
from tests.evaluation.examples import events, measured, rows, score_store

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "detection.json").read_text())
LABELS = ["cough", "knock", "phone"]
FRAME = 0.04


def load_golden(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def toy() -> Scores:
    logits, true = load_golden(FOLDER / "draw_frame.py").draw_scores(12, 5, 250, 34)
    seconds = np.full(12, 10.0)
    seconds[0] = 9.7
    known = [[(k, a, min(b, end)) for a, b, k in clip if a < end] for clip, end in zip(true, seconds, strict=True)]
    labels = [f"class{k}" for k in range(5)]
    scores = sigmoid(logits.transpose(0, 2, 1))
    return score_store(scores, known, labels=labels, step=FRAME, seconds=seconds, dataset_type="audioset-strong")


def named(name: str, labels: list[str], **given: Any) -> PostProcessing:
    return choose_postprocessing(None, labels, resolve({"fl_postprocessing": name, **given}))


def table(listed: dict[str, list[list[Any]]]) -> pd.DataFrame:
    return events(*((f, a / 1000, b / 1000, label) for f, clip in listed.items() for label, a, b in clip))


def test_psds1_macro_and_partial_auroc_are_the_golden_ones() -> None:
    scores, golden = toy(), GOLDEN["toy"]
    found = measured(scores, named("published_sed", scores.labels))
    assert found["PSDS1"].macro == pytest.approx(golden["psds1"], abs=1e-9)
    assert found["PSDS1"].per_class == pytest.approx(golden["psds1_per_class"], abs=1e-9)
    assert found["psds1_macro"].macro == pytest.approx(golden["psds1_macro"], abs=1e-9)
    assert found["pAUROC"].macro == pytest.approx(golden["pauroc"], abs=1e-9)
    assert found["pAUROC"].per_class == pytest.approx(golden["pauroc_per_class"], abs=1e-9)


def test_clips_and_classes_without_events_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A class that only training has, and a clip whose events are of other classes, as AudioSet Strong has them."""
    scores = toy()
    more = np.full((13, 250, 6), 0.9)
    more[:12, :, :5] = scores.framewise
    known = [*scores.true_events(), []]
    seconds = np.append(scores.durations, 10.0)
    labels = [*scores.labels, "absent"]
    wider = score_store(more, known, labels=labels, step=FRAME, seconds=seconds, dataset_type="audioset-strong")
    post = named("published_sed", labels)
    one, other = measured(scores, named("published_sed", scores.labels)), measured(wider, post)
    assert other["psds1_macro"].macro < one["psds1_macro"].macro  # its false alarms count
    found = measured(evaluated_scores(wider, resolve()), post)
    for name in ("PSDS1", "psds1_macro", "pAUROC"):
        assert found[name].macro == one[name].macro
    assert np.isnan(found["pAUROC"].per_class["absent"])
    shown = capsys.readouterr().out
    assert "1 of 13 clips" in shown
    assert "5 of 6 classes" in shown
    assert len(evaluated_scores(wider, resolve({"fl_clips": "all"})).names) == 13


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5])
def test_published_read_out_is_scipys_filter_and_runs(threshold: float) -> None:
    """The frames of the padding behind a recording of 23 s are not used; its last frames are mirrored."""
    raw = np.random.default_rng(0).random((750, 3)).astype(np.float32) ** 1.5
    smoothed = median_filter(raw[:575], (9, 1)) > threshold
    expected = []
    for k, label in enumerate("abc"):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], smoothed[:, k], [0]])))
        expected += [(a * FRAME, b * FRAME, label) for a, b in edges.reshape(-1, 2).tolist()]
    post = named("published_sed", list("abc"), fl_threshold=[threshold])
    for frames in (raw, raw[:575]):
        found = post.decode(frames[None], names=["x"], durations=np.array([23.0]), seconds_per_frame=FRAME)
        assert len(found) == len(expected) > 10
        for row, wanted in zip(rows(found), expected, strict=True):
            assert row[1:] == (pytest.approx(wanted[0]), pytest.approx(wanted[1]), wanted[2])


def test_cross_triggers_of_many_classes_are_refused_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = toy()
    post = named("published_sed", scores.labels)
    assert np.isfinite(measured(scores, post)["PSDS2"].macro)
    monkeypatch.setattr("evaluation.detection.MOST_CROSSED", 299)  # 12 clips, 5 classes
    found = measured(scores, post)
    assert np.isnan(found["PSDS2"].macro)
    assert "5 classes" in found["PSDS2"].note
    assert np.isfinite(found["PSDS1"].macro)


def test_filters_longer_than_a_clip_mirror_it_again() -> None:
    scores = np.random.default_rng(1).random((1, 8, 1))
    post = PostProcessing(("a",), median_filter=(9,), convention="reflect")
    found, _ = post.smooth(scores, durations=np.array([3.0]), seconds_per_frame=1.0)
    np.testing.assert_array_equal(found[0, :3], median_filter(scores[0, :3], (9, 1)))


@pytest.mark.parametrize(("form", "threshold"), [("published_on_logits", []), ("on_probabilities", [0.5])])
def test_dcase2016_events_and_scores_are_the_golden_ones(form: str, threshold: list[float]) -> None:
    golden, logits = GOLDEN["dcase2016"][form], np.load(FOLDER / "dcase2016_logits.npz")
    post = named("dcase2016_published", LABELS, fl_threshold=threshold)
    found = post.decode(
        sigmoid(np.stack([logits["a"], logits["b"]])), names=["a.wav", "b.wav"], durations=np.full(2, 120.0),
        seconds_per_frame=FRAME,
    )  # fmt: skip
    assert sorted((f, label, round(a * 1000), round(b * 1000)) for f, a, b, label in rows(found)) == sorted(
        (f, label, round(a), round(b)) for f, clip in golden["events"].items() for label, a, b in clip
    )
    truth = GroundTruth.build(table(GOLDEN["dcase2016"]["truth"]), {"a.wav": 120.0, "b.wav": 120.0}, LABELS)
    values = {each.metric.name: each.metric.micro for each in measure(truth, System(found))}
    expected = golden["scores"]
    assert values["onset_f1_200ms"] == pytest.approx(expected["onset_0.2"]["f_measure"], abs=1e-9)
    assert values["onset_f1_50ms"] == pytest.approx(expected["onset_0.05"]["f_measure"], abs=1e-9)
    assert values["segment error rate"] == pytest.approx(expected["segment_1s_error_rate"], abs=1e-9)


def test_dcase2016_by_default_takes_probabilities_and_an_odd_filter() -> None:
    post = named("dcase2016", LABELS)
    assert set(post.thresholds) == {0.5}
    assert all(length % 2 for length in post.median_filter)
    with pytest.raises(UserError, match="median_filter"):
        named("published_sed", LABELS, fl_median_filter=[6])


@pytest.mark.parametrize("seed", range(3))
def test_onsets_and_segments_are_sed_evals(seed: int) -> None:
    """Overlapping events of one class count each by itself. (Times a collar apart: ours rounds to a microsecond.)"""
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(2):
        onset = rng.uniform(0, 15, 120)
        names, labels = rng.choice(["a.wav", "b.wav"], 120), rng.choice(LABELS, 120)
        tables.append(events(*zip(names, onset, onset + rng.uniform(0.1, 2, 120), labels, strict=True)))
    truth = GroundTruth.build(tables[0], {"a.wav": 17.0, "b.wav": 17.0}, LABELS)
    values = {each.metric.name: each.metric.micro for each in measure(truth, System(tables[1]))}
    assert values["collar F1, onset only"] != values["onset_f1_200ms"]
    lists = [
        {name: part.to_dict("records") for name, part in each.groupby("filename")} for each in tables
    ]  # fmt: skip
    segments = sed_eval.sound_event.SegmentBasedMetrics(LABELS, time_resolution=1.0)
    for metric, collar in (("onset_f1_200ms", 0.2), ("onset_f1_50ms", 0.05)):
        reference = sed_eval.sound_event.EventBasedMetrics(LABELS, evaluate_offset=False, t_collar=collar)
        for name in lists[0]:
            reference.evaluate(lists[0][name], lists[1][name])
        assert values[metric] == pytest.approx(reference.results_overall_metrics()["f_measure"]["f_measure"])
    for name in lists[0]:
        segments.evaluate(lists[0][name], lists[1][name])
    expected = segments.results_overall_metrics()["error_rate"]["error_rate"]
    assert values["segment error rate"] == pytest.approx(expected)


def pieces(scores: Scores, count: int) -> Scores:
    """Recordings cut into `count` pieces of 10 s each, as prepare and test leave them, in any order."""
    assert scores.framewise is not None
    parts = [(k, 10.0 * p) for k in range(len(scores.names)) for p in range(count)][::-1]
    cut = [
        [(e, max(a - s, 0.0), min(b - s, 10.0)) for e, a, b in scores.true_events()[k] if a < s + 10 and b > s]
        for k, s in parts
    ]
    framewise = np.stack([scores.framewise[k, round(s / FRAME) : round(s / FRAME) + 250] for k, s in parts])
    made = score_store(framewise, cut, labels=scores.labels, step=FRAME, dataset_type="dcase2016-task2")
    return replace(made, names=[f"{scores.names[k]}#t={s:g},{s + 10:g}" for k, s in parts])


def test_recordings_are_joined_from_their_pieces() -> None:
    """Events across seams, two of one class at once, are whole again; and so are metrics."""
    framewise = np.random.default_rng(3).random((2, 3000, 3)).astype(np.float32)
    true = [[(0, 1.0, 35.5), (0, 8.0, 12.0), (1, 19.9, 20.1), (2, 110.0, 120.0)], [(1, 0.0, 120.0), (1, 5.0, 6.0)]]
    whole = score_store(framewise, true, labels=LABELS, step=FRAME, seconds=120.0)
    found = evaluated_scores(pieces(whole, 12), resolve()).in_order(whole.names)
    np.testing.assert_array_equal(found.framewise, framewise)
    assert found.durations.tolist() == [120.0, 120.0]
    assert sorted(e[:2] for e in found.true_events()[0]) == sorted(e[:2] for e in true[0])
    assert sorted(b for _, _, b in found.true_events()[0]) == pytest.approx(sorted(b for _, _, b in true[0]))
    assert found.true_events()[1] == [(1, 0.0, 120.0), (1, 5.0, 6.0)]
    one, other = (measured(each, named("dcase2016", LABELS)) for each in (whole, found))
    assert one["onset_f1_200ms"].micro == other["onset_f1_200ms"].micro
    lacking = pieces(whole, 12).select_clips([k for k in range(24) if k != 5])
    with pytest.raises(UserError, match=r"pieces of 1\.wav"):
        evaluated_scores(lacking, resolve())
    assert CLIPS["dcase2016-task2"] == "recordings"


def test_targets_at_frame_centres() -> None:
    """HEAR's rule, active where start <= centre < end + 0.1 ms, is `fractional_targets False` from 40 ms on."""
    rng = np.random.default_rng(4)
    onset = rng.uniform(0, 9.5, 40).round(3)
    offset = onset + rng.uniform(0.04, 0.4, 40).round(3)
    centres = (np.arange(250) + 0.5) * FRAME
    expected = (onset[:, None] <= centres) & (centres < offset[:, None] + 1e-4)
    given = Events(torch.arange(40), torch.zeros(40, dtype=torch.int64), *map(torch.tensor, (onset, offset)))
    found = rasterize(given, clips=40, classes=1, steps=250, seconds=10.0, fractional=False)[:, :, 0].numpy() > 0
    edge = np.abs(np.stack([onset, offset])[:, :, None] - centres).min(axis=0) < 1e-3  # decided by a rounding
    assert (found == expected)[~edge].all()
