"""The score store: one HDF5 file with the scores of a test and the ground truth of its clips.

Datasets: audio_name (N,) bytes, clipwise (N, K) float32, target (N, K) bool, duration (N,) float64 seconds and
clip_index (N,) int64, the clips' places in the split; with localization framewise (N, frames, K) float32, on the
network's own time axis, and the true events event_clip, event_class (E,), event_onset and event_offset (E,) float64
seconds. Attributes: labels (K names), seconds_per_frame, dataset_type, split, run_id (of checkpoints and clips),
split_clips (number of clips in the split), weights (a fingerprint of the network's), postprocessing (JSON, where a
checkpoint or a mapping brings one), clip_store (path of the clip store), task (that of the data), and the front-end's
settings (sample_rate, window_size, ...).

A test divided among several jobs (test_shard) leaves <name>.shard1of4.h5, ...: load_scores joins them.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd

from data.files import whole_hdf5
from data.hdf5 import Columns, check_columns, open_hdf5, read_column, reading, texts
from evaluation.postprocess import PostProcessing, read_postprocessing
from settings import WITH_COMMAS, UserError

COLUMNS: Columns = {  # kinds of NumPy's dtypes, dimensions
    "audio_name": ("SO", 1), "clipwise": ("f", 2), "target": ("biuf", 2), "duration": ("f", 1), "framewise": ("f", 3),
    "clip_index": ("iu", 1), "event_clip": ("iu", 1), "event_class": ("iu", 1), "event_onset": ("f", 1),
    "event_offset": ("f", 1),
}  # fmt: skip
OF_CLIPS = ("audio_name", "clipwise", "target", "duration", "framewise", "clip_index")
LONGEST_SECONDS = 86_400.0  # of a clip
PIECE = re.compile(r"(?P<recording>.+)#t=(?P<start>[\d.]+),[\d.]+")  # as prepare names what it cuts
SEAM = 1e-3  # seconds by which times in names are rounded

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
    path: Optional[Path] = None  # the file that was read; None: made in memory

    @property
    def source(self) -> str:
        """The file's name, for messages."""
        return str(self.path or "The score store")

    @property
    def seconds(self) -> dict[str, float]:
        """The duration of each clip, by its name."""
        return dict(zip(self.names, self.durations.tolist(), strict=True))

    @property
    def postprocessing(self) -> Optional[PostProcessing]:
        """That of the checkpoint or the class mapping, for these classes; None without one."""
        stored = self.attributes.get("postprocessing")
        return None if not stored else PostProcessing.from_dict(json.loads(str(stored))).for_labels(self.labels)

    def frame_scores(self) -> np.ndarray:
        """(N, frames, K). Raises UserError for scores of clips alone."""
        if self.framewise is None:
            raise UserError(
                f"{self.source} has no frame scores: the test ran without --fl_local True, or the network has no time "
                f"axis. Test with --fl_local True a network that scores frames."
            )
        return self.framewise

    def true_events(self) -> list[EventList]:
        """The true events of each clip. Raises UserError where no clip has any."""
        if not self.events or not any(self.events):
            raise UserError(
                f"{self.source} has no true events: the data set was prepared without event times, or the test ran "
                f"without --fl_local True."
            )
        return self.events

    def smooth(self, post: PostProcessing) -> tuple[np.ndarray, float]:
        """The frame scores to compare with the thresholds, and their seconds per frame; see PostProcessing.smooth."""
        return post.smooth(self.frame_scores(), durations=self.durations, seconds_per_frame=self.seconds_per_frame)

    def decode(self, post: PostProcessing) -> pd.DataFrame:
        """The table of detected events; see decode_events."""
        return post.decode(
            self.frame_scores(), names=self.names, durations=self.durations, seconds_per_frame=self.seconds_per_frame
        )

    def select_classes(self, names: Sequence[str]) -> "Scores":
        """Some of the classes, in the order of `names`. Raises UserError for unknown ones."""
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise UserError(
                f"{self.source} has no class {', '.join(unknown)}; its classes are {', '.join(self.labels)}. "
                f"{WITH_COMMAS}"
            )
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

    def select_clips(self, places: Sequence[int] | np.ndarray) -> "Scores":
        """Some of the clips, by their places, in this order."""
        index = np.arange(len(self.names)) if self.clip_index is None else self.clip_index
        return replace(
            self,
            names=[self.names[k] for k in places],
            clipwise=self.clipwise[places],
            targets=self.targets[places],
            durations=self.durations[places],
            framewise=None if self.framewise is None else self.framewise[places],
            events=None if self.events is None else [self.events[k] for k in places],
            clip_index=index[places],
        )

    def join_recordings(self) -> "Scores":
        """Recordings in place of the pieces that prepare cut them into (forest.wav#t=10,20), in the order of the first.

        A recording has the frames of its pieces one after another (zeros behind shorter ones), and an event that a
        seam divides is one again. Raises UserError where a piece lacks, or does not hold whole frames.
        """
        pieces: dict[str, list[tuple[float, int]]] = {}
        for k, name in enumerate(self.names):
            found = PIECE.fullmatch(name)
            start = float(found["start"]) if found else 0.0
            pieces.setdefault(found["recording"] if found else name, []).append((start, k))
        frames, events = [], []
        for name, parts in pieces.items():
            parts.sort()
            frames.append(self._whole_frames(name, parts))
            known = parts if self.events else []
            events.append(_without_seams([(start, self.durations[k], self.true_events()[k]) for start, k in known]))
        framewise = np.zeros((len(pieces), max(map(len, frames)), len(self.labels)), np.float32)
        for row, found_frames in zip(framewise, frames, strict=True):
            row[: len(found_frames)] = found_frames
        places = [[k for _, k in parts] for parts in pieces.values()]
        return replace(
            self,
            names=list(pieces),
            clipwise=np.stack([self.clipwise[k].max(axis=0) for k in places]),
            targets=np.stack([self.targets[k].any(axis=0) for k in places]),
            durations=np.array([self.durations[k].sum() for k in places]),
            framewise=framewise,
            events=events if self.events is not None else None,
            clip_index=None,
        )

    def _whole_frames(self, name: str, parts: Sequence[tuple[float, int]]) -> np.ndarray:
        """(T, K) scores of a recording, from its pieces: (start in seconds, number)."""
        framewise, step, end = self.frame_scores(), self.seconds_per_frame, 0.0
        counts = [float(self.durations[k]) / step for _, k in parts]
        for (start, k), count in zip(parts, [0.0, *counts[:-1]], strict=True):
            if abs(start - end) > SEAM or abs(count - round(count)) > SEAM:
                raise UserError(
                    f"{self.source}: the pieces of {name} do not join at {start:g} s: score all of them, of a length "
                    f"in whole frames of {step:g} s."
                )
            end += float(self.durations[k])
        return np.concatenate(
            [framewise[k, : int(np.ceil(count - SEAM))] for (_, k), count in zip(parts, counts, strict=True)]
        )

    def in_order(self, names: Sequence[str]) -> "Scores":
        """The clips in the order of `names`. Raises UserError, with some names, where these are other clips."""
        if sorted(self.names) != sorted(names):
            other = ", ".join(sorted(set(self.names) ^ set(names))[:4])
            raise UserError(f"The score files have different clips: only {self.source} or the other one has {other}.")
        place = {name: k for k, name in enumerate(self.names)}
        return self.select_clips([place[name] for name in names])

    def save(self, path: Path) -> None:
        """Write the store, whole or not at all."""
        with whole_hdf5(path) as (file, _):
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


