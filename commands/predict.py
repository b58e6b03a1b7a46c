"""python main.py predict: the sounds in audio files of any length, in folders, or on standard input."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.files import AUDIO_SUFFIXES
from inference import Tagged, Tagger
from inference.loading import event_processing, load_tagger
from inference.outputs import STANDARD_INPUT, Outputs, Source, Wanted, sources_of
from model.registry import find_checkpoint
from settings import UserError, requested

ENDED_BY_READER = 141  # exit status of a program that SIGPIPE ends, in a shell


def run(given: dict[str, Any], files: list[str], runtime: str = "auto", **wanted: Any) -> int:
    """Tag files, print the top_k classes of each, and write the wanted outputs (see inference/outputs.py).

    A file that cannot be read is reported, and the others are tagged. After an interruption the same command resumes.
    Returns the exit status: 1 where any file failed, 141 where standard output was closed. Raises UserError for a
    mistake in what was given.
    """
    path = requested("resume_checkpoint", given)
    if path is not None:  # else load_tagger asks for one
        check_runtime(runtime, path)
    chosen = Wanted(**wanted)
    tagger = load_tagger(given, "predict")
    if not tagger.has_frames:
        chosen.check_time_axis()
    if "batch_size" in given:
        tagger.batch_size = tagger.settings.batch_size
    file = find_checkpoint(path)[0]
    with tempfile.TemporaryDirectory() as folder:
        sources = collect(files, Path(folder), by_place=bool(chosen.audacity or chosen.plot))
        processing = event_processing(tagger) if chosen.with_events and tagger.has_frames else None
        try:
            with Outputs(
                chosen, labels=tagger.labels, settings=tagger.settings, postprocessing=processing, checkpoint=file
            ) as outputs:
                done = outputs.done
                if done:
                    print(f"{len(done)} files were done before the interruption.", file=sys.stderr)
                failed = tag_sources(tagger, [source for source in sources if source.key not in done], outputs)
        except BrokenPipeError:  # the reader of standard output, as head, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it again at the end
            return ENDED_BY_READER
    if chosen.paths():
        print(f"Written: {', '.join(chosen.paths().values())}", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(sources)} files could not be read.", file=sys.stderr)
    return 1 if failed else 0


def check_runtime(runtime: str, path: str) -> None:
    """Raise UserError where the file is not for the runtime."""
    if runtime not in ("auto", "torch", "onnx"):
        raise UserError(f"--runtime {runtime} is not allowed: give auto, torch or onnx.")
    exported = path.endswith(".onnx")
    if runtime == "onnx" and not exported:
        raise UserError(
            f"--runtime onnx needs an exported network: `python main.py export --resume_checkpoint {path}` writes "
            f"model.onnx and model-int8.onnx, which --resume_checkpoint then names."
        )
    if runtime == "torch" and exported:
        raise UserError(f"{path} is run by onnxruntime: for --runtime torch give the checkpoint that it came from.")


def tag_sources(tagger: Tagger, sources: list[Source], outputs: Any) -> int:
    """Tag, print and write each recording; returns how many failed."""
    wanted, failed = outputs.wanted, 0
    with progress_bar(len(sources)) as bar:
        tagging = tagger.tag_files(
            (source.path for source in sources), frame_embeddings=wanted.frame_embeddings, progress=bar.advance
        )
        for source, (_, found) in zip(sources, tagging, strict=True):
            bar.next_file()
            if isinstance(found, UserError):
                reason = str(found).replace(str(source.path), source.name)
                print(f"error: {reason if source.name in reason else f'{source.name}: {reason}'}", file=sys.stderr)
                failed += 1
                continue
            print_tags(source.name, found, wanted.top_k)
            if wanted.bins is not None:
                window = tagger.settings.clip_samples / tagger.settings.sample_rate
                found = found.in_bins(window / wanted.bins, wanted.bins_by)
            outputs.add(source, found)
    return failed


def print_tags(name: str, tagged: Tagged, count: int) -> None:
    lines = [f"{name} ({tagged.duration:.2f} s)", *(f"  {score:.3f}  {label}" for label, score in tagged.top(count))]
    print("\n".join(lines), flush=True)


def collect(files: list[str], folder: Path, *, by_place: bool) -> list[Source]:
    """The recordings that were given. Standard input (-) is copied into a file of `folder`.

    by_place: whether each writes a file of its own. Raises UserError where two of these files have one name.
    """
    sources = list(sources_of([name for name in files if name != STANDARD_INPUT], AUDIO_SUFFIXES))
    if STANDARD_INPUT in files:
        kept = folder / "standard_input"
        with kept.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        sources.append(Source(kept, STANDARD_INPUT, kept.name))
    places: dict[str, str] = {}
    for source in sources if by_place else ():
        other = places.setdefault(source.place, source.name)
        if other != source.name:
            raise UserError(
                f"{other} and {source.name} would both write {source.place}: give the folder that holds both instead."
            )
    return sources


class Bar:
    """Progress of a run: nothing here, for pipes and log files."""

    def advance(self, seconds: float) -> None:
        """So many more seconds of sound have been scored."""

    def next_file(self) -> None:
        """A file is done."""


@contextmanager
def progress_bar(files: int) -> Iterator[Bar]:
    """A bar over the files on a terminal, with the duration that was scored so far; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("files, {task.description} of sound"), TimeElapsedColumn())
    # What is printed to a terminal goes above the bar; what goes into a pipe stays there.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
    ) as progress:
        yield _Rich(progress, files)


class _Rich(Bar):
    def __init__(self, progress: Any, files: int) -> None:
        self.progress, self.seconds = progress, 0.0
        self.task = progress.add_task("0:00:00", total=files)

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        whole = int(self.seconds)
        shown = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        self.progress.update(self.task, description=shown)

    def next_file(self) -> None:
        self.progress.advance(self.task)
