"""The report of an adapter: clips written, files skipped and why."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.clip_store import LEAST_SECONDS
from data.finding import FoundAudio, counted, readable_name
from data.levels import Remark
from data.names import shown, terminal_text

MOST_REMARKS = 20  # that are printed, beside their counts


@dataclass
class PrepareReport:
    """path: the store. skipped: (file, reason) of each file that is not in it.

    remarks: (file, what is odd about its sound) of those that are. unopened: (path, reason) of links and folders that
    lead nowhere; others, unused: how many files are no audio, and how many are audio that no table names.
    short_events, short_segments: parts below LEAST_SECONDS, which rounded times leave. notes: remarks on the tables.
    split_by: how the splits were chosen.
    """

    path: Path
    clips: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[tuple[str, Remark]] = field(default_factory=list)
    unopened: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    unused: int = 0

    short_events: int = 0
    short_segments: int = 0
    notes: list[str] = field(default_factory=list)
    split_by: str = ""

    def add_left_out(self, found: FoundAudio, folder: Path, used: int | None = None) -> None:
        """What lies below a folder beside the clips. used: how many of the audio files are clips; None: all."""
        self.others += found.others
        self.unused += 0 if used is None else len(found.audio) - used
        self.unopened += [(readable_name(path.relative_to(folder)), reason) for path, reason in found.skipped]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.clips} clips"]
        for count, what in (
            (self.short_events, "events or parts of them"),
            (self.short_segments, "ends of recordings"),
        ):
            if count:
                lines.append(f"{count} {what} last less than {LEAST_SECONDS:g} s and were left out.")
        lines += [f"warning: {terminal_text(note)}" for note in self.notes]
        if self.skipped:
            lines.append(f"{len(self.skipped)} files were skipped:")
            lines += [f"  {shown(name)}: {shown(reason)}" for name, reason in self.skipped]
        return "\n".join([*lines, *self.other_lines()])

    def other_lines(self) -> list[str]:
        """What is odd about the clips, and what was left out."""
        lines = []
        if self.remarks:
            kinds = Counter(remark.kind for _, remark in self.remarks)
            lines.append(f"warning: of the clips, {', '.join(f'{count} {kind}' for kind, count in kinds.items())}:")
            lines += [f"  {shown(name)}: {remark.text}" for name, remark in self.remarks[:MOST_REMARKS]]
            lines += [f"  and {len(self.remarks) - MOST_REMARKS} more"] if len(self.remarks) > MOST_REMARKS else []
        lines += [f"not looked into: {shown(name)}: {shown(reason)}" for name, reason in self.unopened]
        left_out = [f"{self.unused} audio files that no table names"] if self.unused else []
        left_out += [f"other files: {counted(self.others)}"] if self.others else []
        if left_out:
            lines.append(f"Left out: {'; '.join(left_out)}")
        return lines
