"""Frame scores -> events. The one place where frames become seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pandas as pd
from scipy.ndimage import median_filter

from data.files import check_memory
from data.tables import EVENT_COLUMNS
from settings import SHORT, Config, UserError, section

SCORE = "score"  # a further column of detected events: the highest score, smoothed, of each
DEFAULT_THRESHOLD, DEFAULT_SOURCE = 0.5, "default"
LONGEST_FILTER, MOST_PARTS = 9_999, 1_000  # frames of a median filter; parts of a frame


@dataclass(frozen=True)
class Convention:
    """extension: of a clip before its filter, by its first and last score, or mirrored ("reflect", as SciPy's default).

    centres: an event lasts from the centre of its first frame to that of its last, not from edge to edge. even: median
    filters of even lengths are allowed (the upper median, half a frame early, as SciPy's).
    """

    extension: Literal["nearest", "reflect"] = "nearest"
    centres: bool = False
    even: bool = False


CONVENTIONS = {
    "edges": Convention(),
    "reflect": Convention("reflect"),  # of the published frame-level encoders (PretrainedSED)
    "centres": Convention("reflect", centres=True, even=True),  # of HEAR
}
# By name, what publications do, for fl_postprocessing; the thresholds are of probabilities.
DCASE2016: dict[str, Any] = {"minimum_duration": (0.125,), "convention": "centres"}
NAMED: dict[str, dict[str, Any]] = {
    "published_sed": {"median_filter": (9,), "convention": "reflect"},  # with fl_threshold 0.1, 0.2 or 0.5
    "dcase2016": {"median_filter": (7,), **DCASE2016},
    # Published: 0.5 of the logits, and round(250 ms / 40 ms) = 6 frames.
    "dcase2016_published": {"median_filter": (6,), "thresholds": (1 / (1 + math.exp(-0.5)),), **DCASE2016},
}


@dataclass(frozen=True)
class PostProcessing:
    """The way from frame scores to events: one value for each class (given as one for all, or as one for each).

    thresholds: a frame with a higher score is on; median_filter: length in frames, odd, 1 for none; minimum_duration:
    shorter events are left out, in seconds; maximum_gap: events of one class at most so far apart are joined, in
    seconds; interpolation: parts into which each frame is divided, with linear interpolation between the frames'
    middles, 1 for none. convention: a name of CONVENTIONS. source: where the values come from. Raises
    UserError for values that are not allowed.
    """

    labels: tuple[str, ...]
    thresholds: tuple[float, ...] = (DEFAULT_THRESHOLD,)
    median_filter: tuple[int, ...] = (1,)
    minimum_duration: tuple[float, ...] = (0.0,)
    maximum_gap: tuple[float, ...] = (0.0,)
    interpolation: int = 1
    source: str = DEFAULT_SOURCE
    convention: str = "edges"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        for name, kind in PER_CLASS.items():
            values = _numbers(name, getattr(self, name))
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
        kept: dict[str, Any] = {"interpolation": self.interpolation, "convention": CONVENTIONS[self.convention]}
        return decode_events(framewise, labels=self.labels, **kept, **chosen, **where)

    def smooth(
        self, framewise: np.ndarray, *, durations: np.ndarray, seconds_per_frame: float
    ) -> tuple[np.ndarray, float]:
        """The scores to compare with the thresholds, and their seconds per frame; see smooth_scores."""
        lengths = np.asarray(self.median_filter)
        extension = CONVENTIONS[self.convention].extension
        smoothed = smooth_scores(framewise, durations, seconds_per_frame, lengths, self.interpolation, extension)
        return smoothed, seconds_per_frame / self.interpolation

    def for_labels(self, labels: Sequence[str]) -> "PostProcessing":
        """For classes in another order, or some of them. Raises UserError, with their names, for other classes."""
        unknown = [label for label in labels if label not in self.labels]
        if unknown:
            raise UserError(f"The post-processing ({self.source}) has no values for the classes {', '.join(unknown)}.")
        place = [self.labels.index(label) for label in labels]
        values: dict[str, Any] = {name: tuple(getattr(self, name)[k] for k in place) for name in PER_CLASS}
        return replace(self, labels=tuple(labels), **values)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text, for a checkpoint, a score store or JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PostProcessing":
        """The inverse of as_dict. Raises UserError for other fields, and for values of a wrong type."""
        known = [field.name for field in fields(cls)]
        if not isinstance(content, Mapping) or set(content) - set(known) or "labels" not in content:
            given = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise UserError(f"A post-processing has the fields {', '.join(known)}, not {given:.200}.")
        labels, *texts = content["labels"], content.get("source", ""), content.get("convention", "")
        if not isinstance(labels, (list, tuple)) or not all(isinstance(each, str) for each in (*labels, *texts)):
            raise UserError("The labels of a post-processing are a list of names, its source and convention are texts.")
        return cls(**content)


def choose_postprocessing(stored: Optional[PostProcessing], labels: Sequence[str], settings: Config) -> PostProcessing:
    """The stored values (calibrated, or of the class mapping), else the defaults; the settings fl_... replace them.

    fl_postprocessing: those of NAMED in place of the stored ones. `source` names the settings that did. Raises
    UserError for values that do not fit the classes.
    """
    base = stored or PostProcessing(tuple(labels))
    named = settings.fl_postprocessing
    if named is not None:
        base = PostProcessing(tuple(labels), source=named, **NAMED[named])
    given = {name: getattr(settings, name) for name in section("event detection") if name != "fl_postprocessing"}
    given = {name: value for name, value in given.items() if value is not None and value != []}
    if not given:
        return base
    values: dict[str, Any] = {
        "thresholds" if name == "fl_threshold" else name.removeprefix("fl_"): value for name, value in given.items()
    }
    return replace(base, **values, source=f"{base.source}, with {', '.join(given)} as given")


PER_CLASS: dict[str, type] = {
    "thresholds": float,
    "median_filter": int,
    "minimum_duration": float,
    "maximum_gap": float,
}


def read_postprocessing(content: Any, path: str | Path) -> PostProcessing:
    """What a file says, as PostProcessing.as_dict gave it. Raises UserError, with the file's name, for others."""
    try:
        return PostProcessing.from_dict(content)
    except UserError as error:
        raise UserError(f"{path} is damaged: its entry postprocessing cannot be used. {error}") from None


def _numbers(name: str, given: Any) -> np.ndarray:
    """(1,) or (K,) finite numbers. Raises UserError for anything else."""
    try:
        values = np.atleast_1d(np.asarray(given, dtype=np.float64))
    except (TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UserError(f"{name} = {SHORT.repr(given)} is not allowed: give finite numbers.")
    return values


def _check_ranges(post: PostProcessing) -> None:
    if post.convention not in CONVENTIONS:
        raise UserError(f"convention = {SHORT.repr(post.convention)} is not allowed: give {', '.join(CONVENTIONS)}.")
    even = CONVENTIONS[post.convention].even
    if any(length < 1 or (length % 2 == 0 and not even) or length > LONGEST_FILTER for length in post.median_filter):
        raise UserError(
            f"median_filter {SHORT.repr(post.median_filter)}: lengths are odd numbers of frames, 1 for no filter, at "
            f"most {LONGEST_FILTER}."
        )
    if any(not 0 <= seconds < np.inf for seconds in (*post.minimum_duration, *post.maximum_gap)):
        raise UserError(
            f"minimum_duration {post.minimum_duration} and maximum_gap {post.maximum_gap} are seconds, 0 or more."
        )
    if post.interpolation not in range(1, MOST_PARTS + 1):
        raise UserError(
            f"interpolation = {SHORT.repr(post.interpolation)} is not allowed: give 1 for none, or the parts of a "
            f"frame, at most {MOST_PARTS}."
        )


def frame_edges(frames: int, seconds_per_frame: float, duration: float) -> np.ndarray:
    """(frames + 1,) times in seconds at which the frames of a clip begin, and the last one ends."""
    return _begin_times(np.arange(frames + 1), frames, seconds_per_frame, np.asarray(duration), seconds_per_frame / 2)


def _begin_times(
    number: np.ndarray, frames: int, seconds_per_frame: float, durations: np.ndarray, half: float
) -> np.ndarray:
    """Seconds at which frames begin; those from the end of their clip on, at its end.

    The last frame ends with the clip: a rest of less than half a frame belongs to the one before. frames: of the
    scores, which cover the clip or, where it is longer by over `half` seconds, its beginning.
    """
    inside = np.maximum(np.floor(durations / seconds_per_frame + 0.5 + 1e-9), 1)
    last = np.where(durations - frames * seconds_per_frame < half, np.minimum(inside, frames), inside)
    return np.where(number >= last, durations, number * seconds_per_frame)


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
    framewise: np.ndarray,
    durations: np.ndarray,
    seconds_per_frame: float,
    lengths: np.ndarray,
    interpolation: int,
    extension: Literal["nearest", "reflect"] = "nearest",
) -> np.ndarray:
    """(N, frames, K) scores -> (N, frames * interpolation, K): each class's median filter, then the interpolation.

    lengths: (K,) in frames. A clip is extended by its first and last score, or mirrored; scores of the padding after a
    short clip are not used.
    """
    if lengths.max(initial=1) == 1 and interpolation == 1:
        return framewise
    last = _last_frame(framewise.shape[1], durations, seconds_per_frame)
    margin = int(lengths.max(initial=1)) // 2 if extension == "reflect" else 0
    scores = _extended(framewise, last, margin, extension)
    for length in np.unique(lengths[lengths > 1]).tolist():
        chosen = lengths == length
        scores[:, :, chosen] = median_filter(scores[:, :, chosen], size=(1, length, 1), mode="nearest")
    scores = scores[:, margin : scores.shape[1] - margin]
    if interpolation == 1:
        return scores
    frames = scores.shape[1]
    check_memory(f"Scores of {len(scores)} clips with interpolation = {interpolation}", scores.nbytes * interpolation)
    place = np.clip((np.arange(frames * interpolation) + 0.5) / interpolation - 0.5, 0, frames - 1)
    before = np.minimum(place.astype(int), max(frames - 2, 0))
    share = (place - before)[None, :, None].astype(scores.dtype)
    return scores[:, before] * (1 - share) + scores[:, np.minimum(before + 1, frames - 1)] * share


def _last_frame(frames: int, durations: np.ndarray, seconds_per_frame: float) -> np.ndarray:
    """(N,) number of each clip's last frame; a rest of less than half a frame belongs to it."""
    return np.clip(np.floor(np.asarray(durations) / seconds_per_frame + 0.5 + 1e-9).astype(int) - 1, 0, frames - 1)


def _extended(
    framewise: np.ndarray, last: np.ndarray, margin: int, extension: Literal["nearest", "reflect"]
) -> np.ndarray:
    """A copy with `margin` frames more on either side, in which those beyond a clip's (N,) last one are extended."""
    frames = framewise.shape[1]
    if margin == 0 and (last == frames - 1).all():
        return framewise.copy()
    place = np.arange(-margin, frames + margin)
    if extension == "nearest":
        place = np.clip(place, 0, last[:, None])
    else:  # d c b a | a b c d | d c b a, again and again where a clip is shorter than the filter
        place = place % (2 * (last[:, None] + 1))
        place = np.minimum(place, 2 * last[:, None] + 1 - place)
    return np.take_along_axis(framewise, place[:, :, None], axis=1)


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
    convention: Convention = CONVENTIONS["edges"],
) -> pd.DataFrame:
    """(N, frames, K) scores -> a table of events: filename, onset, offset (seconds), event_label, score.

    durations: (N,) seconds; the others as in PostProcessing, (K,) or (1,). The scores are filtered and interpolated; an
    event is a run of frames above the threshold; maximum_gap joins events; those shorter than minimum_duration are
    left out, and so are frames that begin after a clip's duration. An event's score is its highest one, filtered and
    interpolated. Sorted by clip, class, time.
    """
    classes = len(labels)
    lengths = np.broadcast_to(median_filter, classes)
    scores = smooth_scores(framewise, durations, seconds_per_frame, lengths, interpolation, convention.extension)
    step = seconds_per_frame / interpolation
    clip, label, start, stop = active_runs(scores > np.asarray(thresholds))
    ends = np.asarray(durations, dtype=np.float64)[clip]
    if convention.centres:
        inside = _last_frame(scores.shape[1], ends, step) + 1
        onset, offset = (start + 0.5) * step, (np.minimum(stop, inside) - 0.5) * step
    else:
        onset, offset = (_begin_times(k, scores.shape[1], step, ends, seconds_per_frame / 2) for k in (start, stop))
    columns = [clip, label, onset, offset, _highest(scores, clip, label, start, stop)]
    inside = offset > onset
    columns = _join_close(*(column[inside] for column in columns), gaps=np.broadcast_to(maximum_gap, classes))
    clip, label, onset, offset, highest = columns
    # Times are multiples of a frame: an event of the minimum duration may be shorter by a rounding.
    kept = offset - onset >= np.broadcast_to(minimum_duration, classes)[label] - 1e-9
    return pd.DataFrame(
        {
            "filename": np.asarray(names, dtype=object)[clip[kept]],
            "onset": onset[kept],
            "offset": offset[kept],
            "event_label": np.asarray(labels, dtype=object)[label[kept]],
            SCORE: highest[kept],
        }
    )


def _highest(
    scores: np.ndarray, clip: np.ndarray, label: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """The highest of the (N, frames, K) scores of each run, which active_runs gave."""
    frames, classes = scores.shape[1:]
    line = np.append(scores.transpose(0, 2, 1), scores.dtype.type(0))  # one behind the last, for runs that end there
    begin = (clip * classes + label) * frames
    edges = np.stack([begin + start, begin + stop], axis=1).reshape(-1)
    return np.maximum.reduceat(line, edges)[::2] if len(edges) else line[:0]  # every second one lies between two runs


def _join_close(
    clip: np.ndarray, label: np.ndarray, onset: np.ndarray, offset: np.ndarray, score: np.ndarray, *, gaps: np.ndarray
) -> list[np.ndarray]:
    """Events, sorted by clip, class and time, with those joined that are at most their class's gap apart."""
    if len(clip) == 0 or gaps.max() == 0:
        return [clip, label, onset, offset, score]
    same = (clip[1:] == clip[:-1]) & (label[1:] == label[:-1])
    apart = onset[1:] - offset[:-1]
    first = np.concatenate([[True], ~same | (apart > gaps[label[1:]] + 1e-9)])
    last = np.concatenate([first[1:], [True]])
    return [clip[first], label[first], onset[first], offset[last], np.maximum.reduceat(score, np.flatnonzero(first))]


def truth_table(names: list[str], events: list[list[tuple[int, float, float]]], labels: list[str]) -> pd.DataFrame:
    """The true events of each clip as a table with the columns of decode_events."""
    rows = [
        (name, onset, offset, labels[label])
        for name, clip in zip(names, events, strict=True)
        for label, onset, offset in clip
    ]
    return pd.DataFrame(rows, columns=EVENT_COLUMNS)
