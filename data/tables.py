"""Tables that users give, CSV or TSV as spreadsheets and annotation tools write them: one reader for all commands."""

import codecs
import csv
import io
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from settings import UserError

DELIMITERS = "\t,;"
LONGEST_HEADER = 10_000  # characters that are looked at: what is no text can be one endless line
EVENT_COLUMNS = ["filename", "onset", "offset", "event_label"]
ENCODINGS = {  # by the byte order mark at the beginning; the longer marks first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


class Row(NamedTuple):
    """A line of a table. cells: by the names of the columns, cleaned; empty where the line is short."""

    table: Path
    line: int
    cells: dict[str, str]

    @property
    def place(self) -> str:
        """The file and the line, for messages."""
        return f"{self.table}, line {self.line}"

    def number(self, column: str) -> float:
        """A time in seconds, or a score. Raises UserError where the cell is no finite number."""
        text = self.cells[column]
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            hint = f" It has a decimal comma: write {text.replace(',', '.')}." if text.count(",") == 1 else ""
            raise UserError(f"{self.place}: {column} {text!r} is not a number, as 0.5.{hint}")
        return found


class TimedLabel(NamedTuple):
    """An event in a table: class name, onset and offset in seconds from the start of the clip."""

    place: str
    label: str
    onset: float
    offset: float


def clean(text: str) -> str:
    """The text of a cell, or a folder's name as a class: in composed characters (NFC), without spaces at the ends."""
    return unicodedata.normalize("NFC", text).strip()


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; lines end with a line feed.

    Raises UserError where the file is missing or in another encoding.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no table {path}.") from None
    except OSError as error:
        raise UserError(f"The table {path} cannot be read: {error.strerror}.") from None
    encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} cannot be read as text in {encoding.upper()} (line {line}): save it as UTF-8."
        ) from None
    if "\0" in text:
        raise UserError(f"{path} cannot be read as text in UTF-8: it holds zero bytes. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def iterate_table(path: Path) -> tuple[list[str], Iterator[Row]]:
    """Columns and rows of a CSV or TSV: tab, comma or semicolon, whichever cuts the header line into most columns.

    Lines without any text are left out, and so are columns without a name. Raises UserError where the file is no text
    (read_text), has no header, names a column twice, or a row has more cells than the header.
    """
    text = read_text(path)
    delimiter = max(DELIMITERS, key=lambda one: _columns_of(text, one))
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    lines = _cleaned_lines(path, reader)
    _, columns = next(lines, (0, []))
    if not columns:
        raise UserError(f"{path} is empty: it needs a line of column names and a line for each clip or event.")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise UserError(f"{path} has the column {', '.join(twice)} twice: keep one of them.")

    def rows() -> Iterator[Row]:
        for line, cells in lines:
            if any(cells[len(columns) :]):
                raise UserError(
                    f"{path}, line {line} has more cells than the {len(columns)} columns: quote those that hold "
                    f"{'a tab' if delimiter == chr(9) else delimiter}."
                )
            cells += [""] * (len(columns) - len(cells))
            yield Row(path, line, {name: cell for name, cell in zip(columns, cells, strict=False) if name})

    return [name for name in columns if name], rows()


def read_table(path: Path, *, empty: bool = False) -> tuple[list[str], list[Row]]:
    """All of iterate_table. empty: whether a header alone will do; else it raises UserError as well."""
    columns, rows = iterate_table(path)
    found = list(rows)
    if not found and not empty:
        raise UserError(f"{path} is empty: it needs a line for each clip or event below the column names.")
    return columns, found


def _columns_of(text: str, delimiter: str) -> int:
    """Into how many columns a delimiter cuts the header line."""
    header = text.lstrip("\n").partition("\n")[0]
    return len(next(csv.reader([header[:LONGEST_HEADER]], delimiter=delimiter, skipinitialspace=True), []))


def _cleaned_lines(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line of a csv.reader that has any text."""
    try:
        for cells in reader:
            cleaned = [clean(cell) for cell in cells]
            if any(cleaned):
                yield reader.line_num, cleaned
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} cannot be read as CSV or TSV: {error}.") from None


def require_columns(table: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raise UserError where one of the needed columns is lacking."""
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise UserError(
            f"{table} lacks the columns {', '.join(lacking)}; it has {', '.join(columns)} and needs "
            f"{', '.join(needed)}, with tabs, commas or semicolons between."
        )


def parse_event(row: Row) -> Optional[TimedLabel]:
    """The event of a row with EVENT_COLUMNS; None where all but the filename is empty: a clip without events.

    Raises UserError, with the line, for empty cells, times that are no numbers, and other than 0 <= onset < offset.
    """
    filename, onset, offset, label = (row.cells[column] for column in EVENT_COLUMNS)
    if not filename:
        raise UserError(f"{row.place}: the filename is empty.")
    if not (onset or offset or label):
        return None
    if not label:
        raise UserError(f"{row.place}: the event from {onset} to {offset} s has no event_label.")
    event = TimedLabel(row.place, label, row.number("onset"), row.number("offset"))
    if not 0 <= event.onset < event.offset:
        raise UserError(f"{row.place}: an event must have 0 <= onset < offset, not {onset} and {offset} s.")
    return event
