"""python main.py predict: the sounds in audio files of any length, in folders, or on standard input."""

import os
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from data.finding import FoundAudio, counted
from data.names import shown, terminal_text
from data.progress import ProgressLines
from inference import Tagged, Tagger
from inference.loading import event_processing, load_tagger
from inference.outputs import STANDARD_INPUT, Outputs, Source, Wanted, best_tags, sources_of
from inference.ray_tagging import RayTagger, ray_tagger
from model.registry import find_checkpoint
from settings import WITH_COMMAS, UserError, close_names, requested, split_list

ENDED_BY_READER = 141  # exit status of a program that SIGPIPE ends, in a shell


def run(
    given: dict[str, Any], files: list[str], runtime: str = "auto", shard: str = "1/1", ray: str = "", **wanted: Any
) -> int:
    """Tag files, print the top_k classes of each, and write the wanted outputs (see inference/outputs.py).

    shard: K/N, the K-th of N shares of the files. ray: local, or the address of a Ray cluster that tags them. A file
    that cannot be read is reported, and the others are tagged. After an interruption the same command resumes.
    Returns the exit status: 1 where any file failed, 141 where standard output was closed. Raises UserError for a
    mistake in what was given.
    """
    path = requested("resume_checkpoint", given)
    chosen = Wanted(**{**wanted, "classes": tuple(dict.fromkeys(split_list(wanted.get("classes", ""))))})
    share, shares = read_shard(shard)
    if chosen.frame_embeddings and runtime == "auto":  # exports have no embeddings of frames
        runtime = "torch"
    tagger = load_tagger({**given, "accelerator": "cpu"} if ray else given, "predict", runtime)
    labels = chosen.classes or tuple(tagger.labels)
    check_classes(labels, tagger.labels)
    chosen = chosen.named(has_frames=tagger.has_frames)
    if shares > 1:
        chosen = chosen.of_share(share, shares)
    if "batch_size" in given:
        tagger.batch_size = tagger.settings.batch_size
    file = find_checkpoint(path)[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        left_out, kinds = FoundAudio(), Counter[str]()
        sources = share_of(collect(files, Path(folder), left_out, by_place=chosen.by_place), share, shares)
        events = chosen.with_events and tagger.has_frames
        processing = event_processing(tagger).for_labels(labels) if events else None
        try:
            with Outputs(
                chosen, labels=labels, settings=tagger.settings, postprocessing=processing, checkpoint=file
            ) as outputs:
                done = outputs.done
                if done:
                    print(f"{len(done)} files were done before the interruption.", file=sys.stderr)
                tagging = stack.enter_context(ray_tagger(ray, given, tagger, runtime)) if ray else tagger
                failed = tag_sources(tagging, [source for source in sources if source.key not in done], outputs, kinds)
                lacking = outputs.lacking
        except BrokenPipeError:  # the reader of standard output, as head, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it again at the end
            return ENDED_BY_READER
    if chosen.paths():
        print(f"Written: {', '.join(chosen.paths().values())}", file=sys.stderr)
    print(summary(len(sources), failed, kinds, left_out), file=sys.stderr)
    if lacking:
        print(f"Labels or pictures of {len(lacking)} files could not be written: {lacking[0]}, ...", file=sys.stderr)
    return 1 if failed or lacking else 0


def summary(files: int, failed: int, kinds: "Counter[str]", left_out: FoundAudio) -> str:
    """How many files were read and how many not, what was odd about them, and what was left out of the folders."""
    lines = [f"{failed} of {files} files could not be read." if failed else f"Files: {files}, all read."]
    if kinds:
        lines.append(f"Warnings: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}.")
    lines += [f"not looked into: {shown(str(path))}: {shown(reason)}" for path, reason in left_out.skipped]
    if left_out.others:
        lines.append(f"Left out: other files: {shown(counted(left_out.others))}.")
    return "\n".join(lines)


def check_classes(chosen: Sequence[str], labels: Sequence[str]) -> None:
    """Raise UserError for a class that the checkpoint does not have."""
    for label in chosen:
        if label not in labels:
            close = close_names(label, labels) or labels[:3]
            raise UserError(
                f"--classes: the checkpoint has no class {label!r}; among its {len(labels)} are {', '.join(close)}. "
                f"{WITH_COMMAS}"
            )


def read_shard(text: str) -> tuple[int, int]:
    """K/N -> which share, and of how many. Raises UserError for anything else."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(
            f"--shard {text} is not allowed: give the number of a share, from 1 on, and how many there are, as 2/4."
        )
    return int(number), int(count)


def share_of(sources: list[Source], number: int, count: int) -> list[Source]:
    """The number-th of `count` shares (from 1). Raises UserError where there are more shares than files."""
    if count > max(1, len(sources)):
        raise UserError(
            f"--shard {number}/{count} is not allowed: at most one share for each of the {len(sources)} files."
        )
    if count > 1:
        print(f"Share {number} of {count}, of {len(sources)} files.", file=sys.stderr)
    return sources[number - 1 :: count]


def tag_sources(tagger: Tagger | RayTagger, sources: list[Source], outputs: Any, kinds: "Counter[str]") -> int:
    """Tag, print and write each recording; returns how many failed. kinds: counts what is odd about sounds."""
    wanted, failed, settings = outputs.wanted, 0, outputs.settings
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(len(sources)))
        tagging = tagger.tag_files(
            (source.path for source in sources), frame_embeddings=wanted.frame_embeddings, progress=bar.advance
        )
        stack.enter_context(closing(tagging))  # at once where the run is interrupted: it has threads
        for source, (_, found) in zip(sources, tagging, strict=True):
            bar.next_file()
            if isinstance(found, UserError):
                reason = str(found).replace(str(source.path), source.name)
                reason = reason if source.name in reason else f"{source.name}: {reason}"
                print(f"error: {terminal_text(reason)}", file=sys.stderr)
                failed += 1
                continue
            if wanted.classes:
                found = found.select_classes(wanted.classes)
            print_tags(source.name, found, wanted)
            for remark in found.remarks:
                print(f"warning: {shown(source.name)}: {remark.text}", file=sys.stderr)
                kinds[remark.kind] += 1
            if wanted.bins is not None:
                window = settings.clip_samples / settings.sample_rate
                found = found.in_bins(window / wanted.bins, wanted.bins_by)
            outputs.add(source, found)
    return failed


def print_tags(name: str, tagged: Tagged, wanted: Wanted) -> None:
    tags = [f"  {score:.3f}  {shown(label)}" for label, score in best_tags(tagged, wanted)]
    found = ["  silent"] if tagged.silent else tags
    print("\n".join([f"{shown(name)} ({tagged.duration:.2f} s)", *found]), flush=True)


def collect(files: list[str], folder: Path, left_out: FoundAudio, *, by_place: bool) -> list[Source]:
    """The recordings that were given. Standard input (-) and pipes are copied into files of `folder`.

    left_out: see sources_of. by_place: whether each writes a file of its own. Raises UserError where two of these files
    have one name.
    """
    read_once = [name for name in dict.fromkeys(files) if name == STANDARD_INPUT or is_pipe(name)]
    sources = list(sources_of([name for name in files if name not in read_once], left_out))
    for name in read_once:
        kept = folder / ("standard_input" if name == STANDARD_INPUT else f"pipe_{Path(name).name}")
        with kept.open("wb") as file:
            if name == STANDARD_INPUT:
                shutil.copyfileobj(sys.stdin.buffer, file)
            else:
                with open(name, "rb") as pipe:
                    shutil.copyfileobj(pipe, file)
        sources.append(Source(kept, name, kept.name, copied=True))
    places: dict[str, str] = {}
    for source in sources if by_place else ():
        other = places.setdefault(source.place, source.name)
        if other != source.name:
            raise UserError(
                f"{other} and {source.name} would both write {source.place}: give the folder that holds both instead."
            )
    return sources


def is_pipe(name: str) -> bool:
    """Whether a path can be read only once, as <(...) of a shell."""
    try:
        return stat.S_ISFIFO(os.stat(name).st_mode)
    except (OSError, ValueError):
        return False


class Bar:
    """Progress of a run: a line every ten seconds, for pipes and log files."""

    def __init__(self, files: int) -> None:
        self.files, self.done, self.seconds = files, 0, 0.0
        self.lines = ProgressLines()

    def advance(self, seconds: float) -> None:
        """So many more seconds of sound have been scored."""
        self.seconds += seconds
        self.show()

    def next_file(self) -> None:
        """A file is done."""
        self.done += 1
        self.show()

    def show(self) -> None:
        self.lines.show(f"{self.done} of {self.files} files, {self.shown_seconds()} of sound")

    def shown_seconds(self) -> str:
        """Hours, minutes, seconds."""
        whole = int(self.seconds)
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextmanager
def progress_bar(files: int) -> Iterator[Bar]:
    """A bar over the files on a terminal, with the duration that was scored so far; elsewhere lines."""
    if not sys.stderr.isatty():
        yield Bar(files)
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
        super().__init__(files)
        self.progress = progress
        self.task = progress.add_task(self.shown_seconds(), total=files)

    def show(self) -> None:
        self.progress.update(self.task, description=self.shown_seconds(), completed=self.done)
