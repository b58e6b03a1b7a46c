"""Data and a trained run that several tests share."""

import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

# Before torch is imported. The tests run on all cores side by side (make test), each on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No bfloat16, whatever the CPU: what is compared with float32 is computed in it.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"

import pytest
from filelock import FileLock

import main
from prepare import demo
from settings import resolve
from tests.helpers import LEAN_FLAGS

STORE = Path("workspace", "data", "demo", "demo.h5")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the workers of pytest-xdist end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all processes of pytest-xdist."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not folder.exists():
            partial = shared / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


def link_store(data: Path, folder: Path) -> None:
    """Give the demo's store a second place, workspace/data/demo/demo.h5 of a folder."""
    (folder / STORE).parent.mkdir(parents=True)
    (folder / STORE).symlink_to(data / STORE)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with workspace/data/demo/demo.h5, which no test changes: 14 clips train, 3 validate, 3 test."""

    def make(folder: Path) -> None:
        demo.prepare(resolve({"dataset_path": str((folder / STORE).parent), "random_seed": 1}), clips=20)

    return made_once(tmp_path_factory, "demo_data", make)


@pytest.fixture(scope="session")
def demo_workspace(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """A folder with the data of demo_data, for runs under names of their own (exp_name)."""
    folder = tmp_path_factory.mktemp("demo")
    link_store(demo_data, folder)
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """A folder that no test changes, with the run workspace/runs/htsat_demo: two epochs on the demo, sizes of LEAN.

    train.log has what `train` printed.
    """

    def make(folder: Path) -> None:
        link_store(demo_data, folder)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["main.py", "train", "--max_epoch", "2", *LEAN_FLAGS])
            assert main.main() == 0
        (folder / "train.log").write_text(printed.getvalue())

    return made_once(tmp_path_factory, "trained_run", make)


@pytest.fixture
def trained(trained_run: Path, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with the demo's data and a copy of trained_run's run to write to."""
    link_store(demo_data, tmp_path)
    shutil.copytree(trained_run / "workspace" / "runs", tmp_path / "workspace" / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path
