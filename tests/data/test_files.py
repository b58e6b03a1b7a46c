"""A file is written whole or not at all."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from data.files import (
    check_writable,
    fitting_name,
    read_json,
    sole_writer,
    whole_file,
    whole_hdf5,
    write_each,
    write_text,
)
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
    """In rows, of which the last do not fit: HDF5 must be able to close it all the same."""
    with whole_hdf5(path) as (file, _):
        rows = file.create_dataset("x", (0, 100), "f4", maxshape=(None, 100), chunks=(1, 100))
        for number in range(100):
            rows.resize(number + 1, axis=0)
            rows[number] = LARGE[:100]
        file.attrs["labels"] = ["a"] * 50


def write_checked_hdf5(path: Path) -> None:
    with whole_hdf5(path) as (file, check):
        file["x"] = LARGE
        check()
        raise AssertionError("the disk has refused this")


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
        write_checked_hdf5,
        write_npz,
        draw,
        lambda path: write_checkpoint(path, {"x": torch.from_numpy(LARGE)}),
        lambda path: save_safetensors(path, {"x": torch.from_numpy(LARGE)}, settings={}, labels=[], frontend={}),
    ],
    ids=["text", "hdf5", "hdf5 checked", "npz", "png", "torch", "safetensors"],
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


def test_the_mode_is_that_of_any_new_file(old: Path) -> None:
    with whole_file(old) as partial:
        partial.chmod(0o600)  # as safetensors leaves it
    (old.parent / "b.txt").write_text("")
    assert old.stat().st_mode == (old.parent / "b.txt").stat().st_mode


@pytest.mark.parametrize("place", ["folder", "folder/a.txt/b.txt", "new/" + "x" * 300])
def test_a_place_is_tried_before_the_work(old: Path, place: str) -> None:
    root = old.parent.parent
    check_writable("--output a", root / "new" / "b.txt")
    assert not list((root / "new").iterdir())
    with pytest.raises(UserError, match=r"^--output a"):
        check_writable("--output a", root / place)
    assert names(old) == ["a.txt"]


def test_a_full_disk_is_found_before_the_work(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(UserError, match=r"^--output a"):
        check_writable("--output a", old)
    assert (old.read_text(), names(old)) == ("old", ["a.txt"])


def test_what_can_be_written_is(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise UserError(f"not {path.name}")

    writes = {tmp_path / name: lambda path: write_text(path, "x") for name in "ac"}
    assert write_each(writes) == list(writes)
    with pytest.raises(UserError, match=r"not b.*c"):
        write_each({tmp_path / "b": refuse, **writes})


@pytest.mark.parametrize("text", ["", "[1, 2", "{}"])
def test_a_damaged_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json", list)


def test_a_name_that_fits(tmp_path: Path) -> None:
    long = ["ä" * 200 + f"{number}.wav.txt" for number in range(2)]
    fitted = {fitting_name(tmp_path, name) for name in long}
    assert len(fitted) == 2
    for name in fitted:
        assert name.endswith(".txt")
        write_text(tmp_path / name, "x")
    assert fitting_name(tmp_path, "a.txt") == "a.txt"


def write_alone(path: Path, ready: object, go: object) -> None:
    with sole_writer(path):
        ready.set()  # type: ignore[attr-defined]
        go.wait(60)  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", ["goes", "is killed"])
def test_one_process_writes(old: Path, end: str) -> None:
    """The other one says which does. One that is killed leaves no lock, and its temporary files are removed."""
    context = get_context("fork")
    ready, go = context.Event(), context.Event()
    writer = context.Process(target=write_alone, args=(old, ready, go))
    writer.start()
    assert ready.wait(60)
    left, foreign = old.with_name("a.txt.0123abcd.partial"), old.with_name("b.txt.0123abcd.partial")
    for path in (left, foreign):
        path.touch()
    with pytest.raises(UserError, match=f"{old}.*{writer.pid}"), sole_writer(old):
        raise AssertionError("two write")
    assert left.exists()
    if end == "goes":
        go.set()
    else:
        writer.kill()
    writer.join()
    with sole_writer(old):
        assert not left.exists()
    assert names(old) == ["a.txt", foreign.name]
    with sole_writer(old.parent):
        assert names(old) == ["a.txt"]
