"""The command teach: what it writes is what the networks say, and what their ensemble's test evaluates."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from data.labels import audioset_mids, published_labels
from data.pseudo_labels import TeacherLogits
from evaluation.mapping import load_mapping
from model import build_model
from model.checkpoint import load_network, read_checkpoint
from model.network import resample
from prepare.demo import LABELS
from settings import resolve
from tests.helpers import LEAN, call, refused, save_network
from utils import int16_to_float32

FINE: dict[str, Any] = {"htsat_time_stride": 2}  # steps half as long


def save_teacher(path: Path, seed: int, labels: Sequence[str] = LABELS, **changes: Any) -> None:
    """A network with random weights that answers differently over time, classes and seeds."""
    save_network(path, labels, seed=seed, exp_name=path.stem, **{**LEAN, **changes})
    content = torch.load(path, weights_only=True)
    content["state_dict"]["sed_model.tscam_conv.weight"].normal_(std=0.2)
    torch.save(content, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_workspace: Path) -> Path:
    """A folder with the demo's workspace and four checkpoints, of which d.ckpt has finer steps."""
    place = tmp_path_factory.mktemp("teach")
    shutil.copytree(demo_workspace / "workspace" / "data", place / "workspace" / "data")
    for seed, name in enumerate("abc"):
        save_teacher(place / f"{name}.ckpt", seed)
    save_teacher(place / "d.ckpt", 3, **FINE)
    return place


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


FLAGS = ("--accelerator", "cpu", "--batch_size", "4")


def teach(*words: str) -> None:
    call("teach", *words, *FLAGS)


def answers(path: str, split: bytes = b"train") -> tuple[list[str], np.ndarray]:
    """The names of a split's clips, and the frame logits (N, K, steps) of a checkpoint's network for them."""
    checkpoint = read_checkpoint(path)
    assert checkpoint.settings is not None
    network = build_model(resolve({}, checkpoint=checkpoint.settings)).eval()
    load_network(network, checkpoint)
    with h5py.File("workspace/data/demo/demo.h5") as store:
        chosen = store["split"][:] == split
        waveforms, names = store["waveform"][:][chosen], store["audio_name"][:][chosen]
    with torch.no_grad():
        sound = resample(int16_to_float32(torch.from_numpy(waveforms)), 32000, network.sample_rate)
        logits = network(sound).frame_logits
    return [name.decode() for name in names], logits.transpose(1, 2).numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_one_network_writes_its_own_logits(capsys: pytest.CaptureFixture[str]) -> None:
    teach("--resume_checkpoint", "a.ckpt")
    path = Path("workspace/teachers/a.h5")
    assert f"--teacher_path {path}" in capsys.readouterr().out
    names, logits = answers("a.ckpt")
    with h5py.File(path) as file:
        assert [name.decode() for name in file["filenames"][:]] == names
        assert file["strong_logits"].dtype == np.float16
        np.testing.assert_allclose(file["strong_logits"][:], logits, rtol=1e-3, atol=1e-3)
        assert file.attrs["clip_seconds"] == 10.0
        assert file.attrs["step_seconds"] == 10.0 / 32
        assert file.attrs["source"].startswith("a.ckpt sha256:")
    assert np.ptp(logits, axis=2).min() > 0.01  # else any order of the steps would do
    teacher = TeacherLogits(path, LABELS[::-1])
    (row,) = teacher.rows([names[5]])
    np.testing.assert_allclose(teacher.read(row), logits[5][::-1], rtol=1e-3, atol=1e-3)


def test_a_second_time_gives_the_same_file() -> None:
    contents = []
    for _ in range(2):
        teach("--resume_checkpoint", "a.ckpt", "--output", "twice.h5", "--teach_split", "test")
        contents.append(Path("twice.h5").read_bytes())
    assert contents[0] == contents[1]
    assert not list(Path().glob("*.partial"))


def test_an_ensemble_is_what_esm_test_evaluates() -> None:
    members = ["--esm_model_pathes", "a.ckpt,b.ckpt,c.ckpt"]
    teach(*members, "--output", "ensemble.h5", "--teach_split", "validation")
    flags = ["--fl_local", "True", "--test_split", "validation", "--test_file", "esm", "--heatmap_dir", "scores"]
    call("esm_test", *members, *flags, "--accelerator", "cpu")
    with h5py.File("ensemble.h5") as file, h5py.File("scores/esm.h5") as tested:
        assert [name.decode() for name in file["filenames"][:]] == [n.decode() for n in tested["audio_name"][:]]
        mean = sigmoid(file["strong_logits"][:]).transpose(0, 2, 1)
        np.testing.assert_allclose(mean, tested["framewise"][:], atol=1e-3)
    single = [sigmoid(answers(f"{name}.ckpt", b"validation")[1]) for name in "abc"]
    assert np.abs(single[0] - single[1]).max() > 0.05
    np.testing.assert_allclose(mean.transpose(0, 2, 1), np.mean(single, axis=0), atol=1e-3)


def test_one_class_a_clip_is_taught_as_probabilities() -> None:
    """What learns from a teacher takes the sigmoid of its logits."""
    save_teacher(Path("s.ckpt"), 4, loss_type="clip_ce", task="single_label")
    teach("--resume_checkpoint", "s.ckpt", "--teach_split", "test")
    with h5py.File("workspace/teachers/s.h5") as file:
        np.testing.assert_allclose(sigmoid(file["strong_logits"][:]).sum(axis=1), 1, atol=5e-3)


