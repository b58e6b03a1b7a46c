"""From AudioSet's frame scores to DESED's events: this repository against plain loops, frame by frame.

    python benchmarks/localization.py [--quick] [--json FILE]

692 maps, as many as DESED's public evaluation set has clips. The plain side is the published way, written anew from its
description: for each clip, each of the ten classes and each of the 1,024 frames, the maximum of the class's group, then
the threshold. Its time is proportional to the number of clips: it runs on some, and is extrapolated to all. Both sides
take turns, so that a busy machine slows both. A ratio is the median of the turns' ratios.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.data_stores import seconds
from data.labels import audioset_mids, published_labels
from data.tables import EVENT_COLUMNS
from evaluation.mapping import ClassMapping, load_mapping
from evaluation.postprocess import PostProcessing

STEPS, REPEATS = 32, 32  # HTS-AT's own frames in 10 s, and how often the published map repeats each
CLIP_SECONDS = 10.0


@dataclass(frozen=True)
class Size:
    """The size of a measurement: clips, clips for the plain loops, turns."""

    clips: int
    plain_clips: int
    turns: int


FULL = Size(clips=692, plain_clips=12, turns=5)
QUICK = Size(clips=48, plain_clips=2, turns=2)


@dataclass(frozen=True)
class Result:
    """Median seconds for all clips of either side, median ratio of the turns, target of the ratio."""

    name: str
    plain_seconds: float
    our_seconds: float
    ratio: float
    target: float


def loop_over_frames(maps: np.ndarray, mapping: ClassMapping, thresholds: tuple[float, ...]) -> list[tuple[Any, ...]]:
    """The published way: the mapped score of each frame, and events from where it is above a threshold."""
    found = []
    frame_seconds = CLIP_SECONDS / maps.shape[1]
    for clip in range(len(maps)):
        for label, group in enumerate(mapping.groups):
            members, start = list(group), None
            for frame in range(maps.shape[1]):
                on = np.max(maps[clip][frame][members]) > thresholds[label]
                if on and start is None:
                    start = frame
                elif not on and start is not None:
                    found.append((f"{clip}.wav", start * frame_seconds, frame * frame_seconds, mapping.labels[label]))
                    start = None
            if start is not None:
                found.append((f"{clip}.wav", start * frame_seconds, CLIP_SECONDS, mapping.labels[label]))
    return found


def decode(maps: np.ndarray, mapping: ClassMapping, post: PostProcessing) -> pd.DataFrame:
    """This repository's way: (N, frames, 527) -> the table of events."""
    return post.decode(
        mapping.apply(maps), names=[f"{clip}.wav" for clip in range(len(maps))],
        durations=np.full(len(maps), CLIP_SECONDS), seconds_per_frame=CLIP_SECONDS / maps.shape[1],
    )  # fmt: skip


def random_maps(clips: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """(clips, 32, classes) float32 scores like a network's: mostly low, with runs of high ones."""
    slow = rng.standard_normal((clips, STEPS + 7, classes), dtype=np.float32).cumsum(axis=1)
    smooth = slow[:, 7:] - slow[:, :-7]  # a moving sum: neighbouring steps resemble one another
    return 1 / (1 + np.exp(8 - 2 * smooth))


def compare(size: Size) -> tuple[list[Result], int]:
    """Both ways on the repeated maps, and ours on the distinct steps; returns the number of events as well."""
    labels = published_labels("audioset", 527)
    mapping = load_mapping("published", labels, audioset_mids())
    assert mapping.thresholds is not None
    post = PostProcessing(mapping.labels, mapping.thresholds)
    steps = random_maps(size.clips, len(labels), np.random.default_rng(0))
    repeated = np.repeat(steps, REPEATS, axis=1)

    some = slice(0, size.plain_clips)
    expected = loop_over_frames(repeated[some], mapping, mapping.thresholds)
    for maps in (repeated, steps):
        found = decode(maps[some], mapping, post)[EVENT_COLUMNS].to_numpy().tolist()
        assert [tuple(row) for row in found] == expected

    works: dict[str, tuple[Callable[[], Any], float]] = {
        "1,024 frames": (lambda: decode(repeated, mapping, post), 200.0),
        "32 distinct steps": (lambda: decode(steps, mapping, post), 1000.0),
    }
    plain: list[float] = []
    ours: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(size.turns):
        taken = seconds(lambda: loop_over_frames(repeated[some], mapping, post.thresholds))
        plain.append(taken * size.clips / size.plain_clips)
        for name, (work, _target) in works.items():
            ours[name].append(seconds(work, calls=3))
    results = [
        Result(
            name, statistics.median(plain), statistics.median(taken),
            statistics.median(p / o for p, o in zip(plain, taken, strict=True)), works[name][1],
        )
        for name, taken in ours.items()
    ]  # fmt: skip
    return results, len(decode(steps, mapping, post))


def print_results(results: list[Result], events: int, size: Size) -> None:
    table = Table(title=f"{size.clips} maps of 527 classes -> {events:,} events of 10 classes", title_justify="left")
    for column in ("mapping and events", "loops (s)", "ours (s)", "ratio", "target"):
        table.add_column(column, justify="left" if column.startswith("mapping") else "right")
    for r in results:
        table.add_row(r.name, f"{r.plain_seconds:.2f}", f"{r.our_seconds:.4f}", f"{r.ratio:,.0f}", f"{r.target:,g}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer maps: to see whether it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    results, events = compare(size)
    print_results(results, events, size)
    if arguments.json:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
        content = {"size": asdict(size), "machine": machine, "results": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
