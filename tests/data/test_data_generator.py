"""Reading clips, and the order in which they are read."""

import io
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

import h5py
import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from data.clip_store import UNREADABLE, Clip, ClipStoreWriter, Event, Waveforms, read_events, read_store_table
from data.labels import weak_class_precision
from data.samplers import BalancedSampler, EpochSampler, ShardSampler, WeightedSampler
from data_generator import ClipDataset, keep_batch, load_table, load_training_data
from prepare.compress import compress_store
from prepare.demo import LABELS
from settings import UserError, resolve


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "esc-50.h5"
    with ClipStoreWriter(path, clip_samples=8, sample_rate=32000, labels=list(map(str, range(50)))) as writer:
        for number in range(10):
            sound = np.arange(1, 6 + number % 3).astype(np.int16) + 10 * number
            writer.add(Clip(f"{number}", sound, [number % 4], fold=number % 5 + 1))
    return path


def read(store: Path, clip_samples: int = 8, fit: Any = "pad", **more: bool) -> ClipDataset:
    return ClipDataset(read_store_table(store), clip_samples=clip_samples, fit=fit, **more)


@pytest.mark.parametrize(
    ("fit", "expected"),
    [("pad", [1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0]), ("repeat", [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2])],
)
def test_short_clips_are_fitted(store: Path, fit: str, expected: list[int]) -> None:
    dataset = read(store, 12, fit)
    assert dataset[0]["waveform"].dtype == torch.int16
    assert dataset[0]["waveform"].tolist() == expected
    assert dataset[0]["real_len"] == 5
    assert read(store, 4, "pad")[1]["waveform"].tolist() == [11, 12, 13, 14]


def test_a_batch_is_its_items(store: Path) -> None:
    dataset = read(store)
    batch = dataset.__getitems__([7, 2, 2])
    for place, index in enumerate([7, 2, 2]):
        item = dataset[index]
        assert batch["audio_name"][place] == item["audio_name"] == str(index)
        for name in ("waveform", "target", "real_len", "index"):
            assert torch.equal(batch[name][place], item[name])


def test_handles_do_not_travel(store: Path) -> None:
    dataset = read(store)
    first = dataset[3]["waveform"]
    copy = pickle.loads(pickle.dumps(dataset))  # as a DataLoader does for a spawned worker
    assert not copy._open
    assert torch.equal(copy[3]["waveform"], first)


def test_a_forked_worker_reads(store: Path) -> None:
    dataset = read(store)
    expected = dataset.__getitems__([0, 1])["waveform"]  # the parent's handle is open
    loader = DataLoader(dataset, 2, num_workers=1, multiprocessing_context="fork", collate_fn=keep_batch)
    assert torch.equal(next(iter(loader))["waveform"], expected)


def test_full_shared_memory_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a clip that cannot be read, for which another would stand in, nor by the death of the worker."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    dataset = read(store)
    loader = DataLoader(dataset, 2, num_workers=1, multiprocessing_context="fork", collate_fn=keep_batch)
    with pytest.raises(UserError, match="/dev/shm"):
        next(iter(loader))


def test_folds(store: Path) -> None:
    given = {"dataset_type": "esc-50", "dataset_path": str(store.parent), "esc_fold": 5}
    held_out = {split: load_table(resolve(given), split).names.tolist() for split in ("train", "validation", "test")}
    assert held_out == {"test": [b"4", b"9"], "validation": [b"0", b"5"], "train": [b"1", b"2", b"3", b"6", b"7", b"8"]}
    paper = resolve({**given, "protocol": "paper"})
    assert load_table(paper, "validation").names.tolist() == load_table(paper, "test").names.tolist() == [b"4", b"9"]
    assert len(load_table(paper, "train")) == 8
    with pytest.raises(UserError, match=r"esc_fold = 6 .* \[1, 2, 3, 4, 5\]"):
        load_table(resolve({**given, "esc_fold": 6}), "test")


def test_data_that_does_not_fit_is_refused(store: Path) -> None:
    given = {"dataset_type": "esc-50", "dataset_path": str(store.parent)}
    with pytest.raises(UserError, match="50 classes"):
        load_table(resolve({**given, "classes_num": 10}), "train")
    with pytest.raises(UserError, match="nowhere"):
        load_table(resolve({**given, "dataset_path": "nowhere"}), "train")


