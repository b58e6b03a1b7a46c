"""python main.py evaluate: the metrics of anybody's detections, or of a score file, by name and with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pandas as pd

from evaluation.bootstrap import RESAMPLES
from evaluation.detection import System, compare, measure, with_intervals
from evaluation.event_tables import GroundTruth, join_overlapping, read_durations, read_events
from evaluation.scores import Scores, load_scores
from evaluation.tables import (
    choose_postprocessing,
    print_comparison,
    print_metrics,
    system_of_scores,
    truth_of_scores,
    write_results,
)
from settings import Config, UserError, resolve

FEWEST_RESAMPLES = 20  # fewer have no 2.5 % at either end


@dataclass
class Task:
    """What is to be evaluated: one system, or two, against one ground truth. about: what the JSON says of them."""

    truth: GroundTruth
    systems: list[System]
    names: list[str]
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def run(
    given: dict[str, Any],
    detections: Optional[str] = None,
    ground_truth: Optional[str] = None,
    durations: Optional[str] = None,
    scores: Optional[str] = None,
    compare_with: Optional[str] = None,
    resamples: int = RESAMPLES,
    output: Optional[str] = None,
) -> None:
    """Print all metrics, and write them to <output>_metrics.json and <output>_metrics.tsv.

    Either detections (a TSV, or several for more operating points), ground_truth and durations, or a score file.
    compare_with: a second system, given as the first (or, beside scores, a TSV). Raises UserError for what is missing
    or does not fit.
    """
    settings = resolve(given)
    if resamples < FEWEST_RESAMPLES:
        raise UserError(f"resamples = {resamples} is not allowed: give {FEWEST_RESAMPLES} or more, as {RESAMPLES}.")
    tables = {"--detections": detections, "--ground_truth": ground_truth, "--durations": durations}
    missing = [flag for flag, value in tables.items() if value is None]
    if scores is not None and len(missing) < len(tables):
        raise UserError(f"Give either --scores, or {', '.join(tables)}: a score file brings its own ground truth.")
    if scores is not None:
        task = task_of_scores(Path(scores), compare_with, settings)
    elif missing:
        raise UserError(
            f"evaluate lacks {', '.join(missing)}: give {', '.join(tables)}, or --scores with a score file."
        )
    else:
        task = task_of_tables(str(detections), Path(str(ground_truth)), Path(str(durations)), compare_with, settings)
    report(task, resamples, settings.random_seed, output)


def report(task: Task, resamples: int, seed: int, output: Optional[str]) -> None:
    """Measure the systems of a task, print and write what comes out."""
    clips = len(task.truth.names)
    measured = [measure(task.truth, system) for system in task.systems]
    metrics = with_intervals(measured[0], clips, resamples=resamples, seed=seed)
    title = f"{task.names[0]}: {len(task.systems[0].events)} events, {len(task.truth.table)} true ones, {clips} clips"
    print_metrics(title, metrics, task.truth.labels)
    compared = compare(measured[0], measured[1], clips, resamples=resamples, seed=seed) if len(measured) > 1 else []
    if compared:
        print_comparison((task.names[0], task.names[1]), compared)
    for note in [*task.notes, *(f"{m.name} ({m.criterion}): {m.note}" for m in metrics if m.note)]:
        print(f"note: {note}")
    if output is not None:
        about = {**task.about, "clips": clips, "resamples": resamples, "random_seed": seed, "notes": task.notes}
        print(f"Written: {', '.join(str(path) for path in write_results(output, about, metrics, compared))}")


def task_of_tables(
    detections: str, ground_truth: Path, durations: Path, compare_with: Optional[str], settings: Config
) -> Task:
    """A task of DCASE's tables. Raises UserError for tables that are wrong, and clips without a duration."""
    seconds, true = read_durations(durations), read_events(ground_truth)
    given = [_paths(text) for text in (detections, compare_with) if text is not None]
    points = [[read_events(path) for path in paths] for paths in given]
    if settings.fl_class_num:
        true, points = _only(settings.fl_class_num, true, points)
    everything = pd.concat([true, *(table for tables in points for table in tables)])
    truth = GroundTruth.build(true, seconds, settings.fl_class_num or sorted(set(everything.event_label)))
    task = Task(
        truth,
        [System(first, tuple(more)) for first, *more in points],
        [str(paths[0]) for paths in given],
        {
            "detections": [str(path) for path in given[0]],
            "compared_with": [str(path) for path in given[1]] if len(given) > 1 else [],
            "ground_truth": str(ground_truth),
            "durations": str(durations),
        },
    )
    if len(true) > len(truth.table):
        task.notes.append(f"{len(true) - len(truth.table)} overlapping true events of one class were joined.")
    if len(points[0]) > 1:
        task.notes.append(f"All but PSDS is of the first table, {given[0][0]}.")
    task.notes += [
        note for name, system in zip(task.names, task.systems, strict=True) for note in _notes(truth, system, name)
    ]
    return task


