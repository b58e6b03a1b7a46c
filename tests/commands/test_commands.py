"""Subcommands one after another, as a newcomer would call them; the main ones in processes of their own."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch

import main
from tests.helpers import ROOT, TINY_FLAGS, call, refused, run_python

BEST = Path("workspace/runs/htsat_demo/checkpoints/best.ckpt")
SCORES = Path("workspace/runs/htsat_demo/scores")


def test_train_leaves_a_run_that_explains_itself(trained_run: Path) -> None:
    run = trained_run / "workspace" / "runs" / "htsat_demo"
    printed = (trained_run / "train.log").read_text()
    assert printed.count("epoch   2/2") == 1
    for row in ("data set", "device", "performance", "clips", "steps", "parameters", "memory", "Model card:"):
        assert row in printed, row
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert (names[0], names[-1], len(names)) == ("best.ckpt", "last.ckpt", 4)
    assert json.loads((run / "config.json").read_text())["max_epoch"] == 2
    (entry,) = json.loads((run / "provenance.json").read_text())
    assert entry["command"][2] == "train"
    assert entry["data"]["train"]["clips"] == 14
    assert len(entry["data"]["train"]["fingerprint"]) == 16
    assert {"git_revision", "python", "packages", "device", "date"} <= entry.keys()
    logs = run / "logs" / "version_0"
    with (logs / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss_epoch", "val_loss", "mAP"} <= rows[0].keys()
    assert list(logs.glob("events.out.tfevents.*"))
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["settings"]["htsat_dim"] == 16
    assert len(checkpoint["labels"]) == 10
    assert checkpoint["frontend"]["sample_rate"] == 32000
    assert "| `max_epoch` | 2 |" in (run / "README.md").read_text()


@pytest.mark.usefixtures("trained")
def test_a_second_run_does_not_mix_with_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--resume auto" in refused(capsys, "train", *TINY_FLAGS)
    call("train", "--max_epoch", "2", "--resume", "auto", *TINY_FLAGS)  # complete: nothing to do
    other = [*TINY_FLAGS, "--max_epoch", "3", "--resume", "auto", "--htsat_dim", "32"]
    assert "htsat_dim" in refused(capsys, "train", *other)


@pytest.mark.slow
def test_test_localize_and_two_processes(trained: Path) -> None:
    flags = ("--resume_checkpoint", BEST, "--fl_local", "True", "--accelerator", "cpu")
    done = run_python("main.py", "test", *flags, cwd=trained)
    for said in ("mAP", "mAUC", "d_prime", "held_out", "keys matched, 100.0%"):
        assert said in done.stdout, said
    one = json.loads((SCORES / "test.json").read_text())
    assert [metric["name"] for metric in one["metrics"]] == ["mAP", "mAUC", "d_prime"]
    assert one["metrics"][0]["clips"] == 3

    run_python(
        "main.py", "test", *flags, "--devices", "2", "--test_file", "parallel", "--batch_size", "2", cwd=trained
    )  # fmt: skip
    two = json.loads((SCORES / "parallel.json").read_text())
    for first, second in zip(one["metrics"], two["metrics"], strict=True):
        assert second == {**first, "value": pytest.approx(first["value"])}
    with h5py.File(SCORES / "test.h5") as a, h5py.File(SCORES / "parallel.h5") as b:
        assert a["audio_name"][:].tolist() == b["audio_name"][:].tolist()
        np.testing.assert_allclose(a["framewise"][:], b["framewise"][:], atol=1e-6)
        assert a["framewise"].shape == (3, 32, 10)

    done = run_python("fl_evaluate.py", "--fl_threshold", "0.1", "--pictures", "1", "--report", cwd=trained)
    for said in ("psds_eval", "sed_scores_eval", "macro", "siren", "interval"):
        assert said in done.stdout, said
    lines = (SCORES / "test_events.tsv").read_text().splitlines()
    assert lines[0] == "filename\tonset\toffset\tevent_label"
    names = [metric["name"] for metric in json.loads((SCORES / "test_detection.json").read_text())["metrics"]]
    assert names[:4] == ["intersection F1", "intersection F1", "collar F1", "collar F1, onset only"]
    areas = {"PSDS1", "PSDS1, macro mean", "PSDS2"}
    assert set(names[4:]) == {"segment F1", "segment error rate", *areas, "clip F1", "clip mAP"}
    assert (SCORES / "test_report.html").read_text().count("<audio") == 3
    (picture,) = (SCORES / "test_pictures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("trained")
def test_average_and_ensembles(capsys: pytest.CaptureFixture[str]) -> None:
    """An ensemble of one network three times is that network."""
    call("weight_average")
    members = f"{BEST},{BEST},workspace/runs/htsat_demo/weight_average.ckpt"
    call("esm_test", "--esm_model_pathes", members, "--test_file", "esm")
    assert "3 networks" in capsys.readouterr().out
    assert json.loads((SCORES / "esm.json").read_text())["checkpoints"] == members.split(",")
    call("test", "--resume_checkpoint", BEST, "--test_file", "one", "--accelerator", "cpu")
    call("esm_test", "--esm_model_pathes", f"{BEST},{BEST},{BEST}", "--test_file", "three", "--accelerator", "cpu")
    with h5py.File(SCORES / "one.h5") as a, h5py.File(SCORES / "three.h5") as b:
        np.testing.assert_allclose(a["clipwise"][:], b["clipwise"][:], atol=1e-6)


def test_save_idc(trained: Path) -> None:
    call("save_idc")
    data = trained / "workspace" / "data" / "demo"
    with np.load(data / "demo_classes.npz") as found, h5py.File(data / "demo.h5") as store:
        targets = store["target"][:][store["split"][:] == b"train"]
        for label in range(10):
            clips = found["clips"][found["starts"][label] : found["starts"][label + 1]]
            assert clips.tolist() == np.flatnonzero(targets[:, label]).tolist()
            assert found["counts"][label] == len(clips)


def test_prepare_check_compress_and_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their own tests look at what they do; here they run as a user runs them."""
    monkeypatch.chdir(tmp_path)
    call("prepare", "--clips", "10")
    call("check")
    call("compress")
    assert "MiB ->" in capsys.readouterr().out
    clips = [{"name": f"{n}.wav", "target": n, "waveform": np.ones(100, np.float32) / 2} for n in range(3)]
    np.save("esc-50-data.npy", np.array([clips] * 5, dtype=object), allow_pickle=True)
    call("import_legacy", "--dataset_type", "esc-50", "--legacy", "esc-50-data.npy")
    assert "15 clips" in capsys.readouterr().out


