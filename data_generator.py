"""Which clips a split has, and the LightningDataModule that brings them to training and tests."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from data.clip_dataset import ClipDataset, FrameClipDataset
from data.clip_store import (
    STRONG,
    UNLABELLED,
    WEAK,
    ClipTable,
    Waveforms,
    labelling,
    open_store,
    read_index_table,
    read_store_table,
    same_classes,
    store_path,
)
from data.frame_targets import Events, touched_steps
from data.hdf5 import check_written, reading
from data.labels import weak_class_precision
from data.pseudo_labels import TeacherLogits
from data.samplers import (
    BalancedSampler,
    EpochSampler,
    FrameBalancedSampler,
    LabellingSampler,
    ShardSampler,
    WeightedSampler,
)
from settings import FRAME_LOSSES, WITH_COMMAS, Config, UserError

PUBLISHED_STEP = 0.04  # seconds of a frame by which balanced_by = active_frames counts
Split = Literal["train", "validation", "test"]
Batch = dict[str, Any]


def load_table(
    settings: Config, split: Split, *, store: Optional[Path] = None, other_classes: bool = False
) -> ClipTable:
    """The clips of a split. store: a file in place of that of dataset_path.

    Raises UserError where the data is missing, has no clips for the split or, unless other_classes are allowed, has
    another number of classes than the network.
    """
    if store is None and settings.dataset_type == "audioset":
        table = _audioset_table(settings, split)
    else:
        table = _split_table(settings, split, store or store_path(settings.dataset_path, settings.dataset_type))
    if not other_classes:
        check_classes(table, settings.classes_num)
    for number, path in enumerate(table.paths):
        _check_sound(path, table.row[table.path_number == number])
    if split == "train" and settings.class_filter:
        wanted = table.targets[:, _class_numbers(settings.class_filter, table)]
        table = table.select(np.asarray(wanted.any(axis=1)))
    if len(table) == 0:
        raise UserError(f"{table.paths[0]} has no clips for {split}.")
    return table


def _check_sound(path: Path, rows: np.ndarray) -> None:
    """Raise UserError where a store is gone, cut off or lacks rows: now, not in the middle of an epoch."""
    with open_store(path) as file, reading(path):
        there = len(Waveforms(file))
        if len(rows) and not 0 <= rows.min() <= rows.max() < there:
            raise UserError(f"{path} has {there} rows of sound; an index names row {rows.max()}. Make the index again.")
        if "waveform" in file:
            check_written(file, "waveform")


def check_classes(table: ClipTable, classes_num: int) -> None:
    """Raise UserError where the clips have another number of classes than the network."""
    if table.targets.shape[1] != classes_num:
        raise UserError(
            f"{table.paths[0]} has {table.targets.shape[1]} classes, the network has classes_num = {classes_num}: "
            f"use a checkpoint on the data set it was trained for."
        )


def _class_numbers(names: Sequence[str], table: ClipTable) -> list[int]:
    """Classes given by number or by name. Raises UserError for those that there are not."""
    labels, classes = table.labels, table.targets.shape[1]
    numbers = {**{str(k): k for k in range(classes)}, **{label: k for k, label in enumerate(labels)}}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        known = f"0 to {classes - 1}" + (f", or {', '.join(labels[:20])}" if labels else "")
        raise UserError(f"class_filter names {', '.join(unknown)}; the classes are {known}. {WITH_COMMAS}")
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
        raise UserError(f"esc_fold = {settings.esc_fold} is not among the folds of {table.paths[0]}: {folds}.")
    following = folds[(folds.index(settings.esc_fold) + 1) % len(folds)]
    if len(folds) < (3 if settings.protocol == "held_out" else 2):
        raise UserError(f"{table.paths[0]} has only the folds {folds}: too few for protocol {settings.protocol}.")
    if split == "test":
        return table.select(table.fold == settings.esc_fold)
    if split == "validation":
        return table.select(table.fold == following)
    held_out = [settings.esc_fold] if settings.protocol == "paper" else [settings.esc_fold, following]
    return table.select(~np.isin(table.fold, held_out))


def hopeless(settings: Config, tables: Mapping[Any, ClipTable]) -> list[str]:
    """Why a training on the classes of these clips cannot succeed, or a test on them tell anything; [] where it can.

    A loss on frames learns from when a class sounds: check_times looks at that.
    """
    found = []
    for split, table in tables.items():
        if settings.loss_type in FRAME_LOSSES or not same_classes(table):
            continue
        names = [table.labels[k] if table.labels else f"class {k}" for k in np.flatnonzero(table.targets.any(axis=0))]
        times = any(len(events.onset) for events in table.events)
        found.append(
            f"All {len(table)} clips for {split} in {table.paths[0]} have the same classes "
            f"({', '.join(names[:5]) or 'none'}): there is nothing to tell apart. Give this split clips of other "
            f"classes, or without any{', or learn from the event times: --loss_type frame_bce' if times else ''}."
        )
    return found


def check_single_label(tables: Mapping[Split, ClipTable]) -> None:
    """Raise UserError where a clip has not exactly one class."""
    for split, table in tables.items():
        wrong = np.flatnonzero(table.targets.sum(axis=1) != 1)
        if len(wrong):
            raise UserError(
                f"{len(wrong)} of {len(table)} clips for {split} in {table.paths[0]} have not exactly one class, as "
                f"{table.names[wrong[0]].decode()}, where task = single_label: correct their labels, or prepare them "
                f"with --task multilabel."
            )


def check_times(settings: Config, tables: Mapping[Split, ClipTable]) -> None:
    """Raise UserError where a loss on frames lacks clips with event times to learn from or to validate on.

    Warns of clips that contribute no loss, and of events after the end of the network's input.
    """
    least, end = STRONG if settings.loss_type == "frame_bce" else WEAK, settings.clip_samples / settings.sample_rate
    for split, table in tables.items():
        if split == "test":
            continue
        if labelling(table).max() < (least if split == "train" else STRONG):
            raise UserError(
                f"loss_type = {settings.loss_type} needs clips with event times for {split}, and {table.paths[0]} has "
                f"none: prepare it with a table of events, or use clip_bce."
            )
        inside, events = len(event_seconds(table, end)[0]), len(event_seconds(table)[0])
        if not inside and (split == "validation" or least == STRONG):
            raise UserError(
                f"No clip for {split} in {table.paths[0]} has an event in its first {end:g} s (clip_samples), where "
                f"loss_type = {settings.loss_type} needs some: give some clips with events to this split."
            )
        if inside < events:
            warnings.warn(
                f"{events - inside} of {events} events for {split} begin after the {end:g} s of the network's input "
                f"(clip_samples) and are ignored. Cut longer recordings when they are prepared.",
                stacklevel=2,
            )
    _warn_of_idle_clips(settings, tables["train"], least)


def _warn_of_idle_clips(settings: Config, table: ClipTable, least: int) -> None:
    """Warn of training clips that contribute no loss, or that are never drawn."""
    classless = int((~table.targets.any(axis=1)).sum())
    if classless and settings.balanced_data and settings.balanced_by != "frames":
        warnings.warn(
            f"{classless} of {len(table)} training clips have no class: balanced_data never draws them. --balanced_by "
            f"frames, or labelling_shares without balanced_data, would.",
            stacklevel=3,
        )
    idle = int((labelling(table) < least).sum())
    if idle and not (settings.teacher_path or settings.mean_teacher):
        strong = settings.loss_type == "frame_bce"
        warnings.warn(
            f"{idle} of {len(table)} training clips have no {'event times' if strong else 'labels'}, and "
            f"{settings.loss_type} learns nothing from them: "
            f"{'weak_strong_bce takes the classes of weak clips, ' if strong else ''}"
            f"mean_teacher and teacher_path take clips without labels.",
            stacklevel=3,
        )


def open_teacher(settings: Config, table: ClipTable) -> TeacherLogits:
    """The logits of teacher_path for the clips of a table. Warns where some clips have none.

    Raises UserError where the file is none, has none of the clips, or has clips of another length.
    """
    assert settings.teacher_path
    teacher = TeacherLogits(Path(settings.teacher_path), table.labels)
    seconds, covered = settings.clip_samples / settings.sample_rate, teacher.steps * teacher.step_seconds
    if abs(covered - seconds) > teacher.step_seconds / 2:
        raise UserError(
            f"{teacher.path} has logits of {covered:g} s a clip, and the network is given {seconds:g} s "
            f"(clip_samples): the times would not match. Let a teacher with the same clip_samples write it."
        )
    share = teacher.check_covers([name.decode() for name in table.names])
    if share < 1:
        warnings.warn(
            f"{teacher.path} has {share:.1%} of the {len(table)} training clips: the others have their labels alone.",
            stacklevel=3,
        )
    return teacher


def without_unlabelled(settings: Config, tables: Mapping[Split, ClipTable]) -> dict[Split, ClipTable]:
    """The tables without unlabelled clips, which a loss on clips would take for clips without any class.

    Warns of what is left out; raises UserError where no clip is left.
    """
    left = {}
    for split, table in tables.items():
        known = labelling(table) != UNLABELLED
        left[split] = table if known.all() else table.select(known)
        if not known.any():
            raise UserError(f"{table.paths[0]} has no clips with labels for {split}, which {settings.loss_type} needs.")
        if not known.all():
            warnings.warn(
                f"{(~known).sum()} of {len(table)} clips for {split} have no labels: {settings.loss_type} leaves them "
                f"out. weak_strong_bce can learn from them, with mean_teacher or teacher_path.",
                stacklevel=3,
            )
    return left


def event_seconds(table: ClipTable, end: float = np.inf) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a table's events: the clip's place in the table, the class, and how many seconds it has before `end`.

    Events that begin there or later are left out.
    """
    place, label, onset, offset = _times(table)
    seconds = np.minimum(offset, end) - onset
    return place[seconds > 0], label[seconds > 0], seconds[seconds > 0]


