"""The score store: one HDF5 file with what a test computed, and the truth beside it, so that it can be read alone.

Datasets: audio_name (N,) bytes, clipwise (N, K) float32, target (N, K) bool, duration (N,) float64 seconds and
clip_index (N,) int64, the clips' places in the split; with localization framewise (N, steps, K) float32, at the
network's own steps, and the true events event_clip, event_class (E,), event_onset and event_offset (E,) float64
seconds. Attributes: labels (K names), seconds_per_frame, dataset_type, split, run_id (of checkpoints and clips),
split_clips (how many clips the split has), weights (a fingerprint of the network's), postprocessing (JSON, where a
checkpoint or a mapping brings one), clip_store (where the audio lies), and the front-end's settings (sample_rate,
window_size, ...).

A test that was shared by several jobs (test_shard) leaves <name>.shard1of4.h5, ...: load_scores joins them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import h5py
import numpy as np

from data.files import whole_file
from evaluation.postprocess import PostProcessing
from settings import UserError

if TYPE_CHECKING:
    import pandas as pd

EventList = list[tuple[int, float, float]]  # class index, onset and offset in seconds


@dataclass(frozen=True)
class Scores:
    """Scores of N clips for K classes; see the module's text for the fields' shapes and units."""

    names: list[str]
    clipwise: np.ndarray
    targets: np.ndarray
    durations: np.ndarray
    labels: list[str]
    framewise: Optional[np.ndarray] = None
    seconds_per_frame: float = 0.0
    events: Optional[list[EventList]] = None  # of each clip; None: no times are known
    clip_index: Optional[np.ndarray] = None  # None: the clips are numbered as they come
    attributes: dict[str, str | int | float] = field(default_factory=dict)

    @property
    def postprocessing(self) -> Optional[PostProcessing]:
        """What came with the checkpoint or the mapping, for these classes; None where nothing did."""
        stored = self.attributes.get("postprocessing")
        return None if not stored else PostProcessing.from_dict(json.loads(str(stored))).for_labels(self.labels)

    def select_classes(self, names: Sequence[str]) -> "Scores":
        """Some of the classes, in the order of `names`. Raises UserError for unknown ones."""
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise UserError(f"The scores know no class {', '.join(unknown)}; they have {', '.join(self.labels)}.")
        place = [self.labels.index(name) for name in names]
        number = {old: new for new, old in enumerate(place)}
        events = None if self.events is None else [
            [(number[k], onset, offset) for k, onset, offset in clip if k in number] for clip in self.events
        ]  # fmt: skip
        framewise = None if self.framewise is None else self.framewise[:, :, place]
        return replace(
            self, labels=list(names), clipwise=self.clipwise[:, place], targets=self.targets[:, place],
            framewise=framewise, events=events,
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the store, whole or not at all."""
        with whole_file(path) as partial, h5py.File(partial, "w") as file:
            file["audio_name"] = np.array([name.encode() for name in self.names], dtype="S")
            file["clipwise"] = self.clipwise.astype(np.float32)
            file["target"] = self.targets.astype(bool)
            file["duration"] = self.durations.astype(np.float64)
            index = np.arange(len(self.names)) if self.clip_index is None else self.clip_index
            file["clip_index"] = index.astype(np.int64)
            if self.framewise is not None:
                file["framewise"] = self.framewise.astype(np.float32)
            if self.events is not None:
                rows = [(clip, *event) for clip, events in enumerate(self.events) for event in events]
                table = np.array(rows, dtype=np.float64).reshape(-1, 4)
                file["event_clip"], file["event_class"] = table[:, 0].astype(np.int32), table[:, 1].astype(np.int16)
                file["event_onset"], file["event_offset"] = table[:, 2], table[:, 3]
            file.attrs.update({"labels": self.labels, "seconds_per_frame": self.seconds_per_frame, **self.attributes})


