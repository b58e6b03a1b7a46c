"""What a store is made from, as a fingerprint: the same preparation again is recognized, and so is another one."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from data.files import write_text
from data.finding import walk
from settings import Config, UserError, split_list

USED = ("dataset_type", "sample_rate", "random_seed", "esc_fold")  # settings that adapters use


def fingerprint(settings: Config, flags: Mapping[str, Any]) -> str:
    """Hexadecimal digits that change with the settings, the flags, and the files that the flags name.

    Files count by name, size and time of change.
    """
    digest = hashlib.sha256(json.dumps({name: getattr(settings, name) for name in USED}).encode())
    for flag, value in sorted(flags.items()):
        digest.update(f"{flag} {value}\n".encode(errors="surrogateescape"))
        named = [str(value)] if Path(str(value)).exists() else split_list(str(value))  # a path may hold commas
        for part in named:
            for path in _files(Path(part)):
                there = path.stat()
                digest.update(f"{path} {there.st_size} {there.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """The file, or all files below a folder, in a fixed order."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (there for there, entry in walk(path, []) if entry.is_file())


def read_record(store: Path) -> dict[str, Any]:
    """What the last preparation wrote about a store: inputs, report and skipped; {} where nothing is known."""
    try:
        found = json.loads(store.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_record(store: Path, inputs: str, report: Optional[str] = None, skipped: int = 0) -> None:
    """Write it. report: None while the store is being made."""
    write_text(store.with_suffix(".json"), json.dumps({"inputs": inputs, "report": report, "skipped": skipped}) + "\n")


def remove_record(store: Path) -> None:
    """Forget it, before another preparation replaces the store."""
    store.with_suffix(".json").unlink(missing_ok=True)


def dataset_path(workspace: str, name: str) -> str:
    """The folder of a data set with a name of its own. Raises UserError for what is not one name of a folder."""
    if not name or name in (".", "..") or Path(name).name != name or not name.isprintable():
        raise UserError(f"--name {name!r} is not allowed: give one name of a folder, as birds.")
    return f"{workspace}/data/{name}"
