"""python main.py prepare: a raw data set -> its clip store."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import numpy as np

from data.clip_store import (
    SPLITS,
    STRONG,
    UNLABELLED,
    ClipTable,
    open_store,
    read_store_table,
    same_classes,
    store_path,
)
from data.files import check_writable, sole_writer
from prepare.adapters import check_flags, load_adapter
from prepare.inputs import dataset_path, fingerprint, read_record, remove_record, write_record
from settings import Config, UserError, place_flags, resolve


def run(given: dict[str, Any], name: Optional[str] = None, overwrite: bool = False, **flags: Any) -> int:
    """Write the store of dataset_type into dataset_path, and print what was packed and what was skipped.

    name: of the data set, for dataset_path = <workspace>/data/<name>. overwrite: whether a store that is there may be
    replaced; one of the same inputs is kept. flags: those of the adapter (prepare.adapters). Returns the exit status:
    1 where files were skipped. Raises UserError for a flag that the data set has no use for, and for another store.
    """
    if name is not None:
        if "dataset_path" in given:
            raise UserError("--name and --dataset_path both say where the store goes: give one of them.")
        given = {**given, "dataset_path": dataset_path(resolve(given).workspace, name)}
    settings = resolve(given)
    adapter = load_adapter(settings.dataset_type)
    check_flags(adapter, flags)
    flags |= asked_task(settings, adapter, given)
    store = store_path(settings.dataset_path, settings.dataset_type)
    check_writable(f"dataset_path = {settings.dataset_path}", store)
    with sole_writer(store, store.with_suffix(".json")):
        if settings.dataset_type == "audioset":  # many files, for create_index; packing keeps what is finished
            report = adapter.prepare(settings, **flags)
            print(report)
            return int(bool(report.skipped))
        text, skipped = prepared(settings, adapter, store, overwrite, flags)
    print(text)
    table = read_store_table(store)
    print(next_step(settings, table))
    print(end=too_long(settings, store, can_cut="segment_seconds" in adapter.FLAGS))
    return int(skipped > 0)


def asked_task(settings: Config, adapter: ModuleType, given: dict[str, Any]) -> dict[str, Any]:
    """The flag `task` for an adapter that lets one choose. Raises UserError where a data set has another task."""
    if "task" not in given:
        return {}
    if "task" in inspect.signature(adapter.prepare).parameters:
        return {"task": settings.task}
    if settings.task != adapter.TASK:
        raise UserError(f"--task {settings.task}: {adapter.NAME} is {adapter.TASK}. Leave --task out.")
    return {}


def prepared(
    settings: Config, adapter: ModuleType, store: Path, overwrite: bool, flags: dict[str, Any]
) -> tuple[str, int]:
    """Make the store, unless it is there; returns the report and how many files were skipped.

    Raises UserError where the store that is there was made from something else.
    """
    inputs, record = fingerprint(settings, flags), read_record(store)
    if store.is_file() and not overwrite:
        if record.get("inputs") != inputs:
            raise UserError(
                f"{store} is there, made from other files or settings. --overwrite replaces it; --name NAME makes "
                f"another data set beside it."
            )
        report = record.get("report") or f"{store} is complete."
        text = f"{report}\nIt was made from the same files: nothing to do. --overwrite makes it anew."
        return text, int(record.get("skipped") or 0)
    if store.is_file():
        remove_record(store)
    else:
        write_record(store, inputs)  # a run that ends before its last line is complete for the next one
    try:
        done = adapter.prepare(settings, **flags)
    finally:
        if not store.is_file():
            remove_record(store)
    text = f"{done}\n{split_line(read_store_table(store), done.split_by)}"
    write_record(store, inputs, text, len(done.skipped))
    return text, len(done.skipped)


def split_line(table: ClipTable, how: str) -> str:
    """The clips of each split, or of each fold; how: how they were chosen."""
    parts = {split: int((table.split == split.encode()).sum()) for split in SPLITS}
    if not any(parts.values()):
        parts = {f"fold {fold}": int((table.fold == fold).sum()) for fold in np.unique(table.fold).tolist()}
    counts = ", ".join(f"{name}: {count}" for name, count in parts.items())
    return f"Split: {counts} clips{f' ({how})' if how else ''}."


def too_long(settings: Config, store: Path, *, can_cut: bool) -> str:
    """A line on clips that are longer than the input of a network; "" where there are none.

    can_cut: whether prepare could cut recordings into clips, by --segment_seconds.
    """
    with open_store(store, "real_len") as file:
        seconds = file["real_len"][:] / settings.sample_rate
    most = settings.clip_samples / settings.sample_rate
    count = int((seconds > most + 0.5).sum())
    if not count:
        return ""
    hint = f" With a table of events, --segment_seconds {most:g} cuts recordings into clips." if can_cut else ""
    return (
        f"{count} clips are longer than {most:g} s, up to {seconds.max():.1f} s: train and test take the first "
        f"{most:g} s of each.{hint}\n"
    )


def next_step(settings: Config, table: ClipTable) -> str:
    """The commands that train on a store, with the flags for its annotation."""
    command = f"python main.py train --dataset_type {settings.dataset_type}{place_flags(settings)}"
    if same_classes(table) and not any(len(events.onset) for events in table.events):
        names = ", ".join(table.labels[k] for k in np.flatnonzero(table.targets.any(axis=0)))
        return (
            f"All {len(table)} clips have the same classes ({names}): a network has nothing to tell apart. Add clips "
            f"of other classes, or without any (a table of events with empty cells)."
        )
    training = ~np.isin(table.split, [b"validation", b"test"])
    known = set() if table.labelling is None else set(table.labelling[training].tolist())
    steps = [f"{len(table.labels)} classes."]
    if UNLABELLED not in known:  # clip_bce would take a clip without annotation for one without any class
        steps[0] += f" Train: {command}"
    if STRONG in known and any(len(events.onset) for events in table.events):
        steps.append(
            f"Train on the times: {command} --loss_type {'frame_bce' if known == {STRONG} else 'weak_strong_bce'}"
        )
    elif UNLABELLED in known:
        steps[0] += f" Train: {command} --loss_type weak_strong_bce"
    return "\n".join(steps)
