"""Subcommands one after another, as a newcomer would call them; the main ones in processes of their own."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch

import main
from tests.helpers import TINY_FLAGS, run_python

BEST = Path("workspace/runs/htsat_demo/checkpoints/best.ckpt")
SCORES = Path("workspace/runs/htsat_demo/scores")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command in this process, which has imported all that it needs: its output; it must succeed."""

    def call(*words: str | Path, cwd: Path) -> str:
        monkeypatch.chdir(cwd)
        assert main.main(list(map(str, words))) == 0, words
        return capsys.readouterr().out

    return call


def test_train_leaves_a_run_that_explains_itself(trained_run: Path) -> None:
    run = trained_run / "workspace" / "runs" / "htsat_demo"
    printed = (trained_run / "train.log").read_text()
    for said in (
        "data set",
        "device",
        "performance",
        "clips",
        "steps",
        "parameters",
        "memory",
        "epoch   2/2",
        "val loss",
    ):
        assert said in printed, said
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[0] == "best.ckpt"
    assert names[-1] == "last.ckpt"
    assert len(names) == 4
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


@pytest.mark.usefixtures("trained")
def test_a_second_run_does_not_mix_with_the_first() -> None:
    assert main.main(["train", *TINY_FLAGS]) == 2
    assert main.main(["train", "--max_epoch", "2", "--resume", "auto", *TINY_FLAGS]) == 0  # complete: nothing to do
    other = [*TINY_FLAGS, "--max_epoch", "3", "--resume", "auto", "--htsat_dim", "32"]
    assert main.main(["train", *other]) == 2