@pytest.mark.parametrize(
    ("given", "labels", "reason"),
    [
        ({}, {"train": [[0], [0]], "validation": [[0], [1]]}, "train .* same classes .*bee"),
        ({}, {"train": [[0], [1]], "validation": [[0]]}, "validation .* same classes .*bee"),
        ({}, {"train": [[0], [1]], "validation": [[], []]}, "validation .* same classes .*none"),
        ({"task": "single_label"}, {"train": [[0], [0, 1]], "validation": [[0], [1]]}, "train .* exactly one class"),
        ({"loss_type": "frame_bce"}, {"train": [[0], [0]], "validation": [[0]]}, None),
        ({}, {"train": [[0], []], "validation": [[0], []]}, None),
    ],
)
def test_a_training_that_cannot_succeed_is_refused(
    tmp_path: Path, given: dict[str, str], labels: dict[str, list[list[int]]], reason: Optional[str]
) -> None:
    with ClipStoreWriter(tmp_path / "demo.h5", clip_samples=8, sample_rate=32000, labels=["bee", "owl"]) as writer:
        for split, clips in labels.items():
            for number, classes in enumerate(clips):
                events = [Event(label, 0.0, 0.0001) for label in classes]
                sound = np.ones(8, np.int16)
                writer.add(Clip(f"{split}{number}", sound, classes, split=split, events=events))
    settings = resolve({"dataset_path": str(tmp_path), "classes_num": 2, **given})
    with pytest.raises(UserError, match=reason) if reason else nullcontext():
        load_training_data(settings)


def test_a_store_of_another_rate(store: Path) -> None:
    """The network's input of 8 samples at 16 kHz lasts as long as 16 of the store's at 32 kHz."""
    settings = resolve({"dataset_type": "esc-50", "dataset_path": str(store.parent), "sample_rate": 16000})
    settings = settings.model_copy(update={"clip_samples": 8})
    batch = load_training_data(settings).dataset("train").__getitems__([0, 1])
    assert batch["sample_rate"] == 32000
    assert batch["waveform"].shape == (2, 16)


