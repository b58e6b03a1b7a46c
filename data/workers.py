"""A process that works for another one ends with it."""

import os
import threading
import time

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
