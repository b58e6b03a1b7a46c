"""The file of a teacher's logits: written and read, as published, and what is refused."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from data.pseudo_labels import PUBLISHED_CLASSES, PUBLISHED_ENDS, TeacherLogits, TeacherWriter
from settings import UserError

LABELS = ["dog", "rain", "siren"]
NAMES = ["a.wav", "b.wav", "c.wav"]


def write(path: Path, names: Sequence[str] = NAMES, labels: Sequence[str] = LABELS, steps: int = 4) -> np.ndarray:
    """A file as teach writes it; returns its logits (N, K, steps)."""
    logits = np.random.default_rng(0).normal(size=(len(names), len(labels), steps)).astype(np.float16)
    with TeacherWriter(path, labels=labels, steps=steps, clip_seconds=2.0, source="x.ckpt sha256:0") as writer:
        writer.add(names[:2], logits[:2].astype(np.float32))
        writer.add(names[2:], logits[2:].astype(np.float32))
    return logits


def write_bare(path: Path, names: Sequence[str], logits: np.ndarray) -> None:
    """A file of the two published datasets alone."""
    with h5py.File(path, "w") as file:
        file.create_dataset("filenames", data=list(names), dtype=h5py.string_dtype())
        file["strong_logits"] = logits


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "teacher.h5"
    logits = write(path)
    teacher = TeacherLogits(path, LABELS)
    assert (teacher.clips, teacher.classes, teacher.steps, teacher.step_seconds) == (3, 3, 4, 0.5)
    rows = teacher.rows(["c.wav", "z.wav", "a.wav", "c.wav"])
    assert rows.dtype == np.int64
    assert rows.tolist() == [2, -1, 0, 2]
    assert teacher.read(2).dtype == np.float16
    np.testing.assert_array_equal(teacher.read(2), logits[2])
    assert [entry.name for entry in path.parent.iterdir()] == ["teacher.h5"]
    with h5py.File(path) as file:
        assert file["strong_logits"].chunks == (1, 3, 4)
        assert file.attrs["source"] == "x.ckpt sha256:0"


def test_logits_are_cut_to_float16_and_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.h5"
    with TeacherWriter(path, labels=["dog"], steps=2, clip_seconds=1.0, source="") as writer:
        writer.add(["a"], np.array([[[1e9, -np.inf]]], dtype=np.float32))
    assert TeacherLogits(path, ["dog"]).read(0).tolist() == [[65504, -65504]]
    whole = path.read_bytes()
    broken = np.array([[[0, 1]], [[np.nan, 1]]], dtype=np.float32)
    with pytest.raises(UserError, match="logits of b"):
        with TeacherWriter(path, labels=["dog"], steps=2, clip_seconds=1.0, source="") as writer:
            writer.add(["a", "b"], broken)
    assert path.read_bytes() == whole  # what was there stays, and nothing half-written lies beside it
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher.h5"]


def test_classes_are_found_by_name(tmp_path: Path) -> None:
    logits = write(tmp_path / "teacher.h5")
    turned = TeacherLogits(tmp_path / "teacher.h5", ["siren", "dog", "rain"])
    np.testing.assert_array_equal(turned.read(1), logits[1][[2, 0, 1]])
    fewer = TeacherLogits(tmp_path / "teacher.h5", ["rain"])
    assert (fewer.classes, fewer.read(0).shape) == (1, (1, 4))
    np.testing.assert_array_equal(fewer.read(0)[0], logits[0][1])


def test_published_file_is_read_as_it_is(tmp_path: Path) -> None:
    """447 classes by 250 steps of 40 ms, classes in alphabetical order; here for data with another order.

    Of a name the ending alone is left out, and no more of its letters.
    """
    path = tmp_path / "as_strong.hdf5"
    logits = np.random.default_rng(1).normal(size=(3, PUBLISHED_CLASSES, 250)).astype(np.float16)
    write_bare(path, ["Yb0RFKhbpFM3.mp3", "Y--PJHxphWEs.mp3", "Y_uPPn9gmh_g.mp3"], logits)
    ordered = [PUBLISHED_ENDS[0], *(f"Class {k:03d}" for k in range(445)), PUBLISHED_ENDS[1]]
    with pytest.warns(UserWarning, match="alphabetical"):
        teacher = TeacherLogits(path, ordered[::-1])
    assert (teacher.steps, teacher.step_seconds) == (250, 0.04)
    rows = teacher.rows(np.array([b"Y_uPPn9gmh_g.wav", b"Ynowhere.wav", b"packed/Yb0RFKhbpFM3.wav"]))
    assert rows.tolist() == [2, -1, 0]
    np.testing.assert_array_equal(teacher.read(2), logits[2][::-1])
    with pytest.raises(UserError, match="alphabetical"):
        TeacherLogits(path, [f"/m/{k}" for k in range(PUBLISHED_CLASSES)])


def test_classes_without_names_are_taken_as_they_come(tmp_path: Path) -> None:
    path, logits = tmp_path / "bare.h5", np.zeros((1, 3, 5), np.float16)
    write_bare(path, ["a"], logits)
    with pytest.warns(UserWarning, match="3 classes"):
        teacher = TeacherLogits(path, LABELS)
    assert teacher.step_seconds == 2.0
    with pytest.raises(UserError, match="3 classes"):
        TeacherLogits(path, LABELS[:2])


def test_names_match_with_and_without_folder_and_ending(tmp_path: Path) -> None:
    path = tmp_path / "teacher.h5"
    write(path, names=["folder/a.wav", "b.FLAC", "c.d"])
    teacher = TeacherLogits(path, LABELS)
    assert teacher.rows(["a.mp3", "other/b", "c.d", "c"]).tolist() == [0, 1, 2, -1]
    assert teacher.rows(["elsewhere/a.wav"]).tolist() == [-1]  # another folder: another clip
    assert teacher.rows([]).tolist() == []
    assert teacher.check_covers(["a.mp3", "x", "y", "z"]) == 0.25


def test_a_full_name_wins_over_a_short_one_and_the_first_row_over_another(tmp_path: Path) -> None:
    path = tmp_path / "teacher.h5"
    write(path, names=["dog/1.wav", "cat/1.wav", "1.wav"])
    assert TeacherLogits(path, LABELS).rows(["1.wav", "cat/1.wav", "dog/1.wav"]).tolist() == [2, 1, 0]
    write(path, names=["b.wav", "a.wav", "a.wav"])
    assert TeacherLogits(path, LABELS).rows(["a.wav", "a.mp3"]).tolist() == [1, 1]
    with h5py.File(path, "r+") as file:  # of fixed length
        del file["filenames"]
        file["filenames"] = np.array([b"one.wav", b"two.wav", b"three.wav"])
    assert TeacherLogits(path, LABELS).rows(["two"]).tolist() == [1]


@pytest.mark.parametrize(("wanted", "named"), [(["1.wav"], "cat/1.wav"), (["x/b.wav", "y/b.wav"], "y/b.wav")])
def test_names_that_could_be_several_clips_are_refused(tmp_path: Path, wanted: list[str], named: str) -> None:
    write(tmp_path / "teacher.h5", names=["dog/1.wav", "cat/1.wav", "b.wav"])
    with pytest.raises(UserError, match=named):
        TeacherLogits(tmp_path / "teacher.h5", LABELS).rows(wanted)


def test_a_file_of_other_clips_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "teacher.h5")
    with pytest.raises(UserError, match=r"x\.wav.*a\.wav"):
        TeacherLogits(tmp_path / "teacher.h5", LABELS).check_covers(["x.wav", "y.wav"])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.h5"

    def check_refused(named: str, labels: Sequence[str] = LABELS) -> None:
        with pytest.raises(UserError, match=named):
            TeacherLogits(path, labels)

    check_refused("teacher.h5")
    path.write_bytes(b"no HDF5")
    check_refused("HDF5")
    with h5py.File(path, "w") as file:
        file["audio_name"] = [b"a"]
    check_refused("filenames, strong_logits")
    write_bare(path, NAMES, np.zeros((3, 3, 4), np.float32))
    check_refused(r"float32 \(3, 3, 4\)")
    write_bare(path, NAMES[:2], np.zeros((3, 3, 4), np.float16))
    check_refused(r"\(2,\)")
    write(path)
    check_refused("cat, horse", ["cat", "dog", "horse"])


class Rows(Dataset):
    """Reads rows of a teacher's file, as the data set of a training does."""

    def __init__(self, teacher: TeacherLogits) -> None:
        self.teacher = teacher

    def __len__(self) -> int:
        return self.teacher.clips

    def __getitem__(self, row: int) -> np.ndarray:
        return self.teacher.read(row)


def test_workers_read_for_themselves(tmp_path: Path) -> None:
    logits = write(tmp_path / "teacher.h5")
    teacher = TeacherLogits(tmp_path / "teacher.h5", LABELS)
    np.testing.assert_array_equal(teacher.read(0), logits[0])  # the file is open in this process
    copied = pickle.loads(pickle.dumps(teacher))  # as a spawned worker gets it
    np.testing.assert_array_equal(copied.read(1), logits[1])
    batches = list(DataLoader(Rows(teacher), batch_size=2, num_workers=2))  # forked, with the handle
    np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in batches]), logits)
