"""What the README and the manual name is there: commands, flags, values of settings, files."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import fl_evaluate
from commands.command_line import COMMANDS, build_parser
from commands.encoders import encoder_table
from prepare.adapters import check_flags, load_adapter
from settings import check_values
from tests.helpers import ROOT, SMALL_FLAGS, call

MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, *sorted(ROOT.glob("*/README.md")), ROOT / "benchmarks/RESULTS.md"]
CALL = re.compile(r"(?:python3?|torchrun|srun)\b[^\n`]*?\b(main|fl_evaluate)\.py +([^`#|&>\n]*)")
SHORT_CALL = re.compile(rf"`((?:{'|'.join(COMMANDS)}) -[^`]*)`")  # `train --resume auto`
FLAG = re.compile(r"`--(\w+)")
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
NAMED_FILE = re.compile(r"`([\w.-]+/[\w./-]*\.(?:py|json|md))`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(main or fl_evaluate, words) of each command line in a page."""
    text = page.read_text().replace("\\\n", " ")
    for script, line in [*CALL.findall(text), *(("main", line) for line in SHORT_CALL.findall(text))]:
        words = shlex.split(line)
        if len(words) > 1 and "--help" not in words:  # a word alone is a mention
            yield script, words


def parse(script: str, words: list[str]) -> dict[str, Any]:
    if script == "fl_evaluate":
        return vars(fl_evaluate.build_parser().parse_args(words))
    return vars(build_parser(words[0]).parse_args(words))


@pages
def test_command_lines_are_accepted(page: Path) -> None:
    for script, words in calls(page):
        values = parse(script, words)
        given = {k.removeprefix("setting_"): v for k, v in values.items() if k.startswith("setting_") and v is not None}
        check_values({name: value for name, value in given.items() if not value.isupper()})  # SEED is no value
        if words[0] == "prepare":
            flags = [name for name in values if not name.startswith("setting_") and name != "command"]
            check_flags(load_adapter(given.get("dataset_type", "demo")), flags)


def test_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            build_parser(command).parse_args([command, "--help"])
    known = re.findall(r"--(\w+)", capsys.readouterr().out + fl_evaluate.build_parser().format_help())
    named = {flag for page in MANUAL for flag in FLAG.findall(page.read_text())}
    assert named <= set(known)


@pages
def test_files_exist(page: Path) -> None:
    links = {link for link in LINK.findall(page.read_text()) if "://" not in link}
    missing = {link for link in links if not (page.parent / link).exists()}
    missing |= {name for name in NAMED_FILE.findall(page.read_text()) if not (ROOT / name).exists()}
    assert not missing


def test_table_of_encoders() -> None:
    shown = (ROOT / "README.md").read_text().partition("<!-- encoders -->\n")[2].partition("\n<!-- /encoders -->")[0]
    assert shown == encoder_table(), "README.md lacks the table that `python main.py encoders` prints"


@pytest.mark.slow
def test_readme_from_top_to_bottom(trained: Path) -> None:
    """Each command of README.md in order, with a small network, and its lines of Python."""
    Path("workspace/runs/htsat_demo").rename("workspace/runs/demo")  # as `make demo` names it
    Path("docs").mkdir()
    shutil.copy(ROOT / "docs/demo.ogg", "docs")
    Path("my_recordings").mkdir()
    rows = ["filename,label"]
    for clip in range(12):
        name, label = f"{clip}.wav", ("frog", "owl")[clip % 2]
        tone = np.sin(np.arange(8000) * (0.05, 0.3)[clip % 2] * (1 + clip / 100))
        soundfile.write(f"my_recordings/{name}", 0.3 * tone, 32000)
        rows.append(f"{name},{label}")
    Path("labels.csv").write_text("\n".join(rows))
    ran = []
    for script, words in calls(ROOT / "README.md"):
        assert script == "main"
        call(*words, *([*SMALL_FLAGS, "--max_epoch", "1"] if words[0] == "train" else []))
        ran.append(words[0])
    assert ran == ["predict", "prepare", "train", "test"]
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    values: dict[str, Any] = {}
    exec(lines, values)
    assert len(values["tagged"].top(3)) == 3
