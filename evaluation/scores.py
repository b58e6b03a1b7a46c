"""The score store: one HDF5 file with what a test computed, and the truth beside it, so that it can be read alone.

Datasets: audio_name (N,) bytes, clipwise (N, K) float32, target (N, K) bool, duration (N,) float64 seconds; with
localization framewise (N, steps, K) float32 and the true events event_clip, event_class (E,), event_onset and
event_offset (E,) float64 seconds. Attributes: labels (K names), seconds_per_frame, dataset_type,
clip_store (where the audio lies), and the front-end's settings (sample_rate, window_size, ...).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import h5py
import numpy as np

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
    attributes: dict[str, str | int | float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the store; it takes its name when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with h5py.File(partial, "w") as file:
            file["audio_name"] = np.array([name.encode() for name in self.names], dtype="S")
            file["clipwise"] = self.clipwise.astype(np.float32)
            file["target"] = self.targets.astype(bool)
            file["duration"] = self.durations.astype(np.float64)
            if self.framewise is not None:
                file["framewise"] = self.framewise.astype(np.float32)
            if self.events is not None:
                rows = [(clip, *event) for clip, events in enumerate(self.events) for event in events]
                table = np.array(rows, dtype=np.float64).reshape(-1, 4)
                file["event_clip"], file["event_class"] = table[:, 0].astype(np.int32), table[:, 1].astype(np.int16)
                file["event_onset"], file["event_offset"] = table[:, 2], table[:, 3]
            file.attrs.update({"labels": self.labels, "seconds_per_frame": self.seconds_per_frame, **self.attributes})
        os.replace(partial, path)


def load_scores(path: Path) -> Scores:
    """Read a score store. Raises ValueError where it is missing or is none."""
    if not path.is_file():
        raise ValueError(
            f"There is no score file {path}. `python main.py test --fl_local True --resume_checkpoint ...` writes it; "
            f"heatmap_dir and test_file say where."
        )
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
                attributes={key: value for key, value in file.attrs.items() if key not in own},
            )
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is no score file, or it is cut off: {error}") from None
