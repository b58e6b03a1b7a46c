"""Sounds read ahead by threads: order, bounds, errors, and that no thread outlives its reading."""

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from inference import Tagged
from inference.reading import read_ahead
from inference.tagger import BATCHES_AHEAD
from settings import UserError
from tests.levels import RATE, levels, levels_tagger

SECONDS = 30.0  # after which a test fails in place of waiting without end


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


class Sounds:
    """Sound n has n % 7 items, of which the number ever begun and read is counted."""

    def __init__(self, fail: int = -1) -> None:
        self.fail, self.changed = fail, threading.Condition()
        self.begun = self.read = self.closed = 0

    def __call__(self, sound: int) -> Generator[tuple[int, int], None, None]:
        with self.changed:
            self.begun += 1
        try:
            for number in range(sound % 7):
                with self.changed:
                    self.read += 1
                    self.changed.notify_all()
                yield sound, number
            if sound == self.fail:
                raise ValueError(sound)
        finally:
            with self.changed:
                self.closed += 1

    def wait_until_read(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.read >= count, SECONDS)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_order_and_end(count: int) -> None:
    sounds = Sounds()
    found = [(sound, list(items)) for sound, items in read_ahead(range(50), sounds, readers=count, most=4)]
    assert found == [(n, [(n, k) for k in range(n % 7)]) for n in range(50)]
    assert (sounds.begun, sounds.closed) == (50, 50)
    assert not readers()


def test_readers_run_ahead_and_no_further() -> None:
    """Of endless sounds, and of endlessly many."""
    sounds, taken = Sounds(), [0]

    def many() -> Iterator[int]:
        for taken[0] in range(10**9):
            yield 6

    with closing(read_ahead(many(), sounds, readers=2, most=10)) as reading:
        _, items = next(reading)
        next(items)
        sounds.wait_until_read(11)  # the one taken, and ten that are held
        assert taken[0] <= 10
        list(items)
        for _, items in islice(reading, 100):
            list(items)
    assert sounds.read <= 6 * 102 + 3 * 10
    assert not readers()
    assert sounds.closed == sounds.begun


def test_a_sound_whose_turn_it_is_waits_for_none_behind_it() -> None:
    """The one reader is not held up by items that nobody takes yet, of a sound that was left."""
    sounds = Sounds()
    with closing(read_ahead([6, 6, 6, 5], sounds, readers=1, most=2)) as reading:
        for _, items in islice(reading, 3):
            next(items)  # and the rest is left
        assert [len(list(items)) for _, items in reading] == [5]
    assert sounds.closed == 4
    assert not readers()


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_is_raised_behind_the_items_of_its_sound(count: int) -> None:
    found: list[Any] = []
    for sound, items in read_ahead(range(9), Sounds(fail=5), readers=count, most=3):
        try:
            for item in items:
                found.append(item)
        except ValueError:
            found.append(f"error of {sound}")
    at = found.index("error of 5")
    assert found[at - 1] == (5, 4)
    assert found[at + 1] == (6, 0)
    assert found[-1] == (8, 0)
    assert not readers()


def test_an_interruption_ends_the_threads() -> None:
    def interrupted() -> None:
        with closing(read_ahead(range(1000), Sounds(), readers=3, most=4)) as reading:
            for sound, items in reading:
                list(items)
                if sound == 40:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not readers()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_results_that_are_dropped_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """Files of several lengths, in order; one is bad. A caller that stops leaves no thread and no open file.

    depth: batches that the device has begun before a result is taken, as on a GPU.
    """
    monkeypatch.setitem(BATCHES_AHEAD, "cpu", depth)
    for number in range(12):
        soundfile.write(tmp_path / f"{number:02d}.wav", levels(1 + 7.0 * (number % 4), seed=number), RATE)
    (tmp_path / "05.wav").write_text("no sound")
    paths = sorted(tmp_path.glob("*.wav"))
    tagger = levels_tagger()
    found = list(tagger.tag_files(paths))
    assert [path for path, _ in found] == paths
    assert [path for path, result in found if isinstance(result, UserError)] == [tmp_path / "05.wav"]
    for path, result in found:
        if isinstance(result, Tagged):
            np.testing.assert_array_equal(result.framewise, tagger.tag(soundfile.read(path)[0]).framewise)
    before = set(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else set()
    with closing(tagger.tag_files(paths)) as tagging:
        next(tagging)
        assert readers()
    assert not readers()
    if before:
        assert len(set(Path("/proc/self/fd").iterdir())) <= len(before)
