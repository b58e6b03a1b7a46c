"""Tables of events and durations in DCASE's format: read, checked, and as arrays.

Events: filename, onset, offset (seconds), event_label; a row with nothing but a filename is a clip without events.
Durations: filename, duration (seconds), one row for each clip of the data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd

from data.clip_store import END_TOLERANCE
from data.names import cell_text
from data.tables import EVENT_COLUMNS, parse_event, read_table, require_columns
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

    No two events of a class overlap in a clip: join_overlapping has joined them. annotated: the events as they were
    given; None: the same.
    """

    names: list[str]
    durations: np.ndarray
    labels: list[str]
    table: pd.DataFrame
    annotated: Optional[pd.DataFrame] = None

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
        return cls(list(durations), seconds, list(labels), join_overlapping(table), table[EVENT_COLUMNS])

    @cached_property
    def events(self) -> EventSet:
        return self.index(self.table)

    @cached_property
    def annotated_events(self) -> EventSet:
        """The events as they were given, overlapping ones of a class each by itself."""
        return self.index(self.table if self.annotated is None else self.annotated)

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
    """A table of events with EVENT_COLUMNS. Raises UserError, with the line, as data.tables.parse_event."""
    columns, rows = read_table(path, empty=True)
    require_columns(path, columns, EVENT_COLUMNS)
    events = [(cell_text(row.cells["filename"]), parse_event(row)) for row in rows]
    found = [(name, e.onset, e.offset, cell_text(e.label)) for name, e in events if e is not None]
    return pd.DataFrame(found, columns=EVENT_COLUMNS).astype({"onset": np.float64, "offset": np.float64})


def read_durations(path: Path) -> dict[str, float]:
    """{filename: seconds}. Raises UserError, with the line, for durations that are not allowed, and repeated clips."""
    columns, rows = read_table(path)
    require_columns(path, columns, ("filename", "duration"))
    durations: dict[str, float] = {}
    for row in rows:
        name, seconds = row.cells["filename"], row.number("duration")
        if not name:
            raise UserError(f"{row.place}: the filename is empty.")
        if seconds <= 0:
            raise UserError(f"{row.place}: the duration is not above 0 s.")
        if name in durations:
            raise UserError(f"{row.place}: {name} is in the table twice.")
        durations[name] = seconds
    return durations


def check_clips(table: pd.DataFrame, durations: dict[str, float], what: str) -> None:
    """Raise UserError, with their names, for clips of a table without a duration. what: the table, for the message."""
    unknown = sorted(set(table.filename) - durations.keys())
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise UserError(
            f"{what} has events in clips without a duration: {', '.join(unknown[:SHOWN])}{more}. Add them to the "
            f"durations of {len(durations)} clips ({next(iter(durations))}, ...), or remove the events."
        )


def check_ends(table: pd.DataFrame, durations: dict[str, float], what: str) -> None:
    """Raise UserError for an event that ends more than END_TOLERANCE after its clip. what: the table."""
    end = table.filename.map(durations)
    late = table[table.offset > end + END_TOLERANCE]
    if len(late):
        name, onset, offset, label = late.iloc[0][EVENT_COLUMNS]
        raise UserError(
            f"{what} has {len(late)} events that end after their clip, as {label} from {onset:g} to {offset:g} s in "
            f"{name}, which is {durations[name]:g} s long: correct the event or the duration."
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
