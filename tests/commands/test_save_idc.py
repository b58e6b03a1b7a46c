"""The clips of each class, against a plain loop."""

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest

from commands import save_idc
from data.clip_store import BLOCK_ROWS, Clip, ClipStoreWriter, class_index


def plain_loop(targets: np.ndarray) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(targets.shape[1])]
    for clip, row in enumerate(targets):
        for label in range(len(row)):
            if row[label]:
                found[label].append(clip)
    return found


@pytest.mark.parametrize(
    ("rows", "classes", "share"),
    [
        (0, 3, 0.5),
        (1, 1, 1.0),
        (50, 7, 0.0),
        (50, 7, 1.0),
        (BLOCK_ROWS, 5, 0.3),
        (2 * BLOCK_ROWS + 1, 5, 0.3),
        (300, 527, 0.004),
    ],
)
def test_class_index_is_the_plain_loop(rows: int, classes: int, share: float) -> None:
    targets = np.random.default_rng(rows).random((rows, classes)) < share
    clips, starts, counts = class_index(targets)
    expected = plain_loop(targets)
    assert clips.dtype == np.int32
    assert starts.shape == (classes + 1,)
    assert counts.tolist() == [len(clips) for clips in expected]
    assert [clips[start:stop].tolist() for start, stop in itertools.pairwise(starts)] == expected


def test_class_index_takes_any_memory_order() -> None:
    targets = np.random.default_rng(1).random((9, 40)) < 0.2
    for found, expected in zip(class_index(targets.T), class_index(np.ascontiguousarray(targets.T)), strict=True):
        assert np.array_equal(found, expected)


def test_save_idc_of_an_audioset_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index in PANNs' format, with a class that has no clips; no pickle is needed to read the result."""
    part = tmp_path / "hdf5s" / "waveforms" / "balanced_train.h5"
    labels = [f"class {k}" for k in range(527)]
    with ClipStoreWriter(part, clip_samples=4, sample_rate=32000, labels=labels) as writer:
        for number in range(3):
            writer.add(Clip(f"Y{number}.wav", np.ones(4, dtype=np.int16), [number, 526]))
    index = tmp_path / "hdf5s" / "indexes" / "full_train.h5"
    index.parent.mkdir()
    with h5py.File(part) as stored, h5py.File(index, "w") as file:
        file["audio_name"], file["target"] = stored["audio_name"][:], stored["target"][:]
        file["hdf5_path"] = np.array([str(part).encode()] * 3)
        file["index_in_hdf5"] = np.arange(3, dtype=np.int32)
    save_idc.run({"dataset_type": "audioset", "dataset_path": str(tmp_path)})
    with np.load(tmp_path / "audioset_classes.npz", allow_pickle=False) as found:
        assert {name: found[name].dtype.kind for name in found} == {"clips": "i", "starts": "i", "counts": "i"}
        assert found["clips"].dtype == np.int32
        assert found["clips"].tolist() == [0, 1, 2, 0, 1, 2]
        assert found["counts"].tolist() == [1, 1, 1, *[0] * 523, 3]
        assert found["starts"].tolist() == [0, 1, 2, *[3] * 524, 6]
    assert "3 clips, 4 of 527 classes have clips" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.partial")] == []
