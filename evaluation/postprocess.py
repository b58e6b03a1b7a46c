"""Frame scores -> events. The one place where frames become seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import median_filter

from settings import UserError

EVENT_COLUMNS = ["filename", "onset", "offset", "event_label"]
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class PostProcessing:
    """How frame scores become events: one value for each class (given as one for all, or a list in their order).

    thresholds: a frame whose score lies above is on; median_filter: length in frames, odd, 1 for none;
    minimum_duration: shorter events are left out, in seconds; maximum_gap: events of one class that are so close are
    one, in seconds; interpolation: parts into which each frame is divided, with scores on straight lines between the
    frames' middles, 1 for none. source: who chose this. Raises UserError for values that are not allowed.
    """

    labels: tuple[str, ...]
    thresholds: tuple[float, ...] = (DEFAULT_THRESHOLD,)
    median_filter: tuple[int, ...] = (1,)
    minimum_duration: tuple[float, ...] = (0.0,)
    maximum_gap: tuple[float, ...] = (0.0,)
    interpolation: int = 1
    source: str = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        for name, kind in PER_CLASS.items():
            values = np.atleast_1d(np.asarray(getattr(self, name)))
            if len(values) not in (1, len(self.labels)):
                raise UserError(
                    f"{name} has {len(values)} values: give 1, or one for each of the {len(self.labels)} classes "
                    f"{', '.join(self.labels)}."
                )
            object.__setattr__(self, name, tuple(kind(v) for v in np.broadcast_to(values, len(self.labels)).tolist()))
        _check_ranges(self)

    def decode(
        self, framewise: np.ndarray, *, names: Sequence[str], durations: np.ndarray, seconds_per_frame: float
    ) -> pd.DataFrame:
        """Events in (N, frames, K) scores; see decode_events."""
        where: dict[str, Any] = {"names": names, "durations": durations, "seconds_per_frame": seconds_per_frame}
        chosen: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in PER_CLASS}
        return decode_events(framewise, labels=self.labels, interpolation=self.interpolation, **chosen, **where)

    def smooth(
        self, framewise: np.ndarray, *, durations: np.ndarray, seconds_per_frame: float
    ) -> tuple[np.ndarray, float]:
        """The scores that are held against the thresholds, and their seconds per frame; see smooth_scores."""
        lengths = np.asarray(self.median_filter)
        smoothed = smooth_scores(framewise, durations, seconds_per_frame, lengths, self.interpolation)
        return smoothed, seconds_per_frame / self.interpolation

    def for_labels(self, labels: Sequence[str]) -> "PostProcessing":
        """The same for classes in another order, or some of them. Raises UserError, with its name, for a new class."""
        unknown = [label for label in labels if label not in self.labels]
        if unknown:
            raise UserError(f"The post-processing ({self.source}) does not know the classes {', '.join(unknown)}.")
        place = [self.labels.index(label) for label in labels]
        values = {name: tuple(getattr(self, name)[k] for k in place) for name in PER_CLASS}
        return PostProcessing(tuple(labels), interpolation=self.interpolation, source=self.source, **values)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text, for a checkpoint, a score store or JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PostProcessing":
        """What as_dict wrote. Raises UserError where something else is there."""
        known = {field.name for field in fields(cls)}
        if set(content) - known or "labels" not in content:
            raise UserError(f"This is no post-processing: it has {', '.join(content)}, known are {', '.join(known)}.")
        return cls(**content)


PER_CLASS: dict[str, type] = {
    "thresholds": float,
    "median_filter": int,
    "minimum_duration": float,
    "maximum_gap": float,
}


def _check_ranges(post: PostProcessing) -> None:
    if not np.isfinite(post.thresholds).all():
        raise UserError(f"thresholds {post.thresholds} must be finite numbers.")
    if any(length < 1 or length % 2 == 0 for length in post.median_filter):
        raise UserError(f"median_filter {post.median_filter}: lengths are odd numbers of frames, 1 for no filter.")
    if any(not 0 <= seconds < np.inf for seconds in (*post.minimum_duration, *post.maximum_gap)):
        raise UserError(
            f"minimum_duration {post.minimum_duration} and maximum_gap {post.maximum_gap} are seconds, 0 or more."
        )
    if int(post.interpolation) != post.interpolation or post.interpolation < 1:
        raise UserError(
            f"interpolation = {post.interpolation} is not allowed: give 1 for none, or the parts of a frame."
        )


def frame_edges(frames: int, seconds_per_frame: float, duration: float) -> np.ndarray:
    """(frames + 1,) times in seconds at which the frames of a clip begin, and the last one ends."""
    return np.minimum(np.arange(frames + 1) * seconds_per_frame, duration)


def active_runs(active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(N, frames, K) bool -> clip, class, first frame and frame after the last of each run, sorted in this order."""
    clips, frames, classes = active.shape
    line = np.zeros((clips, classes, frames + 2), dtype=bool)  # an empty frame before and after: runs end with the clip
    line[:, :, 1:-1] = active.transpose(0, 2, 1)
    flat = line.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1])  # on, off, on, off, ...
    row, start = np.divmod(changes[::2], frames + 2)
    clip, label = np.divmod(row, classes)
    return clip, label, start, start + (changes[1::2] - changes[::2])


