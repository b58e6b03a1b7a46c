"""Raw data of each kind to a test, by the commands of the README."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import main
from prepare.esc50 import LABELS
from tests.helpers import ROOT, SMALL_FLAGS
from tests.prepare.raw_data import RAW_DATA, SPEECH, write_sound, write_text

RATE = ("--sample_rate", "8000")


def run(command: str, name: str, flags: dict[str, Any] | None = None, *settings: str) -> None:
    words = [word for flag, value in (flags or {}).items() for word in (f"--{flag}", str(value))]
    skipped = command == "prepare" and any((flags or {})["raw"].rglob("broken.*"))
    assert main.main([command, "--dataset_type", name, *words, *settings]) == int(skipped), command


@pytest.mark.parametrize(
    ("name", "settings", "clips"),
    [("esc-50", ("--esc_fold", "4"), 2), ("scv2", (), 3), ("folder", (), 2)],
)
def test_single_label(
    name: str, settings: tuple[str, ...], clips: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = RAW_DATA[name](tmp_path)
    if name == "esc-50":  # each fold needs two classes
        meta = flags["raw"] / "meta" / "esc50.csv"
        more = [f"{number}.wav,{number},{10 + number},{LABELS[10 + number]}\n" for number in range(1, 5)]
        write_text(meta, meta.read_text() + "".join(more).replace("1.wav", "5.wav"))
        for number in range(2, 6):
            write_sound(flags["raw"] / "audio" / f"{number}.wav")
    run("prepare", name, flags, *RATE)
    run("check", name, None, *settings)
    run("train", name, None, *settings, "--max_epoch", "1", *SMALL_FLAGS)
    run("compress", name)
    (folder,) = Path("workspace/runs").iterdir()
    run("test", name, {"resume_checkpoint": folder / "checkpoints" / "best.ckpt"}, "--accelerator", "cpu")
    (metric,) = json.loads((folder / "scores" / "test.json").read_text())["metrics"]
    assert (metric["name"], 0 <= metric["value"] <= 1) == ("acc", True)
    with h5py.File(folder / "scores" / "test.h5") as file:
        assert len(file["audio_name"]) == clips


def test_audioset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments and audio -> packed sets -> create_index.sh -> save_idc -> balanced training -> test."""
    monkeypatch.chdir(tmp_path)
    place = ("--dataset_path", "audioset", *RATE)
    for number, split in enumerate(("balanced_train", "unbalanced_train", "eval")):
        ids = [f"clip_{number}_{clip:04d}" for clip in range(6)]
        for ytid in ids:
            write_sound(tmp_path / "raw" / f"Y{ytid}.wav", seconds=1)
        lines = [f'{ytid}, 0.000, 10.000, "{(SPEECH, "/m/0bt9lr", "/m/01yrx")[n % 3]}"' for n, ytid in enumerate(ids)]
        table = write_text(tmp_path / f"{split}.csv", "\n".join(["# a comment", *lines, f'absent, 0, 10, "{SPEECH}"']))
        run("prepare", "audioset", {"raw": tmp_path / "raw", "segments": table}, *place)
    subprocess.run(
        ["bash", str(ROOT / "create_index.sh"), "audioset"],
        check=True, cwd=tmp_path, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    run("save_idc", "audioset", None, *place)
    with np.load("audioset/audioset_classes.npz") as found:
        assert (found["counts"].sum(), (found["counts"] > 0).sum()) == (12, 3)
    run("check", "audioset", None, *place)
    run("compress", "audioset", None, *place)
    run("train", "audioset", None, *place, "--max_epoch", "1", "--num_workers", "0", *SMALL_FLAGS)
    best = {"resume_checkpoint": "workspace/runs/htsat_audioset/checkpoints/best.ckpt"}
    run("test", "audioset", best, *place, "--num_workers", "0", "--tta_shifts", "0,100", "--accelerator", "cpu")
    summary = json.loads(Path("workspace/runs/htsat_audioset/scores/test.json").read_text())
    assert (summary["protocol"], summary["tta_shifts"]) == ("paper", [0, 100])
    metrics = [(m["name"], m["clips"], m["classes"]) for m in summary["metrics"]]
    assert metrics == [("mAP", 6, 3), ("mAUC", 6, 3), ("d_prime", 6, 3)]
    with h5py.File("workspace/runs/htsat_audioset/scores/test.h5") as file:
        assert file.attrs["labels"][0] == "Speech"