def test_test_localize_and_two_processes(trained: Path) -> None:
    flags = ("--resume_checkpoint", BEST, "--fl_local", "True")
    done = run_python("main.py", "test", *flags, "--accelerator", "cpu", cwd=trained)
    for said in ("mAP", "mAUC", "d_prime", "10", "held_out", "keys matched, 100.0%"):
        assert said in done.stdout, done.stdout
    one = json.loads((trained / SCORES / "test.json").read_text())
    assert [metric["name"] for metric in one["metrics"]] == ["mAP", "mAUC", "d_prime"]
    assert one["metrics"][0]["clips"] == 3

    parallel = ("--accelerator", "cpu", "--devices", "2", "--test_file", "parallel", "--batch_size", "2")
    run_python("main.py", "test", *flags, *parallel, cwd=trained)
    two = json.loads((trained / SCORES / "parallel.json").read_text())
    for first, second in zip(one["metrics"], two["metrics"], strict=True):
        assert second == {**first, "value": pytest.approx(first["value"])}
    with h5py.File(trained / SCORES / "test.h5") as a, h5py.File(trained / SCORES / "parallel.h5") as b:
        assert a["audio_name"][:].tolist() == b["audio_name"][:].tolist()
        np.testing.assert_allclose(a["framewise"][:], b["framewise"][:], atol=1e-6)
        assert a["framewise"].shape == (3, 32, 10)

    done = run_python("fl_evaluate.py", "--fl_threshold", "0.1", "--pictures", "1", "--report", cwd=trained)
    for said in ("intersection F1", "psds_eval", "collar F1", "PSDS1", "sed_scores_eval", "macro", "siren", "interval"):
        assert said in done.stdout, done.stdout
    lines = (trained / SCORES / "test_events.tsv").read_text().splitlines()
    assert lines[0] == "filename\tonset\toffset\tevent_label"
    names = [metric["name"] for metric in json.loads((trained / SCORES / "test_detection.json").read_text())["metrics"]]
    assert names[:4] == ["intersection F1", "intersection F1", "collar F1", "collar F1, onset only"]
    areas = {"PSDS1", "PSDS1, macro mean", "PSDS2"}
    assert {"segment F1", "segment error rate", *areas, "clip F1", "clip mAP"} == set(names[4:])
    assert (trained / SCORES / "test_report.html").read_text().count("<audio") == 3
    (picture,) = (trained / SCORES / "test_pictures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_average_and_ensemble(trained: Path, called: Callable[..., str]) -> None:
    assert "the mean of 2 checkpoints" in called("weight_average", cwd=trained)
    average = Path("workspace/runs/htsat_demo/weight_average.ckpt")
    members = f"{BEST},{BEST},{average}"
    said = called("esm_test", "--esm_model_pathes", members, "--test_file", "esm", cwd=trained)
    assert "test of 3 networks" in said
    summary = json.loads((trained / SCORES / "esm.json").read_text())
    assert summary["checkpoints"] == members.split(",")


@pytest.mark.usefixtures("trained")
def test_ensemble_of_one_network_is_that_network() -> None:
    assert main.main(["test", "--resume_checkpoint", str(BEST), "--test_file", "one", "--accelerator", "cpu"]) == 0
    assert (
        main.main(
            [
                "esm_test",
                "--esm_model_pathes",
                ",".join([str(BEST)] * 3),
                "--test_file",
                "three",
                "--accelerator",
                "cpu",
            ]
        )
        == 0
    )
    with h5py.File(SCORES / "one.h5") as a, h5py.File(SCORES / "three.h5") as b:
        np.testing.assert_allclose(a["clipwise"][:], b["clipwise"][:], atol=1e-6)


def test_save_idc(trained: Path, called: Callable[..., str]) -> None:
    called("save_idc", cwd=trained)
    data = trained / "workspace" / "data" / "demo"
    with np.load(data / "demo_classes.npz") as found, h5py.File(data / "demo.h5") as store:
        targets = store["target"][:][store["split"][:] == b"train"]
        for label in range(10):
            clips = found["clips"][found["starts"][label] : found["starts"][label + 1]]
            assert clips.tolist() == np.flatnonzero(targets[:, label]).tolist()
            assert found["counts"][label] == len(clips)


def test_check_compress_and_import(trained: Path, tmp_path: Path, called: Callable[..., str]) -> None:
    """Their own tests look at what they do; here they run as a user runs them."""
    assert "No problems found" in called("check", cwd=trained)
    called("prepare", "--clips", "10", cwd=tmp_path)
    assert "MiB ->" in called("compress", cwd=tmp_path)
    clips = [{"name": f"{n}.wav", "target": n, "waveform": np.ones(100, np.float32) / 2} for n in range(3)]
    np.save(tmp_path / "esc-50-data.npy", np.array([clips] * 5, dtype=object), allow_pickle=True)
    flags = ("--dataset_type", "esc-50", "--legacy", "esc-50-data.npy")
    assert "15 clips" in called("import_legacy", *flags, cwd=tmp_path)


def test_predict(trained: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).standard_normal((8000 * 13, 2)), 8000)
    (tmp_path / "text.wav").write_text("no sound")
    flags = ("--resume_checkpoint", BEST, "--accelerator", "cpu", "--top_k", "3")
    done = run_python(
        "main.py", "predict", tmp_path / "text.wav", tmp_path / "long.wav", *flags, cwd=trained, check=False
    )
    assert done.returncode == 1
    assert "text.wav cannot be read as audio" in done.stderr
    assert "1 of 2 files" in done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("long.wav (13.00 s)")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["test"], "test needs a checkpoint: --resume_checkpoint PATH"),
        (["test", "--resume_checkpoint", "nowhere.ckpt"], "There is no checkpoint nowhere.ckpt"),
        (["predict", "a.wav"], "predict needs a checkpoint"),
        (["esm_test"], "esm_test needs checkpoints"),
        (["weight_average", "--wa_folder", "nowhere"], "There are no .ckpt files in nowhere"),
        (["prepare", "--dataset_type", "esc-50"], "needs --raw"),
        (["prepare", "--dataset_type", "audioset", "--raw", "a"], "needs --segments"),
        (["prepare", "--raw", "somewhere"], "no use for --raw"),
        (["compress"], "prepare the data set first"),
        (["train", "--enable_label_enhance", "True"], "needs class_map_path"),
        (["train", "--token_label_range", "0.5"], "two shares"),
        (["prepare", "--clips", "3"], "at least 10"),
        (["train", "--dataset_path", "nowhere"], "There is no file"),
        (["train", "--max_epoch", "none"], "max_epoch = 'none' is not allowed"),
        (["train", "--devices", "2", "--accelerator", "gpu"], "Use --accelerator cpu"),
        (["train", "--resume", "nowhere.ckpt"], "There is no checkpoint nowhere.ckpt"),
        (["save_idc", "--dataset_path", "nowhere"], "There is no file"),
    ],
)
def test_mistakes_are_explained(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "gpu" in words and torch.cuda.device_count() >= 2:
        pytest.skip("this machine has the GPUs that the test says are missing")
    assert main.main(words) == 2
    assert said in capsys.readouterr().err


def test_unknown_command_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["trian"]):
        with pytest.raises(SystemExit) as left:
            main.main(words)
        assert left.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err
