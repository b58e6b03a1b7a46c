"""A file is written whole or not at all."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import h5py
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from data.files import whole_file, write_text
from evaluation.plots import save_png
from model.checkpoint import save_safetensors, write_checkpoint
from settings import UserError

LARGE = np.random.default_rng(0).random(100_000).astype(np.float32)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that is there already, in a folder of its own."""
    path = tmp_path / "folder" / "a.txt"
    write_text(path, "old")
    return path


def names(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir())


def test_the_name_changes_at_the_end(old: Path) -> None:
    with whole_file(old) as partial:
        assert (partial.parent, partial.suffix, partial.stat().st_size) == (old.parent, ".partial", 0)
        partial.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    assert names(old) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("3"), KeyboardInterrupt(), OSError(errno.ENOENT, "a clip"), OSError("?")])
def test_an_error_leaves_the_old_file(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, whole_file(old) as partial:
        partial.write_text("half of it")
        raise error
    assert raised.value is error
    assert old.read_text() == "old"
    assert names(old) == ["a.txt"]


def test_what_an_error_has_to_keep(old: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(old, keep=True) as partial:
        partial.write_text("hours of it")
        raise KeyboardInterrupt
    assert (old.read_text(), Path(f"{old}.partial").read_text()) == ("old", "hours of it")
    with whole_file(old, keep=True) as partial:
        assert partial.read_text() == ""
    assert names(old) == ["a.txt"]


def test_another_name_of_the_old_file_stays(old: Path) -> None:
    os.link(old, old.with_name("link"))
    write_text(old, "new")
    assert old.with_name("link").read_text() == "old"
    assert names(old) == ["a.txt", "link"]


def test_the_longest_name(tmp_path: Path) -> None:
    write_text(tmp_path / ("ä" * 127), "x")
    with pytest.raises(UserError, match="ä"):
        write_text(tmp_path / ("ä" * 128), "x")
    assert len(names(tmp_path / "a")) == 1


def write_slowly(path: Path, text: str, both: object) -> None:
    with whole_file(path) as partial:
        partial.write_text(text)
        both.wait(60)  # type: ignore[attr-defined]


def test_two_processes_at_once(old: Path) -> None:
    context = get_context("fork")
    both = context.Barrier(2)
    processes = [context.Process(target=write_slowly, args=(old, text * 9, both)) for text in "xy"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert old.read_text() in ("x" * 9, "y" * 9)
    assert names(old) == ["a.txt"]


@pytest.fixture
def little_room() -> Iterator[None]:
    """Files of this process may have 5,000 bytes: each library that writes meets an error like that of a full disk."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    matplotlib.get_cachedir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, allowed[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


def write_hdf5(path: Path) -> None:
    with whole_file(path) as partial, h5py.File(partial, "w") as file:
        file["x"] = LARGE


def write_npz(path: Path) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, x=LARGE)


def draw(path: Path) -> None:
    figure = Figure()
    figure.subplots().imshow(LARGE.reshape(1000, 100))
    save_png(figure, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 10_000),
        write_hdf5,
        write_npz,
        draw,
        lambda path: write_checkpoint(path, {"x": torch.from_numpy(LARGE)}),
        lambda path: save_safetensors(path, {"x": torch.from_numpy(LARGE)}, settings={}, labels=[], frontend={}),
    ],
    ids=["text", "hdf5", "npz", "png", "torch", "safetensors"],
)
def test_no_room(old: Path, write: Callable[[Path], None], little_room: None) -> None:
    with pytest.raises(UserError, match=f"{old} cannot be written: {os.strerror(errno.EFBIG)}"):
        write(old)
    assert old.read_text() == "old"
    assert names(old) == ["a.txt"]


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"])
@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "pathlib.Path.open"])
def test_what_the_file_system_refuses(old: Path, code: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, code)

    def refuse(*_: object) -> None:
        raise OSError(number, "")

    monkeypatch.setattr(call, refuse)
    with pytest.raises(UserError, match=f"{old} cannot be written: {os.strerror(number)}"):
        write_text(old, "new")
    monkeypatch.undo()
    assert old.read_text() == "old"
    assert names(old) == ["a.txt"]


@pytest.mark.parametrize("place", ["folder", "folder/a.txt/b.txt"])
def test_what_is_in_the_way(old: Path, place: str) -> None:
    path = old.parent.parent / place
    with pytest.raises(UserError, match=str(path)):
        write_text(path, "new")
    assert names(old) == ["a.txt"]
