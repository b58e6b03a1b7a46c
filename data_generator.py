"""The clip store read as a torch Dataset, and the LightningDataModule that brings it to training."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from evaluation.mapping import mapping_labels
from prepare.clip_store import (
    SPLITS,
    UNREADABLE,
    ClipTable,
    Waveforms,
    open_store,
    read_index_table,
    read_store_table,
    store_path,
)
from samplers import BalancedSampler, EpochSampler, ShardSampler
from settings import Config

Split = Literal["train", "validation", "test"]
Batch = dict[str, Any]
AUDIOSET_CLASSES = 527
PANNS_SAMPLE_RATE = 32000  # of AudioSet's files as PANNs' scripts pack them, which do not say it


def load_table(settings: Config, split: Split) -> ClipTable:
    """The clips of a split. Raises ValueError where the data is missing or does not fit the settings."""
    tested = split == settings.test_split
    if settings.fl_local and settings.fl_dataset and tested:
        table = _split_table(settings, split, Path(settings.fl_dataset))
    elif settings.dataset_type == "audioset":
        table = _audioset_table(settings, split)
    else:
        table = _split_table(settings, split, store_path(settings.dataset_path, settings.dataset_type))
    if table.targets.shape[1] != settings.classes_num and not (tested and _is_mapped(settings, table)):
        raise ValueError(
            f"{table.paths[0]} has {table.targets.shape[1]} classes, the network has classes_num = "
            f"{settings.classes_num}: test a checkpoint on the data set it was trained for, or set classes_num."
        )
    sample_rate = table.sample_rate or PANNS_SAMPLE_RATE
    if sample_rate != settings.sample_rate:
        raise ValueError(
            f"{table.paths[0]} holds audio at {sample_rate} Hz, the network takes {settings.sample_rate} Hz: "
            f"prepare it again with --sample_rate {settings.sample_rate}."
        )
    for path in table.paths:
        open_store(path).close()  # a file that is gone or cut off is told now, not in the middle of an epoch
    if split == "train" and settings.class_filter:
        wanted = table.targets[:, _class_numbers(settings.class_filter, table)]
        table = table.select(np.asarray(wanted.any(axis=1)))
    if len(table) == 0:
        raise ValueError(f"{table.paths[0]} has no clips for {split}.")
    return table


def _is_mapped(settings: Config, table: ClipTable) -> bool:
    """Whether a test can take the classes of a table from a network with AudioSet's (fl_audioset_mapping)."""
    audioset = settings.classes_num == AUDIOSET_CLASSES
    return audioset and sorted(mapping_labels(settings.fl_audioset_mapping)) == sorted(table.labels)


def _class_numbers(names: Sequence[str], table: ClipTable) -> list[int]:
    """Classes given by number or by name. Raises ValueError for those that there are not."""
    labels, classes = table.labels, table.targets.shape[1]
    numbers = {**{str(k): k for k in range(classes)}, **{label: k for k, label in enumerate(labels)}}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        known = f"0 to {classes - 1}" + (f", or {', '.join(labels[:20])}" if labels else "")
        raise ValueError(f"class_filter names {', '.join(unknown)}; the classes are {known}.")
    return [numbers[name] for name in names]


def _audioset_table(settings: Config, split: Split) -> ClipTable:
    """AudioSet: the index of training clips, or the evaluation set, which serves validation and test."""
    root = Path(settings.dataset_path)
    name = settings.index_type if split == "train" else "eval"
    index = root / "hdf5s" / "indexes" / f"{name}.h5"
    packed = root / "hdf5s" / "waveforms" / f"{name}.h5"
    return read_store_table(packed) if packed.is_file() and not index.is_file() else read_index_table(index, root)


def _split_table(settings: Config, split: Split, store: Path) -> ClipTable:
    """One store: by its column `split`, or by fold, with esc_fold for the test and the next fold for validation."""
    table = read_store_table(store)
    if settings.protocol == "paper" and split == "validation":
        split = "test"
    if (table.split != b"").any():
        return table.select(table.split == split.encode())
    folds = np.unique(table.fold).tolist()
    if settings.esc_fold not in folds:
        raise ValueError(f"esc_fold = {settings.esc_fold} is not among the folds of {table.paths[0]}: {folds}.")
    following = folds[(folds.index(settings.esc_fold) + 1) % len(folds)]
    if len(folds) < (3 if settings.protocol == "held_out" else 2):
        raise ValueError(f"{table.paths[0]} has only the folds {folds}: too few for protocol {settings.protocol}.")
    if split == "test":
        return table.select(table.fold == settings.esc_fold)
    if split == "validation":
        return table.select(table.fold == following)
    held_out = [settings.esc_fold] if settings.protocol == "paper" else [settings.esc_fold, following]
    return table.select(~np.isin(table.fold, held_out))


