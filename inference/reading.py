"""Sounds read ahead of the network: threads open, decode, resample and cut them while it computes."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Generic, Optional, TypeVar

Sound = TypeVar("Sound")
Item = TypeVar("Item")


def read_ahead(
    sounds: Iterable[Sound], read: Callable[[Sound], Generator[Item, None, None]], *, readers: int, most: int
) -> Generator[tuple[Sound, Iterator[Item]], None, None]:
    """Each sound, in order, with the items that `read` yields for it, such as windows.

    readers: threads that call `read`, each for one sound at a time; 0: it is called where its items are taken. most:
    so many sounds are taken from `sounds` ahead, and about so many items are held for each reader, whatever the number
    of sounds and their length. An error of `read` is raised where the items are taken, behind the last one. What is
    left of a sound when the next one is asked for is not read. Closing the generator ends the threads at once: after
    the item that each is at.
    """
    if readers == 0:
        for sound in sounds:
            with closing(read(sound)) as items:
                yield sound, items
        return
    reading = _Reading[Sound, Item](readers, most)
    following = iter(sounds)
    try:
        while True:
            for sound in islice(following, most - len(reading.shelves)):
                reading.begin(_Shelf(sound, read(sound)))
            if not reading.shelves:
                return
            shelf = reading.shelves[0]
            yield shelf.sound, reading.take(shelf)
            reading.leave(shelf)
    finally:
        reading.end()


class _Shelf(Generic[Sound, Item]):
    """What was read of one sound and not taken yet."""

    def __init__(self, sound: Sound, unread: Generator[Item, None, None]) -> None:
        self.sound, self.unread = sound, unread
        self.items = deque[Item]()
        self.complete, self.left = False, False  # no item follows; nobody takes any
        self.error: Optional[BaseException] = None


class _Reading(Generic[Sound, Item]):
    """The threads of read_ahead, and what they share; `changed` guards it."""

    def __init__(self, readers: int, most: int) -> None:
        self.most, self.held, self.ended = most, 0, False
        self.shelves = deque[_Shelf[Sound, Item]]()  # in order; the first is the one that is taken from
        self.unread = deque[_Shelf[Sound, Item]]()
        self.changed = threading.Condition()
        # Daemons: a caller that drops the results half-way, and keeps the iterator, must not keep Python from ending.
        self.threads = [threading.Thread(target=self._work, daemon=True, name="reader") for _ in range(readers)]
        for thread in self.threads:
            thread.start()

    def begin(self, shelf: "_Shelf[Sound, Item]") -> None:
        with self.changed:
            self.shelves.append(shelf)
            self.unread.append(shelf)
            self.changed.notify_all()

    def take(self, shelf: "_Shelf[Sound, Item]") -> Iterator[Item]:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: shelf.items or shelf.complete)
                if not shelf.items:
                    break
                item = shelf.items.popleft()
                self.held -= 1
                self.changed.notify_all()
            yield item
        if shelf.error is not None:
            raise shelf.error

    def leave(self, shelf: "_Shelf[Sound, Item]") -> None:
        with self.changed:
            shelf.left = True
            self.held -= len(shelf.items)
            self.shelves.popleft()
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ended or self.unread)
                if self.ended:
                    return
                shelf = self.unread.popleft()
                while not self._may_begin(shelf):
                    self.changed.wait()
            try:
                with closing(shelf.unread):
                    for item in shelf.unread:
                        if not self._put(shelf, item):
                            break
            except BaseException as error:  # raised in the thread that takes the items
                shelf.error = error
            with self.changed:
                shelf.complete = True
                self.changed.notify_all()

    def _may_begin(self, shelf: "_Shelf[Sound, Item]") -> bool:
        """A sound whose turn it is never waits for what is held of those behind it."""
        return self.ended or shelf.left or self.held < self.most or shelf is self.shelves[0]

    def _put(self, shelf: "_Shelf[Sound, Item]", item: Item) -> bool:
        """Wait for room; returns False where no more is wanted."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or shelf.left or len(shelf.items) < self.most)
            if self.ended or shelf.left:
                return False
            shelf.items.append(item)
            self.held += 1
            self.changed.notify_all()
            return True