def load_scores(path: Path) -> Scores:
    """Read a score store, or join its shards. Raises UserError where it is missing, cut off, or is none."""
    shards = find_shards(path)
    if not path.is_file():
        if shards:
            return join_shards(path)
        raise UserError(
            f"There is no score file {path}. `python main.py test --fl_local True --resume_checkpoint ...` writes it; "
            f"heatmap_dir and test_file say where."
        )
    if shards:
        raise UserError(
            f"There are both {path} and {', '.join(shard.name for shard in shards)}: remove what is out of date."
        )
    return _read(path)


def _read(path: Path) -> Scores:
    try:
        with h5py.File(path, "r") as file:
            names = [name.decode() for name in file["audio_name"][:]]
            events: Optional[list[EventList]] = None
            if "event_clip" in file:
                events = [[] for _ in names]
                columns = (file[f"event_{name}"][:].tolist() for name in ("clip", "class", "onset", "offset"))
                for clip, label, onset, offset in zip(*columns, strict=True):
                    events[clip].append((label, onset, offset))
            own = ("labels", "seconds_per_frame")
            return Scores(
                names=names,
                clipwise=file["clipwise"][:],
                targets=file["target"][:],
                durations=file["duration"][:],
                labels=[str(label) for label in file.attrs["labels"]],
                framewise=file["framewise"][:] if "framewise" in file else None,
                seconds_per_frame=float(file.attrs["seconds_per_frame"]),
                events=events,
                clip_index=file["clip_index"][:] if "clip_index" in file else None,
                attributes={key: value for key, value in file.attrs.items() if key not in own},
            )
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is no score file, or it is cut off: {error}") from None


def shard_path(path: Path, number: int, count: int) -> Path:
    """Where the number-th of `count` jobs (from 1) writes its share of the score file `path`."""
    return path.with_name(f"{path.stem}.shard{number}of{count}{path.suffix}")


def find_shards(path: Path) -> list[Path]:
    """The shards beside a score file, by their names."""
    pattern = re.compile(re.escape(path.stem) + r"\.shard\d+of\d+" + re.escape(path.suffix))
    return sorted(p for p in path.parent.glob("*") if pattern.fullmatch(p.name))


def join_shards(path: Path) -> Scores:
    """The scores of all shards of `path`, in the order of the split; a clip that several have is taken once.

    Raises UserError that names the shards which are missing, cut off, or of another run (other weights or clips), and
    where clips are missing all the same.
    """
    found = find_shards(path)
    counts = {int(name.stem.rpartition("of")[2]) for name in found}
    if len(counts) != 1:
        raise UserError(f"Shards of different tests lie beside {path}: {', '.join(p.name for p in found)}.")
    expected = [shard_path(path, number + 1, *counts) for number in range(*counts)]
    missing = [shard.name for shard in expected if shard not in found]
    if missing:
        raise UserError(f"{path} is not complete: {', '.join(missing)} is missing; test with that test_shard.")
    parts = [_read(shard) for shard in expected]
    runs = [str(part.attributes.get("run_id")) for part in parts]
    stale = [shard.name for shard, run in zip(expected, runs, strict=True) if run != runs[0]]
    if stale:
        raise UserError(
            f"The shards of {path} are of different runs: {expected[0].name} of {runs[0]}, not so {', '.join(stale)}. "
            f"Test again what is out of date."
        )
    joined = _concatenate(parts)
    wanted = int(parts[0].attributes["split_clips"])
    if len(joined.names) != wanted:
        raise UserError(f"The shards of {path} hold {len(joined.names)} clips of {wanted}: test again.")
    return joined


def _concatenate(parts: list[Scores]) -> Scores:
    """Scores of one run, sorted by clip_index, each clip once."""
    assert all(part.clip_index is not None for part in parts)
    index, first = np.unique(np.concatenate([part.clip_index for part in parts]), return_index=True)
    names = [name for part in parts for name in part.names]
    columns: dict[str, Any] = {
        column: np.concatenate([getattr(part, column) for part in parts])[first]
        for column in ("clipwise", "targets", "durations", "framewise")
        if getattr(parts[0], column) is not None
    }
    known = all(part.events is not None for part in parts)
    events = [clip for part in parts for clip in part.events or []]
    return replace(
        parts[0],
        names=[names[k] for k in first],
        clip_index=index,
        events=[events[k] for k in first] if known else None,
        **columns,
    )