def test_members_of_other_steps_meet_on_the_finest() -> None:
    members = ["--esm_model_pathes", "a.ckpt,d.ckpt", "--esm_together", "False"]
    teach(*members, "--output", "mixed.h5", "--teach_split", "test")
    coarse, fine = (sigmoid(answers(path, b"test")[1]) for path in ("a.ckpt", "d.ckpt"))
    assert (coarse.shape[2], fine.shape[2]) == (32, 64)
    with h5py.File("mixed.h5") as file:
        expected = (coarse.repeat(2, axis=2) + fine) / 2
        np.testing.assert_allclose(sigmoid(file["strong_logits"][:]), expected, atol=1e-3)
        assert file.attrs["step_seconds"] == 10.0 / 64


def test_encoders_with_other_frames_teach_together() -> None:
    """32 steps of HTS-AT and 250 frames of a MobileNet at another rate: each frame has the mean over its time."""
    sizes: dict[str, Any] = {"encoder": "frame_mn06", "clip_samples": 160000, "loss_type": "frame_bce"}
    save_network(Path("mn.ckpt"), seed=3, **sizes)
    teach("--esm_model_pathes", "a.ckpt,mn.ckpt", "--output", "both.h5", "--teach_split", "test")
    coarse, fine = (sigmoid(answers(path, b"test")[1]) for path in ("a.ckpt", "mn.ckpt"))
    with h5py.File("both.h5") as file:
        found = sigmoid(file["strong_logits"][:])
    assert found.shape[2] == fine.shape[2] == 250
    # Of the 125 frames of each half, those of 16 steps.
    np.testing.assert_allclose(found[..., 0], (coarse[..., 0] + fine[..., 0]) / 2, atol=1e-3)
    halves = [each.reshape(*each.shape[:2], 2, -1).mean(axis=3) for each in (found, coarse, fine)]
    np.testing.assert_allclose(halves[0], (halves[1] + halves[2]) / 2, atol=1e-3)


def test_all_splits_and_clips_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("workspace/data/demo", "damaged")
    with h5py.File("damaged/demo.h5", "r+") as store:
        first = int(np.flatnonzero(store["split"][:] == b"train")[0])
        store["real_len"][first] = 0
        lost, everything = store["audio_name"][first], sorted(store["audio_name"][:])
    flags = ["--resume_checkpoint", "a.ckpt", "--output", "all.h5", "--teach_split", "all", "--dataset_path", "damaged"]
    teach(*flags)
    assert "1 clips" in capsys.readouterr().out
    with h5py.File("all.h5") as file:
        written = sorted(file["filenames"][:])
        assert len(written) == 19
        assert [name for name in everything if name not in written] == [lost]


def test_clips_without_times_can_be_taught_by_a_network_trained_on_times(capsys: pytest.CaptureFixture[str]) -> None:
    save_teacher(Path("frames.ckpt"), 4, loss_type="frame_bce", dataset_type="folder", classes_num=10)
    Path("unlabelled").mkdir()
    shutil.copy("workspace/data/demo/demo.h5", "unlabelled/folder.h5")
    with h5py.File("unlabelled/folder.h5", "r+") as store:
        store["labelling"][:] = 0
        store["target"][:] = False
    flags = ["--resume_checkpoint", "frames.ckpt", "--output", "frames.h5", "--dataset_path", "unlabelled"]
    teach(*flags)
    assert "train --dataset_type folder --dataset_path unlabelled --loss_type" in capsys.readouterr().out
    with h5py.File("frames.h5") as file:
        np.testing.assert_allclose(file["strong_logits"][:], answers("frames.ckpt")[1], rtol=1e-3, atol=1e-3)


def test_a_network_of_audioset_teaches_other_classes() -> None:
    """By the mapping that a test of it uses: the largest score of a group of classes."""
    save_teacher(Path("audioset.ckpt"), 6, published_labels("audioset", 527), classes_num=527)
    mapping = load_mapping("reviewed", published_labels("audioset", 527), audioset_mids())
    shutil.copytree("workspace/data/demo", "household")
    with h5py.File("household/demo.h5", "r+") as store:
        store.attrs["labels"] = list(mapping.labels)
    flags = ["--resume_checkpoint", "audioset.ckpt", "--output", "household.h5", "--dataset_path", "household"]
    teach(*flags)
    expected = answers("audioset.ckpt")[1]
    with h5py.File("household.h5") as file:
        assert file.attrs["labels"].tolist() == list(mapping.labels)
        for label, group in enumerate(mapping.groups):
            largest = expected[:, list(group)].max(axis=1)
            np.testing.assert_allclose(file["strong_logits"][:, label], largest, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--resume_checkpoint"),
        (["--resume_checkpoint", "a.ckpt", "--esm_model_pathes", "a.ckpt,b.ckpt"], "both"),
        (["--esm_model_pathes", "a.ckpt,other.ckpt"], "other.ckpt"),
        (["--resume_checkpoint", "other.ckpt"], "other.ckpt"),
        (["--resume_checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--resume_checkpoint", "a.ckpt", "--output", "workspace"], "workspace"),
        (["--resume_checkpoint", "a.ckpt", "--output", "a.ckpt/a.h5"], "a.ckpt/a.h5"),
    ],
)
def test_mistakes_are_explained(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_teacher(Path("other.ckpt"), 5, [f"other {k}" for k in range(10)])
    assert named in refused(capsys, "teach", "--output", "refused.h5", *words, *FLAGS)
    assert not Path("refused.h5").exists()
