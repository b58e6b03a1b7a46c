"""Calibration: what is found raises its metric, is kept in the checkpoint, and never comes from the test clips."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fl_evaluate
import main
from evaluation.calibration import Calibrated, Objective, calibrate
from evaluation.postprocess import PostProcessing
from evaluation.scores import Scores, load_scores
from model import build_model
from model.checkpoint import read_checkpoint, save_safetensors, store_in_checkpoint
from prepare.demo import LABELS
from settings import resolve
from tests.helpers import TINY, TINY_FLAGS

STEP = 10 / 32


def noisy_scores(clips: int = 20) -> Scores:
    """Class a needs a threshold near 0.8; b flickers, which a filter heals; c has false clicks; d never sounds."""
    rng = np.random.default_rng(0)
    framewise = rng.uniform(0.0, 0.1, (clips, 32, 4))
    events: list[list[tuple[int, float, float]]] = [[] for _ in range(clips)]
    for clip in range(clips):
        for label in range(3):
            start, length = int(rng.integers(1, 12)), int(rng.integers(8, 16))
            events[clip].append((label, start * STEP, (start + length) * STEP))
            framewise[clip, start : start + length, label] = rng.uniform(0.85, 0.95, length)
        onset, offset = (round(t / STEP) for t in events[clip][0][1:])
        outside = np.ones(32, dtype=bool)
        outside[onset:offset] = False
        framewise[clip, outside, 0] = rng.uniform(0.6, 0.75, outside.sum())
        onset, offset = (round(t / STEP) for t in events[clip][1][1:])
        framewise[clip, range(onset + 2, offset - 1, 3), 1] = 0.05
        onset, offset = (round(t / STEP) for t in events[clip][2][1:])
        framewise[clip, min(offset + 2, 31), 2] = 0.99
    return Scores(
        names=[f"{clip}.wav" for clip in range(clips)],
        clipwise=framewise.max(axis=1),
        targets=framewise.max(axis=1) > 0.5,
        durations=np.full(clips, 10.0),
        labels=["a", "b", "c", "d"],
        framewise=framewise,
        seconds_per_frame=STEP,
        events=events,
        attributes={"split": "validation"},
    )


def found_for(objective: Objective) -> Calibrated:
    return calibrate(noisy_scores(), objective, PostProcessing(("a", "b", "c", "d"), (0.5, 0.5, 0.5, 0.25)))


@pytest.mark.parametrize("objective", ["intersection_f1", "collar_f1"])
def test_each_class_gets_what_it_needs(objective: Objective) -> None:
    fitted = found_for(objective)
    post = fitted.post
    assert 0.7 < post.thresholds[0] < 0.86
    assert post.median_filter[1] >= 3 or objective == "intersection_f1"  # to which pieces of an event are as good
    assert post.median_filter[2] >= 3 or post.minimum_duration[2] > STEP  # either takes the clicks away
    assert (post.thresholds[3], post.median_filter[3]) == (0.25, 1)  # without events: as before
    for label in "abc":
        assert fitted.after[label] > 0.9
    assert fitted.before["a"] == 0.0
    assert fitted.before["c"] < 0.75
    assert np.isnan(fitted.after["d"])
    assert post.source == f"calibrated for {objective} on the validation clips"


def test_the_figures_are_those_of_the_evaluation() -> None:
    scores, fitted = noisy_scores(), found_for("intersection_f1")
    _, metrics = fl_evaluate.evaluate(scores, fitted.post)
    assert [metrics[0].per_class[label] for label in "abc"] == pytest.approx([fitted.after[label] for label in "abc"])


def test_filters_for_psds() -> None:
    fitted = found_for("psds1")
    assert fitted.post.median_filter[2] >= 3
    assert fitted.after["c"] > fitted.before["c"] + 0.1
    assert all(fitted.after[label] >= fitted.before[label] for label in "abc")


def test_touching_and_overlapping_true_events() -> None:
    """sed_scores_eval refuses them; they count as one."""
    scores = noisy_scores()
    assert scores.events is not None
    split = [
        [(label, *times) for label, onset, offset in clip for times in ((onset, onset + 1), (onset + 0.5, offset))]
        for clip in scores.events
    ]
    joined, whole = calibrate(replace(scores, events=split), "collar_f1"), calibrate(scores, "collar_f1")
    assert joined.post == whole.post
    assert joined.after == pytest.approx(whole.after, nan_ok=True)


def test_what_cannot_be_calibrated_on() -> None:
    for lacking in (replace(noisy_scores(), framewise=None), replace(noisy_scores(), events=None)):
        with pytest.raises(ValueError, match="frame scores and true events"):
            calibrate(lacking, "collar_f1")


@pytest.fixture
def untrained(demo_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny network for the demo's classes, in the folder where the test runs."""
    settings = resolve({**TINY, "dataset_path": str(demo_workspace / "workspace" / "data" / "demo")})
    torch.manual_seed(0)
    network = build_model(settings)
    weights = {f"sed_model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": weights, "settings": settings.model_dump(), "labels": LABELS}, tmp_path / "n.ckpt")
    monkeypatch.chdir(tmp_path)
    return Path("n.ckpt")


