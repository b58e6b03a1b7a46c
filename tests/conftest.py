"""What several tests share: tiny data sets, a tiny network, and the command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prepare.demo import prepare_demo

ROOT = Path(__file__).parents[1]
TINY = {  # a network of one block a stage
    "htsat_dim": "16",
    "htsat_depth": "1,1,1,1",
    "htsat_num_head": "1,2,4,8",
    "batch_size": "4",
    "accelerator": "cpu",
}
TINY_FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", value)]


def run_python(*words: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python words...` in `cwd`, where the workspace is; words[0] is a script of the repository."""
    script, *rest = map(str, words)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def demo_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with workspace/data/demo/demo.h5: 20 clips, of which 14 train, 3 validation, 3 test."""
    folder = tmp_path_factory.mktemp("demo")
    prepare_demo(folder / "workspace" / "data" / "demo" / "demo.h5", sample_rate=32000, seed=1, clips=20)
    return folder
