"""The house: imports point down only, and siblings do not know each other (docs/house.md)."""

import ast
import re
from pathlib import Path

import pytest

from prepare.adapters import ADAPTERS
from tests.helpers import ROOT

FLOORS = [  # from the top: a file imports its own package and the floors below
    {"main", "fl_evaluate"},
    {"commands"},
    {"runs"},
    {"sed_model"},
    {"training", "inference", "data_generator"},
    {"model", "evaluation", "prepare"},
    {"data"},
    {"settings"},
    {"utils"},
    {"config"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(path for room in FLOOR for path in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py")])


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of each import of this project, anywhere in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module or "", alias.name) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in FLOOR]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module, name in imports(path):
        other = module.split(".")[0]
        assert other == room or FLOOR[other] > FLOOR[room], f"{path.name} imports {module} {name}"
        assert room != "commands" or other != room, f"a command imports a command: {module}"
        assert not any(part.startswith("_") for part in (*module.split("."), name)), f"{module} {name} is private"


@pytest.mark.parametrize("path", sorted(ROOT.glob("prepare/*.py")), ids=lambda path: path.stem)
def test_no_adapter_is_imported_in_prepare(path: Path) -> None:
    """An adapter is a file that the table ADAPTERS names; the table itself imports the one that is asked for."""
    named = {module for pair in imports(path) for module in (pair[0], ".".join(pair))}
    assert not named & {f"prepare.{adapter}" for adapter in ADAPTERS.values()}


def imported_files(path: Path) -> set[Path]:
    """The project's files that a file imports, directly and indirectly, in functions too; files of __init__ with them.

    An encoder is imported by the name in its settings, and does not count.
    """
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        for module, name in imports(waiting.pop()):
            for place in (ROOT.joinpath(*module.split(".")), ROOT.joinpath(*module.split("."), name)):
                files = {place.with_suffix(".py"), *(folder / "__init__.py" for folder in (place, *place.parents))}
                new = {file for file in files if file.is_file() and file.is_relative_to(ROOT)} - found
                found |= new
                waiting += new
    with_code = (file for file in found if len(ast.parse(file.read_text()).body) > 1)  # more than a docstring
    return {file.relative_to(ROOT) for file in with_code}


def test_training_imports_neither_tests_nor_event_metrics() -> None:
    found = imported_files(ROOT / "commands" / "train.py")
    assert len(found) <= 31, sorted(map(str, found))
    assert {path for path in found if path.parts[0] == "evaluation"} <= {Path("evaluation/metrics.py")}
    assert not {path for path in found if path.parts[0] == "inference" or path.stem in ("testing", "test_plan")}


def test_every_module_has_a_room() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} <= FLOOR.keys()


def test_only_the_registry_imports_encoders() -> None:
    """By name; elsewhere a network is what its contract says. An encoder never imports another."""
    for path in FILES:
        named = {module for pair in imports(path) for module in (pair[0], ".".join(pair))}
        assert not any(module.startswith("model.encoders.") for module in named), path


def test_every_room_is_installed() -> None:
    """`pip install -e .` puts them on the path of Python in every folder."""
    text = (ROOT / "pyproject.toml").read_text()
    found = (re.findall(rf"^{kind} = (\[.*?\])", text, re.MULTILINE | re.DOTALL) for kind in ("py-modules", "packages"))
    modules, packages = (ast.literal_eval(each[0]) for each in found)
    assert set(modules) == {path.stem for path in ROOT.glob("*.py")}
    folders = {file.parent.relative_to(ROOT) for file in FILES if file.parent != ROOT}
    assert set(packages) == {".".join(folder.parts) for folder in folders}