def _without_seams(parts: Sequence[tuple[float, float, EventList]]) -> EventList:
    """The events of pieces (start and length in seconds, events), those parts joined that meet at a seam."""
    joined: EventList = []
    before: dict[int, list[int]] = {}  # class: places in `joined` of the events that reach the last seam
    for start, seconds, events in parts:
        reaching: dict[int, list[int]] = {}
        for label, onset, offset in sorted(events, key=lambda event: event[1]):
            if onset < SEAM and before.get(label):
                place = before[label].pop(0)
                joined[place] = (label, joined[place][1], start + offset)
            else:
                place = len(joined)
                joined.append((label, start + onset, start + offset))
            if offset > seconds - SEAM:
                reaching.setdefault(label, []).append(place)
        before = reaching
    return joined


def load_scores(path: Path) -> Scores:
    """Read a score store, or join its shards. Raises UserError where it is missing, cut off or another kind of file."""
    shards = find_shards(path)
    if not path.is_file():
        if shards:
            return join_shards(path)
        raise UserError(
            f"There is no score file {path}. `python main.py test --fl_local True --resume_checkpoint ...` writes it, "
            f"as <heatmap_dir>/<test_file>.h5."
        )
    if shards:
        raise UserError(
            f"There are both {path} and {', '.join(shard.name for shard in shards)}: remove what is out of date."
        )
    return _read(path)


