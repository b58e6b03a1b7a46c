"""What several tests share: a tiny network, and the command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
