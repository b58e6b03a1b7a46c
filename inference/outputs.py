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
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional

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
from data.names import score_text, shown, table_cell
from inference.parquet import check_parquet, write_parquet
from inference.tagger import Tagged
from settings import Config, UserError, section

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.postprocess import PostProcessing

STANDARD_INPUT = "-"
HDF5_SUFFIXES = (".h5", ".hdf5")
EVENT_HEADER = ("filename", "onset", "offset", "event_label", "score", "threshold")
RAVEN_HEADER = (
    "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Label",
    "Score", "Threshold", "Begin Path",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """An output of predict. name: below --output. folder: each recording has a file of its own, in a folder.

    endings: which its name may have, empty: any. timed: whether it needs an encoder with a time axis; events: whether
    it has events where there is one. optional: needs a package that is not required, and is none of --output's.
    """

    name: str
    folder: bool = False
    endings: tuple[str, ...] = ()
    timed: bool = False
    events: bool = False
    optional: bool = False


FORMATS = {  # by their flags
    "jsonl": Format("tags.jsonl", events=True),
    "csv": Format("scores.csv"),
    "events": Format("events.tsv", timed=True, events=True),
    "scores": Format("scores.h5", endings=HDF5_SUFFIXES),
    "embeddings": Format("embeddings.h5", endings=(*HDF5_SUFFIXES, ".npz")),
    "parquet": Format("scores.parquet", endings=(".parquet",), optional=True),
    "audacity": Format("audacity", folder=True, timed=True, events=True),
    "raven": Format("raven", folder=True, timed=True, events=True),
    "plot": Format("pictures", folder=True, events=True),
}


@dataclass(frozen=True)
class Wanted:
    """The flags of predict for its outputs: paths, None where not wanted."""

    jsonl: Optional[str] = None
    csv: Optional[str] = None
    events: Optional[str] = None
    scores: Optional[str] = None
    embeddings: Optional[str] = None
    parquet: Optional[str] = None
    audacity: Optional[str] = None
    raven: Optional[str] = None
    plot: Optional[str] = None
    output: Optional[str] = None  # folder of all formats that have no path of their own
    embeddings_of: Literal["clips", "frames"] = "clips"
    bins: Optional[int] = None
    bins_by: Literal["mean", "max"] = "mean"
    top_k: int = 5
    min_score: float = 0.0
    classes: tuple[str, ...] = ()  # empty: all

    def __post_init__(self) -> None:
        for name, path in self.paths().items():
            allowed = FORMATS[name].endings
            if allowed and not path.endswith(allowed):
                raise UserError(f"--{name} {path}: the name must end with {' or '.join(allowed)}.")
        if not 0 <= self.min_score <= 1:
            raise UserError(f"--min_score {self.min_score} is not allowed: scores lie between 0 and 1.")
        if self.top_k < 1:
            raise UserError(f"--top_k {self.top_k} is not allowed: give 1 or more.")
        if self.bins is not None and self.bins < 1:
            raise UserError(f"--bins {self.bins} is not allowed: give the number of steps of a window, 1 or more.")
        paths = [str(Path(path)) for path in self.paths().values()]
        if len(set(paths)) < len(paths):
            raise UserError(f"Two outputs have the same name: {', '.join(paths)}.")

    def named(self, *, has_frames: bool) -> "Wanted":
        """With the paths of --output. has_frames: whether the encoder has a time axis.

        Raises UserError for outputs of frames and events that are asked for by name, where it has none.
        """
        if not has_frames:
            self._check_time_axis()
        if self.output is None:
            return self
        kinds = {name for name, kind in FORMATS.items() if (has_frames or not kind.timed) and not kind.optional}
        missing = kinds - self.paths().keys()
        paths: dict[str, Any] = {name: str(Path(self.output, FORMATS[name].name)) for name in missing}
        return replace(self, output=None, **paths)

    def of_share(self, number: int, count: int) -> "Wanted":
        """With names for the number-th of `count` shares (from 1): `tags.shard2of4.jsonl`, `labels/shard2of4`."""
        names, share = dict[str, Any](), f"shard{number}of{count}"
        for name, path in self.paths().items():
            root, ending = os.path.splitext(path)
            names[name] = os.path.join(path, share) if FORMATS[name].folder else f"{root}.{share}{ending}"
        return replace(self, **names)

    def _check_time_axis(self) -> None:
        asked = [f"--{name}" for name in self.paths() if FORMATS[name].timed]
        asked += ["--bins"] if self.bins is not None else []
        asked += ["--embeddings_of frames"] if self.embeddings_of == "frames" else []
        if asked:
            raise UserError(
                f"{', '.join(asked)} cannot be written: the encoder of the checkpoint has no time axis. It gives tags "
                f"and embeddings of whole recordings."
            )

    def check_places(self) -> None:
        """Make the folders in which all of it lies. Raises UserError where something could not be written."""
        if self.parquet is not None:
            check_parquet(f"--parquet {self.parquet}")
        for name, path in self.paths().items():
            check_writable(f"--{name} {path}", Path(path) / "a.txt" if FORMATS[name].folder else path)

    def paths(self) -> dict[str, str]:
        """Flag: path, of all that is wanted."""
        return {name: getattr(self, name) for name in FORMATS if getattr(self, name) is not None}

    @property
    def frame_embeddings(self) -> bool:
        return self.embeddings is not None and self.embeddings_of == "frames"

    @property
    def with_events(self) -> bool:
        return any(FORMATS[name].events for name in self.paths())

    @property
    def by_place(self) -> bool:
        """Whether each recording writes a file of its own."""
        return any(FORMATS[name].folder for name in self.paths())


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


class EventRow(NamedTuple):
    """An event: seconds, class, the highest of its scores, and the threshold above which its class is on."""

    onset: float
    offset: float
    label: str
    score: float
    threshold: float


@dataclass(frozen=True)
class Result:
    """One recording with its scores and events (None: the encoder has no time axis, or no output needs them)."""

    source: Source
    tagged: Tagged
    events: Optional[list[EventRow]]
    wanted: Wanted
    highest_hz: float  # of the sound that the network is given

    def tags(self) -> list[tuple[str, float]]:
        return best_tags(self.tagged, self.wanted)


def best_tags(tagged: Tagged, wanted: Wanted) -> list[tuple[str, float]]:
    """The top_k classes of a recording with a clip score of min_score or more, best first."""
    return [(label, score) for label, score in tagged.top(wanted.top_k) if score >= wanted.min_score]


def event_rows(table: "pd.DataFrame", processing: "PostProcessing", min_score: float = 0.0) -> list[EventRow]:
    """Detected events, as Tagged.events gives them, in the order of time; without those of a lower score."""
    thresholds = dict(zip(processing.labels, processing.thresholds, strict=True))
    columns = (table[name].tolist() for name in ("onset", "offset", "event_label", "score"))
    rows = [
        EventRow(a, b, c, plain_score(s), thresholds[c]) for a, b, c, s in zip(*columns, strict=True) if s >= min_score
    ]
    return sorted(rows, key=lambda row: row[:2])  # which takes a tenth of the table's own sorting


def plain_score(score: float) -> float:
    """Rounded to four digits of the score, or near 1 of what it lacks: 0.02424, 0.97312, 0.99999905."""
    lacking = min(score, 1 - score)
    return round(float(score), 4 if lacking <= 0 else max(4, 3 - math.floor(math.log10(lacking))))


def jsonl_line(result: Result) -> bytes:
    """{file, duration, tags: [{label, score}], events: [{onset, offset, label, score, threshold}]}, in seconds.

    events: with a time axis alone. warnings: what is odd about the sound, where something is.
    """
    content: dict[str, Any] = {
        "file": result.source.name,
        "duration": round(result.tagged.duration, 6),
        "tags": [{"label": label, "score": round(score, 6)} for label, score in result.tags()],
    }
    if result.events is not None:
        content["events"] = [
            {**row._asdict(), "onset": round(row.onset, 4), "offset": round(row.offset, 4)} for row in result.events
        ]
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
        writer.writerow(
            [table_cell(result.source.name), f"{start:.4f}", f"{end:.4f}", *(f"{score:.6f}" for score in scores)]
        )
    return text.getvalue().encode()


def csv_header(labels: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["file", "start", "end", *map(table_cell, labels)])
    return text.getvalue().encode()


def tab_separated(rows: Iterable[Iterable[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)  # it quotes a name that has a tab in it
    return text.getvalue()


def event_lines(name: str, events: Iterable[EventRow]) -> str:
    """The columns of EVENT_HEADER, of which DCASE's tools read the first four; times in seconds."""
    rows = (
        (f"{e.onset:.4f}", f"{e.offset:.4f}", table_cell(e.label), repr(e.score), f"{e.threshold:.9g}") for e in events
    )
    return tab_separated((table_cell(name), *row) for row in rows)


def audacity_text(result: Result) -> str:
    """Labels for Audacity: onset, offset, and the class with score and threshold, as `dog 0.97 > 0.5`."""
    rows = result.events or []
    return "".join(
        f"{e.onset:.6f}\t{e.offset:.6f}\t{shown(e.label)} {score_text(e.score)} > {score_text(e.threshold)}\n"
        for e in rows
    )


def raven_text(result: Result) -> str:
    """A selection table for Raven: a box over the whole band of the network for each event."""
    rows = (
        (str(number), "Spectrogram 1", "1", f"{e.onset:.4f}", f"{e.offset:.4f}", "0", f"{result.highest_hz:g}",
         table_cell(shown(e.label)), repr(e.score), f"{e.threshold:.9g}", table_cell(shown(result.source.name)))
        for number, e in enumerate(result.events or [], start=1)
    )  # fmt: skip
    return tab_separated([RAVEN_HEADER, *rows])


OF_EACH: dict[str, tuple[str, Callable[[Result], str]]] = {  # flag: ending and content of a recording's own file
    "audacity": (".txt", audacity_text),
    "raven": (".selections.txt", raven_text),
}


def score_block(result: Result) -> memoryview:
    """Clip scores, then those of the frames: (1 + T, K) float32."""
    return np.concatenate([result.tagged.clipwise[None], result.tagged.framewise]).astype("<f4", copy=False).data


def embedding_block(result: Result) -> memoryview:
    """The clip's embedding, then those of the frames where they are wanted: (1 + T, C) or (1, C) float32."""
    frames = result.tagged.frame_embeddings
    clip = result.tagged.embedding[None]
    return (clip if frames is None else np.concatenate([clip, frames])).astype("<f4", copy=False).data


def parquet_values(result: Result) -> memoryview:
    """Clip scores, those of the frames, and the clip's embedding, one behind the other: float32."""
    tagged = result.tagged
    return np.concatenate([tagged.clipwise, tagged.framewise.ravel(), tagged.embedding]).astype("<f4", copy=False).data


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
            "events": (
                tab_separated([EVENT_HEADER]).encode(),
                lambda result: event_lines(result.source.name, result.events or []).encode(),
            ),
            "scores": (b"", score_block),
            "embeddings": (b"", embedding_block),
            "parquet": (b"", parquet_values),
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
        processing, rows = self.postprocessing, None
        if processing is not None:
            rows = event_rows(tagged.events(processing, source.name), processing, self.wanted.min_score)
        result = Result(source, tagged, rows, self.wanted, self.settings.sample_rate / 2)
        lacks = ""
        try:
            write_each(self._own_files(result))
        except UserError as error:
            lacks = str(error)
            print(f"error: {shown(source.name)}: {shown(lacks)}", file=sys.stderr)
        entry = {
            "key": source.key, "name": source.name, "duration": tagged.duration, "frames": len(tagged.framewise),
            "seconds_per_frame": tagged.seconds_per_frame, **({"lacks": lacks} if lacks else {}),
        }  # fmt: skip
        parts = {name: write(result) for name, (_, write) in self.writers.items() if name in self.paths}
        self.journal.add(entry, parts)

    def _own_files(self, result: Result) -> dict[Path, Callable[[Path], object]]:
        """The files of one recording, each with the function that writes it."""

        def draw(path: Path) -> None:
            from inference.pictures import draw_recording  # here: it brings matplotlib

            rows = [row[:3] for row in result.events or []]
            draw_recording(path, result.source.path, result.tagged, rows, self.postprocessing, self.settings)

        def writer(text: Callable[[Result], str]) -> Callable[[Path], object]:
            return lambda path: write_text(path, text(result))

        writers = {name: (ending, writer(text)) for name, (ending, text) in OF_EACH.items()}
        writers["plot"] = (".png", draw)
        place = Path(result.source.place)
        return {
            folder / place.parent / fitting_name(folder, f"{place.name}{ending}"): write
            for name, (ending, write) in writers.items()
            for folder in ([self.paths[name]] if name in self.paths else [])
        }

    def _write(self, journal: Journal) -> None:
        """Make the outputs of the journal."""

        def writer(name: str) -> Callable[[Path], object]:
            if name in ("scores", "embeddings"):
                return lambda path: self._write_arrays(journal, name, path)
            if name == "parquet":
                values = (np.frombuffer(part, "<f4") for part in journal.parts(name))
                return lambda path: write_parquet(path, self.labels, zip(journal.entries, values, strict=True))
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
