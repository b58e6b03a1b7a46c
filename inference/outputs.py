"""What predict writes, recording after recording, and how an interrupted run resumes.

The results of each recording go into a journal beside the first output. When all recordings are done, the outputs are
made of it, each whole or not at all, and it is removed. The same command, after an interruption, tags the recordings
that the journal does not have.

Frame scores of recordings of different lengths do not fit the score store of `test` (evaluation/scores.py), which has
one number of frames and annotations. The HDF5 files here hold: audio_name (N,) bytes, duration (N,) seconds, clipwise
(N, K) or embedding (N, D) float32, and for the frames of all recordings one behind the other framewise (T, K) or
frame_embedding (T, D) float32, where recording n has the rows first_frame[n] to first_frame[n + 1]. Attributes:
labels, seconds_per_frame, and the front-end's settings.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import numpy as np

from data.files import (
    check_writable,
    explained,
    fitting_name,
    sole_writer,
    whole_file,
    whole_hdf5,
    write_each,
    write_text,
)
from data.finding import FoundAudio, counted, find_audio
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
    """The flags of predict for its outputs: paths, None where not wanted."""

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

    def check_time_axis(self) -> None:
        """Raise UserError for outputs of frames and events, which an encoder without a time axis does not have."""
        asked = [f"--{name}" for name in ("events", "audacity", "bins") if getattr(self, name) is not None]
        asked += ["--embeddings_of frames"] if self.embeddings_of == "frames" else []
        if asked:
            raise UserError(
                f"{', '.join(asked)} cannot be written: the encoder of the checkpoint has no time axis. It gives tags "
                f"and embeddings of whole recordings."
            )

    def check_places(self) -> None:
        """Make the folders in which all of it lies. Raises UserError where something could not be written."""
        for name, path in self.paths().items():
            check_writable(f"--{name} {path}", Path(path) / "a.txt" if name in FOLDERS else path)

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
    """A recording: its file, its name in outputs, and its place below the folders of labels and pictures."""

    path: Path
    name: str
    place: str
    copied: bool = False  # from standard input or a pipe: the path is another one in each run

    @property
    def key(self) -> str:
        """What identifies it in the journal: names that are no UTF-8 may look the same in outputs."""
        return self.name if self.copied else str(self.path)


@dataclass(frozen=True)
class Result:
    """One recording with its scores and events (None: the encoder has no time axis, or no output needs them)."""

    source: Source
    tagged: Tagged
    events: "Optional[pd.DataFrame]"
    top_k: int

    def event_rows(self) -> list[tuple[float, float, str]]:
        """Onset and offset in seconds, and class, in the order of time."""
        if self.events is None:
            return []
        table = self.events.sort_values(["onset", "offset"], kind="stable")
        return [
            (float(a), float(b), str(c)) for a, b, c in zip(table.onset, table.offset, table.event_label, strict=True)
        ]


def jsonl_line(result: Result) -> bytes:
    """{file, duration, tags: [{label, score}], events: [{onset, offset, label}]}, seconds; events: with a time axis.

    warnings: what is odd about the sound, where something is.
    """
    content: dict[str, Any] = {
        "file": result.source.name,
        "duration": round(result.tagged.duration, 6),
        "tags": [{"label": label, "score": round(score, 6)} for label, score in result.tagged.top(result.top_k)],
    }
    if result.events is not None:
        rows = result.event_rows()
        content["events"] = [{"onset": round(a, 4), "offset": round(b, 4), "label": c} for a, b, c in rows]
    if result.tagged.remarks:
        content["warnings"] = [remark.text for remark in result.tagged.remarks]
    return (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()


def csv_rows(result: Result, every_frame: bool) -> bytes:
    """file, start, end, a score for each class: one row for the recording, or one for each of its frames."""
    tagged, text = result.tagged, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if every_frame:
        rows = zip(tagged.times(), tagged.framewise, strict=True)
    else:
        rows = zip(np.array([[0.0, tagged.duration]]), tagged.clipwise[None], strict=True)
    for (start, end), scores in rows:
        writer.writerow([result.source.name, f"{start:.4f}", f"{end:.4f}", *(f"{score:.6f}" for score in scores)])
    return text.getvalue().encode()


def csv_header(labels: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["file", "start", "end", *labels])
    return text.getvalue().encode()


def event_lines(result: Result) -> bytes:
    """filename, onset, offset (seconds), event_label, tab-separated, as DCASE's tools read them."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")  # it quotes a name that has a tab in it
    writer.writerows((result.source.name, f"{a:.4f}", f"{b:.4f}", c) for a, b, c in result.event_rows())
    return text.getvalue().encode()


def score_block(result: Result) -> memoryview:
    """Clip scores, then those of the frames: (1 + T, K) float32."""
    return np.concatenate([result.tagged.clipwise[None], result.tagged.framewise]).astype("<f4", copy=False).data


def embedding_block(result: Result) -> memoryview:
    """The clip's embedding, then those of the frames where they are wanted: (1 + T, C) or (1, C) float32."""
    frames = result.tagged.frame_embeddings
    clip = result.tagged.embedding[None]
    return (clip if frames is None else np.concatenate([clip, frames])).astype("<f4", copy=False).data


