"""What reading and writing files share: one is written whole or not at all, and read only if memory holds it."""

import errno
import os
import re
import resource
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

from settings import UserError

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
        with explained(path, FULL):
            yield partial
        with explained(path):
            _sync(partial)
            os.replace(partial, path)
            with suppress(OSError):  # some network file systems, and Windows, cannot sync a folder
                _sync(path.parent)
    except BaseException:
        if not keep:
            with suppress(OSError):
                partial.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file, whole or not at all, as UTF-8. Raises UserError as `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
