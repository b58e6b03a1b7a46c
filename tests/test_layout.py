"""The house: imports point down only, and siblings do not know each other (docs/house.md)."""

import ast
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


def test_every_module_has_a_room() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} <= FLOOR.keys()


def test_only_the_registry_imports_encoders() -> None:
    """By name; elsewhere a network is what its contract says. An encoder never imports another."""
    for path in FILES:
        named = {module for pair in imports(path) for module in (pair[0], ".".join(pair))}
        assert not any(module.startswith("model.encoders.") for module in named), path


def reached(module: str) -> set[str]:
    """The files with code that a module imports, directly and indirectly, anywhere in them."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for pair in imports(ROOT / f"{waiting.pop().replace('.', '/')}.py"):
            for name in (pair[0], ".".join(pair), pair[0].partition(".")[0] + ".__init__"):
                path = ROOT / f"{name.replace('.', '/')}.py"
                if path.is_file() and name not in found and len(ast.parse(path.read_text()).body) > 1:
                    found.add(name)
                    waiting.append(name)
    return found - {module}


def test_a_training_imports_little() -> None:
    """And nothing of testing a run, of event metrics or of inference."""
    files = reached("commands.train")
    assert len(files) <= 30, sorted(files)
    assert {name for name in files if name.startswith("evaluation.")} == {"evaluation.metrics"}
    assert not {name for name in files if name.startswith("inference.") or "test" in name}
