"""How names and labels, which others chose, and scores are shown: on a terminal, in a table, in a label file."""

import unicodedata

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # beginnings of a cell that spreadsheets compute
JOINERS = "\u200c\u200d"  # between letters of Persian and Hindi, and between parts of an emoji


def shown(text: str) -> str:
    """For a terminal, a picture and a label file: control characters as escapes, such as \\x1b.

    They move the cursor, change colours, hide or reverse what follows, and end lines.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"


def terminal_text(text: str) -> str:
    """For a terminal: as `shown`, but lines stay lines."""
    return "\n".join(map(shown, text.split("\n")))


def markup(text: str) -> str:
    """For a table that rich prints: as `shown`, and brackets stay brackets."""
    from rich.markup import escape  # here: `--help` and messages do not wait for it

    return escape(shown(text))


def table_cell(text: str) -> str:
    """For CSV and TSV, whose writer quotes tabs and lines: no other control characters, and no formulas.

    Text that a spreadsheet would compute begins with an apostrophe, which `cell_text` takes away.
    """
    kept = text if text.isprintable() else "".join(c if c in "\t\r\n" else shown(c) for c in text)
    return f"'{kept}" if len(kept) > 1 and kept.startswith(FORMULA) else kept


def cell_text(cell: str) -> str:
    """The text of a cell that `table_cell` wrote."""
    return cell[1:] if cell.startswith(tuple(f"'{first}" for first in FORMULA)) else cell


def score_text(score: float) -> str:
    """A score or threshold in few digits: 0.5, 0.973, 2.4e-05, and near 1, where digits end, 1 - 9.5e-07."""
    return f"1 - {1 - score:.2g}" if 0.9995 <= score < 1 else f"{score:.3g}"
