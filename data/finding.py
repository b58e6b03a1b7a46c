"""The audio below a folder, and counts of everything else that lies there."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.containers import looks_like_audio
from data.files import AUDIO_SUFFIXES

# Endings that audio has in containers that are read through PyAV alone.
MEDIA_SUFFIXES = (
    ".m4a", ".mp4", ".m4b", ".mov", ".3gp", ".aac", ".wma", ".asf", ".webm", ".mka", ".mkv", ".amr", ".ape", ".wv",
    ".ac3", ".avi", ".spx", ".tta", ".mpc", ".dsf",
)  # fmt: skip
# Endings of files that are not looked into: they are no audio, and there may be as many of them as of recordings.
OTHER_SUFFIXES = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".jams", ".xml", ".md", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".gif",
    ".svg", ".h5", ".hdf5", ".npy", ".npz", ".pt", ".pth", ".ckpt", ".onnx", ".safetensors", ".py", ".ipynb", ".yaml",
    ".yml", ".toml", ".lab", ".rttm", ".textgrid", ".mid", ".zip", ".gz", ".tar", ".pkl", ".db", ".log", ".xlsx",
    ".journal", ".partial",
)  # fmt: skip


@dataclass
class FoundAudio:
    """audio: sorted paths below the folder; skipped: what could not be looked at, and why; others: kinds of files."""

    audio: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # by ending, or "hidden"


def find_audio(folder: Path) -> FoundAudio:
    """The audio files in a folder and all below it, by their endings or by what they hold.

    Hidden files and folders (.name) are counted.
    """
    found = FoundAudio()
    for path, entry in walk(folder, found.skipped):
        if entry.name.startswith("."):
            found.others["hidden"] += 1
        else:
            _take(path, entry, found)
    found.audio.sort()
    return found


def walk(folder: Path, skipped: list[tuple[Path, str]]) -> Iterator[tuple[Path, "os.DirEntry[str]"]]:
    """Everything below a folder but folders, and hidden folders themselves.

    Links are followed, to folders after all that lies here; each folder is looked into once, so that a link to a folder
    above has an end. skipped: takes the folders that were not looked into, and why.
    """
    seen, links = dict[tuple[int, int], Path](), [folder]
    while links:
        inside = [links.pop(0)]
        while inside:
            here = inside.pop()
            try:
                about = here.stat()
                entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            except OSError as error:
                skipped.append((here, f"It cannot be opened: {os.strerror(error.errno or 0)}."))
                continue
            other = seen.setdefault((about.st_dev, about.st_ino), here)
            if other is not here:
                skipped.append((here, f"It is the same folder as {other}."))
                continue
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_dir():
                    yield here / entry.name, entry
                else:
                    (links if entry.is_symlink() else inside).append(here / entry.name)


def _take(path: Path, entry: "os.DirEntry[str]", found: FoundAudio) -> None:
    """Put a file where it belongs."""
    if not entry.is_file():
        what = f"a link to {os.readlink(path)}, which does not exist" if entry.is_symlink() else "a pipe or a device"
        found.skipped.append((path, f"It is {what}."))
        return
    suffix = path.suffix.strip().lower()
    try:
        audio = suffix in (*AUDIO_SUFFIXES, *MEDIA_SUFFIXES) or (suffix not in OTHER_SUFFIXES and _holds_audio(path))
    except OSError as error:
        found.skipped.append((path, f"It cannot be opened: {os.strerror(error.errno or 0)}."))
        return
    if audio:
        found.audio.append(path)
    else:
        found.others[suffix or "without ending"] += 1


def _holds_audio(path: Path) -> bool:
    with path.open("rb") as file:
        return looks_like_audio(file)


def counted(kinds: "Counter[str]") -> str:
    """`5 (.txt 3, hidden 2)`."""
    return f"{kinds.total()} ({', '.join(f'{kind} {count}' for kind, count in sorted(kinds.items()))})"


def readable_name(path: Path) -> str:
    """A path with slashes as text in UTF-8, the same for no two paths; the bytes of other encodings as \\xe9."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def spellings(path: Path) -> Iterator[str]:
    """A path as it may be written in a table: in UTF-8, or in the code page of an older Windows."""
    name = os.fsencode(path.as_posix())
    try:
        yield name.decode()
    except UnicodeDecodeError:
        yield name.decode("cp1252", "replace")
