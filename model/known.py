"""Names of published checkpoints -> files in a folder of the user's."""

import json
import os
from pathlib import Path
from typing import Any

from settings import UserError

KNOWN = Path(__file__).parents[1] / "assets" / "checkpoints.json"
FOLDER_VARIABLE = "HTSAT_CHECKPOINTS"
DEFAULT_FOLDER = "~/.cache/hts-at"


def find_checkpoint(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a path or of a known name (htsat-audioset, ...), and the settings that the name brings.

    Known names, those of assets/checkpoints.json, are looked up in the folder that the environment variable
    HTSAT_CHECKPOINTS names, or in ~/.cache/hts-at. Raises UserError, with what to download and where to put it, where
    the file of a known name is not there.
    """
    known = json.loads(KNOWN.read_text())
    if Path(path).is_file() or str(path) not in known["names"]:
        return Path(path), {}
    entry = known["names"][str(path)]
    folder = Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()
    for file in (folder / name for name in entry["files"]):
        if file.is_file():
            return file, dict(entry["settings"])
    raise UserError(
        f"{path} ({entry['about']}) is not in {folder}. Download {' or '.join(entry['files'])} from the published "
        f"checkpoints ({entry['source']}, licence {entry['licence']}) and put it there, or set the environment "
        f"variable {FOLDER_VARIABLE} to the folder that has it."
    )


def known_names() -> list[str]:
    """The names that find_checkpoint knows."""
    return list(json.loads(KNOWN.read_text())["names"])
