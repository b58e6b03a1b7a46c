"""A line every ten seconds on standard error: the progress of a long command whose output is no terminal."""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

EVERY_SECONDS = 10.0
Item = TypeVar("Item")


class ProgressLines:
    """Prints what it is given, at most every ten seconds and not before the first ten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.last = clock, clock()

    def show(self, text: str) -> None:
        if self.clock() - self.last >= EVERY_SECONDS:
            self.last = self.clock()
            print(text, file=sys.stderr, flush=True)


def with_progress(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, with a line every ten seconds: `120 of 2000 files are read`."""
    lines = ProgressLines()
    for number, item in enumerate(items):
        lines.show(f"{number} of {len(items)} {what}")
        yield item