def _read(path: Path) -> Scores:
    with open_hdf5(path) as file, reading(path):
        lacking = [name for name in ("audio_name", "clipwise", "target", "duration") if name not in file]
        if lacking or "labels" not in file.attrs:
            raise UserError(f"{path} is no score file: it lacks {', '.join([*lacking, 'labels'])}.")
        clips = len(file["audio_name"])
        check_columns(file, COLUMNS, rows=dict.fromkeys(OF_CLIPS, clips))
        column = {name: read_column(file, name) for name in COLUMNS if name in file}
        own = ("labels", "seconds_per_frame")
        found = Scores(
            names=[name.decode() for name in column["audio_name"].tolist()],
            clipwise=column["clipwise"],
            targets=column["target"],
            durations=column["duration"],
            labels=texts(file.attrs["labels"]),
            framewise=column.get("framewise"),
            seconds_per_frame=float(file.attrs["seconds_per_frame"]),
            events=_clip_events(path, column, clips),
            clip_index=column.get("clip_index"),
            attributes={key: value for key, value in file.attrs.items() if key not in own},
            path=path,
        )
        stored = found.attributes.get("postprocessing")
        if stored:
            read_postprocessing(json.loads(str(stored)), path)
        fault = next(_faults(found), None)
        if fault:
            raise UserError(f"{path} is no valid score file: {fault}. Test again.")
        return found


def _clip_events(path: Path, column: dict[str, np.ndarray], clips: int) -> Optional[list[EventList]]:
    """The events of each clip. Raises UserError where they belong to none."""
    if "event_clip" not in column:
        return None
    events: list[EventList] = [[] for _ in range(clips)]
    number = column["event_clip"]
    if len(number) and not 0 <= number.min() <= number.max() < clips:
        raise UserError(f"{path} is no valid score file: an event belongs to clip {number.max()} of {clips}.")
    columns = (column[f"event_{name}"].tolist() for name in ("clip", "class", "onset", "offset"))
    for clip, label, onset, offset in zip(*columns, strict=True):
        events[clip].append((label, onset, offset))
    return events


def _faults(scores: Scores) -> Iterator[str]:
    """What is wrong in the values of a score file, most important first; each relies on those before."""
    clips, classes = len(scores.names), len(scores.labels)
    if len(set(scores.labels)) != classes:
        yield f"labels has a name twice: {scores.labels[:5]}"
    for name, array in (("clipwise", scores.clipwise), ("target", scores.targets), ("framewise", scores.framewise)):
        if array is not None and (len(array), array.shape[-1]) != (clips, classes):
            yield f"{name} is of the shape {array.shape}, for {clips} clips and {classes} classes"
        if array is not None and not np.isfinite(array).all():
            yield f"{name} holds NaN or infinite values"
    if not ((scores.durations > 0) & (scores.durations <= LONGEST_SECONDS)).all():
        yield f"duration must be above 0 and at most {LONGEST_SECONDS:g} s, and is up to {scores.durations.max():g}"
    if scores.framewise is not None:
        covered = scores.seconds_per_frame * scores.framewise.shape[1]
        if not scores.durations.max(initial=0) <= covered + scores.seconds_per_frame < np.inf:
            yield f"{scores.framewise.shape[1]} frames of {scores.seconds_per_frame:g} s do not cover the clips"
    for label, onset, offset in itertools.chain(*(scores.events or [])):
        if not (0 <= label < classes and 0 <= onset <= offset < np.inf):
            yield f"an event has class {label} of {classes}, from {onset:g} to {offset:g} s"


def shard_path(path: Path, number: int, count: int) -> Path:
    """The file of the number-th of `count` jobs (from 1), for its share of the score file `path`."""
    return path.with_name(f"{path.stem}.shard{number}of{count}{path.suffix}")


def find_shards(path: Path) -> list[Path]:
    """The shards beside a score file, by their names."""
    pattern = re.compile(re.escape(path.stem) + r"\.shard\d+of\d+" + re.escape(path.suffix))
    return sorted(p for p in path.parent.glob("*") if pattern.fullmatch(p.name))


def join_shards(path: Path) -> Scores:
    """The scores of all shards of `path`, in the order of the split; a clip in several shards is taken once.

    Raises UserError, with their names, for shards that are missing, cut off, or of another run (other weights or
    clips), and for missing clips.
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
            f"The shards of {path} are of different runs: {expected[0].name} of {runs[0]}, {', '.join(stale)} of other "
            f"ones. Repeat the tests that are out of date."
        )
    joined = _concatenate(parts, path)
    wanted = int(parts[0].attributes["split_clips"])
    if len(joined.names) != wanted:
        raise UserError(f"The shards of {path} hold {len(joined.names)} clips of {wanted}: test again.")
    return joined


def _concatenate(parts: list[Scores], path: Path) -> Scores:
    """Scores of one run, sorted by clip_index, each clip once."""
    assert all(part.clip_index is not None for part in parts)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("clipwise", "targets", "durations", "framewise", "clip_index")
        if getattr(parts[0], name) is not None
    }
    known = all(part.events is not None for part in parts)
    joined = replace(
        parts[0],
        names=[name for part in parts for name in part.names],
        events=[clip for part in parts for clip in part.events or []] if known else None,
        path=path,
        **columns,
    )
    return joined.select_clips(np.unique(columns["clip_index"], return_index=True)[1])
