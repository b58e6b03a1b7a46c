"""compare: two encoders on the demo clips from end to end, its flags, and how it goes on."""

import json
from pathlib import Path

import numpy as np
import pytest

import main
from commands.compare import flags_for, own_flags, plan_systems
from evaluation.bootstrap import MeanStatistic, clip_statistic, paired_bootstrap
from evaluation.metrics import clip_metrics
from settings import UserError
from tests.helpers import SMALL, SMALL_FLAGS, call, here, refused


def test_flags_of_each_encoder() -> None:
    """A setting of HTS-AT goes to HTS-AT alone; options of all and of one are joined."""
    given = {"htsat_dim": "16", "max_epoch": "3", "encoder_options": "depth=2"}
    name, own = own_flags("ast --max_epoch 5 --encoder_options dim=128,heads=2")
    found = flags_for(name, given, own)
    assert found == {"max_epoch": 5, "encoder_options": {"depth": "2", "dim": "128", "heads": "2"}}
    assert flags_for("htsat", {"htsat_dim": "16"}, {}) == {"htsat_dim": "16"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--encoders", "hsat"], "htsat"),
        (["--encoders", "ast,ast"], "once"),
        (["--encoders", "ast", "--seeds", "1,1"], "--seeds"),
        (["--encoders", "ast", "--flags_of", "beats --max_epoch 3"], "beats"),
        (["--encoders", "ast", "--flags_of", "ast --max_epoch"], "--flags_of"),
        (["--encoders", "ast", "--flags_of", "ast --max_epochs 3"], "max_epoch"),
        (["--encoders", "ast", "--flags_of", "ast --random_seed 3"], "random_seed"),
        (["--encoders", "ast", "--exp_name", "x"], "exp_name"),
        (["--encoders", "ast", "--encoder_options", "size=3"], "size"),
        (["--encoders", "htsat,ast", "--flags_of", "ast --dataset_type esc-50"], "dataset_type"),
        (["--encoders", "htsat", "--steps", "-1"], "--steps"),
    ],
)
def test_mistakes(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, "compare", *words)


def test_mean_over_seeds() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((40, 5)) < 0.4
    scores = [rng.random((40, 5)) + targets * shift for shift in (0.2, 0.5)]
    statistic = MeanStatistic([clip_statistic("multilabel", each, targets) for each in scores])
    expected = np.mean([clip_metrics("multilabel", each, targets)[0].value for each in scores])
    assert statistic(np.ones((40, 1), np.float32)) == pytest.approx(expected, abs=1e-6)


def test_a_constant_system_is_not_found_worse_for_lack_of_bias() -> None:
    """Resampled mAP is too high for random scores and right for equal ones: uncorrected, their difference is biased."""
    rng = np.random.default_rng(0)
    targets = rng.random((12, 6)) < 0.4
    random, equal = (clip_statistic("multilabel", each, targets) for each in (rng.random((12, 6)), np.ones((12, 6))))
    plain, corrected = (
        paired_bootstrap(equal, random, 12, resamples=400, correct_bias=correct, seed=0) for correct in (False, True)
    )
    assert corrected.difference == plain.difference
    middles = [(found.interval.low + found.interval.high) / 2 for found in (plain, corrected)]
    assert abs(middles[1] - corrected.difference) < abs(middles[0] - corrected.difference)


@pytest.mark.slow
def test_two_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The third one cannot be trained: the others are compared all the same, and it is named at the end."""
    monkeypatch.chdir(tmp_path)
    call("prepare", "--clips", "20")
    started = here(monkeypatch)
    words = ["compare", "--encoders", "htsat,ast", "--seeds", "1,2", "--max_epoch", "1", "--steps", "1", *SMALL_FLAGS]
    words += ["--flags_of", "ast --clip_samples 16000 --encoder_options dim=128,depth=1,heads=2"]
    broken = [*words, "--resume_checkpoint", "nowhere.ckpt"]
    assert main.main(broken) == 2
    assert "train of compare_demo_htsat_seed1" in capsys.readouterr().err
    started.clear()

    call(*words)
    (report,) = Path("workspace/runs").glob("comparison_*.json")
    found = json.loads(report.read_text())
    first, second = found["systems"]
    assert [first["encoder"], second["encoder"]] == ["htsat", "ast"]
    assert [len(each["values"]) for each in (first, second)] == [2, 2]
    assert second["minus_first"]["difference"] == pytest.approx(second["mean"] - first["mean"], abs=1e-6)
    assert second["interval"]["low"] <= second["mean"] <= second["interval"]["high"]
    assert second["cost"]["multiply_adds"] > 0
    assert first["training_seconds"] > 0
    assert report.with_suffix(".png").is_file()
    assert "| AST |" in report.with_suffix(".md").read_text()
    assert [words[0] for words in started] == ["train", "test"] * 4

    scores = Path(first["runs"]["2"], "scores", "test.h5")
    scores.unlink()
    started.clear()
    call(*words)
    assert [words[0] for words in started] == ["train", "test"]  # of that run alone
    assert json.loads(report.read_text())["systems"] == found["systems"]


def test_seeds_have_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call("prepare", "--clips", "10")
    names = {
        run.name
        for rate in ("1e-3", "1e-4")
        for run in plan_systems({**SMALL, "learning_rate": rate}, "htsat", "1,2", [])[0].runs
    }
    assert len(names) == 4
    with pytest.raises(UserError, match="heatmap_dir"):
        plan_systems({"heatmap_dir": "x"}, "htsat", "1", [])
