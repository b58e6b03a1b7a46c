"""The file that a table names: below the raw folder, however its name is spelled."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Optional

from data.finding import FoundAudio, find_audio, spellings
from settings import UserError


def spelling(name: str) -> str:
    """What all spellings of a file's name have in common.

    Composed and decomposed accents, slashes and back-slashes, `./`, spaces at the ends and the case of the ending.
    """
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    stem, dot, ending = "/".join(part.strip() for part in parts if part.strip() not in ("", ".")).rpartition(".")
    return f"{stem}{dot}{ending.lower() if '/' not in ending else ending}"


class AudioFinder:
    """Finds the file that a table names: at its place below a folder, or deeper where only one has that name."""

    def __init__(self, raw: Path) -> None:
        self.raw = raw

    @cached_property
    def found(self) -> FoundAudio:
        """All that lies below the folder."""
        return find_audio(self.raw)

    @cached_property
    def _by_name(self) -> dict[str, list[tuple[str, Path]]]:
        """Last part of a name, in lower case -> names below the folder, and paths."""
        paths = defaultdict(list)
        for path in self.found.audio:
            for name in spellings(path.relative_to(self.raw)):
                place = spelling(name)
                paths[place.rpartition("/")[2].lower()].append((place, path))
        return paths

    def find(self, name: str, table: Optional[Path] = None) -> Path:
        """Path of the file. Raises UserError where there is none, or several deeper ones, or it lies elsewhere.

        table: of several, the file is taken whose folders share most names with the folders and the name of this table.
        """
        below = self._below(name)
        if _is_file(self.raw / below):
            return self.raw / below
        wanted = spelling(below)
        near = self._by_name.get(wanted.rpartition("/")[2].lower(), [])
        rules: list[Callable[[str], str]] = [str, str.lower]
        for rule in rules:  # a file of another case is taken where none has the name's own
            same = [(rule(place), path) for place, path in near if f"/{rule(place)}".endswith(f"/{rule(wanted)}")]
            exact = [path for place, path in same if place == rule(wanted)]
            deeper = exact or [path for _, path in same]
            if len(deeper) > 1 and table is not None:
                deeper = self._nearest(deeper, table)
            if len(deeper) > 1:
                raise UserError(f"Several files have this name: {deeper[0]} and {deeper[1]}.")
            if deeper:
                return deeper[0]
        raise UserError(f"There is no file {self.raw / below}, nor one of that name in its folders.")

    def _below(self, name: str) -> str:
        """The name as a path below the folder. Raises UserError for an absolute one, or one with .., that leaves it."""
        path = os.path.normpath(name)
        if os.path.isabs(path):
            path = os.path.relpath(path, os.path.abspath(self.raw))
        slashes = os.path.normpath(path.replace("\\", "/"))
        if ".." in (path.split(os.sep)[0], slashes.split(os.sep)[0]):
            raise UserError(f"{name} does not lie below {self.raw}: name files by their paths below --raw.")
        return path

    def _nearest(self, paths: Sequence[Path], table: Path) -> list[Path]:
        names = set(table.resolve().with_suffix("").parts)
        common = [len(names & set(path.parent.relative_to(self.raw).parts)) for path in paths]
        return [path for path, count in zip(paths, common, strict=True) if count == max(common)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a zero byte
        return False
