"""Tables of events and durations in DCASE's format (tab-separated): read, checked, and as arrays.

Events: filename, onset, offset (seconds), event_label; a row with nothing but a filename is a clip without events.
Durations: filename, duration (seconds), one row for each clip of the data set.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation.postprocess import EVENT_COLUMNS
from settings import UserError

SHOWN = 4  # names or lines in a message


@dataclass(frozen=True)
class EventSet:
    """E events of N clips and K classes: numbers of clip and class, onset and offset in seconds, each (E,)."""

    clip: np.ndarray
    label: np.ndarray
    onset: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.clip)


@dataclass(frozen=True)
class GroundTruth:
    """N clips with their names, durations (N,) in seconds, K labels, and the table of their true events.

    No two events of a class overlap in a clip: join_overlapping has joined them.
    """

    names: list[str]
    durations: np.ndarray
    labels: list[str]
    table: pd.DataFrame

    @classmethod
    def build(cls, table: pd.DataFrame, durations: dict[str, float], labels: Sequence[str]) -> "GroundTruth":
        """Raises UserError for a table without events, clips without a duration, and names that cannot be measured."""
        if len(table) == 0:
            raise UserError("The ground truth has no events: there is nothing to evaluate against.")
        wrong = next((label for label in labels if "\\" in label), None)
        if wrong is not None:
            raise UserError(
                f"The class {wrong} has a backslash in its name, which sed_scores_eval cannot take: rename it."
            )
        check_clips(table, durations, "The ground truth")
        seconds = np.array(list(durations.values()), dtype=np.float64)
        return cls(list(durations), seconds, list(labels), join_overlapping(table))

    @cached_property
    def events(self) -> EventSet:
        return self.index(self.table)

    @cached_property
    def present(self) -> list[str]:
        """The classes with true events: the others have no metric of their own."""
        known = set(self.table.event_label)
        return [label for label in self.labels if label in known]

    @property
    def seconds(self) -> dict[str, float]:
        return dict(zip(self.names, self.durations.tolist(), strict=True))

    def by_clip(self) -> dict[str, list[tuple[float, float, str]]]:
        """The events of each clip for sed_scores_eval, which refuses events of a class that touch: they are joined."""
        events: dict[str, list[tuple[float, float, str]]] = {name: [] for name in self.names}
        for name, onset, offset, label in join_overlapping(self.table, touching=True).itertuples(index=False):
            events[name].append((float(onset), float(offset), str(label)))
        return events

    def index(self, table: pd.DataFrame) -> EventSet:
        """The events of a table of the same clips and classes, as arrays."""
        return EventSet(
            pd.Index(self.names).get_indexer(pd.Index(table.filename)),
            pd.Index(self.labels).get_indexer(pd.Index(table.event_label)),
            table.onset.to_numpy(dtype=np.float64),
            table.offset.to_numpy(dtype=np.float64),
        )


def read_events(path: Path) -> pd.DataFrame:
    """A table of events with EVENT_COLUMNS.

    Raises UserError, with the lines, for missing columns, times that are no numbers or negative, empty fields, and
    events that do not end after they begin.
    """
    text = _read_text(path, EVENT_COLUMNS)
    text = text[~(text.onset.isna() & text.offset.isna() & text.event_label.isna())]
    for column in ("filename", "event_label"):
        _refuse(path, text[column].isna(), f"{column} is empty")
    onset = _numbers(path, text, "onset")
    offset = _numbers(path, text, "offset")
    _refuse(path, onset < 0, "the onset is negative")
    _refuse(path, offset <= onset, "the event does not end after it begins")
    table = pd.DataFrame(
        {"filename": text.filename, "onset": onset, "offset": offset, "event_label": text.event_label},
        columns=EVENT_COLUMNS,
    )
    return table.reset_index(drop=True)


def read_durations(path: Path) -> dict[str, float]:
    """{filename: seconds}. Raises UserError, with the lines, for durations that are not allowed, and repeated clips."""
    text = _read_text(path, ["filename", "duration"])
    _refuse(path, text.filename.isna(), "filename is empty")
    seconds = _numbers(path, text, "duration")
    _refuse(path, seconds <= 0, "the duration is not above 0 s")
    _refuse(path, text.filename.duplicated(), "the clip is in the table twice")
    if len(text) == 0:
        raise UserError(f"{path} names no clips.")
    return dict(zip(text.filename.tolist(), seconds.tolist(), strict=True))


def check_clips(table: pd.DataFrame, durations: dict[str, float], what: str) -> None:
    """Raise UserError, with their names, for clips of a table without a duration. what: the table, for the message."""
    unknown = sorted(set(table.filename) - durations.keys())
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise UserError(
            f"{what} has events in clips without a duration: {', '.join(unknown[:SHOWN])}{more}. Add them to the "
            f"durations of {len(durations)} clips ({next(iter(durations))}, ...), or remove the events."
        )


def join_overlapping(table: pd.DataFrame, *, touching: bool = False) -> pd.DataFrame:
    """A table in which overlapping events of one class in one clip are one event, sorted by clip, class and time.

    psds_eval and sed_scores_eval refuse tables with such events: their metrics are defined on joined ones.
    touching: also join events of which one begins where another ends, which sed_scores_eval refuses as ground truth.
    """
    if len(table) == 0:
        return table[EVENT_COLUMNS]
    events = table[EVENT_COLUMNS].sort_values(["filename", "event_label", "onset", "offset"], ignore_index=True)
    kind = events.groupby(["filename", "event_label"], sort=False).ngroup().to_numpy()
    latest = events.groupby(kind).offset.cummax().to_numpy()
    onset = events.onset.to_numpy()
    apart = onset[1:] > latest[:-1] if touching else onset[1:] >= latest[:-1]
    first = np.concatenate([[True], apart | (kind[1:] != kind[:-1])])
    last = np.concatenate([first[1:], [True]])
    return events[first].assign(offset=latest[last]).reset_index(drop=True)


def _read_text(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The columns of a table as text, NaN for empty fields; the index is the line's number in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of lines with more fields than the first one
            text = pd.read_csv(
                path,
                sep="\t",
                dtype=str,
                keep_default_na=False,
                na_values=[""],
                skip_blank_lines=False,
                index_col=False,
            )
    except OSError as error:
        raise UserError(f"The table {path} cannot be read: {error.strerror}.") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a tab-separated table: {error}.") from None
    missing = [column for column in columns if column not in text.columns]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: its first line has {', '.join(map(str, text.columns))}. Give a "
            f"tab-separated table with {', '.join(columns)}."
        )
    text.index = text.index + 2
    return text[list(columns)].dropna(how="all")


def _numbers(path: Path, text: pd.DataFrame, column: str) -> pd.Series:
    values = pd.to_numeric(text[column], errors="coerce")
    _refuse(path, ~np.isfinite(values), f"{column} is not a finite number of seconds")
    return values.astype(np.float64)


def _refuse(path: Path, wrong: pd.Series, reason: str) -> None:
    if wrong.any():
        lines = wrong.index[wrong].tolist()
        more = ", ..." if len(lines) > SHOWN else ""
        raise UserError(f"{path}, line {', '.join(map(str, lines[:SHOWN]))}{more}: {reason}.")