def test_predict(trained: Path) -> None:
    soundfile.write("long.wav", 0.1 * np.random.default_rng(0).standard_normal((8000 * 13, 2)), 8000)
    Path("text.wav").write_text("no sound")
    flags = ("--resume_checkpoint", BEST, "--accelerator", "cpu", "--top_k", "3")
    done = run_python("main.py", "predict", "text.wav", "long.wav", *flags, cwd=trained, check=False)
    assert done.returncode == 1
    assert "text.wav" in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("long.wav (13.00 s)")
    assert len(lines) == 4


FAULTY = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, commands.results, main
def run(given):
    np.zeros(2) + np.zeros(3)
commands.results.run = run
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("words", "status", "traceback"), [(["results"], 1, True), (["results", "--max_epoch", "none"], 2, False)]
)
def test_a_bug_shows_its_traceback_and_a_mistake_one_message(
    words: list[str], status: int, traceback: bool, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", FAULTY, str(ROOT), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == status
    assert ("Traceback" in done.stderr) == traceback
    assert ("operands could not be broadcast" if traceback else "max_epoch") in done.stderr
    assert traceback or done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["test"], "--resume_checkpoint"),
        (["test", "--resume_checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
        (["predict", "a.wav"], "--resume_checkpoint"),
        (["esm_test"], "--esm_model_pathes"),
        (["weight_average", "--wa_folder", "nowhere"], "nowhere"),
        (["prepare", "--dataset_type", "esc-50"], "--raw"),
        (["prepare", "--dataset_type", "audioset", "--raw", "a"], "--segments"),
        (["prepare", "--raw", "somewhere"], "--raw"),
        (["compress"], "prepare"),
        (["train", "--enable_label_enhance", "True"], "class_map_path"),
        (["train", "--token_label_range", "0.5"], "token_label_range"),
        (["prepare", "--clips", "3"], "at least 10"),
        (["train", "--dataset_path", "nowhere"], "nowhere"),
        (["train", "--max_epoch", "none"], "max_epoch = 'none'"),
        (["train", "--devices", "2", "--accelerator", "gpu"], "--accelerator cpu"),
        (["train", "--resume", "nowhere.ckpt"], "nowhere.ckpt"),
        (["train", "--freeze_backbone", "True"], "--resume_checkpoint"),
        (["train", "--swin_pretrain_path", "a.pth", "--resume_checkpoint", "b.ckpt"], "a.pth"),
        (["save_idc", "--dataset_path", "nowhere"], "nowhere"),
        (["plan", "--measure_steps", "-1"], "--measure_steps"),
        (["benchmark", "--accelerator", "cpu", "--precisions", "64"], "32, bf16-mixed, 16-mixed"),
        (["benchmark", "--accelerator", "cpu", "--compile_modes", "fast"], "fast"),
        (["benchmark", "--accelerator", "cpu", "--steps", "0"], "--steps"),
        (["benchmark", "--accelerator", "cpu", "--precisions", "16-mixed"], "GPU"),
        (["cross_validate", "--dataset_type", "esc-50", "--esc_fold", "2"], "esc_fold"),
        (["cross_validate", "--dataset_type", "esc-50", "--protocols", "best"], "held_out, paper"),
        (["cross_validate", "--dataset_type", "esc-50", "--max_epoch", "0"], "max_epoch"),
        (["weight_average", "--wa_model_path", "a.safetensors", "--wa_folder", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_explained(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "gpu" in words and torch.cuda.device_count() >= 2:
        pytest.skip("this machine has the GPUs that the test says are missing")
    assert named in refused(capsys, *words)


def test_unknown_command_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["trian"]):
        with pytest.raises(SystemExit) as left:
            main.main(words)
        assert left.value.code == 2
    assert "trian" in capsys.readouterr().err
