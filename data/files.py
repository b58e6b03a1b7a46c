"""What reading and writing files share: a file is written whole or not at all, by one process at a time.

It has another name first, which it changes for its own at the end; it is read only if memory holds it.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import resource
import secrets
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TextIO

from settings import UserError

if TYPE_CHECKING:
    import h5py

# Endings of audio files that libsndfile reads.
AUDIO_SUFFIXES = (
    ".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64", ".aifc", ".oga", ".wave", ".bwf",
    ".rf64", ".snd", ".mp2", ".mpga",
)  # fmt: skip

REMEDIES = {
    errno.ENOSPC: "make room on this disk, or write to another",
    errno.EDQUOT: "make room on this disk, or write to another",
    errno.EFBIG: "write to a disk that takes larger files",
    errno.EROFS: "write to another folder",
    errno.EACCES: "write to another folder, or change the permissions",
    errno.EPERM: "write to another folder, or change the permissions",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "write to a folder that exists",
    errno.ENOTDIR: "a part of the path is a file: write to another folder",
    errno.EEXIST: "a part of the path is a file: write to another folder",
    errno.EISDIR: "give the name of a file",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no error of reading has these numbers
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # limits of a container
KEPT_CHARACTERS = 40  # of the name, in the temporary one: the longest name that is allowed stays so
# As whole_file names it, and inside of it torch.hub.
PARTIAL = re.compile(r"(.+?)\.[0-9a-f]{8}\.partial(\.[0-9a-f]{32}\.partial)?")
LONGEST_NAME = 255  # bytes, where the file system does not say it
PATIENCE = 60.0  # seconds in which a server sends nothing, until a download is given up


@contextmanager
def whole_file(path: str | Path, *, keep: bool = False) -> Iterator[Path]:
    """The path of a new, empty file to write into; when the `with` block ends, that file replaces `path`.

    Its folder is that of `path`, which is made, and its name ends in .partial and is no other process's. After an
    error or Ctrl-C the file is removed, and an older `path` stays as it was; a second name of the older file (a hard
    link) stays in any case. keep: after an error, what was written stays as PATH.partial. Raises UserError where the
    disk is full or the folder cannot be written to; other errors of the block pass through.
    """
    path = Path(path)
    middle = "" if keep else f".{secrets.token_hex(4)}"
    partial = path.with_name(f"{path.name if keep else path.name[:KEPT_CHARACTERS]}{middle}.partial")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            partial.open("wb").close()
            mode = stat.S_IMODE(partial.stat().st_mode)
        with explained(path, FULL):
            yield partial
        with explained(path):
            if stat.S_IMODE(partial.stat().st_mode) != mode:  # safetensors makes a file of its own, for its owner alone
                partial.chmod(mode)
            _sync(partial)
            os.replace(partial, path)
            with suppress(OSError):  # some network file systems, and Windows, cannot sync a folder
                _sync(path.parent)
    except BaseException:
        if not keep:
            with suppress(OSError):
                partial.unlink()
        raise


@contextmanager
def whole_hdf5(path: str | Path) -> "Iterator[tuple[h5py.File, Callable[[], None]]]":
    """An empty HDF5 file, which replaces `path` when the `with` block ends, as `whole_file`, and a function.

    The function raises the error of a write that the disk has refused: as HDF5 ends the process with a segmentation
    fault where it cannot write what is left, it never meets one. Without that call the end of the block raises it.
    """
    import h5py  # here: most of what writes files writes no HDF5

    with whole_file(path) as partial, _Sink(partial, "r+") as sink:
        with h5py.File(sink, "w") as file:
            try:
                yield file, sink.check
            except Exception:
                sink.check()  # which it may come from: what was not written cannot be read back
                raise
        sink.check()


class _Sink(io.FileIO):
    """A file whose writes all seem to succeed; the first error is kept, and nothing is written after it."""

    error: Optional[OSError] = None

    def write(self, content: Any) -> int:
        view, done = memoryview(content), 0
        try:
            while self.error is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: Optional[int] = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def write_text(path: str | Path, text: str) -> None:
    """Write a file, whole or not at all, as UTF-8. Raises UserError as `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


class _TrialError(Exception):
    """Ends the writing of a file that was only tried."""


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, whole or not at all. Raises UserError as `whole_file`, and ValueError for numbers that are none."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_writable(said: str, *paths: str | Path, size: int = 0) -> None:
    """Make the folders of files that are to be written, and write something beside each, which is removed.

    size: bytes of each file, as far as they are known. Raises UserError that begins with `said`, the setting or flag
    with its value, where one could not be written.
    """
    for path in paths:
        try:
            with suppress(_TrialError), whole_file(path) as partial:
                partial.write_bytes(b"\0")
                _sync(partial)
                free = shutil.disk_usage(partial.parent).free
                if free < size:
                    raise UserError(
                        f"{path} needs {size / 2**20:.0f} MiB, and its disk has {free / 2**20:.0f}: make room."
                    )
                raise _TrialError
        except UserError as error:
            raise UserError(f"{said}: {error}") from None


def write_each(writes: Mapping[Path, Callable[[Path], object]]) -> list[Path]:
    """Call write(path) for each path. Where one cannot be written, the others are; returns the paths.

    Raises UserError, with what is lacking and what was written, after all of them.
    """
    refused: dict[Path, str] = {}
    for path, write in writes.items():
        try:
            write(path)
        except UserError as error:
            refused[path] = str(error)
    if refused:
        written = ", ".join(str(path) for path in writes if path not in refused)
        raise UserError(" ".join(refused.values()) + (f" Written: {written}." if written else ""))
    return list(writes)


def read_json(path: str | Path, kind: type) -> Any:
    """The content of a JSON file, a list or dict as `kind` says. Raises UserError for anything else."""
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON, or it is cut off: {error}. Restore or remove it.") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}, not a {kind.__name__}.")
    return content


def fitting_name(folder: Path, name: str) -> str:
    """`name`, or where it is too long for a file in `folder`: its beginning, 8 hexadecimal digits of it, its ending."""
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        longest = LONGEST_NAME
    if len(os.fsencode(name)) <= longest:
        return name
    ending = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}{Path(name).suffix[:16]}"
    return os.fsencode(name)[: longest - len(os.fsencode(ending))].decode(errors="ignore") + ending


@contextmanager
def sole_writer(path: Path, *others: Path, wait: bool = False) -> Iterator[None]:
    """While the block runs, no other process is in such a block for `path`, a file or folder.

    PATH.lock says who writes; the operating system ends its lock with the process, however that ends. What a killed
    process has left of these files and folders under temporary names is removed. wait: for another process that writes,
    until it ends. Raises UserError, with what the other process says of itself, where one writes, and where the file
    cannot be made.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(fitting_name(path.parent, f"{path.name}.lock"))
        file = _locked(lock, path, wait)
    with file:
        for each in (path, *others):
            _remove_partials(each)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def _locked(lock: Path, path: Path, wait: bool) -> TextIO:
    """The open lock file. Record locks, not flock's: processes that are forked do not inherit them."""
    while True:
        file = lock.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            file.seek(0)
            writer = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{path} is being written by {writer}. Wait until it ends, or end it.") from None
        except OSError:
            pass  # a file system without locks
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break
        file.close()  # the other process has ended and removed it meanwhile
    file.truncate(0)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {platform.node()} since {started} ({shlex.join(sys.argv[:2])})\n")
    file.flush()
    return file


def _remove_partials(path: Path) -> None:
    """Remove files under temporary names: those of a file, or all in a folder."""
    inside = path.is_dir()
    for left in list(path.rglob("*.partial") if inside else path.parent.glob("*.partial")):
        match = PARTIAL.fullmatch(left.name)
        if match and (inside or match[1] == path.name) and len(match[1]) < KEPT_CHARACTERS:
            left.unlink(missing_ok=True)


def download(address: str, path: Path, *, sha256: Optional[str] = None) -> None:
    """Fetch a file, whole or not at all, where no other process has done so meanwhile; a process that does is awaited.

    address: of http. sha256: hexadecimal, where it is known. Raises UserError where the address does not answer, or
    with a page in place of a file, where the connection ends early, and as `whole_file`.
    """
    from http.client import HTTPException  # these here: most of what writes files downloads none

    from torch.hub import download_url_to_file

    before = socket.getdefaulttimeout()
    with sole_writer(path, wait=True):
        if path.is_file():
            return
        try:
            socket.setdefaulttimeout(PATIENCE)
            with whole_file(path) as partial:
                size = _announced_size(address)
                if size and shutil.disk_usage(partial.parent).free < size:
                    raise OSError(errno.ENOSPC, f"{size / 2**20:.0f} MiB are needed")
                print(f"Downloading {address} to {path}", file=sys.stderr)
                download_url_to_file(address, str(partial), hash_prefix=sha256, progress=sys.stderr.isatty())
                found = partial.stat().st_size
                if found != (size or found):
                    raise OSError(f"{found} of {size} bytes came, then the connection ended")
        except (OSError, HTTPException, RuntimeError) as error:  # of the network, or of torch.hub for another SHA-256
            raise UserError(f"{address} did not give the file: {str(error).strip('<>')}.") from error
        finally:
            socket.setdefaulttimeout(before)


def _announced_size(address: str) -> Optional[int]:
    """Bytes of a file, as its server declares them; torch.hub does not compare them. Raises UserError for a page."""
    from urllib.request import Request, urlopen

    with urlopen(Request(address, headers={"User-Agent": "torch.hub"})) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{address} answers with a page, not with a file.")
        size = answer.headers["Content-Length"]
    return None if size is None else int(size)


@contextmanager
def explained(path: Path, codes: Collection[int] = tuple(REMEDIES)) -> Iterator[None]:
    """Turn the operating system's errors with these numbers into a UserError about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = _error_number(error)
        if code not in codes:
            raise
        raise UserError(f"{path} cannot be written: {os.strerror(code)}. What to do: {REMEDIES[code]}.") from error


def _error_number(error: Optional[BaseException]) -> int:
    """The operating system's number of an error, or of what it came from; 0 without one.

    torch.save puts an error of its own in front; safetensors has the number in its text, as "(os error 28)".
    """
    while error is not None:
        found = re.search(r"\(os error (\d+)\)", str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code:
            return code
        error = error.__cause__ or error.__context__
    return 0


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def memory_limit() -> int:
    """Bytes that this process may take: those of the machine, or less where its container or ulimit allows less."""
    page = os.sysconf("SC_PAGE_SIZE")
    limits = [os.sysconf("SC_PHYS_PAGES") * page]
    for file in CGROUPS:
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(Path(file).read_text()))
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed != resource.RLIM_INFINITY:
        with suppress(OSError):  # where there is no /proc
            allowed -= int(Path("/proc/self/statm").read_text().split()[0]) * page
        limits.append(max(allowed, 0))
    return min(limits)


def check_memory(what: str, size: int) -> None:
    """Raise UserError where `size` bytes, as declared, are more than half of memory_limit. what: begins the message."""
    if size > memory_limit() // 2:
        raise UserError(
            f"{what} would take {size / 2**30:,.1f} GiB, and this process may take {memory_limit() / 2**30:,.1f} GiB: "
            f"it is damaged, or it needs a machine with more memory."
        )
