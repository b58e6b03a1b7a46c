"""All metrics of detections with their bootstrap intervals: how long `python main.py evaluate` computes.

    python benchmarks/detection_metrics.py [--quick] [--json FILE]

As many clips, events and detections as DESED's public evaluation set gives: 692 clips of 10 s, ten classes. Both kinds
of input: tables of events, and frame scores (with PSDS over all thresholds and its intervals). The times include
reading the files, but not the imports. The target is 30 s; there is no other implementation to compare with.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from evaluation.bootstrap import RESAMPLES
from evaluation.detection import DetectionMetric, compare, measure, with_intervals
from evaluation.postprocess import PostProcessing, truth_table
from evaluation.scores import EventList, Scores
from evaluation.systems import Task, task_of_scores, task_of_tables
from settings import resolve

LABELS = [f"class {k}" for k in range(10)]
STEPS, CLIP_SECONDS = 32, 10.0
DETECTIONS_A_CLIP = 2800 / 692
TARGET_SECONDS = 30.0


@dataclass(frozen=True)
class Timed:
    """Seconds of one kind of input, with what it had."""

    name: str
    clips: int
    true_events: int
    detections: int
    metrics: int
    intervals: int
    seconds: float


def random_scores(clips: int, seed: int, truth: list[EventList] | None = None) -> Scores:
    """Noisy frame scores, higher in events; `truth`: these events instead of random ones."""
    rng = np.random.default_rng(seed)
    events = truth or [
        [
            (int(rng.integers(10)), onset, min(onset + rng.uniform(0.4, 6), CLIP_SECONDS))
            for onset in rng.uniform(0, 9, n)
        ]
        for n in rng.integers(1, 7, clips)
    ]
    framewise = rng.beta(1.2, 8, (clips, STEPS, len(LABELS))).astype(np.float32)
    step = CLIP_SECONDS / STEPS
    for clip, found in enumerate(events):
        for label, onset, offset in found:
            framewise[clip, int(onset / step) : int(np.ceil(offset / step)), label] += rng.normal(0.35, 0.2)
    targets = np.zeros((clips, len(LABELS)), dtype=bool)
    for clip, found in enumerate(events):
        targets[clip, [label for label, _, _ in found]] = True
    framewise = framewise.clip(0, 1)
    return Scores(
        [f"{clip}.wav" for clip in range(clips)], framewise.max(axis=1), targets, np.full(clips, CLIP_SECONDS), LABELS,
        framewise, step, events,
    )  # fmt: skip


def suited(scores: Scores) -> Scores:
    """The scores with the threshold that comes nearest to DETECTIONS_A_CLIP."""
    posts = [PostProcessing(tuple(LABELS), (threshold,)) for threshold in np.arange(0.4, 0.9, 0.02).tolist()]
    missing = [abs(len(scores.decode(p)) - DETECTIONS_A_CLIP * len(scores.names)) for p in posts]
    chosen = posts[int(np.argmin(missing))]
    return replace(scores, attributes={"postprocessing": json.dumps(chosen.as_dict())})


def write_tables(scores: Scores, folder: Path) -> None:
    """truth.tsv, durations.tsv and detections.tsv."""
    assert scores.postprocessing is not None
    true = truth_table(scores.names, scores.true_events(), LABELS)
    true.to_csv(folder / "truth.tsv", sep="\t", index=False)
    scores.decode(scores.postprocessing).to_csv(folder / "detections.tsv", sep="\t", index=False)
    durations = pd.DataFrame({"filename": scores.names, "duration": scores.durations})
    durations.to_csv(folder / "durations.tsv", sep="\t", index=False)


def timed(name: str, build: Callable[[], Task]) -> Timed:
    """Measure the systems of a task, with intervals, and compare them where there are two."""
    begin = time.perf_counter()
    task = build()
    clips = len(task.truth.names)
    measured = [measure(task.truth, system) for system in task.systems]
    metrics: list[DetectionMetric] = with_intervals(measured[0], clips, resamples=RESAMPLES, seed=1)
    if len(measured) > 1:
        compare(measured[0], measured[1], clips, resamples=RESAMPLES, seed=1)
    return Timed(
        name, clips, len(task.truth.table), len(task.systems[0].events), len(metrics),
        sum(len(metric.intervals) for metric in metrics), time.perf_counter() - begin,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the clips: to see whether it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    arguments = parser.parse_args()
    clips, settings = (70 if arguments.quick else 692), resolve({})
    scores = suited(random_scores(clips, seed=1))
    other = suited(random_scores(clips, seed=2, truth=scores.events))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(scores, folder)
        scores.save(folder / "scores.h5")
        other.save(folder / "other.h5")
        tables = (str(folder / "detections.tsv"), folder / "truth.tsv", folder / "durations.tsv")
        results = [
            timed("tables of events", lambda: task_of_tables(*tables, None, settings)),
            timed("frame scores", lambda: task_of_scores(folder / "scores.h5", None, settings)),
            timed(
                "frame scores of two systems, compared",
                lambda: task_of_scores(folder / "scores.h5", str(folder / "other.h5"), settings),
            ),
        ]
    for r in results:
        print(
            f"{r.name}: {r.seconds:.1f} s (target {TARGET_SECONDS:g} s for one system). {r.clips} clips, "
            f"{r.true_events} true events, {r.detections} detections; {r.metrics} metrics, {r.intervals} intervals of "
            f"{RESAMPLES} resamples"
        )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}
        content = {"machine": machine, "results": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
