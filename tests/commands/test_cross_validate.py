"""Cross-validation: which epoch counts under which rule, and the folds of a tiny data set from end to end."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from commands.cross_validate import judge, read_curve
from data.clip_store import Clip, ClipStoreWriter
from runs.experiments import experiment_hash
from settings import UserError, resolve
from tests.helpers import SMALL, SMALL_FLAGS, TINY, call, here


def test_rules() -> None:
    """Two folds of three epochs: (metric of the clips that choose, metric of the test clips)."""
    first = {0: (0.9, 0.1), 1: (0.5, 0.2), 2: (0.6, 0.3)}
    second = {0: (0.2, 0.4), 1: (0.8, 0.5), 2: (0.6, 0.6)}
    each, average, last = judge("held_out", [first, second])
    assert (each.rule, each.values, each.epochs) == ("best of each fold", [0.1, 0.5], [0, 1])
    assert (average.values, average.epochs) == ([0.2, 0.5], [1, 1])  # means 0.55, 0.65, 0.6
    assert (last.values, last.epochs) == ([0.3, 0.6], [2, 2])
    assert each.mean == pytest.approx(0.3)
    assert each.deviation == pytest.approx(0.4 / np.sqrt(2))


def test_curve_of_a_resumed_run(tmp_path: Path) -> None:
    for version, rows in ((2, "0,,0.5\n0,0.4,\n0,0.1,0.2\n"), (10, "0,0.3,0.4\n1,0.5,0.6\n")):
        folder = tmp_path / "logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("epoch,acc,test_acc\n" + rows)
    assert read_curve(tmp_path, ("acc", "test_acc"), 2) == {0: (0.3, 0.4), 1: (0.5, 0.6)}
    with pytest.raises(UserError, match="epoch 3"):
        read_curve(tmp_path, ("acc", "test_acc"), 3)
    assert read_curve(tmp_path, ("acc", "test_acc"), 1) == {0: (0.3, 0.4)}  # epochs beyond max_epoch do not count


@pytest.fixture
def folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three folds of four clips, as ESC-50's store."""
    path = tmp_path / "workspace" / "data" / "esc-50" / "esc-50.h5"
    rng = np.random.default_rng(0)
    with ClipStoreWriter(path, clip_samples=8000, sample_rate=32000, labels=[f"class {k}" for k in range(50)]) as w:
        for number in range(12):
            sound = rng.integers(-9000, 9000, 8000, dtype=np.int16)
            w.add(Clip(f"{number}.wav", sound, [number % 2], fold=number // 4 + 1))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folds")
def test_another_experiment_has_other_runs() -> None:
    """Else its folds would be found complete, and the old figures reported as the new ones."""
    base = {"dataset_type": "esc-50", **TINY}
    first = experiment_hash(resolve(base))
    others: list[dict[str, Any]] = [
        {"learning_rate": 0.1}, {"max_epoch": 3}, {"random_seed": 1}, {"mixup_alpha": 0.0}, {"debug": True},
    ]  # fmt: skip
    hashes = {experiment_hash(resolve({**base, **other})) for other in others}
    assert len(hashes | {first}) == len(others) + 1
    assert experiment_hash(resolve({**base, "num_workers": 2, "exp_name": "x"})) == first
    with h5py.File("workspace/data/esc-50/esc-50.h5", "r+") as store:
        store["audio_name"][0] = b"other.wav"
    assert experiment_hash(resolve(base)) != first


@pytest.mark.usefixtures("folds")
def test_every_fold_under_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folds train in this process."""

    here(monkeypatch)
    words = ["cross_validate", "--dataset_type", "esc-50", "--protocols", "held_out", "--max_epoch", "1"]
    call(*words, *SMALL_FLAGS)
    experiment = experiment_hash(resolve({"dataset_type": "esc-50", "max_epoch": "1", **SMALL}))
    written = json.loads((tmp_path / f"workspace/runs/cross_validation_esc-50_{experiment}.json").read_text())
    assert written["folds"] == [1, 2, 3]
    assert [outcome["epochs"] for outcome in written["outcomes"]] == [[0, 0, 0]] * 3
    trained = (tmp_path / f"workspace/runs/cv_esc-50_held_out_fold2_{experiment}/provenance.json").read_text()
    clips = {split: recorded["clips"] for split, recorded in json.loads(trained)[0]["data"].items()}
    assert clips == dict.fromkeys(("train", "validation", "test"), 4)