class Journal:
    """A file of the finished recordings: the part of each in every output.

    The first line is the run's identity. Then each recording has a line of JSON and, behind it, its part of each
    output, whose sizes in bytes the line has. Opening it cuts off a recording that an interruption left incomplete.
    """

    def __init__(self, path: Path, identity: str) -> None:
        """Raises UserError where the file is another run's, or cannot be written."""
        self.path, self.entries = path, list[dict[str, Any]]()
        with explained(path):
            self.file = path.open("a+b")
            self._read(f"{identity}\n".encode())

    def _read(self, first: bytes) -> None:
        length = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        found = self.file.readline()
        if not first.startswith(found):
            self.file.close()
            raise UserError(
                f"{self.path} belongs to an interrupted run with another checkpoint, settings or outputs: give the "
                f"same ones to resume it, or remove the file to start anew."
            )
        end = len(found) if found == first else 0
        while end and (line := self.file.readline()).endswith(b"\n"):
            try:
                entry = json.loads(line)
                begin, size = self.file.tell(), sum(entry["sizes"].values())
            except (ValueError, KeyError, TypeError):
                break
            if begin + size > length:
                break
            self.entries.append({**entry, "begin": begin})
            end = self.file.seek(begin + size)
        self.file.truncate(end)
        if not end:
            self.file.write(first)
            self.file.flush()

    def add(self, entry: dict[str, Any], parts: Mapping[str, bytes | memoryview]) -> None:
        """Append a recording: plain values, and bytes for each output."""
        entry = {**entry, "sizes": {name: memoryview(part).nbytes for name, part in parts.items()}}
        line = json.dumps(entry).encode() + b"\n"
        with explained(self.path):
            begin = self.file.seek(0, os.SEEK_END) + len(line)
            self.file.writelines([line, *parts.values()])
            self.file.flush()
        self.entries.append({**entry, "begin": begin})

    def parts(self, name: str) -> Iterator[bytes]:
        """The bytes of one output, recording after recording."""
        for entry in self.entries:
            before = itertools.takewhile(lambda other: other != name, entry["sizes"])
            self.file.seek(entry["begin"] + sum(entry["sizes"][other] for other in before))
            yield self.file.read(entry["sizes"][name])


