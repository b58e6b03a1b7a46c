"""Each data set from its raw files to a test, by the commands of the README; real recordings where they are at hand."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile

import main
from prepare.esc50 import LABELS
from tests.helpers import ROOT, TINY_FLAGS

SHARED = ROOT.parent / "shared" / "data"
CLASSES = (0, 1, 10)  # of ESC-50: few are enough here


def tone(path: Path, pitch: int, seed: int, seconds: float, rate: int) -> None:
    """A tone in noise; no two clips of different seeds are the same, which `check` would object to."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (300 + 40 * pitch) * t) + 0.05 * rng.standard_normal(len(t)), rate)


@pytest.fixture
def esc10(tmp_path: Path) -> Path:
    """A few clips of ESC-10's four folds, or tones in their place."""
    raw = tmp_path / "esc10"
    rows = []
    if (SHARED / "esc10").is_dir():
        with (SHARED / "esc10" / "meta" / "esc50.csv").open() as file:
            found = [row for row in csv.DictReader(file) if int(row["target"]) in CLASSES]
        for fold in range(1, 5):
            for target in CLASSES:
                rows += [r for r in found if int(r["fold"]) == fold and int(r["target"]) == target][:2]
        (raw / "audio").mkdir(parents=True)
        for row in rows:
            shutil.copy(SHARED / "esc10" / "audio" / row["filename"], raw / "audio")
    else:
        for number in range(24):
            target = CLASSES[number % 3]
            row = {"filename": f"{number}.ogg", "fold": str(number // 6 + 1), "target": str(target)}
            rows.append({**row, "category": LABELS[target]})
            tone(raw / "audio" / row["filename"], target, number, 5, 44100)
    (raw / "meta").mkdir(exist_ok=True)
    with (raw / "meta" / "esc50.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("filename", "fold", "target", "category"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return raw


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Three words of the spoken digits in Speech Commands' layout, or tones in their place."""
    raw = tmp_path / "digits"
    lists: dict[str, list[str]] = {"testing": [], "validation": []}
    for word, place in (("one", 1), ("two", 2), ("zero", 3)):
        if (SHARED / "digits").is_dir():
            (raw / word).mkdir(parents=True)
            for path in sorted((SHARED / "digits" / word).iterdir())[:8]:
                shutil.copy(path, raw / word)
        else:
            for number in range(8):
                tone(raw / word / f"speaker_nohash_{number}.wav", place, 8 * place + number, 0.5, 8000)
        names = [f"{word}/{path.name}" for path in sorted((raw / word).iterdir())]
        lists["testing"] += names[:2]
        lists["validation"] += names[2:4]
    for name, lines in lists.items():
        (raw / f"{name}_list.txt").write_text("\n".join(lines) + "\n")
    (raw / "_background_noise_").mkdir()
    return raw


def run(*words: str) -> None:
    assert main.main(words) == 0, words


def accuracy(exp_name: str) -> float:
    (metric,) = json.loads(Path(f"workspace/runs/{exp_name}/scores/test.json").read_text())["metrics"]
    assert metric["name"] == "acc"
    return float(metric["value"])


def test_esc10(esc10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset_type", "esc-50")
    run("prepare", *flags, "--raw", str(esc10))
    run("check", *flags)
    run("compress", *flags)
    run("train", *flags, "--esc_fold", "4", "--max_epoch", "2", *TINY_FLAGS)
    run(
        "test", "--resume_checkpoint", "workspace/runs/htsat_esc-50_fold4/checkpoints/best.ckpt", "--accelerator", "cpu"
    )
    assert 0 <= accuracy("htsat_esc-50_fold4") <= 1


def test_digits(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--dataset_type", "scv2", "--classes_num", "3")
    run("prepare", "--dataset_type", "scv2", "--raw", str(digits))
    run("check", *flags)
    run("train", *flags, "--max_epoch", "2", *TINY_FLAGS)
    run("test", "--resume_checkpoint", "workspace/runs/htsat_scv2/checkpoints/best.ckpt", "--accelerator", "cpu")
    with h5py.File("workspace/runs/htsat_scv2/scores/test.h5") as file:
        assert file.attrs["labels"].tolist() == ["one", "two", "zero"]
        assert len(file["audio_name"]) == 6
    assert 0 <= accuracy("htsat_scv2") <= 1


def test_a_users_own_folder(esc10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder for each class, nothing else; the command that prepare prints trains on it."""
    monkeypatch.chdir(tmp_path)
    with (esc10 / "meta" / "esc50.csv").open() as file:
        for row in csv.DictReader(file):
            folder = tmp_path / "mine" / row["category"]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(esc10 / "audio" / row["filename"], folder)
    run("prepare", "--dataset_type", "folder", "--raw", "mine")
    flags = ("--dataset_type", "folder", "--classes_num", "3", "--task", "single_label")
    run("check", *flags)
    run("train", *flags, "--max_epoch", "1", *TINY_FLAGS)
    run("test", "--resume_checkpoint", "workspace/runs/htsat_folder/checkpoints/best.ckpt", "--accelerator", "cpu")
    assert 0 <= accuracy("htsat_folder") <= 1


def test_audioset(esc10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and audio -> packed sets -> create_index.sh -> save_idc -> balanced training -> test."""
    monkeypatch.chdir(tmp_path)
    clips = sorted((esc10 / "audio").iterdir())
    mids = ["/m/09x0r", "/m/0bt9lr", "/m/01yrx"]
    names = ("balanced_train", "unbalanced_train", "eval")
    for number, path in enumerate(clips):  # an id of 11 characters, as AudioSet's
        path.rename(path.with_name(f"Yclip_{number:06d}{path.suffix}"))
    for place, name in enumerate(names):
        chosen = range(place, len(clips), 3)
        lines = [f'clip_{n:06d}, 0.000, 10.000, "{mids[n // 3 % 3]}"' for n in chosen]
        Path(f"{name}_segments.csv").write_text(
            "\n".join(["# a comment", *lines, 'absent_0001, 0, 10, "/m/09x0r"', ""])
        )
        flags = ("--dataset_type", "audioset", "--dataset_path", "audioset")
        run("prepare", *flags, "--raw", str(esc10 / "audio"), "--segments", f"{name}_segments.csv")
    subprocess.run(
        ["bash", str(ROOT / "create_index.sh"), "audioset"],
        check=True, cwd=tmp_path, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    run("save_idc", *flags)
    with np.load("audioset/audioset_classes.npz") as found:
        assert found["counts"].sum() == 16
        assert (found["counts"] > 0).sum() == 3
    run("check", *flags)
    run("train", *flags, "--max_epoch", "1", "--tta_shifts", "0,100", *TINY_FLAGS)
    best = "workspace/runs/htsat_audioset/checkpoints/best.ckpt"
    run("test", *flags, "--resume_checkpoint", best, "--tta_shifts", "0,100", "--accelerator", "cpu")
    summary = json.loads(Path("workspace/runs/htsat_audioset/scores/test.json").read_text())
    assert summary["protocol"] == "paper"
    assert summary["tta_shifts"] == [0, 100]
    assert [(m["name"], m["clips"], m["classes"]) for m in summary["metrics"]] == [
        ("mAP", 8, 3),
        ("mAUC", 8, 3),
        ("d_prime", 8, 3),
    ]
    with h5py.File("workspace/runs/htsat_audioset/scores/test.h5") as file:
        assert file.attrs["labels"][0] == "Speech"