def active_frames(table: ClipTable, end: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As event_seconds, but how many frames of 40 ms before `end` an event touches that no other of its class does."""
    steps = max(1, round(end / PUBLISHED_STEP))
    events = Events(*map(torch.from_numpy, _times(table)))
    found = touched_steps(events, classes=table.targets.shape[1], steps=steps, seconds=steps * PUBLISHED_STEP)
    place, label, frames = (column.numpy() for column in found)
    return place[frames > 0], label[frames > 0], frames[frames > 0]


def _times(table: ClipTable) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a table's events: the clip's place in the table, class, onset and offset in seconds."""
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))]
    for number, events in enumerate(table.events):
        clips = np.flatnonzero(table.path_number == number)
        counts = (events.starts[1:] - events.starts[:-1])[table.row[clips]]
        place = np.repeat(clips, counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        event = np.repeat(events.starts[table.row[clips]], counts) + within
        found.append((place, events.label[event], events.onset[event], events.offset[event]))
    place, label, onset, offset = (np.concatenate(column) for column in zip(*found, strict=True))
    return place, label, onset, offset


class TrainLoader(DataLoader):
    """A DataLoader over an EpochSampler that can be resumed in the middle of an epoch.

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
        """Raises UserError where the place in the epoch would be another one."""
        for name, now in self._place().items():
            if state.get(name, now) != now:
                raise UserError(
                    f"The run was stopped in the middle of an epoch with {name} = {state[name]}, and cannot "
                    f"be resumed with {now}: give the same batch_size, accumulate_batches, devices and data, or "
                    f"--resume the checkpoint of a whole epoch."
                )
        self.resumed_at = state["handed_out"]

    def _place(self) -> dict[str, Any]:
        """What makes a number of batches a place in the epoch."""
        assert isinstance(self.dataset, ClipDataset)
        clips = self.dataset.table.fingerprint()
        return {"clips a batch": self.batch_size, "processes": self.sampler.world, "training clips": clips}


def keep_batch(batch: Any) -> Any:
    """The collate_fn of ClipDataset, which reads whole batches."""
    return batch


class SEDDataModule(pl.LightningDataModule):
    """Splits of a data set as DataLoaders. settings.batch_size counts all devices together.

    frames: whether batches have events and labelling (FrameClipDataset). teacher: its logits go into training batches.
    replace_unreadable: whether another training clip takes the place of one that cannot be read. The loaders of
    validation have the splits beside `train` in their order, that of a test the one split there is.
    """

    def __init__(
        self,
        settings: Config,
        tables: Mapping[Split, ClipTable],
        *,
        frames: bool = False,
        teacher: Optional[TeacherLogits] = None,
        replace_unreadable: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.tables = settings, dict(tables)
        self.frames, self.teacher, self.replace_unreadable = frames, teacher, replace_unreadable

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a run records of its data: the first store, and of each split clips and digest (ClipTable.digest)."""
        splits = {split: {"clips": len(t), "digest": t.digest()} for split, t in self.tables.items()}
        return {"store": str(next(iter(self.tables.values())).paths[0]), "splits": splits}

    def dataset(self, split: Split) -> ClipDataset:
        settings, table = self.settings, self.tables[split]
        options: dict[str, Any] = {
            # As many of the store's samples as last as long as the network's input.
            "clip_samples": round(settings.clip_samples * table.waveform_rate / settings.sample_rate),
            "fit": settings.short_clips,
            "replace": split == "train" and self.replace_unreadable,
        }
        if not self.frames:
            return ClipDataset(table, **options)
        if split == "train":
            options |= {"teacher": self.teacher, "crops": settings.random_crops}
        return FrameClipDataset(table, **options)

    def steps_per_epoch(self, devices: int) -> int:
        """Training steps in an epoch on so many devices, of which each has an equal share of the clips."""
        per_device = self.settings.batch_size // devices // self.settings.accumulate_batches
        draws = self.settings.epoch_clips or len(self.tables["train"])
        batches = -(-(draws // devices) // per_device)
        return -(-batches // self.settings.accumulate_batches)

    def train_dataloader(self) -> DataLoader:
        table, seed = self.tables["train"], self.settings.random_seed
        rank, world = self._place()
        share: dict[str, int] = {"seed": seed, "draws": self.settings.epoch_clips, "rank": rank, "world": world}
        share |= {"crops": self.settings.random_crops}
        if self.settings.labelling_shares:
            part = self.settings.batch_size // self.settings.accumulate_batches
            sampler: EpochSampler = LabellingSampler(labelling(table), self.settings.labelling_shares, part, **share)
        elif self.settings.balanced_data and self.settings.balanced_by != "clips":
            sampler = self._frame_sampler(table, share)
        elif self.settings.oversample_weak:
            sampler = WeightedSampler(table.targets, self.settings.oversample_weak / weak_class_precision(), **share)
        elif self.settings.balanced_data:
            sampler = BalancedSampler(table.targets, **share)
        else:
            sampler = EpochSampler(len(table), **share)
        return TrainLoader(sampler=sampler, **self._loader_options("train"))

    def _frame_sampler(self, table: ClipTable, share: Mapping[str, int]) -> FrameBalancedSampler:
        end = self.settings.clip_samples / self.settings.sample_rate
        published, again = self.settings.balanced_by == "active_frames", self.settings.balanced_replacement
        events = active_frames(table, end) if published else event_seconds(table, end)
        return FrameBalancedSampler(events, len(table), published=published, replacement=again, **share)

    def val_dataloader(self) -> list[DataLoader]:
        """The validation set; with watch_test then the test set, by which no checkpoint is chosen."""
        return [self._evaluation_loader(split) for split in self.tables if split != "train"]

    def test_dataloader(self) -> DataLoader:
        (split,) = self.tables
        return self._evaluation_loader(split)

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
            # Whole numbers: device_count and process_count check it.
            "batch_size": self.settings.batch_size // self._place()[1] // self.settings.accumulate_batches,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": keep_batch,
            # Of its own: else each loader that is begun takes a number from the network's random stream, and a resumed
            # run begins them at other moments than an unbroken one.
            "generator": torch.Generator().manual_seed(self.settings.random_seed),
        }


def load_training_data(settings: Config, splits: Sequence[Split] = ("train", "validation")) -> SEDDataModule:
    """The data of a training: what its loss can learn from, with event times and a teacher's logits where it uses them.

    The tables are read at once, so that a mistake shows before a network is built. Raises UserError.
    """
    tables = {split: load_table(settings, split) for split in splits}
    if settings.loss_type not in FRAME_LOSSES:
        tables = without_unlabelled(settings, tables)
    if settings.task == "single_label":
        check_single_label(tables)
    reasons = hopeless(settings, tables)
    if reasons:
        raise UserError(" ".join(reasons))
    if settings.loss_type not in FRAME_LOSSES:
        return SEDDataModule(settings, tables, replace_unreadable=True)
    check_times(settings, tables)
    teacher = open_teacher(settings, tables["train"]) if settings.teacher_path else None
    return SEDDataModule(settings, tables, frames=True, teacher=teacher, replace_unreadable=True)


def load_test_data(settings: Config) -> SEDDataModule:
    """The clips of test_split, each once; with fl_local those of fl_dataset. They may have other classes."""
    store = Path(settings.fl_dataset) if settings.fl_local and settings.fl_dataset else None
    split: Split = settings.test_split
    return SEDDataModule(settings, {split: load_table(settings, split, store=store, other_classes=True)})