class Outputs:
    """All that a run of predict writes, as a context: where it ends without an error, the outputs get their names.

    Labels and pictures, a file for each recording, are written at once; the other outputs are made of the journal.
    """

    def __init__(
        self,
        wanted: Wanted,
        *,
        labels: Sequence[str],
        settings: Config,
        postprocessing: "Optional[PostProcessing]",
        checkpoint: Path,
    ) -> None:
        """postprocessing: None for an encoder without a time axis, and where no output has events.

        Raises UserError where an output cannot be written, or an interrupted run was another one.
        """
        self.wanted, self.labels, self.settings, self.postprocessing = wanted, list(labels), settings, postprocessing
        self.writers: dict[str, tuple[bytes, Callable[[Result], bytes | memoryview]]] = {
            "jsonl": (b"", jsonl_line),
            "csv": (csv_header(labels), lambda result: csv_rows(result, wanted.bins is not None)),
            "events": (b"filename\tonset\toffset\tevent_label\n", event_lines),
            "scores": (b"", score_block),
            "embeddings": (b"", embedding_block),
        }
        self.paths = {name: Path(path) for name, path in wanted.paths().items()}
        self.journal: Optional[Journal] = None
        self.opened = ExitStack()
        if not self.paths:
            return
        with ExitStack() as stack:
            wanted.check_places()
            about = checkpoint.stat()
            identity = [str(checkpoint), about.st_size, about.st_mtime_ns, settings.model_dump(), asdict(wanted)]
            first = next(iter(self.paths.values()))
            path = first.with_name(fitting_name(first.parent, first.name + ".journal"))
            stack.enter_context(sole_writer(path, *self.paths.values()))
            self.journal = Journal(path, hashlib.sha256(json.dumps(identity).encode()).hexdigest())
            self.opened = stack.pop_all()

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind: Optional[type[BaseException]], *_: object) -> None:
        with self.opened:
            if self.journal is not None:
                with explained(self.journal.path), self.journal.file:  # a full disk refuses what is left to write, too
                    if kind is None:
                        self._write(self.journal)
                if kind is None:
                    self.journal.path.unlink()

    @property
    def done(self) -> set[str]:
        """Keys of the recordings that are written, now or by an interrupted run."""
        return {entry["key"] for entry in self.journal.entries} if self.journal else set()

    @property
    def lacking(self) -> list[str]:
        """Names of the recordings whose labels or picture could not be written, now or by an interrupted run."""
        return [entry["name"] for entry in self.journal.entries if entry.get("lacks")] if self.journal else []

    def add(self, source: Source, tagged: Tagged) -> None:
        """Write one recording into everything that is wanted. Prints why its labels or its picture are not written."""
        if self.journal is None:
            return
        events = None if self.postprocessing is None else tagged.events(self.postprocessing, source.name)
        result = Result(source, tagged, events, self.wanted.top_k)
        lacks = ""
        try:
            write_each(self._own_files(result))
        except UserError as error:
            lacks = str(error)
            print(f"error: {source.name}: {lacks}", file=sys.stderr)
        entry = {
            "key": source.key, "name": source.name, "duration": tagged.duration, "frames": len(tagged.framewise),
            "seconds_per_frame": tagged.seconds_per_frame, **({"lacks": lacks} if lacks else {}),
        }  # fmt: skip
        parts = {name: write(result) for name, (_, write) in self.writers.items() if name in self.paths}
        self.journal.add(entry, parts)

    def _own_files(self, result: Result) -> dict[Path, Callable[[Path], object]]:
        """The files of one recording, each with the function that writes it."""

        def write_labels(path: Path) -> None:
            write_text(path, "".join(f"{a:.6f}\t{b:.6f}\t{c}\n" for a, b, c in result.event_rows()))

        def draw(path: Path) -> None:
            from inference.pictures import draw_recording  # here: it brings matplotlib

            rows, source = result.event_rows(), result.source.path
            draw_recording(path, source, result.tagged, rows, self.postprocessing, self.settings)

        kinds: dict[str, tuple[str, Callable[[Path], object]]] = {
            "audacity": (".txt", write_labels), "plot": (".png", draw),
        }  # fmt: skip
        place = Path(result.source.place)
        return {
            folder / place.parent / fitting_name(folder, f"{place.name}{ending}"): write
            for name, (ending, write) in kinds.items()
            for folder in ([self.paths[name]] if name in self.paths else [])
        }

    def _write(self, journal: Journal) -> None:
        """Make the outputs of the journal."""

        def writer(name: str) -> Callable[[Path], object]:
            if name in ("scores", "embeddings"):
                return lambda path: self._write_arrays(journal, name, path)
            return lambda path: self._write_lines(journal, name, path)

        try:
            write_each({self.paths[name]: writer(name) for name in self.writers if name in self.paths})
        except UserError as error:
            raise UserError(f"{error} The same command writes what is lacking, and tags nothing again.") from None

    def _write_lines(self, journal: Journal, name: str, path: Path) -> None:
        with whole_file(path) as partial, partial.open("wb") as file:
            file.writelines(itertools.chain([self.writers[name][0]], journal.parts(name)))

    def _write_arrays(self, journal: Journal, name: str, path: Path) -> None:
        """HDF5, or npz, by the ending of the output's name."""
        of_clips, of_frames = ("clipwise", "framewise") if name == "scores" else ("embedding", "frame_embedding")
        with_frames = name == "scores" or self.wanted.frame_embeddings
        entries = journal.entries
        frames = [entry["frames"] if with_frames else 0 for entry in entries]
        first = np.concatenate([[0], np.cumsum(frames)]).astype(np.int64)
        width = entries[0]["sizes"][name] // 4 // (1 + frames[0]) if entries else 0
        arrays: dict[str, Any] = {
            "audio_name": np.array([entry["name"].encode() for entry in entries], dtype="S"),
            "duration": np.array([entry["duration"] for entry in entries], dtype=np.float64),
            **({"first_frame": first} if with_frames else {}),
        }
        shapes = {of_clips: (len(entries), width), **({of_frames: (int(first[-1]), width)} if with_frames else {})}

        def fill(store: Any) -> None:
            for number, part in enumerate(journal.parts(name)):
                block = np.frombuffer(part, "<f4").reshape(-1, width)
                store[of_clips][number] = block[0]
                if with_frames:
                    store[of_frames][first[number] : first[number + 1]] = block[1:]

        if path.suffix == ".npz":
            arrays |= {key: np.empty(shape, "<f4") for key, shape in shapes.items()}
            fill(arrays)
            with whole_file(path) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
            return
        with whole_hdf5(path) as (store, _):
            for key, value in arrays.items():
                store[key] = value
            for key, shape in shapes.items():
                store.create_dataset(key, shape, "<f4")
            fill(store)
            seconds = entries[0]["seconds_per_frame"] if entries else 0.0
            frontend = {setting: getattr(self.settings, setting) for setting in section("front-end")}
            store.attrs.update({"labels": self.labels, "seconds_per_frame": seconds, **frontend})


def sources_of(files: Sequence[str], left_out: FoundAudio) -> Iterator[Source]:
    """The recordings that were given, in order and each once; folders with all audio below them.

    left_out: takes what else lies in the folders. Raises UserError for a folder without any audio.
    """
    seen: set[str] = set()
    for name in files:
        folder, found = Path(name), [Path(name)]
        if folder.is_dir():
            below = find_audio(folder)
            left_out.skipped += below.skipped
            left_out.others += below.others
            found = below.audio
            if not found:
                others = f": other files {counted(below.others)}" if below.others else ""
                raise UserError(f"The folder {folder} holds no audio files{others}.")
        for path in found:
            if str(path) not in seen:
                seen.add(str(path))
                place = path.relative_to(folder) if folder.is_dir() else Path(path.name)
                shown = str(path).encode(errors="replace").decode()  # a name that is no UTF-8 cannot be written
                yield Source(path, shown, str(place))
