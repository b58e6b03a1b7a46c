"""Frame scores -> events. The one place where frames become seconds."""

import numpy as np
import pandas as pd

EVENT_COLUMNS = ["filename", "onset", "offset", "event_label"]


def frame_edges(frames: int, seconds_per_frame: float, duration: float) -> np.ndarray:
    """(frames + 1,) times in seconds at which the frames of a clip begin, and the last one ends."""
    return np.minimum(np.arange(frames + 1) * seconds_per_frame, duration)


def active_runs(active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frames, K) bool -> class, first frame and frame after the last of each run, sorted by class and time."""
    edges = np.diff(np.pad(active.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # (K, frames + 1)
    label, start = np.nonzero(edges == 1)
    _, stop = np.nonzero(edges == -1)
    return label, start, stop


def decode_events(
    framewise: np.ndarray,
    *,
    names: list[str],
    labels: list[str],
    durations: np.ndarray,
    seconds_per_frame: float,
    thresholds: np.ndarray,
) -> pd.DataFrame:
    """(N, frames, K) scores -> a table of events: filename, onset, offset (seconds), event_label.

    thresholds: (K,) or (1,); a frame whose score is above its class's threshold is on, and an event is a run of such
    frames. Frames that begin after a clip's duration are left out.
    """
    tables = []
    for clip, name in enumerate(names):
        edges = frame_edges(framewise.shape[1], seconds_per_frame, float(durations[clip]))
        label, start, stop = active_runs(framewise[clip] > thresholds)
        onset, offset = edges[start], edges[stop]
        inside = offset > onset
        columns = {
            "filename": name,
            "onset": onset[inside],
            "offset": offset[inside],
            "event_label": np.asarray(labels)[label[inside]],
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=EVENT_COLUMNS)


def truth_table(names: list[str], events: list[list[tuple[int, float, float]]], labels: list[str]) -> pd.DataFrame:
    """The true events of each clip as a table with the columns of decode_events."""
    rows = [
        (name, onset, offset, labels[label])
        for name, clip in zip(names, events, strict=True)
        for label, onset, offset in clip
    ]
    return pd.DataFrame(rows, columns=EVENT_COLUMNS)
