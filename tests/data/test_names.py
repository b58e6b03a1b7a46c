"""How names, labels and scores are shown."""

import csv
import io

import pytest

from data.names import cell_text, markup, score_text, shown, table_cell, terminal_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Käuzchen 猫 🦉", "Käuzchen 猫 🦉"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\u202eb\u2028c\x9b\r\n\t", "a\\u202eb\\u2028c\\x9b\\r\\n\\t"),
        ("caf\udce9", "caf\\udce9"),
        ("می\u200cخواهم\u3000x", "می\u200cخواهم\u3000x"),
    ],
)
def test_control_characters_are_escapes(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert terminal_text(f"{text}\n{text}").count("\n") == 1 + text.count("\n") * 2


@pytest.mark.parametrize("text", ["=1+2", "+cmd", "-x", "@a", "\t=1", "dog", "a\tb", 'say "x"', "-", "'quoted'"])
def test_no_cell_is_a_formula(text: str) -> None:
    cell = table_cell(text)
    assert cell == "-" or not cell.startswith(("=", "+", "-", "@", "\t"))
    file = io.StringIO()
    csv.writer(file).writerow([cell])
    ((back,),) = csv.reader(io.StringIO(file.getvalue()))
    assert cell_text(back) == text


def test_brackets_are_no_markup() -> None:
    assert markup("[red]a\x1b") == "\\[red]a\\x1b"


@pytest.mark.parametrize(
    ("score", "text"),
    [(0.5, "0.5"), (0.97341, "0.973"), (0.99999906, "1 - 9.4e-07"), (2.4e-5, "2.4e-05"), (1.0, "1"), (0.0, "0")],
)
def test_scores_near_1_are_distinct(score: float, text: str) -> None:
    assert score_text(score) == text
