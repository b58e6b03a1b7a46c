"""A process that works for another one ends with it."""

import subprocess
import sys

from tests.helpers import ROOT

WORKER = "import time; from data.workers import end_with_parent; end_with_parent(); print('begun', flush=True)"
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1] + "; time.sleep(600)"])
time.sleep(600)
"""


def test_a_worker_ends_with_a_parent_that_is_killed() -> None:
    """The worker has the other end of the pipe, which is closed when it ends."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, WORKER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "begun\n"
    parent.kill()
    assert parent.communicate(timeout=60)[0] == ""
