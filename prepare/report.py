"""The report of an adapter: clips written, files skipped and why."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class PrepareReport:
    """path: the store. skipped: (file, reason) of each file that is not in it."""

    path: Path
    clips: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.clips} clips"]
        if self.skipped:
            lines.append(f"{len(self.skipped)} files were skipped:")
            lines += [f"  {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)