def test_a_clip_that_cannot_be_read_is_replaced(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip 4 is damaged: one of its class (0, 4, 8) stands in, name, index and target included, and is counted."""
    dataset = read(store)
    whole = Waveforms.read_into

    def damaged(self: Waveforms, row: int, waveform: np.ndarray) -> int:
        if row == 4:
            raise OSError("damaged")
        return whole(self, row, waveform)

    monkeypatch.setattr(Waveforms, "read_into", damaged)
    batch = dataset.__getitems__([3, 4])
    assert batch["unreadable"] == 1
    stand_in = int(batch["index"][1])
    assert stand_in in (0, 8)
    assert batch["audio_name"] == ["3", str(stand_in)]
    assert torch.equal(batch["waveform"][1], dataset[stand_in]["waveform"])
    assert batch["target"][1].argmax() == 0
    evaluated = read(store, replace=False)
    batch = evaluated.__getitems__([3, 4])
    assert batch["index"].tolist() == [3, UNREADABLE]
    assert batch["waveform"][1].tolist() == [0] * 8
    assert batch["audio_name"] == ["3", "4"]
    alone = dataset.table.select(np.array([4, 5]))  # no other clip has its class: any will do
    assert ClipDataset(alone, clip_samples=8, fit="pad")[0]["audio_name"] == "5"
    monkeypatch.setattr(Waveforms, "read_into", lambda *_: 0)
    with pytest.raises(UserError, match="check"):
        dataset[0]


def test_compressed_store_is_the_same_sound(store: Path) -> None:
    before = read(store, 12, "repeat").__getitems__(range(10))
    events, table = read_events(store), read_store_table(store)
    compress_store(store)
    with h5py.File(store) as file:
        assert "waveform" not in file
    after = read(store, 12, "repeat").__getitems__(range(10))
    for name in ("waveform", "target", "real_len", "index"):
        assert torch.equal(before[name], after[name])
    assert read_events(store) == events
    assert read_store_table(store).fingerprint() == table.fingerprint()
    size = store.stat().st_size
    assert compress_store(store) == (size, size)  # nothing more to do
    assert not list(store.parent.glob("*.partial"))


@pytest.mark.parametrize(("samples", "channels"), [(0, 1), (4, 1), (10**6, 1), (8, 2)])
def test_a_damaged_flac_row_is_named(samples: int, channels: int, store: Path) -> None:
    """No FLAC file at all (0 samples), a shorter and a longer one than real_len says, and stereo."""
    compress_store(store)
    row = io.BytesIO(bytes(20))
    with h5py.File(store, "r+") as file:
        if samples:
            soundfile.write(row, np.zeros((samples, channels), np.int16), 8000, format="FLAC")
        file["waveform_flac"][3] = np.frombuffer(row.getvalue(), np.uint8)
    with h5py.File(store) as file, pytest.raises(UserError, match="Row 3"):
        Waveforms(file).read(3)


def test_class_filter(demo_workspace: Path) -> None:
    path = str(demo_workspace / "workspace" / "data" / "demo")
    kept = load_table(resolve({"dataset_path": path, "class_filter": ["siren", "0"]}), "train")
    everything = load_table(resolve({"dataset_path": path}), "train")
    wanted = everything.targets[:, [LABELS.index("siren"), 0]].any(axis=1)
    assert 0 < len(kept) == wanted.sum() < len(everything)
    with pytest.raises(UserError, match="sirene"):
        load_table(resolve({"dataset_path": path, "class_filter": ["sirene"]}), "train")


def test_a_file_of_the_index_that_is_gone_is_told_at_once(tmp_path: Path) -> None:
    index = tmp_path / "hdf5s" / "indexes" / "full_train.h5"
    index.parent.mkdir(parents=True)
    with h5py.File(index, "w") as file:
        file["audio_name"], file["target"] = np.array([b"a"]), np.ones((1, 527), bool)
        file["hdf5_path"], file["index_in_hdf5"] = np.array([b"hdf5s/waveforms/gone.h5"]), np.zeros(1, np.int32)
    with pytest.raises(UserError, match=r"gone\.h5"):
        load_table(resolve({"dataset_type": "audioset", "dataset_path": str(tmp_path)}), "train")


def test_epoch_sampler_shares_are_disjoint() -> None:
    shares = [list(EpochSampler(11, seed=1, rank=rank, world=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert len({clip for share in shares for clip in share}) == 9
    sampler = EpochSampler(11, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(11))
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    with pytest.raises(UserError, match="devices"):
        EpochSampler(2, seed=1, world=3)


def test_balanced_sampler_draws_classes_equally_often() -> None:
    targets = np.zeros((1000, 4), dtype=bool)
    targets[:900, 0] = targets[900:990, 1] = targets[990:, 3] = True  # class 2 has no clips
    drawn = np.array(list(BalancedSampler(targets, seed=1)))
    label = targets[drawn].argmax(axis=1)
    assert len(drawn) == 1000
    for start in range(0, 999, 3):  # each class once a round
        assert sorted(label[start : start + 3]) == [0, 1, 3]
    assert len(set(drawn[label == 0])) > 250
    halves = [list(BalancedSampler(targets, seed=1, rank=rank, world=2)) for rank in range(2)]
    assert [clip for pair in zip(*halves, strict=True) for clip in pair] == drawn.tolist()
    with pytest.raises(UserError, match="--balanced_data"):
        BalancedSampler(np.zeros((3, 2), dtype=bool), seed=1)


def test_weighted_sampler() -> None:
    """In proportion to 1000 / (clips of the class + 0.01) + added, summed over a clip's classes."""
    targets = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    sampler = WeightedSampler(targets, np.array([0, 500, 7]), seed=1, draws=60000)
    weights = np.array([1000 / 3.01, 1000 / 3.01, 1000 / 3.01 + 1000 / 1.01 + 500, 0])
    shares = np.bincount(sampler.draw(np.random.default_rng(0)), minlength=4) / 60000
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)
    with pytest.raises(UserError, match="--balanced_data"):
        WeightedSampler(targets[3:], np.zeros(3), seed=1)
    added = 0.4 / weak_class_precision()
    assert (added > 0).sum() == 77
    assert added[447] == pytest.approx(0.4 / 0.03202)
    with pytest.raises(UserError, match="oversample_weak"):
        resolve({"oversample_weak": 0.4})


def test_a_process_without_clips_takes_the_first() -> None:
    assert [list(ShardSampler(1, rank=rank, world=3)) for rank in range(3)] == [[0], [0], [0]]


@pytest.mark.parametrize(("length", "world"), [(7, 1), (7, 2), (3, 3)])
def test_shard_sampler_repeats_nothing(length: int, world: int) -> None:
    shares = [list(ShardSampler(length, rank=rank, world=world)) for rank in range(world)]
    assert sorted(clip for share in shares for clip in share) == list(range(length))


def test_loaders_give_every_clip_with_and_without_workers(demo_workspace: Path) -> None:
    orders = []
    for workers in (0, 4):
        path = str(demo_workspace / "workspace" / "data" / "demo")
        settings = resolve({"dataset_path": path, "num_workers": workers, "batch_size": 4})
        loader = load_training_data(settings).train_dataloader()
        orders.append([name for batch in loader for name in batch["audio_name"]])
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == 14
