"""Subcommands one after another, as a newcomer would call them."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import main
from commands import results
from prepare.demo import LABELS
from tests.helpers import LEAN_FLAGS, call, refused

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
    assert {"train_loss_epoch", "val_loss", "mAP", "learning_rate"} <= rows[0].keys()
    rates = [float(row["learning_rate"]) for row in rows if row["learning_rate"]]
    assert rates == pytest.approx([1e-2 * 0.02, 1e-2 * 0.05])  # the epochs' own: the first two of the warm-up
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(logs.glob("events.out.tfevents.*"))
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["settings"]["htsat_dim"] == 16
    assert len(checkpoint["labels"]) == 10
    assert checkpoint["frontend"]["sample_rate"] == 32000


@pytest.mark.usefixtures("trained")
def test_a_second_run_does_not_mix_with_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--resume auto" in refused(capsys, "train", *LEAN_FLAGS)
    call("train", "--max_epoch", "2", "--resume", "auto", *LEAN_FLAGS)  # complete: nothing to do
    other = [*LEAN_FLAGS, "--max_epoch", "3", "--resume", "auto", "--htsat_dim", "32"]
    assert "htsat_dim" in refused(capsys, "train", *other)


@pytest.mark.usefixtures("trained")
def test_test_and_localize(capsys: pytest.CaptureFixture[str]) -> None:
    call("test", "--resume_checkpoint", BEST, "--fl_local", "True", "--accelerator", "cpu")
    printed = capsys.readouterr().out
    for word in ("mAP", "mAUC", "d_prime", "held_out", "keys matched, 100.0%"):
        assert word in printed, word
    metrics = json.loads((SCORES / "test.json").read_text())["metrics"]
    assert [(metric["name"], metric["clips"]) for metric in metrics] == [("mAP", 3), ("mAUC", 3), ("d_prime", 3)]
    with (SCORES / "test_classes.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["class"] for row in rows] == LABELS
    known = [float(row["average_precision"]) for row in rows if row["average_precision"]]
    assert np.mean(known) == pytest.approx(metrics[0]["value"], abs=1e-5)
    with h5py.File(SCORES / "test.h5") as store:
        assert store["framewise"].shape == (3, 32, 10)


def test_a_bug_shows_its_traceback_and_a_mistake_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "run", lambda given: np.zeros(2) + np.zeros(3))
    with pytest.raises(ValueError, match="broadcast"):
        main.main(["results"])
    message = refused(capsys, "results", "--max_epoch", "none")
    assert "max_epoch" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["test"], "--resume_checkpoint"),
        (["test", "--resume_checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
        (["predict", "a.wav"], "--resume_checkpoint"),
        (["export"], "checkpoint"),
        (["export", "--resume_checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
        (["export", "--formats", "onnx,tflite"], "tflite"),
        (["export", "--clips", "0"], "--clips 0"),
        (["serve", "--port", "65536"], "port 65536"),
        (["serve", "--most_seconds", "0"], "most_seconds = 0.0"),
        (["serve", "--most_waiting", "-1"], "most_waiting = -1"),
        (["listen", "--rate", "16000"], "--rate"),
        (["listen", "--pcm", "s16le"], "--resume_checkpoint"),
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


def test_what_the_parser_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["trian"], ["listen", "--pcm", "mp3"]):
        with pytest.raises(SystemExit) as left:
            main.main(words)
        assert left.value.code == 2
        assert not words or words[-1] in capsys.readouterr().err