MOST_TRIES = 10  # other clips of its class, and then any others, that are tried in place of one that cannot be read


class ClipDataset(Dataset):
    """Clips of a table as training examples, read in batches.

    An item: audio_name, waveform (clip_samples,) int16, target (K,) float32, real_len and index (its place in the
    table). A clip that is shorter than clip_samples is padded with zeros or repeated (`fit`); a longer one is cut.
    Files are opened when first read, by each process for itself. A clip that cannot be read is replaced by another
    one, of its class if possible; without `replace`, for evaluation, it is silent and has the index UNREADABLE.
    """

    def __init__(
        self, table: ClipTable, *, clip_samples: int, fit: Literal["pad", "repeat"], replace: bool = True
    ) -> None:
        self.table, self.clip_samples, self.fit, self.replace = table, clip_samples, fit, replace
        self._open: dict[int, Waveforms] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        return {name: value if name == "unreadable" else value[0] for name, value in batch.items()}

    def __getitems__(self, indexes: Sequence[int]) -> Batch:
        """A whole batch: the items of `__getitem__`, stacked; audio_name is a list, unreadable a count.

        Of a clip that is replaced, all of the item is the other clip's.
        """
        batch = _BatchMemory(len(indexes), self.clip_samples)
        chosen = np.array(indexes)
        lengths, unreadable = [], 0
        silent: list[int] = []
        for place, index in enumerate(indexes):
            for candidate in self._candidates(index):
                try:
                    lengths.append(self._read_into(batch.row(place), candidate))
                except (OSError, ValueError):
                    unreadable += 1
                    continue
                batch.keep(place)
                chosen[place] = candidate
                break
            else:
                if self.replace:
                    raise ValueError(
                        f"{self.table.names[index].decode()} cannot be read, and neither could any other clip that was "
                        f"tried: `python main.py check` tells which stores are damaged."
                    )
                batch.row(place)[:] = 0
                batch.keep(place)
                lengths.append(0)
                silent.append(place)
        places = torch.from_numpy(chosen.copy())
        places[silent] = UNREADABLE
        return {
            "audio_name": [name.decode() for name in self.table.names[chosen]],
            "waveform": batch.waveforms,
            "target": torch.from_numpy(self.table.targets[chosen].astype(np.float32)),
            "real_len": torch.tensor(lengths),
            "index": places,
            "unreadable": unreadable,
        }

    def _candidates(self, index: int) -> Iterator[int]:
        """A clip, then others of its class, then any, in an order that depends on the clip alone."""
        yield index
        if self.replace:
            rng = np.random.default_rng(index)
            same = np.asarray(self.table.targets[:, self.table.targets[index]].any(axis=1))
            same[index] = False
            yield from rng.permutation(np.flatnonzero(same))[:MOST_TRIES].tolist()
            yield from rng.integers(len(self), size=MOST_TRIES).tolist()

    def _read_into(self, waveform: np.ndarray, index: int) -> int:
        """Fill one row of the batch; returns the clip's own length in samples, at most clip_samples."""
        length = self._file(int(self.table.path_number[index])).read_into(int(self.table.row[index]), waveform)
        if length == 0:
            raise ValueError("The clip is empty.")
        if length < self.clip_samples:
            repeated = self.fit == "repeat"
            waveform[length:] = np.resize(waveform[:length], self.clip_samples)[length:] if repeated else 0
        return length

    def _file(self, number: int) -> Waveforms:
        if self._process != os.getpid():  # a forked worker: handles of the parent are not its own
            self._open, self._process = {}, os.getpid()
        if number not in self._open:
            self._open[number] = Waveforms(open_store(self.table.paths[number]))
        return self._open[number]


class _BatchMemory:
    """(clips, samples) int16 that is filled row by row: `row` is written to, then `keep` puts it in its place.

    In a worker the batch lies in memory that the training process shares, as torch's default_collate does it. It is
    filled there as a file is written: through its mapped pages each new page would cost a fault and be zeroed first,
    which takes longer than reading the clips.
    """

    def __init__(self, clips: int, samples: int) -> None:
        self._file: Optional[int] = None
        if get_worker_info() is None:
            # NumPy asks for huge pages, torch does not.
            self.waveforms = torch.from_numpy(np.empty((clips, samples), dtype=np.int16))
        else:
            storage = torch.UntypedStorage._new_shared(2 * clips * samples)
            if torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
                self._file, self._row = storage._share_fd_cpu_()[0], np.empty(samples, dtype=np.int16)
            self.waveforms = torch.empty(0, dtype=torch.int16).set_(storage).reshape(clips, samples)
        self._rows = self.waveforms.numpy()

    def row(self, place: int) -> np.ndarray:
        """(samples,) int16 to write a clip into; its content before is undefined."""
        return self._rows[place] if self._file is None else self._row

    def keep(self, place: int) -> None:
        """Put what was written into `row(place)` in its place. Raises ValueError where shared memory is full."""
        if self._file is None:
            return
        remaining, offset = self._row.data.cast("B"), place * self._row.nbytes
        try:
            while remaining:
                written = os.pwrite(self._file, remaining, offset)
                remaining, offset = remaining[written:], offset + written
        except OSError as error:
            raise ValueError(
                f"A worker has no shared memory for a batch ({error}): enlarge /dev/shm (in a container --shm-size), "
                f"or lower num_workers or batch_size."
            ) from None


