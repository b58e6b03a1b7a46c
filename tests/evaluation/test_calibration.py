"""Calibration: the search finds what raises its metric; the command keeps it, and never uses the test clips."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import fl_evaluate
import main
from evaluation.calibration import Calibrated, Objective, calibrate, filter_lengths
from evaluation.postprocess import PostProcessing
from evaluation.scores import EventList, Scores, load_scores
from model.checkpoint import read_checkpoint, save_safetensors, store_in_checkpoint
from prepare.demo import LABELS
from settings import UserError
from tests.evaluation.examples import STEP, measured, score_store
from tests.helpers import LEAN, LEAN_FLAGS, call, refused, save_network


def noisy_scores(clips: int = 20, parts: int = 1) -> Scores:
    """Class a needs a threshold near 0.8; b flickers, which a filter heals; c has false clicks; d has no events.

    parts: into which each frame of 312.5 ms is divided.
    """
    rng = np.random.default_rng(0)
    framewise = rng.uniform(0.0, 0.1, (clips, 32, 4))
    true: list[EventList] = []
    for frames in framewise:
        spans = [(start := int(rng.integers(1, 12)), start + int(rng.integers(8, 16))) for _ in range(3)]
        for label, (start, stop) in enumerate(spans):
            frames[start:stop, label] = rng.uniform(0.85, 0.95, stop - start)
        (a, a_end), (b, b_end), (_, c_end) = spans
        outside = np.ones(32, dtype=bool)
        outside[a:a_end] = False
        frames[outside, 0] = rng.uniform(0.6, 0.75, outside.sum())
        frames[b + 2 : b_end - 1 : 3, 1] = 0.05
        frames[min(c_end + 2, 31), 2] = 0.99
        true.append([(label, start * STEP, stop * STEP) for label, (start, stop) in enumerate(spans)])
    finer = np.repeat(framewise, parts, axis=1)
    return score_store(finer, true, labels="abcd", step=STEP / parts, split="validation")


def found_for(objective: Objective, parts: int = 1) -> Calibrated:
    return calibrate(noisy_scores(parts=parts), objective, PostProcessing(tuple("abcd"), (0.5, 0.5, 0.5, 0.25)))


@pytest.mark.parametrize("parts", [1, 8])  # frames of 312.5 and 39 ms
@pytest.mark.parametrize("objective", ["intersection_f1", "collar_f1"])
def test_each_class_gets_its_own_values(objective: Objective, parts: int) -> None:
    fitted = found_for(objective, parts)
    post = fitted.post
    filters = np.array(post.median_filter) / parts * STEP  # seconds
    assert 0.7 < post.thresholds[0] < 0.86
    assert filters[1] > 0.6 or objective == "intersection_f1"  # to which pieces of an event are as good
    assert filters[2] > 0.6 or post.minimum_duration[2] > STEP  # either takes the clicks away
    assert (post.thresholds[3], post.median_filter[3]) == (0.25, 1)  # without events: as before
    for label in "abc":
        assert fitted.after[label] > 0.9
    assert fitted.before["a"] == 0.0
    assert fitted.before["c"] < 0.75
    assert np.isnan(fitted.after["d"])
    assert post.source == f"calibrated for {objective} on the validation clips"


def test_filter_lengths_are_odd_numbers_of_frames_for_the_same_seconds() -> None:
    assert filter_lengths(STEP) == [1, 3, 5, 7, 9, 11]
    assert filter_lengths(0.04) == [1, 3, 7, 13, 23, 39, 55, 71, 85]
    assert filter_lengths(5.0) == [1]


@pytest.mark.parametrize(("objective", "name"), [("intersection_f1", "intersection F1"), ("psds1", "PSDS1")])
def test_the_figures_are_those_of_the_evaluation(objective: Objective, name: str) -> None:
    fitted = found_for(objective)
    assert measured(noisy_scores(), fitted.post)[name].per_class == pytest.approx(fitted.after, nan_ok=True)


def test_filters_for_psds() -> None:
    fitted = found_for("psds1")
    assert fitted.post.median_filter[2] >= 3
    assert fitted.after["c"] > fitted.before["c"] + 0.1
    assert all(fitted.after[label] >= fitted.before[label] for label in "abc")


@pytest.mark.parametrize("pause", [0.0, -0.5], ids=["touching", "overlapping"])
def test_touching_and_overlapping_true_events(pause: float) -> None:
    """sed_scores_eval refuses them; the search of thresholds takes them as one event."""
    scores = noisy_scores()
    split = [
        [(k, *times) for k, onset, offset in clip for times in ((onset, onset + 1), (onset + 1 + pause, offset))]
        for clip in scores.true_events()
    ]
    joined, whole = calibrate(replace(scores, events=split), "collar_f1"), calibrate(scores, "collar_f1")
    assert joined.post.thresholds == whole.post.thresholds
    assert joined.post.median_filter == whole.post.median_filter
    if pause < 0:
        assert joined.post == whole.post
        assert joined.after == pytest.approx(whole.after, nan_ok=True)


@pytest.fixture
def data(demo_data: Path) -> list[str]:
    return ["--dataset_path", str(demo_data / "workspace" / "data" / "demo"), *LEAN_FLAGS]


@pytest.fixture
def untrained(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny network for the demo's classes, in the folder where the test runs."""
    store = str(demo_data / "workspace" / "data" / "demo")
    save_network(tmp_path / "n.ckpt", LABELS, dataset_path=store, **LEAN)
    monkeypatch.chdir(tmp_path)
    return Path("n.ckpt")