def test_from_calibrate_to_fl_evaluate(
    untrained: Path, demo_workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [
        "--dataset_path",
        str(demo_workspace / "workspace" / "data" / "demo"),
        "--heatmap_dir",
        "scores",
        *TINY_FLAGS,
    ]
    checkpoint = ["--resume_checkpoint", str(untrained)]
    before = read_checkpoint(untrained).state_dict
    assert main.main(["calibrate", *checkpoint, "--calibrate_for", "collar_f1", "--fl_interpolation", "4", *data]) == 0
    assert load_scores(Path("scores/calibration.h5")).attributes["split"] == "validation"
    stored = read_checkpoint(untrained)
    assert stored.postprocessing is not None
    assert stored.postprocessing["interpolation"] == 4
    assert stored.postprocessing["source"] == "calibrated for collar_f1 on the validation clips"
    assert all(torch.equal(before[key], value) for key, value in stored.state_dict.items())

    assert main.main(["test", *checkpoint, "--fl_local", "True", *data]) == 0
    kept = load_scores(Path("scores/test.h5")).postprocessing
    assert kept == PostProcessing.from_dict(stored.postprocessing)
    capsys.readouterr()
    assert fl_evaluate.main(["--heatmap_dir", "scores", "--pictures", "0"]) == 0
    assert "Post-processing: calibrated for collar_f1 on the validation clips; thresholds" in capsys.readouterr().out
    assert fl_evaluate.main(["--heatmap_dir", "scores", "--pictures", "0", "--fl_threshold", "0.25"]) == 0
    assert "clips, with fl_threshold as given; thresholds 0.25" in capsys.readouterr().out

    tables = ["--export_scores", "tables", "--fl_class_num", "siren,knock"]
    assert fl_evaluate.main(["--heatmap_dir", "scores", "--pictures", "0", *tables]) == 0
    assert len(list(Path("tables").glob("test_*.tsv"))) == 3
    imported = ["--import_scores", "tables"]
    capsys.readouterr()
    assert fl_evaluate.main(["--heatmap_dir", "scores", "--pictures", "0", *imported]) == 2
    assert "has the classes siren, knock" in capsys.readouterr().err


def test_never_on_the_clips_that_are_reported(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["calibrate", "--resume_checkpoint", str(untrained), "--calibrate_for", "collar_f1"]
    assert main.main([*flags, "--test_split", "test"]) == 2
    assert "clips that a test reports" in capsys.readouterr().err
    for split in ("test", None):
        replace(noisy_scores(), attributes={"split": split} if split else {}).save(Path("scores.h5"))
        assert main.main([*flags, "--scores", "scores.h5"]) == 2
        assert "scores of the test clips" in capsys.readouterr().err
    assert read_checkpoint(untrained).postprocessing is None


def test_scores_of_another_network_are_refused(
    untrained: Path, demo_workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their fingerprint tells, which a calibration leaves as it is; of older files the classes."""
    data = ["--dataset_path", str(demo_workspace / "workspace" / "data" / "demo"), *TINY_FLAGS]
    words = ["test", "--resume_checkpoint", str(untrained), "--test_split", "validation", "--fl_local", "True"]
    assert main.main([*words, "--heatmap_dir", "scores", *data]) == 0
    content = torch.load(untrained, weights_only=True)
    content["state_dict"]["sed_model.norm.bias"] += 1e-3
    torch.save(content, "other.ckpt")
    for objective in ("collar_f1", "intersection_f1"):  # twice: the first one adds to the file
        flags = ["--calibrate_for", objective, "--scores", "scores/test.h5"]
        assert main.main(["calibrate", "--resume_checkpoint", str(untrained), *flags]) == 0
        capsys.readouterr()
        assert main.main(["calibrate", "--resume_checkpoint", "other.ckpt", *flags]) == 2
        assert "was written by a test of other weights than those of other.ckpt" in capsys.readouterr().err
    assert read_checkpoint("other.ckpt").postprocessing is None
    noisy_scores().save(Path("older.h5"))
    assert main.main(["calibrate", "--resume_checkpoint", "other.ckpt", "--scores", "older.h5"]) == 2
    said = capsys.readouterr().err
    assert "older.h5 has other classes (" in said
    assert "leave --scores out" in said


def test_a_foreign_file_leaves_the_scores_of_runs_alone(untrained: Path, demo_workspace: Path) -> None:
    """Whatever its score file is called: the default folder is that of the run that config.py names."""
    content = torch.load(untrained, weights_only=True)
    torch.save({key.removeprefix("sed_model."): value for key, value in content["state_dict"].items()}, "foreign.pth")
    words = ["--resume_checkpoint", "foreign.pth", *TINY_FLAGS]
    words += ["--dataset_path", str(demo_workspace / "workspace" / "data" / "demo")]
    assert main.main(["test", *words, "--test_file", "mine"]) == 0
    assert main.main(["calibrate", *words, "--calibrate_for", "collar_f1"]) == 0
    found = sorted(str(path) for path in Path("workspace/runs").rglob("*.h5"))
    assert found == [f"workspace/runs/foreign/scores/{name}.h5" for name in ("calibration", "mine")]
    assert read_checkpoint("foreign.pth").postprocessing is not None


def test_under_the_papers_protocol_validation_is_the_test(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(untrained, weights_only=True)
    content["settings"]["protocol"] = "paper"
    torch.save(content, untrained)
    assert main.main(["calibrate", "--resume_checkpoint", str(untrained)]) == 2
    assert "protocol paper" in capsys.readouterr().err


def test_a_checkpoint_keeps_what_it_had(untrained: Path) -> None:
    Path("second.ckpt").hardlink_to(untrained)
    store_in_checkpoint(untrained, "postprocessing", {"labels": ["a"], "thresholds": [0.5]})
    content = torch.load(untrained, weights_only=True)
    assert set(content) == {"state_dict", "settings", "labels", "postprocessing"}
    assert read_checkpoint("second.ckpt").postprocessing is None
    assert not list(Path().glob("*.partial"))
    described = read_checkpoint(untrained)
    save_safetensors(
        Path("n.safetensors"), described.state_dict, settings=described.settings or {}, labels=[], frontend={}
    )
    with pytest.raises(ValueError, match="is a safetensors file"):
        store_in_checkpoint("n.safetensors", "postprocessing", {})
