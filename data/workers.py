"""How a process ends: with its parent, and after SIGTERM as after Ctrl-C."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Optional

LOOK_SECONDS = 1.0
CHILD = "HTSAT_ENDS_WITH_PARENT"  # variable of the environment that a command sets for a command that it starts


def works_for_another() -> bool:
    """Whether this process was started for a part of a run: by Lightning, torchrun or cross_validate."""
    return bool(os.environ.keys() & {"LOCAL_RANK", CHILD})


def end_with_parent() -> None:
    """End this process, without a word, when the one that started it has ended, however it did.

    As the initializer of a pool as well: workers of a pool whose process was killed would wait for work without end.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


class Terminated(KeyboardInterrupt):
    """SIGTERM, which `kill`, `timeout` and batch systems send: a command ends as after Ctrl-C."""


def raise_at_sigterm() -> None:
    """From now on SIGTERM raises Terminated in this process, once. Processes that it forks end as without this."""
    own, ending = os.getpid(), threading.Event()

    def end(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not ending.is_set():
            ending.set()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a DataLoader's raises an error for each worker that ends
            raise Terminated

    signal.signal(signal.SIGTERM, end)
