"""What predict writes, recording after recording, and how an interrupted run goes on.

Each file grows under another name (.partial, .spool) and takes its own at the end. A journal beside the first of them
has a line for each recording that is written in full, with the sizes the files had then: after an interruption, the
same command cuts them back to those sizes and goes on behind. A finished run leaves no journal: the next starts anew.

Frame scores of recordings of different lengths do not fit the score store of `test` (evaluation/scores.py), which has
one number of steps and the truth. The HDF5 files here hold: audio_name (N,) bytes, duration (N,) seconds, clipwise
(N, K) or embedding (N, C) float32, and for the frames of all recordings one behind the other framewise (T, K) or
frame_embedding (T, C) float32, where recording n has the rows first_frame[n] to first_frame[n + 1]. Attributes:
labels, seconds_per_frame, and the front-end's settings.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Optional

import h5py
import numpy as np

from inference.tagger import Tagged
from settings import Config, UserError, section

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.postprocess import PostProcessing

STANDARD_INPUT = "-"
FOLDERS = ("audacity", "plot")  # outputs of several files
HDF5_SUFFIXES = (".h5", ".hdf5")


@dataclass(frozen=True)
class Wanted:
    """The flags of predict that say what to write. Paths; None: not wanted."""

    jsonl: Optional[str] = None
    csv: Optional[str] = None
    events: Optional[str] = None
    scores: Optional[str] = None
    embeddings: Optional[str] = None
    audacity: Optional[str] = None
    plot: Optional[str] = None
    embeddings_of: Literal["clips", "frames"] = "clips"
    bins: Optional[int] = None
    bins_by: Literal["mean", "max"] = "mean"
    top_k: int = 5

    def __post_init__(self) -> None:
        for name, allowed in (("scores", HDF5_SUFFIXES), ("embeddings", (*HDF5_SUFFIXES, ".npz"))):
            path = getattr(self, name)
            if path is not None and not path.endswith(allowed):
                raise UserError(f"--{name} {path}: the name must end with {' or '.join(allowed)}.")
        if self.top_k < 1:
            raise UserError(f"--top_k {self.top_k} is not allowed: give 1 or more.")
        if self.bins is not None and self.bins < 1:
            raise UserError(f"--bins {self.bins} is not allowed: give the number of steps of a window, 1 or more.")
        paths = [str(Path(path)) for path in self.paths().values()]
        if len(set(paths)) < len(paths):
            raise UserError(f"Two outputs have the same name: {', '.join(paths)}.")

    def make_places(self) -> None:
        """Make the folders in which all of it lies. Raises UserError where a file or folder is in the way."""
        for name, text in self.paths().items():
            path = Path(text)
            try:
                (path if name in FOLDERS else path.parent).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--{name} {path} cannot be written: {error}") from None
            if name not in FOLDERS and path.is_dir():
                raise UserError(f"--{name} {path} is a folder: give the name of a file.")

    def paths(self) -> dict[str, str]:
        """Flag: path, of all that is wanted."""
        names = ("jsonl", "csv", "events", "scores", "embeddings", "audacity", "plot")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def frame_embeddings(self) -> bool:
        return self.embeddings is not None and self.embeddings_of == "frames"

    @property
    def with_events(self) -> bool:
        return any((self.jsonl, self.events, self.audacity, self.plot))


@dataclass(frozen=True)
class Source:
    """A recording: its file, what it is called in outputs, and its place below the folders of labels and pictures."""

    path: Path
    name: str
    place: str

    @property
    def key(self) -> str:
        """What tells it from others after an interruption: names that are no UTF-8 may look the same in outputs."""
        return self.name if self.name == STANDARD_INPUT else str(self.path)


@dataclass(frozen=True)
class Heard:
    """One recording with its scores and events, as the writers get it."""

    source: Source
    tagged: Tagged
    events: "Optional[pd.DataFrame]"
    top_k: int

    def event_rows(self) -> list[tuple[float, float, str]]:
        """Onset and offset in seconds, and class, in the order of time."""
        assert self.events is not None
        table = self.events.sort_values(["onset", "offset"], kind="stable")
        return [
            (float(a), float(b), str(c)) for a, b, c in zip(table.onset, table.offset, table.event_label, strict=True)
        ]


def jsonl_line(heard: Heard) -> bytes:
    """{file, duration, tags: [{label, score}], events: [{onset, offset, label}]}, seconds."""
    content = {
        "file": heard.source.name,
        "duration": round(heard.tagged.duration, 6),
        "tags": [{"label": label, "score": round(score, 6)} for label, score in heard.tagged.top(heard.top_k)],
        "events": [{"onset": round(a, 4), "offset": round(b, 4), "label": c} for a, b, c in heard.event_rows()],
    }
    return (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()


def csv_rows(heard: Heard, every_frame: bool) -> bytes:
    """file, start, end, a score for each class: one row for the recording, or one for each of its frames."""
    tagged, text = heard.tagged, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if every_frame:
        rows = zip(tagged.times(), tagged.framewise, strict=True)
    else:
        rows = zip(np.array([[0.0, tagged.duration]]), tagged.clipwise[None], strict=True)
    for (start, end), scores in rows:
        writer.writerow([heard.source.name, f"{start:.4f}", f"{end:.4f}", *(f"{score:.6f}" for score in scores)])
    return text.getvalue().encode()


def csv_header(labels: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["file", "start", "end", *labels])
    return text.getvalue().encode()


def event_rows(heard: Heard) -> bytes:
    """filename, onset, offset (seconds), event_label, tab-separated, as DCASE's tools read them."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")  # it quotes a name that has a tab in it
    writer.writerows((heard.source.name, f"{a:.4f}", f"{b:.4f}", c) for a, b, c in heard.event_rows())
    return text.getvalue().encode()


