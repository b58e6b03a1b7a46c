"""The notebooks, run from the first cell to the last on a few clips: recorded ones where they are at hand."""

import json
import re
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pytest
import soundfile
from nbclient import NotebookClient

from data.clip_store import read_events, read_store_table
from evaluation.scores import Scores
from prepare.esc50 import LABELS as ESC50_LABELS
from tests.helpers import ROOT
from tests.prepare.raw_data import make_scv2

NOTEBOOKS = ("esc-50/prep_esc50.ipynb", "scv2/prep_scv2.ipynb", "htsat_esc_training.ipynb", "fl_evaluate_f1.ipynb")
FOLDS = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the notebooks read, and a place for what a kernel leaves behind."""
    monkeypatch.setenv("HTSAT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("ESC50_RAW", str(tmp_path / "esc50"))
    monkeypatch.setenv("SCV2_RAW", str(tmp_path / "raw"))
    monkeypatch.setenv("HTSAT_EPOCHS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # another test's choice would keep pictures out of the outputs


def make_esc50(folder: Path) -> None:
    """Two tones of each of two classes in four folds, in two formats."""
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    rng = np.random.default_rng(0)
    rows = ["filename,fold,target,category\n"]
    for number in range(4 * len(FOLDS)):
        fold, label = FOLDS[number // 4], number % 2
        name = f"{fold}-{number}.{('wav', 'ogg')[number // 2 % 2]}"
        tone = np.sin(2 * np.pi * (400 + 800 * label) * np.arange(5 * 44100) / 44100)
        soundfile.write(folder / "audio" / name, 0.3 * tone + 0.01 * rng.standard_normal(len(tone)), 44100)
        rows.append(f"{name},{fold},{label},{ESC50_LABELS[label]}\n")
    (folder / "meta" / "esc50.csv").write_text("".join(rows))


def execute(name: str) -> tuple[str, int]:
    """Run a notebook where it lies. Returns the text of its outputs, and how many pictures it shows."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    folder = str((ROOT / name).parent)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    text = [output.get("text", "") for output in outputs] + [data.get("text/plain", "") for data in shown]
    return "\n".join(text), sum("image/png" in data for data in shown)


def make_scores(store: Path, folder: Path) -> None:
    """Score files as tests of the demo leave them: as if a network had heard the events, in all but the last clip."""
    table, events, rng = read_store_table(store), read_events(store), np.random.default_rng(0)
    frontend = {"sample_rate": 32000, "window_size": 1024, "hop_size": 320, "mel_bins": 64, "fmin": 50, "fmax": 14000}
    for name, said, split in (("calibration", "validation", b"train"), ("test", "test", b"test")):  # train: most clips
        rows = np.flatnonzero(table.split == split)
        framewise = rng.uniform(0.5, 0.8, (len(rows), 32, len(table.labels))).astype(np.float32)
        for clip, row in enumerate(rows[:-1]):
            for event in events[row]:
                framewise[clip, round(event.onset * 3.2) : round(event.offset * 3.2), event.label] = 0.9
        Scores(
            names=[table.names[row].decode() for row in rows], clipwise=framewise.max(axis=1),
            targets=table.targets[rows], durations=np.full(len(rows), 10.0), labels=table.labels,
            framewise=framewise, seconds_per_frame=10 / 32,
            events=[[(event.label, event.onset, event.offset) for event in events[row]] for row in rows],
            attributes={"dataset_type": "demo", "split": said, "clip_store": str(store), **frontend},
        ).save(folder / f"{name}.h5")  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs(name: str) -> None:
    notebook = nbformat.read(ROOT / name, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_preparing(tmp_path: Path) -> None:
    make_esc50(tmp_path / "esc50")
    make_scv2(tmp_path, ("one", "three", "two"))  # a clip for training, one for validation, one for the test
    counts = {  # of clips: fold 1 to 4; test, train, validation; and all
        "esc-50/prep_esc50.ipynb": (16, ["dog", "2", "2", "2", "2", "8"]),
        "scv2/prep_scv2.ipynb": (9, ["three", "1", "1", "1", "3"]),
    }
    for name, (clips, row) in counts.items():
        text, pictures = execute(name)
        assert f"{clips} clips" in text
        assert pictures == 1
        (line,) = (line for line in text.splitlines() if line.startswith(row[0]))
        assert line.split() == row
    with h5py.File(tmp_path / "workspace" / "data" / "esc-50" / "esc-50.h5") as file:
        assert sorted(file["fold"][:].tolist()) == sorted(4 * FOLDS)
    with h5py.File(tmp_path / "workspace" / "data" / "scv2" / "scv2.h5") as file:
        splits = file["split"][:].tolist()
    assert [splits.count(split) for split in (b"train", b"validation", b"test")] == [3, 3, 3]


@pytest.mark.slow
def test_training_on_esc50(tmp_path: Path) -> None:
    make_esc50(tmp_path / "esc50")
    text, pictures = execute("htsat_esc_training.ipynb")
    assert "epoch   2/2" in text
    assert pictures == 1
    run = tmp_path / "workspace" / "runs" / "esc50_notebook"
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert (run / "logs" / "version_0" / "metrics.csv").is_file()
    (accuracy,) = json.loads((run / "scores" / "test.json").read_text())["metrics"]
    assert (accuracy["name"], accuracy["clips"]) == ("acc", 4)
    assert any(line.split()[:3] == ["0", "acc", str(accuracy["value"])] for line in text.splitlines())
    *_, clip = (line for line in text.splitlines() if line.startswith("1-"))  # of the fold that was held out
    assert (tmp_path / "esc50" / "audio" / clip).is_file()
    scores = [line.split() for line in text.rpartition(clip)[2].splitlines() if len(line.split()) == 2]
    assert len(scores) >= 2
    assert all(label in ESC50_LABELS for _, label in scores[:2])
    assert 0 <= float(scores[1][0]) <= float(scores[0][0]) <= 1


@pytest.mark.slow
def test_evaluating_localization(tmp_path: Path, demo_workspace: Path) -> None:
    store = demo_workspace / "workspace" / "data" / "demo" / "demo.h5"
    make_scores(store, tmp_path / "workspace" / "runs" / "demo" / "scores")
    text, pictures = execute("fl_evaluate_f1.ipynb")
    assert pictures == 2  # PSD-ROC, and a clip
    assert "validation: 14 clips" in text
    assert "test: 3 clips" in text
    test_clips = np.flatnonzero(read_store_table(store).split == b"test")
    assert read_store_table(store).names[test_clips[-1]].decode() in text  # the clip with nothing found
    before_and_after, difference = (line for line in text.splitlines() if "200 ms or 20 %" in line)
    before, after = map(float, re.findall(r"(\d\.\d+) \(", before_and_after))
    assert after > before
    assert float(re.findall(r"\+\d\.\d+", difference)[0]) == pytest.approx(after - before, abs=2e-3)