def export_tables(scores: Scores, folder: Path) -> None:
    """Write frame scores as sed_scores_eval reads them: a folder of <clip>.tsv with onset, offset and the classes.

    A clip is called there as its file without the ending. Raises UserError where that is not unique, or the folder
    has other files.
    """
    from sed_scores_eval.base_modules.io import write_sed_scores

    from evaluation.detection import score_tables  # here: reading a store shall not import all metrics

    if scores.framewise is None:
        raise UserError("The score file has no frame scores: run test with --fl_local True.")
    tables = score_tables(
        scores.framewise, names=[table_name(name) for name in scores.names], labels=scores.labels,
        durations=scores.durations, seconds_per_frame=scores.seconds_per_frame,
    )  # fmt: skip
    if len(tables) < len(scores.names):
        raise UserError("Some clips have the same name but for folder and ending: their tables would be one file.")
    others = [p.name for p in folder.glob("*") if p.name.removesuffix(".tsv") not in tables] if folder.is_dir() else []
    if others:
        raise UserError(f"{folder} holds other files ({', '.join(others[:3])}, ...): give a new or empty folder.")
    write_sed_scores(tables, folder)


def table_name(name: str) -> str:
    """A clip's name in sed_scores_eval's tables: its file without folder and ending."""
    return Path(name).name.rpartition(".")[0] or Path(name).name


def import_tables(folder: Path, truth: Scores) -> Scores:
    """Frame scores of any system, as export_tables writes them, for the clips and with the truth of a score store.

    The frames of all tables must have one length, the last one of a clip may be shorter; a clip's score is its
    frames' highest. Raises UserError, with their names, for clips and classes that only one side knows.
    """
    from sed_scores_eval.base_modules.io import read_sed_scores

    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: --import_scores names a folder of <clip>.tsv files.")
    tables: dict[str, pd.DataFrame] = read_sed_scores(folder)
    names = [table_name(name) for name in truth.names]
    if set(names) != tables.keys():
        ours, theirs = sorted(set(names) - tables.keys()), sorted(tables.keys() - set(names))
        raise UserError(
            f"{folder} and the score file know different clips: only in the folder {theirs[:4]}, only in the score "
            f"file {ours[:4]}."
        )
    step = _frame_seconds(tables)
    framewise = np.zeros((len(names), max(len(table) for table in tables.values()), len(truth.labels)), np.float32)
    for clip, name in enumerate(names):
        classes = list(tables[name].columns[2:])
        if set(classes) != set(truth.labels):
            raise UserError(
                f"{name}.tsv has the classes {', '.join(classes)}, the score file {', '.join(truth.labels)}."
            )
        framewise[clip, : len(tables[name])] = tables[name][truth.labels].to_numpy()
    kept = {
        name: value for name, value in truth.attributes.items() if name not in ("postprocessing", "run_id", "weights")
    }
    return replace(truth, framewise=framewise, clipwise=framewise.max(axis=1), seconds_per_frame=step, attributes=kept)


def _frame_seconds(tables: "Mapping[str, pd.DataFrame]") -> float:
    """The length in seconds of the frames of all tables. Raises UserError where it is not one."""
    lengths = {name: (table.offset - table.onset).to_numpy() for name, table in tables.items()}
    step = float(max(length.max() for length in lengths.values()))
    for name, length in lengths.items():
        if not np.allclose(length[:-1], step, rtol=0, atol=1e-5) or abs(tables[name].onset.iloc[0]) > 1e-5:
            raise UserError(f"{name}.tsv: frames of one length ({step} s, as others have it), from 0 s on, are needed.")
    return step