def score_block(heard: Heard) -> memoryview:
    """Clip scores, then those of the frames: (1 + T, K) float32."""
    return np.concatenate([heard.tagged.clipwise[None], heard.tagged.framewise]).astype("<f4", copy=False).data


def embedding_block(heard: Heard) -> memoryview:
    """The clip's embedding, then those of the frames where they are wanted: (1 + T, C) or (1, C) float32."""
    frames = heard.tagged.frame_embeddings
    clip = heard.tagged.embedding[None]
    return (clip if frames is None else np.concatenate([clip, frames])).astype("<f4", copy=False).data


class Outputs:
    """All that a run of predict writes. Use as a context: leaving it closes the files; `finish` names them."""

    def __init__(
        self,
        wanted: Wanted,
        *,
        labels: Sequence[str],
        settings: Config,
        postprocessing: "Callable[[], PostProcessing]",
        checkpoint: Path,
    ) -> None:
        self.wanted, self.labels, self.settings = wanted, list(labels), settings
        self.postprocessing = postprocessing() if wanted.with_events else None
        about = checkpoint.stat()
        identity = [str(checkpoint), about.st_size, about.st_mtime_ns, settings.model_dump(), asdict(wanted)]
        self.identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.columns: dict[str, tuple[bytes, Callable[[Heard], bytes | memoryview]]] = {
            "jsonl": (b"", jsonl_line),
            "csv": (csv_header(labels), lambda heard: csv_rows(heard, wanted.bins is not None)),
            "events": (b"filename\tonset\toffset\tevent_label\n", event_rows),
            "scores": (b"", score_block),
            "embeddings": (b"", embedding_block),
        }
        self.files: dict[str, BinaryIO] = {}
        self.journal: Optional[BinaryIO] = None
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> "Outputs":
        """Begin, or go on where an interrupted run stopped: `done` has the names of what is written already."""
        paths = self.wanted.paths()
        if not paths:
            return self
        self.wanted.make_places()
        first = Path(next(iter(paths.values())))
        self.journal_path = first.with_name(first.name + ".journal")
        sizes = self._read_journal() if self.journal_path.is_file() else None
        for flag in self.columns.keys() & paths.keys():
            path = self._growing(flag)
            if sizes is None:
                self.files[flag] = path.open("wb")
                self.files[flag].write(self.columns[flag][0])
            else:
                self.files[flag] = self._cut_back(path, sizes[flag])
        if sizes is None:
            self.journal = self.journal_path.open("wb")
            self._note({"identity": self.identity})
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self.files.values(), *([self.journal] if self.journal else [])):
            file.close()

    @property
    def done(self) -> set[str]:
        """Keys of the recordings that an interrupted run has written."""
        return {entry["key"] for entry in self.entries}

    def add(self, source: Source, tagged: Tagged) -> None:
        """Write one recording into everything that is wanted."""
        events = None if self.postprocessing is None else tagged.events(self.postprocessing, source.name)
        heard = Heard(source, tagged, events, self.wanted.top_k)
        if self.wanted.audacity is not None:
            text = "".join(f"{a:.6f}\t{b:.6f}\t{c}\n" for a, b, c in heard.event_rows())
            write_text(Path(self.wanted.audacity) / f"{source.place}.txt", text)
        if self.wanted.plot is not None:
            from inference.pictures import draw_recording  # here: it brings matplotlib

            assert self.postprocessing is not None
            picture = Path(self.wanted.plot) / f"{source.place}.png"
            draw_recording(picture, source.path, tagged, heard.event_rows(), self.postprocessing, self.settings)
        for flag, file in self.files.items():
            file.write(self.columns[flag][1](heard))
        entry = {"key": source.key, "name": source.name, "duration": tagged.duration, "frames": len(tagged.framewise)}
        entry["seconds_per_frame"] = tagged.seconds_per_frame
        self.entries.append(entry)
        if self.journal is not None:
            self._note(entry)

    def finish(self) -> list[str]:
        """Give the files their names; returns them and the folders."""
        paths = self.wanted.paths()
        for file in self.files.values():
            file.close()
        for flag in ("scores", "embeddings"):
            if flag in self.files:
                self._write_arrays(flag, Path(paths[flag]))
        for flag in self.files:
            target = Path(paths[flag])
            os.replace(target.with_name(target.name + ".partial"), target)
            self._growing(flag).unlink(missing_ok=True)
        if self.journal is not None:
            self.journal.close()
            self.journal_path.unlink()
        return list(paths.values())

    def _growing(self, flag: str) -> Path:
        """The name of a file while recordings are added: HDF5, which a kill can make unreadable, comes last."""
        path = Path(self.wanted.paths()[flag])
        return path.with_name(path.name + (".spool" if flag in ("scores", "embeddings") else ".partial"))

    def _note(self, entry: dict[str, Any]) -> None:
        """A line of the journal, after the files hold what it says."""
        for file in self.files.values():
            file.flush()
        sizes = {flag: file.tell() for flag, file in self.files.items()}
        assert self.journal is not None
        self.journal.write((json.dumps({**entry, "sizes": sizes}) + "\n").encode())
        self.journal.flush()

    def _read_journal(self) -> Optional[dict[str, int]]:
        """The sizes of the files at the journal's last whole line, or None where it has none; it is cut behind it."""
        content = self.journal_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return None
        try:
            head, *self.entries = [json.loads(line) for line in whole.splitlines()]
            sizes = dict((self.entries or [head])[-1]["sizes"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.journal_path} is damaged: remove it, and the run starts anew.") from None
        if head.get("identity") != self.identity:
            raise UserError(
                f"{self.journal_path} belongs to an interrupted run with another checkpoint, settings or outputs: "
                f"give the same ones to go on with it, or remove it to start anew."
            )
        self.journal = self._cut_back(self.journal_path, len(whole))
        return sizes

    def _cut_back(self, path: Path, size: int) -> BinaryIO:
        if not path.is_file() or path.stat().st_size < size:
            raise UserError(
                f"The interrupted run of {self.journal_path} cannot go on: {path} is not as it left it. Remove the "
                f"journal, and the run starts anew."
            )
        os.truncate(path, size)
        return path.open("ab")

    def _write_arrays(self, flag: str, path: Path) -> None:
        """HDF5 or npz from what was put aside, one recording after the other."""
        names = ("clipwise", "framewise") if flag == "scores" else ("embedding", "frame_embedding")
        with_frames = flag == "scores" or self.wanted.frame_embeddings
        frames = [entry["frames"] if with_frames else 0 for entry in self.entries]
        first = np.concatenate([[0], np.cumsum(frames)]).astype(np.int64)
        partial = path.with_name(path.name + ".partial")
        values = os.path.getsize(self._growing(flag)) // 4
        width = values // max(1, len(frames) + int(first[-1]))
        about: dict[str, Any] = {
            "audio_name": np.array([entry["name"].encode() for entry in self.entries], dtype="S"),
            "duration": np.array([entry["duration"] for entry in self.entries], dtype=np.float64),
        }
        if with_frames:
            about["first_frame"] = first
        if path.suffix == ".npz":
            about[names[0]] = np.empty((len(frames), width), "<f4")
            if with_frames:
                about[names[1]] = np.empty((int(first[-1]), width), "<f4")
            self._fill(flag, about[names[0]], about.get(names[1]), first)
            with partial.open("wb") as file:
                np.savez(file, **about)
            return
        with h5py.File(partial, "w") as store:
            for name, value in about.items():
                store[name] = value
            clips = store.create_dataset(names[0], (len(frames), width), "<f4")
            rows = store.create_dataset(names[1], (int(first[-1]), width), "<f4") if with_frames else None
            self._fill(flag, clips, rows, first)
            seconds = self.entries[0]["seconds_per_frame"] if self.entries else 0.0
            frontend = {name: getattr(self.settings, name) for name in section("front-end")}
            store.attrs.update({"labels": self.labels, "seconds_per_frame": seconds, **frontend})

    def _fill(self, flag: str, clips: Any, rows: Any, first: np.ndarray) -> None:
        width = clips.shape[1]
        with self._growing(flag).open("rb") as spool:
            for number, (begin, end) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
                block = np.fromfile(spool, "<f4", (1 + end - begin) * width).reshape(-1, width)
                clips[number] = block[0]
                if rows is not None and end > begin:
                    rows[begin:end] = block[1:]


def write_text(path: Path, text: str) -> None:
    """Write a file that takes its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def sources_of(files: Sequence[str], suffixes: Sequence[str]) -> Iterator[Source]:
    """The recordings that were given, in order and each once; folders with all below them, but for hidden files.

    Raises UserError for a folder without any.
    """
    seen: set[str] = set()
    for name in files:
        folder, found = Path(name), [Path(name)]
        if folder.is_dir():
            found = sorted(
                Path(root) / file
                for root, _, names in os.walk(folder)
                for file in names
                if file.lower().endswith(tuple(suffixes)) and not file.startswith(".")
            )
            if not found:
                raise UserError(f"The folder {folder} holds no audio files ({', '.join(suffixes)}).")
        for path in found:
            if str(path) not in seen:
                seen.add(str(path))
                place = path.relative_to(folder) if folder.is_dir() else Path(path.name)
                shown = str(path).encode(errors="replace").decode()  # a name that is no UTF-8 cannot be written
                yield Source(path, shown, str(place))
