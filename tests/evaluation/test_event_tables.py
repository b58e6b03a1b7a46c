"""Tables of events and durations: what is read, and what is refused with the line."""

from pathlib import Path

import pandas as pd
import pytest

from evaluation.event_tables import GroundTruth, read_durations, read_events
from evaluation.postprocess import EVENT_COLUMNS


def events(*rows: tuple[str, float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=EVENT_COLUMNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename\tonset\toffset\nx\t0\t1\n", "lacks event_label.*filename, onset, offset"),
        ("filename,onset,offset,event_label\nx,0,1,cat\n", "lacks filename, onset, offset, event_label"),
        ("filename\tonset\toffset\tevent_label\nx\t0\t1\tcat\nx\tlate\t1\tcat\n", "line 3: onset is no finite number"),
        ("filename\tonset\toffset\tevent_label\nx\t0\tNaN\tcat\n", "line 2: offset is no finite number"),
        ("filename\tonset\toffset\tevent_label\nx\t0\tinf\tcat\n", "line 2: offset is no finite number"),
        ("filename\tonset\toffset\tevent_label\n\nx\t1\t\tcat\n", "line 3: offset is no finite number"),
        ("filename\tonset\toffset\tevent_label\nx\t2\t2\tcat\n", "line 2: the event does not end after it begins"),
        ("filename\tonset\toffset\tevent_label\nx\t-1\t2\tcat\n", "line 2: the onset is negative"),
        ("filename\tonset\toffset\tevent_label\nx\t1\t2\t\n", "line 2: event_label is empty"),
        ("filename\tonset\toffset\tevent_label\n\t1\t2\tcat\n", "line 2: filename is empty"),
        ("", "is no tab-separated table"),
        ("filename\tonset\toffset\tevent_label\nx\t1\t2\tcat\tmore\tmore\n" * 2, "is no tab-separated table"),
    ],
)  # fmt: skip
def test_bad_event_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "e.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_events(tmp_path / "e.tsv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename\tlength\nx\t1\n", "lacks duration"),
        ("filename\tduration\nx\tlong\n", "line 2: duration is no finite number"),
        ("filename\tduration\nx\t0\n", "line 2: the duration is not above 0 s"),
        ("filename\tduration\nx\t1\nx\t2\n", "line 3: the clip stands in the table twice"),
        ("filename\tduration\n", "names no clips"),
    ],
)
def test_bad_duration_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_durations(tmp_path / "d.tsv")


def test_tables_are_read(tmp_path: Path) -> None:
    """Names and labels stay text, further columns are left, and a row with a name alone is a clip without events."""
    text = "onset\tfilename\toffset\tevent_label\tconfidence\n0.5\t007\t1\tNA\t1\n\t008\t\t\t\n"
    (tmp_path / "e.tsv").write_text(text)
    assert read_events(tmp_path / "e.tsv").to_numpy().tolist() == [["007", 0.5, 1.0, "NA"]]
    with pytest.raises(ValueError, match=r"The table .*gone.tsv cannot be read: No such file"):
        read_events(tmp_path / "gone.tsv")
    with pytest.raises(ValueError, match="has events in clips that the durations do not know: x, y"):
        GroundTruth.build(events(("y", 0, 1, "a"), ("x", 0, 1, "a")), {"z": 1.0}, ["a"])
    with pytest.raises(ValueError, match="no events"):
        GroundTruth.build(events(), {"z": 1.0}, ["a"])
