"""Clips of which little is known, and events that no network hears: what a training and a test do with them."""

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from data.clip_store import STRONG, UNLABELLED, WEAK
from data.pseudo_labels import TeacherWriter
from data.samplers import FrameBalancedSampler
from data_generator import event_seconds, load_training_data
from evaluation.scores import load_scores
from model import build_model
from prepare.demo import LABELS
from sed_model import FrameSEDWrapper
from settings import Config, UserError
from tests.helpers import call, save_network, tiny


def on_frames(workspace: Path, **changes: Any) -> Config:
    return tiny(workspace, **{"loss_type": "frame_bce", **changes})


def test_clips_without_labels_validate_nothing(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = on_frames(demo_workspace, loss_type="weak_strong_bce")
    wrapper = FrameSEDWrapper(build_model(settings), settings, LABELS)
    batch = load_training_data(settings, ("train",)).dataset("train").__getitems__(range(4))
    logged: dict[str, float] = {}
    monkeypatch.setattr(wrapper, "log", lambda name, value, **_: logged.update({name: float(value)}))
    monkeypatch.setattr(FrameSEDWrapper, "trainer", type("Trainer", (), {"world_size": 1})())
    batch["labelling"] = torch.tensor([STRONG, WEAK, UNLABELLED, STRONG])
    found = []
    for _ in range(2):
        wrapper.eval().on_validation_epoch_start()
        with torch.no_grad():
            wrapper.validation_step(batch, 0)
        wrapper.on_validation_epoch_end()
        found.append(dict(logged))
        batch["target"][2] = 1 - batch["target"][2]
    assert found[0]["mAP"] > 0
    assert found[0] == found[1]


def changed_store(workspace: Path, folder: Path, change: Any) -> Path:
    """A copy of the demo's data under `folder`, changed by a function of the open file; returns its dataset_path."""
    folder.mkdir()
    shutil.copy(workspace / "workspace/data/demo/demo.h5", folder / "demo.h5")
    with h5py.File(folder / "demo.h5", "r+") as file:
        change(file)
    return folder


def test_clip_labels_leave_out_what_has_none(demo_workspace: Path, tmp_path: Path) -> None:
    """To clip_bce, a clip without labels would be one without any class."""

    def forget(file: h5py.File) -> None:
        file["labelling"][:4] = UNLABELLED
        file["target"][:4] = False

    place = str(changed_store(demo_workspace, tmp_path / "some", forget))
    settings = on_frames(demo_workspace, loss_type="clip_bce", dataset_path=place)
    with pytest.warns(UserWarning, match="4 of 14 clips for train"):
        data = load_training_data(settings, ("train",))
    assert len(data.tables["train"]) == 10
    settings = on_frames(demo_workspace, loss_type="weak_strong_bce", dataset_path=place, balanced_data=True)
    with (
        pytest.warns(UserWarning, match="4 of 14 training clips have no labels"),
        pytest.warns(UserWarning, match="4 of 14 training clips have no class"),
    ):
        assert len(load_training_data(settings, ("train",)).tables["train"]) == 14


def test_events_that_are_never_heard_are_told(demo_workspace: Path) -> None:
    settings = on_frames(demo_workspace, clip_samples=96000, balanced_data=True, balanced_by="frames")
    with pytest.warns(UserWarning, match="after the 3 s"):
        data = load_training_data(settings, ("train",))
    table = data.tables["train"]
    clip, _, seconds = event_seconds(table, 3.0)
    assert 0 < seconds.min() <= seconds.max() <= 3.0
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, FrameBalancedSampler)
    deaf = sorted(set(range(len(table))) - set(clip.tolist()))  # clips that sound after the 3 s only are silent
    weight = np.diff(sampler.upto, prepend=0)
    np.testing.assert_allclose(weight[deaf], 1 / len(deaf))


def test_a_split_without_events_is_refused(demo_workspace: Path, tmp_path: Path) -> None:
    def silence(file: h5py.File) -> None:
        validating = np.flatnonzero(file["split"][:] == b"validation")
        kept = ~np.isin(file["event_clip"][:], validating)
        for name in ("event_clip", "event_class", "event_onset", "event_offset"):
            column = file[name][:][kept]
            del file[name]
            file[name] = column

    place = str(changed_store(demo_workspace, tmp_path / "silent", silence))
    with pytest.raises(UserError, match="validation"):
        load_training_data(on_frames(demo_workspace, dataset_path=place), ("train", "validation"))


def test_a_teacher_of_clips_of_another_length_is_refused(demo_workspace: Path, tmp_path: Path) -> None:
    data = load_training_data(on_frames(demo_workspace), ("train",)).tables["train"]
    names = [name.decode() for name in data.names]
    for seconds, name in ((5.0, "short.h5"), (10.0, "long.h5")):
        writer = TeacherWriter(tmp_path / name, labels=data.labels, steps=4, clip_seconds=seconds, source="test")
        with writer:
            writer.add(names[:7], np.zeros((7, 10, 4)))
    with pytest.raises(UserError, match="5 s a clip"):
        load_training_data(on_frames(demo_workspace, teacher_path=str(tmp_path / "short.h5")), ("train",))
    with pytest.warns(UserWarning, match="50.0%"):
        load_training_data(on_frames(demo_workspace, teacher_path=str(tmp_path / "long.h5")), ("train",))


def test_a_test_leaves_out_what_is_not_known(
    demo_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Events found in a weak clip would be false alarms; an event after clip_samples could not be found."""
    monkeypatch.chdir(tmp_path)

    def forget(file: h5py.File) -> None:
        first, second, _ = np.flatnonzero(file["split"][:] == b"test")
        file["labelling"][first], file["labelling"][second] = WEAK, UNLABELLED

    place = changed_store(demo_workspace, tmp_path / "known", forget)
    save_network(Path("known.ckpt"), exp_name="known", clip_samples=160000, loss_type="frame_bce")
    words = ["test", "--resume_checkpoint", "known.ckpt", "--accelerator", "cpu", "--dataset_path", str(place)]
    for local, clips, lacking in (("False", 2, "1 of 3 clips"), ("True", 1, "event times")):
        call(*words, "--fl_local", local, "--heatmap_dir", "scores")
        assert lacking in capsys.readouterr().out
        scores = load_scores(Path("scores/test.h5"))
        assert len(scores.names) == clips
    assert scores.events is not None
    assert all(offset <= 5.0 for _, _, offset in scores.events[0])