def smooth_scores(
    framewise: np.ndarray, durations: np.ndarray, seconds_per_frame: float, lengths: np.ndarray, interpolation: int
) -> np.ndarray:
    """(N, frames, K) scores -> (N, frames * interpolation, K): each class's median filter, then the straight lines.

    lengths: (K,) in frames. Beyond its ends a clip goes on with its first and last score: what the network said about
    the padding after a short clip counts for nothing.
    """
    if lengths.max(initial=1) == 1 and interpolation == 1:
        return framewise
    scores = _hold_last(framewise, durations, seconds_per_frame)
    for length in np.unique(lengths[lengths > 1]).tolist():
        chosen = lengths == length
        scores[:, :, chosen] = median_filter(scores[:, :, chosen], size=(1, length, 1), mode="nearest")
    if interpolation == 1:
        return scores
    frames = scores.shape[1]
    place = np.clip((np.arange(frames * interpolation) + 0.5) / interpolation - 0.5, 0, frames - 1)
    before = np.minimum(place.astype(int), max(frames - 2, 0))
    share = (place - before)[None, :, None].astype(scores.dtype)
    return scores[:, before] * (1 - share) + scores[:, np.minimum(before + 1, frames - 1)] * share


def _hold_last(framewise: np.ndarray, durations: np.ndarray, seconds_per_frame: float) -> np.ndarray:
    """A copy in which the frames that begin after a clip's duration repeat its last one."""
    frames = framewise.shape[1]
    last = np.clip(np.ceil(durations / seconds_per_frame - 1e-9).astype(int) - 1, 0, frames - 1)
    if (last == frames - 1).all():
        return framewise.copy()
    return np.take_along_axis(framewise, np.minimum(np.arange(frames), last[:, None])[:, :, None], axis=1)


def decode_events(
    framewise: np.ndarray,
    *,
    names: Sequence[str],
    labels: Sequence[str],
    durations: np.ndarray,
    seconds_per_frame: float,
    thresholds: np.ndarray,
    median_filter: np.ndarray | int = 1,
    minimum_duration: np.ndarray | float = 0.0,
    maximum_gap: np.ndarray | float = 0.0,
    interpolation: int = 1,
) -> pd.DataFrame:
    """(N, frames, K) scores -> a table of events: filename, onset, offset (seconds), event_label.

    durations: (N,) seconds; the others as in PostProcessing, (K,) or (1,). The scores are filtered and interpolated; an
    event is a run of frames above the threshold; events that maximum_gap joins are one; those shorter than
    minimum_duration are left out, and so are frames that begin after a clip's duration. Sorted by clip, class, time.
    """
    classes = len(labels)
    lengths = np.broadcast_to(median_filter, classes)
    scores = smooth_scores(framewise, durations, seconds_per_frame, lengths, interpolation)
    step = seconds_per_frame / interpolation
    clip, label, start, stop = active_runs(scores > np.asarray(thresholds))
    ends = np.asarray(durations, dtype=np.float64)[clip]
    onset, offset = np.minimum(start * step, ends), np.minimum(stop * step, ends)
    inside = offset > onset
    columns = [clip[inside], label[inside], onset[inside], offset[inside]]
    columns = _join_close(*columns, gaps=np.broadcast_to(maximum_gap, classes))
    clip, label, onset, offset = columns
    # Times are multiples of a step: what is as long as asked for may come out a rounding shorter.
    kept = offset - onset >= np.broadcast_to(minimum_duration, classes)[label] - 1e-9
    return pd.DataFrame(
        {
            "filename": np.asarray(names, dtype=object)[clip[kept]],
            "onset": onset[kept],
            "offset": offset[kept],
            "event_label": np.asarray(labels, dtype=object)[label[kept]],
        },
        columns=EVENT_COLUMNS,
    )


def _join_close(
    clip: np.ndarray, label: np.ndarray, onset: np.ndarray, offset: np.ndarray, *, gaps: np.ndarray
) -> list[np.ndarray]:
    """Events, sorted by clip, class and time, with those joined that lie no further apart than their class's gap."""
    if len(clip) == 0 or gaps.max() == 0:
        return [clip, label, onset, offset]
    same = (clip[1:] == clip[:-1]) & (label[1:] == label[:-1])
    apart = onset[1:] - offset[:-1]
    first = np.concatenate([[True], ~same | (apart > gaps[label[1:]] + 1e-9)])
    last = np.concatenate([first[1:], [True]])
    return [clip[first], label[first], onset[first], offset[last]]


def detected_frames(
    found: pd.DataFrame, *, names: Sequence[str], labels: Sequence[str], frames: int, seconds_per_frame: float
) -> np.ndarray:
    """The way back from the events of decode_events: (N, frames, K), 1.0 where a class is on, else 0.0."""
    active = np.zeros((len(names), frames, len(labels)))
    clips, classes = {n: k for k, n in enumerate(names)}, {n: k for k, n in enumerate(labels)}
    for name, onset, offset, label in found[EVENT_COLUMNS].itertuples(index=False):
        # An offset within a frame is the clip's end: that frame was on.
        span = slice(round(onset / seconds_per_frame), int(np.ceil(offset / seconds_per_frame - 1e-6)))
        active[clips[name], span, classes[label]] = 1.0
    return active


def truth_table(names: list[str], events: list[list[tuple[int, float, float]]], labels: list[str]) -> pd.DataFrame:
    """The true events of each clip as a table with the columns of decode_events."""
    rows = [
        (name, onset, offset, labels[label])
        for name, clip in zip(names, events, strict=True)
        for label, onset, offset in clip
    ]
    return pd.DataFrame(rows, columns=EVENT_COLUMNS)