def task_of_scores(path: Path, compare_with: Optional[str], settings: Config) -> Task:
    """A task of a score file, with the post-processing stored or set. Raises UserError where parts are missing."""
    scores = _chosen_classes(load_scores(path), settings)
    post = choose_postprocessing(scores, settings)
    system, truth = system_of_scores(scores, post, scores.names), truth_of_scores(scores)
    about: dict[str, Any] = {"scores": str(path), "postprocessing": post.as_dict()}
    task = Task(truth, [system], [str(path)], about)
    task.notes.append(f"Post-processing: {post.source}.")
    if compare_with is None:
        return task
    if compare_with.endswith(".h5"):
        other = load_scores(Path(compare_with)).select_classes(truth.labels)
        other_post = choose_postprocessing(other, settings)
        task.systems.append(system_of_scores(other, other_post, truth.names))
        task.notes.append(f"Post-processing of {compare_with}: {other_post.source}.")
        about["compared_with"] = {"scores": compare_with, "postprocessing": other_post.as_dict()}
    else:
        table = read_events(Path(compare_with))
        unknown = sorted(set(table.event_label) - set(truth.labels))
        if unknown:
            raise UserError(f"{compare_with} has classes that {path} does not know: {', '.join(unknown)}.")
        task.systems.append(System(table))
        about["compared_with"] = compare_with
    task.names.append(compare_with)
    return task


def _paths(text: str) -> list[Path]:
    paths = [Path(part.strip()) for part in text.split(",") if part.strip()]
    if not paths:
        raise UserError("No table of detections is given.")
    return paths


def _only(
    labels: Sequence[str], true: pd.DataFrame, points: list[list[pd.DataFrame]]
) -> tuple[pd.DataFrame, list[list[pd.DataFrame]]]:
    """The tables with some of the classes alone. Raises UserError for classes that are never true."""
    unknown = [label for label in labels if label not in set(true.event_label)]
    if unknown:
        raise UserError(
            f"fl_class_num: {', '.join(unknown)} has no true events; the ground truth has "
            f"{', '.join(sorted(set(true.event_label)))}."
        )
    return true[true.event_label.isin(labels)], [[t[t.event_label.isin(labels)] for t in tables] for tables in points]


def _chosen_classes(scores: Scores, settings: Config) -> Scores:
    return scores.select_classes(settings.fl_class_num) if settings.fl_class_num else scores


def _notes(truth: GroundTruth, system: System, name: str) -> list[str]:
    """What a reader of a table of detections should know of it."""
    table, notes = system.events, []
    never = table.event_label[~table.event_label.isin(truth.present)].value_counts().sort_index()
    if len(never):
        named = ", ".join(f"{label} ({count})" for label, count in never.items())
        notes.append(
            f"{name} detects classes that are never true: {named}. They are false positives of the micro values."
        )
    joined = len(table) - len(join_overlapping(table))
    if joined:
        notes.append(f"{joined} overlapping detections of one class in {name} were joined.")
    late = int((table.onset >= table.filename.map(truth.seconds)).sum())
    if late:
        notes.append(f"{late} detections in {name} begin behind the end of their clip.")
    return notes
