"""JSON lists of clips as AST, PSLA and AudioTagging Done Right have them, and their table of classes.

A list is {"data": [{"wav": path, "labels": "/m/09x0r,/t/dd00088"}, ...]}; other keys of a clip are ignored. The table
is a CSV with the columns index, mid and display_name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Optional

from data.files import read_json
from data.tables import clean, read_table, require_columns
from prepare.tables import Entry
from settings import UserError

SPLITS_OF = {1: ("",), 2: ("train", "test"), 3: ("train", "validation", "test")}  # by the number of lists


def read_class_table(path: Path) -> dict[str, str]:
    """Names of classes by their ids, in the order of their numbers. Raises UserError for another table."""
    columns, rows = read_table(path)
    require_columns(path, columns, ("index", "mid", "display_name"))
    found: dict[int, tuple[str, str]] = {}
    for row in rows:
        number, mid, name = (row.cells[column] for column in ("index", "mid", "display_name"))
        if not number.isdecimal() or int(number) in found or not mid or not name:
            raise UserError(f"{row.place}: a class needs a number of its own, a mid and a display_name.")
        found[int(number)] = mid, name
    names = dict(found[number] for number in sorted(found))
    if len(names) < len(found) or len(set(names.values())) < len(found):
        raise UserError(f"{path} has a mid or a display_name twice.")
    return names


def read_lists(paths: Sequence[Path], raw: Path, names: Optional[Mapping[str, str]] = None) -> list[Entry]:
    """The clips of one list without split, of two for train and test, or of three with validation between.

    names: of the ids; None: the ids are the names. An absolute path that does not lie below `raw`, as of another
    machine, is looked for by its last part. Raises UserError for other files, and for ids without a name.
    """
    if len(paths) not in SPLITS_OF:
        raise UserError("--lists takes one JSON file, train.json,test.json or train.json,validation.json,test.json.")
    return [
        _entry(clip, f"{path}, clip {number}", raw, names, split)
        for path, split in zip(paths, SPLITS_OF[len(paths)], strict=True)
        for number, clip in enumerate(_clips(path), start=1)
    ]


def _clips(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"There is no list {path}.")
    clips = read_json(path, dict).get("data")
    if not isinstance(clips, list) or not clips:
        raise UserError(f'{path} is no list of clips: it must hold {{"data": [{{"wav": ..., "labels": ...}}, ...]}}.')
    return clips


def _entry(clip: Any, place: str, raw: Path, names: Optional[Mapping[str, str]], split: str) -> Entry:
    wav, labels = (clip.get(name) for name in ("wav", "labels")) if isinstance(clip, dict) else (None, None)
    if not (isinstance(wav, str) and wav and isinstance(labels, str)):
        raise UserError(f'{place}: it must be {{"wav": path, "labels": "id,id"}}.')
    found = [clean(label) for label in labels.split(",") if label.strip()]
    unknown = [label for label in found if names is not None and label not in names]
    if unknown or not found:
        raise UserError(f"{place}: {unknown[0] if unknown else 'no label'} is not in the table of classes.")
    return Entry(_below(wav, raw), {names[label] if names else label for label in found}, split=split)


def _below(wav: str, raw: Path) -> str:
    path = PurePosixPath(wav)
    if not path.is_absolute():
        return wav
    return str(path.relative_to(raw.absolute())) if path.is_relative_to(raw.absolute()) else path.name
