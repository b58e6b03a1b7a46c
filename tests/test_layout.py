"""The house: imports point down only, siblings do not know each other, utils is a leaf."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the top; a room may import from the floors below it, and from itself
    {"main", "fl_evaluate", "create_indexes", "hear"},
    {"commands"},
    {"streaming", "frame_training"},
    {"inference", "sed_model", "data_generator"},
    {"clip_dataset"},
    {"samplers", "pseudo_labels"},
    {"model", "prepare", "evaluation"},
    {"settings", "augment", "augment_features", "windows", "mean_teacher"},
    {"utils", "frame_targets"},
    {"config"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# fl_evaluate is a command line of its own, with main's parser.
ALLOWED = {("fl_evaluate", "main")}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found & FLOOR.keys()


FILES = sorted(path for room in FLOOR for path in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported_rooms(path) - {room}:
        assert FLOOR[other] > FLOOR[room] or (room, other) in ALLOWED, f"{path.name} imports {other}"


def test_every_module_has_a_room() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules <= FLOOR.keys()


def test_files_are_short() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
