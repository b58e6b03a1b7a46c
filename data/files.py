"""A file is written whole or not at all: under another name first, which it changes for its own at the end."""

import errno
import os
import re
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
