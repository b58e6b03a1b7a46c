"""The reader of tables: delimiters, encodings and spellings give the same cells, or an error that names the line."""

from pathlib import Path

import pytest

from data.tables import parse_event, read_table
from settings import UserError

LINES = [("filename", "onset", "offset", "event_label"), ("a.wav", "0.5", "1", "Käuzchen, male"), ("b.wav", "", "", "")]


def text_of(delimiter: str = ",", end: str = "\n") -> str:
    return end.join(delimiter.join(f'"{c}"' if "," in c else c for c in line) for line in LINES) + end


@pytest.mark.parametrize(
    "content",
    [
        *(text_of(delimiter, end).encode() for delimiter in "\t,;" for end in ("\n", "\r\n", "\r")),
        *(text_of().encode(encoding) for encoding in ("utf-8-sig", "utf-16", "utf-32")),
        text_of("\t").replace("\t", " \t ").encode(),
        text_of().replace("ä", "a\u0308").encode(),
        text_of().replace("\n", "\n ,, ,\n").encode(),
        text_of().replace("\n", ",,\n").encode(),
        text_of().replace(",0.5,1,", ', 0.5 ,"1", ').encode(),
        ("," + text_of().replace("\n", "\n0,", 2)).encode(),
    ],
)
def test_every_spelling_gives_the_same_cells(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    columns, rows = read_table(tmp_path / "t.csv")
    assert columns == list(LINES[0])
    assert [tuple(row.cells.values()) for row in rows] == LINES[1:]
    assert [event and event[1:] for event in map(parse_event, rows)] == [("Käuzchen, male", 0.5, 1.0), None]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("filename,label\nä,b\n".encode("latin-1"), "line 2"),
        ("filename,label\n".encode("utf-16")[2:], "UTF-8"),
        (b"filename,label,filename\n", "filename"),
        (b"filename,label\na.wav,b,c\n", "line 2"),
        (b'filename,label\n"a.wav,b\n', "line 2"),
        (b"", "t.csv"),
        (b"filename;onset;offset;event_label\na;0,5;1;x\n", "line 2: onset '0,5'.* 0.5"),
        (b"filename,onset,offset,event_label\na,1,nan,x\n", "line 2: offset 'nan'"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=named):
        for row in read_table(tmp_path / "t.csv", empty=True)[1]:
            parse_event(row)
