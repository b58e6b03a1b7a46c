"""What prepared data say of themselves reaches the settings; what contradicts them is refused."""

from pathlib import Path
from typing import Any, Optional

import h5py
import numpy as np
import pytest

from data.clip_store import Clip, ClipStoreWriter, Event
from data.facts import store_facts, store_task
from model.checkpoint import Checkpoint, decided_settings
from runs import resume
from settings import Config, UserError, resolve

RATE = 22050


def write_store(
    folder: Path, dataset_type: str, clips: list[list[int]], *, task: Optional[str] = None, times: bool = False
) -> dict[str, Any]:
    """A store of 10 classes whose clips have the given ones; returns the flags that name it."""
    about: dict[str, Any] = {"task": task} if task else {}
    path = folder / f"{dataset_type}.h5"
    with ClipStoreWriter(path, clip_samples=8, sample_rate=RATE, labels=[*"abcdefghij"], **about) as writer:
        for number, labels in enumerate(clips):
            events = [Event(label, 0.0, 1.0) for label in labels] if times else []
            writer.add(Clip(str(number), np.ones(8, np.int16), labels, fold=number % 5 + 1, events=events))
    return {"dataset_type": dataset_type, "dataset_path": str(folder)}


def of_data(given: dict[str, Any]) -> Config:
    return resolve(given, facts=store_facts)


def test_a_training_needs_no_flags(tmp_path: Path) -> None:
    """As ESC-10: 10 of the 50 classes, at its own rate; what config.py computes follows."""
    given = write_store(tmp_path, "esc-50", [[0], [9]], task="single_label")
    found = resume.resolve_training(given)
    assert (found.classes_num, found.task, found.loss_type) == (10, "single_label", "clip_ce")
    assert (found.sample_rate, found.clip_samples, found.hop_size) == (RATE, 10 * RATE, RATE // 100)
    assert found.fmax == RATE / 2
    other_rate = of_data({**given, "sample_rate": 32000, "classes_num": 10, "task": "single_label"})
    assert (other_rate.sample_rate, other_rate.hop_size) == (32000, 320)
    assert of_data({**given, "loss_type": "clip_bce"}).loss_type == "clip_bce"
    assert of_data({**given, "encoder": "ast"}).sample_rate == 16000


@pytest.mark.parametrize(
    ("dataset_type", "clips", "task", "times", "expected"),
    [
        ("folder", [[0], [1]], "multilabel", False, "multilabel"),
        ("demo", [[0], [1]], "single_label", False, "single_label"),
        ("folder", [[0], [1]], None, False, "single_label"),
        ("folder", [[0], [1]], None, True, "multilabel"),
        ("folder", [[0], [1, 2]], None, False, "multilabel"),
        ("folder", [[0], []], None, False, "multilabel"),
        ("esc-50", [[0], [1]], None, False, "single_label"),
        ("esc-50", [[0], [1, 2]], None, False, "single_label"),
        ("scv2", [[0], [1]], None, False, "single_label"),
        ("demo", [[0], [1]], None, False, "multilabel"),
    ],
)
def test_task(
    tmp_path: Path, dataset_type: str, clips: list[list[int]], task: Optional[str], times: bool, expected: str
) -> None:
    """task None: a store made before stores said it."""
    assert of_data(write_store(tmp_path, dataset_type, clips, task=task, times=times)).task == expected


@pytest.mark.parametrize(("name", "wrong", "right"), [("classes_num", 50, 10), ("task", "multilabel", "single_label")])
@pytest.mark.parametrize("task", ["single_label", None])
def test_contradictions_name_both(
    tmp_path: Path, name: str, wrong: int | str, right: int | str, task: Optional[str]
) -> None:
    given = write_store(tmp_path, "folder", [[0], [1]], task=task)
    with pytest.raises(UserError, match=f"{name} = {wrong!r} contradicts .*{name} = {right!r}"):
        of_data({**given, name: wrong})


@pytest.mark.parametrize("folder", ["indexes", "waveforms"])
@pytest.mark.parametrize("name", ["full_train", "eval"])
def test_audioset(tmp_path: Path, folder: str, name: str) -> None:
    """PANNs' files say neither rate nor task: config.py does."""
    path = tmp_path / "hdf5s" / folder / f"{name}.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["target"] = np.zeros((2, 7), dtype=bool)
    found = of_data({"dataset_type": "audioset", "dataset_path": str(tmp_path)})
    assert (found.classes_num, found.task, found.sample_rate) == (7, "multilabel", 32000)


def test_nothing_prepared_and_a_damaged_store(tmp_path: Path) -> None:
    given = {"dataset_type": "esc-50", "dataset_path": str(tmp_path)}
    assert of_data(given) == resolve(given)
    (tmp_path / "esc-50.h5").write_bytes(b"cut off")
    assert of_data(given) == resolve(given)


def test_a_checkpoint_decides_its_classes_and_rate(tmp_path: Path) -> None:
    given = write_store(tmp_path, "folder", [[0], [1]])
    saved = resolve({"dataset_type": "scv2", "classes_num": 3, "task": "multilabel"}).model_dump()
    own = Checkpoint(Path("own.ckpt"), {}, settings=saved)
    found = resolve(given, checkpoint=decided_settings(own, "auto"), facts=store_task)
    assert (found.classes_num, found.task, found.sample_rate) == (3, "multilabel", 16000)


def test_the_classifier_of_a_foreign_file_says_its_classes(tmp_path: Path) -> None:
    given = write_store(tmp_path, "folder", [[0], [1]])
    weights = {name: np.zeros(4) for name in ("norm.bias", "tscam_conv.bias", "head.bias")}
    foreign: Any = Checkpoint(Path("foreign.ckpt"), {**weights, "norm.bias": np.zeros(96)}, encoder="htsat")  # type: ignore[dict-item]
    found = resolve(given, checkpoint=decided_settings(foreign, "auto"), facts=store_task)
    assert (found.classes_num, found.task, found.sample_rate) == (4, "single_label", 32000)
    assert "classes_num" not in decided_settings(foreign, "auto", fine_tuning=True)
