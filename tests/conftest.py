"""Data that several tests share."""

import os
from pathlib import Path

# Before torch is imported: the tests run on all cores side by side (make test), each on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from prepare.demo import prepare_demo


@pytest.fixture(scope="session")
def demo_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with workspace/data/demo/demo.h5: 20 clips, of which 14 train, 3 validation, 3 test."""
    folder = tmp_path_factory.mktemp("demo")
    prepare_demo(folder / "workspace" / "data" / "demo" / "demo.h5", sample_rate=32000, seed=1, clips=20)
    return folder
