"""Tables of events and durations: what is read, and what is refused with the line."""

from pathlib import Path

import pytest

from evaluation.event_tables import GroundTruth, check_ends, read_durations, read_events
from settings import UserError
from tests.evaluation.examples import events

HEAD = "filename\tonset\toffset\tevent_label\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("filename\tonset\toffset\nx\t0\t1\n", "event_label"),
        (HEAD + "x\t0\t1\tcat\nx\tlate\t1\tcat\n", "line 3: onset"),
        (HEAD + "x\t0\tNaN\tcat\n", "line 2: offset"),
        (HEAD + "x\t0\tinf\tcat\n", "line 2: offset"),
        (HEAD + "\nx\t1\t\tcat\n", "line 3: offset"),
        (HEAD + "x\t2\t2\tcat\n", "line 2: .* 2 and 2"),
        (HEAD + "x\t-1\t2\tcat\n", "line 2: .* -1"),
        (HEAD + "x\t1\t2\t\n", "line 2: .*event_label"),
        (HEAD + "\t1\t2\tcat\n", "line 2: .*filename"),
        ("", "empty"),
        ((HEAD + "x\t1\t2\tcat\tmore\tmore\n") * 2, "line 2 has more cells"),
    ],
)
def test_bad_event_tables(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "e.tsv").write_text(text)
    with pytest.raises(UserError, match=named):
        read_events(tmp_path / "e.tsv")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("filename\tlength\nx\t1\n", "lacks .* duration"),
        ("filename\tduration\nx\tlong\n", "line 2: duration"),
        ("filename\tduration\nx\t0\n", "line 2: .*duration"),
        ("filename\tduration\nx\t1\nx\t2\n", "line 3: .*twice"),
        ("filename\tduration\n", r"d\.tsv"),
    ],
)
def test_bad_duration_tables(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "d.tsv").write_text(text)
    with pytest.raises(UserError, match=named):
        read_durations(tmp_path / "d.tsv")


def test_tables_are_read(tmp_path: Path) -> None:
    """Names and labels stay text, further columns are left, and a row with a name alone is a clip without events."""
    text = "onset\tfilename\toffset\tevent_label \tconfidence\n0.5\t007\t1\tNA \t1\n\t008\t\t\t\n"
    (tmp_path / "e.tsv").write_text(text)
    assert read_events(tmp_path / "e.tsv").to_numpy().tolist() == [["007", 0.5, 1.0, "NA"]]
    with pytest.raises(UserError, match=r"gone\.tsv"):
        read_events(tmp_path / "gone.tsv")
    with pytest.raises(UserError, match="x, y"):
        GroundTruth.build(events(("y", 0, 1, "a"), ("x", 0, 1, "a")), {"z": 1.0}, ["a"])
    check_ends(events(("x", 0, 2.4, "a")), {"x": 2.0}, "t.tsv")
    with pytest.raises(UserError, match=r"t\.tsv .* x, which is 2 s"):
        check_ends(events(("x", 0, 99, "a")), {"x": 2.0}, "t.tsv")
    with pytest.raises(UserError, match="no events"):
        GroundTruth.build(events(), {"z": 1.0}, ["a"])
