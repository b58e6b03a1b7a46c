"""The report of an adapter: clips written, files skipped and why."""

from dataclasses import dataclass, field
from pathlib import Path

from data.clip_store import LEAST_SECONDS


@dataclass
class PrepareReport:
    """path: the store. skipped: (file, reason) of each file that is not in it.

    short_events, short_segments: parts below LEAST_SECONDS, which rounded times leave. notes: remarks on the tables.
    split_by: how the splits were chosen.
    """

    path: Path
    clips: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    short_events: int = 0
    short_segments: int = 0
    notes: list[str] = field(default_factory=list)
    split_by: str = ""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.clips} clips"]
        for count, what in (
            (self.short_events, "events or parts of them"),
            (self.short_segments, "ends of recordings"),
        ):
            if count:
                lines.append(f"{count} {what} last less than {LEAST_SECONDS:g} s and were left out.")
        lines += [f"warning: {note}" for note in self.notes]
        if self.skipped:
            lines.append(f"{len(self.skipped)} files were skipped:")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)