def test_from_calibrate_to_fl_evaluate(untrained: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["--heatmap_dir", "scores", "--pictures", "0", "--resamples", "0"]
    checkpoint = ["--resume_checkpoint", str(untrained), "--heatmap_dir", "scores", *data]
    before = read_checkpoint(untrained).state_dict
    assert main.main(["calibrate", *checkpoint, "--calibrate_for", "collar_f1", "--fl_interpolation", "4"]) == 0
    assert load_scores(Path("scores/calibration.h5")).attributes["split"] == "validation"
    stored = read_checkpoint(untrained)
    assert stored.postprocessing is not None
    assert stored.postprocessing["interpolation"] == 4
    assert stored.postprocessing["source"] == "calibrated for collar_f1 on the validation clips"
    assert all(torch.equal(before[key], value) for key, value in stored.state_dict.items())

    assert main.main(["test", *checkpoint, "--fl_local", "True"]) == 0
    assert load_scores(Path("scores/test.h5")).postprocessing == PostProcessing.from_dict(stored.postprocessing)
    for flags, printed in (([], "calibrated for collar_f1"), (["--fl_threshold", "0.25"], "thresholds 0.25")):
        capsys.readouterr()
        assert fl_evaluate.main([*evaluate, *flags]) == 0
        assert printed in capsys.readouterr().out

    assert fl_evaluate.main([*evaluate, "--export_scores", "tables", "--fl_class_num", "siren,knock"]) == 0
    assert len(list(Path("tables").glob("test_*.tsv"))) == 3
    capsys.readouterr()
    assert fl_evaluate.main([*evaluate, "--import_scores", "tables"]) == 2
    assert "siren, knock" in capsys.readouterr().err


def test_again_it_leaves_what_it_left(untrained: Path, data: list[str]) -> None:
    """As where it was killed after the checkpoint had been calibrated."""
    words = ["--resume_checkpoint", str(untrained), "--calibrate_for", "collar_f1", *data]
    left = []
    for _ in range(2):
        call("calibrate", *words, "--heatmap_dir", "scores", "--results_path", "results.jsonl")
        lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
        (member,) = lines[-1]["checkpoints"]
        left.append((load_scores(Path("scores/calibration.h5")).attributes, member, read_checkpoint(untrained).content))
    assert left[0][:2] == left[1][:2]
    assert left[0][2]["postprocessing"] == left[1][2]["postprocessing"]


def test_clips_without_event_times_are_refused_before_they_are_scored(
    untrained: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("store").mkdir()
    shutil.copy(demo_data / "workspace" / "data" / "demo" / "demo.h5", "store/demo.h5")
    with h5py.File("store/demo.h5", "r+") as store:
        for name in ("event_clip", "event_class", "event_onset", "event_offset"):
            del store[name]
    monkeypatch.setattr("commands.calibrate.test_member", lambda member: pytest.fail("the clips were scored"))
    assert "store/demo.h5" in refused(
        capsys, "calibrate", "--resume_checkpoint", untrained, "--dataset_path", "store", "--accelerator", "cpu"
    )


def test_never_on_the_clips_that_are_reported(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["calibrate", "--resume_checkpoint", str(untrained), "--calibrate_for", "collar_f1"]
    assert "protocol" in refused(capsys, *flags, "--test_split", "test")
    for split in ("test", None):
        replace(noisy_scores(), attributes={"split": split} if split else {}).save(Path("scores.h5"))
        assert "scores.h5" in refused(capsys, *flags, "--scores", "scores.h5")
    content = torch.load(untrained, weights_only=True)
    content["settings"]["protocol"] = "paper"  # whose validation clips are the test clips
    torch.save(content, untrained)
    assert "protocol paper" in refused(capsys, "calibrate", "--resume_checkpoint", untrained)
    assert read_checkpoint(untrained).postprocessing is None


def test_scores_of_another_network_are_refused(
    untrained: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Known by the fingerprint of the weights, which a calibration keeps; in older files by the classes."""
    words = ["test", "--resume_checkpoint", str(untrained), "--test_split", "validation", "--fl_local", "True"]
    assert main.main([*words, "--heatmap_dir", "scores", *data]) == 0
    content = torch.load(untrained, weights_only=True)
    content["state_dict"]["sed_model.norm.bias"] += 1e-3
    torch.save(content, "other.ckpt")
    for objective in ("collar_f1", "intersection_f1"):  # twice: the first one adds to the file
        flags = ["--calibrate_for", objective, "--scores", "scores/validation.h5"]
        assert main.main(["calibrate", "--resume_checkpoint", str(untrained), *flags]) == 0
        assert "weights than those of other.ckpt" in refused(
            capsys, "calibrate", "--resume_checkpoint", "other.ckpt", *flags
        )
    assert read_checkpoint("other.ckpt").postprocessing is None
    noisy_scores().save(Path("older.h5"))
    message = refused(capsys, "calibrate", "--resume_checkpoint", "other.ckpt", "--scores", "older.h5")
    assert "older.h5 has other classes" in message


def test_a_foreign_file_leaves_the_scores_of_runs_alone(untrained: Path, data: list[str]) -> None:
    """Whatever its score file is called: the default folder is that of the run that config.py names."""
    content = torch.load(untrained, weights_only=True)
    torch.save({key.removeprefix("sed_model."): value for key, value in content["state_dict"].items()}, "foreign.pth")
    words = ["--resume_checkpoint", "foreign.pth", *data]
    assert main.main(["test", *words, "--test_file", "mine"]) == 0
    assert main.main(["calibrate", *words, "--calibrate_for", "collar_f1"]) == 0
    found = sorted(str(path) for path in Path("workspace/runs").rglob("*.h5"))
    assert found == [f"workspace/runs/foreign/scores/{name}.h5" for name in ("calibration", "mine")]
    assert read_checkpoint("foreign.pth").postprocessing is not None


def test_a_checkpoint_keeps_what_it_had(untrained: Path) -> None:
    Path("second.ckpt").hardlink_to(untrained)
    store_in_checkpoint(untrained, postprocessing={"labels": ["a"], "thresholds": [0.5]})
    content = torch.load(untrained, weights_only=True)
    assert set(content) == {"state_dict", "settings", "labels", "postprocessing", "digests"}
    assert read_checkpoint("second.ckpt").postprocessing is None
    assert not list(Path().glob("*.partial"))
    save_safetensors(Path("n.safetensors"), content["state_dict"], settings={}, labels=[], frontend={})
    with pytest.raises(UserError, match="safetensors"):
        store_in_checkpoint("n.safetensors", postprocessing={})
