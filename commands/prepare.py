"""python main.py prepare: a raw data set -> its clip store."""

from pathlib import Path
from typing import Any

import numpy as np

from data.clip_store import STRONG, UNLABELLED, ClipTable, open_store, read_store_table, store_path
from data.files import check_writable, sole_writer
from prepare.adapters import check_flags, load_adapter
from settings import Config, place_flags, resolve


def run(given: dict[str, Any], **flags: Any) -> None:
    """Write the store of dataset_type into dataset_path, and print what was packed and what was skipped.

    flags: those of the adapter (prepare.adapters). Raises UserError for one that the data set has no use for.
    """
    settings = resolve(given)
    adapter = load_adapter(settings.dataset_type)
    check_flags(adapter, flags)
    store = store_path(settings.dataset_path, settings.dataset_type)
    check_writable(f"dataset_path = {settings.dataset_path}", store)
    with sole_writer(store):
        print(adapter.prepare(settings, **flags))
    if store.is_file():  # AudioSet is many files, for create_index
        print(next_step(settings, read_store_table(store)))
        print(end=too_long(settings, store, can_cut="segment_seconds" in adapter.FLAGS))


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