class TrainLoader(DataLoader):
    """A DataLoader over an EpochSampler that a checkpoint in the middle of an epoch can go on with.

    Lightning saves its state_dict and loads it before the epoch that was interrupted.
    """

    sampler: EpochSampler
    handed_out = 0  # batches of this epoch
    resumed_at = 0  # batch that the next epoch begins with

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: its first batch is drawn when the epoch begins, after set_epoch. A DataLoader's own iterator
        # would let its workers draw when it is made, which Lightning does before.
        self.handed_out, self.resumed_at = self.resumed_at, 0
        self.sampler.start = self.handed_out * (self.batch_size or 1)
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self.handed_out, **self._place()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the place in the epoch would be another one."""
        for name, now in self._place().items():
            if state.get(name, now) != now:
                raise ValueError(
                    f"The run was stopped in the middle of an epoch with {name} = {state[name]}, and cannot go on with "
                    f"{now}: give the same batch_size, accumulate_batches, devices and data, or --resume the "
                    f"checkpoint of a whole epoch."
                )
        self.resumed_at = state["handed_out"]

    def _place(self) -> dict[str, Any]:
        """What a number of batches means a place in an epoch with."""
        assert isinstance(self.dataset, ClipDataset)
        clips = self.dataset.table.fingerprint()
        return {"clips a batch": self.batch_size, "processes": self.sampler.world, "training clips": clips}


def _as_read(batch: Any) -> Any:
    """ClipDataset hands over whole batches: there is nothing to collate."""
    return batch


class SEDDataModule(pl.LightningDataModule):
    """The three splits of a data set as DataLoaders. batch_size counts all devices together.

    splits: those that will be used; their tables are read at once, so that a mistake shows before a network is built.
    """

    def __init__(self, settings: Config, splits: Sequence[Split] = SPLITS) -> None:  # type: ignore[assignment]
        super().__init__()
        self.settings = settings
        self.tables = {split: load_table(settings, split) for split in splits}

    def dataset(self, split: Split) -> ClipDataset:
        settings = self.settings
        return ClipDataset(
            self.tables[split],
            clip_samples=settings.clip_samples,
            fit=settings.short_clips,
            replace=split == "train" and settings.test_split != "train",
        )

    def steps_per_epoch(self, devices: int) -> int:
        """Training steps in an epoch on so many devices, of which each has an equal share of the clips."""
        per_device = self.settings.batch_size // devices // self.settings.accumulate_batches
        batches = -(-(len(self.tables["train"]) // devices) // per_device)
        return -(-batches // self.settings.accumulate_batches)

    def train_dataloader(self) -> DataLoader:
        table, seed = self.tables["train"], self.settings.random_seed
        rank, world = self._place()
        if self.settings.balanced_data:
            sampler: EpochSampler = BalancedSampler(table.targets, seed=seed, rank=rank, world=world)
        else:
            sampler = EpochSampler(len(table), seed=seed, rank=rank, world=world)
        return TrainLoader(sampler=sampler, **self._loader_options("train"))

    def val_dataloader(self) -> list[DataLoader]:
        """The validation clips; and with watch_test the test clips, which nothing is chosen by."""
        splits: list[Split] = ["validation", "test"] if self.settings.watch_test else ["validation"]
        return [self._evaluation_loader(split) for split in splits]

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader(self.settings.test_split)

    def _evaluation_loader(self, split: Split) -> DataLoader:
        rank, world = self._place()
        sampler = ShardSampler(len(self.tables[split]), rank=rank, world=world)
        return DataLoader(sampler=sampler, **self._loader_options(split))

    def _place(self) -> tuple[int, int]:
        """Rank of this process and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader_options(self, split: Split) -> dict[str, Any]:
        """What the loaders of all splits have in common, for this process."""
        workers = self.settings.num_workers
        return {
            "dataset": self.dataset(split),
            # Whole numbers: commands/_trainer.py sees to it.
            "batch_size": self.settings.batch_size // self._place()[1] // self.settings.accumulate_batches,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": _as_read,
            # Of its own: else each loader that is begun takes a number from the network's random stream, and a resumed
            # run begins them at other moments than an unbroken one.
            "generator": torch.Generator().manual_seed(self.settings.random_seed),
        }
