"""The systems that are evaluated, with their ground truth: from score files, or from tables in DCASE's format."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import pandas as pd

from evaluation.detection import System
from evaluation.event_tables import GroundTruth, check_ends, join_overlapping, read_durations, read_events
from evaluation.postprocess import PostProcessing, choose_postprocessing, truth_table
from evaluation.score_tables import score_tables
from evaluation.scores import Scores, load_scores
from settings import WITH_COMMAS, Config, UserError, split_list

CLIPS = {"audioset-strong": "with_events", "dcase2016-task2": "recordings"}  # fl_clips of a score file's dataset_type


@dataclass
class Task:
    """One system, or two, and their ground truth. about: their files, for the JSON."""

    truth: GroundTruth
    systems: list[System]
    names: list[str]
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def truth_of_scores(scores: Scores) -> GroundTruth:
    """The ground truth in a score store. Raises UserError where it has no true events."""
    table = truth_table(scores.names, scores.true_events(), scores.labels)
    return GroundTruth.build(table, scores.seconds, scores.labels)


def system_of_scores(scores: Scores, post: PostProcessing) -> System:
    """Scores with the events that `post` decodes. Raises UserError where the store has no frame scores."""
    smoothed, step = scores.smooth(post)
    ready = scores if post.interpolation > 1 else replace(scores, framewise=smoothed)
    rest = post if post.interpolation > 1 else replace(post, median_filter=(1,))  # filtered once: it takes longest
    return System(
        events=ready.decode(rest),
        tables=score_tables(
            smoothed, names=scores.names, labels=scores.labels, durations=scores.durations, seconds_per_frame=step
        ),
        clipwise=scores.clipwise,
        targets=scores.targets,
    )


def evaluated_scores(scores: Scores, settings: Config) -> Scores:
    """What is evaluated of a score file, as fl_class_num and fl_clips say; what is left out is printed."""
    if settings.fl_class_num:
        scores = scores.select_classes(settings.fl_class_num)
    how = settings.fl_clips or CLIPS.get(str(scores.attributes.get("dataset_type")), "all")
    if how == "recordings":
        scores = scores.join_recordings()
    if how == "with_events":
        kept = [k for k, events in enumerate(scores.true_events()) if events]
        if len(kept) < len(scores.names):
            print(f"{len(scores.names) - len(kept)} of {len(scores.names)} clips have no events: they are left out.")
            scores = scores.select_clips(kept)
    scores.frame_scores()  # an error in the order of the steps: without frames there is nothing to evaluate
    present = {label for events in scores.true_events() for label, _, _ in events}
    if len(present) < len(scores.labels):
        print(f"{len(present)} of {len(scores.labels)} classes have events; the others are left out of the means.")
    return scores


def task_of_tables(
    detections: str, ground_truth: Path, durations: Path, compare_with: Optional[str], settings: Config
) -> Task:
    """A task of DCASE's tables. Raises UserError for mistakes in them, and for clips without a duration."""
    seconds, true = read_durations(durations), read_events(ground_truth)
    given = [_paths(text) for text in (detections, compare_with) if text is not None]
    points = [[read_events(path) for path in paths] for paths in given]
    if settings.fl_class_num:
        true, points = _only(settings.fl_class_num, true, points)
    everything = pd.concat([true, *(table for tables in points for table in tables)])
    truth = GroundTruth.build(true, seconds, settings.fl_class_num or sorted(set(everything.event_label)))
    check_ends(true, seconds, str(ground_truth))
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
    scores = evaluated_scores(load_scores(path), settings)
    post = choose_postprocessing(scores.postprocessing, scores.labels, settings)
    system, truth = system_of_scores(scores, post), truth_of_scores(scores)
    about: dict[str, Any] = {"scores": str(path), "postprocessing": post.as_dict()}
    task = Task(truth, [system], [str(path)], about, [f"Post-processing: {post.source}."])
    if compare_with is None:
        return task
    task.names.append(compare_with)
    if compare_with.endswith(".h5"):
        other = evaluated_scores(load_scores(Path(compare_with)), settings).select_classes(truth.labels)
        other = other.in_order(truth.names)
        other_post = choose_postprocessing(other.postprocessing, other.labels, settings)
        task.systems.append(system_of_scores(other, other_post))
        task.notes.append(f"Post-processing of {compare_with}: {other_post.source}.")
        about["compared_with"] = {"scores": compare_with, "postprocessing": other_post.as_dict()}
    else:
        table = read_events(Path(compare_with))
        unknown = sorted(set(table.event_label) - set(truth.labels))
        if unknown:
            raise UserError(f"{compare_with} has classes that {path} does not have: {', '.join(unknown)}.")
        task.systems.append(System(table))
        about["compared_with"] = compare_with
    return task


def _paths(text: str) -> list[Path]:
    paths = [Path(part) for part in split_list(text)]
    if not paths:
        raise UserError("No table of detections is given.")
    return paths


def _only(
    labels: Sequence[str], true: pd.DataFrame, points: list[list[pd.DataFrame]]
) -> tuple[pd.DataFrame, list[list[pd.DataFrame]]]:
    """The tables with these classes only. Raises UserError, with their names, for classes without true events."""
    unknown = [label for label in labels if label not in set(true.event_label)]
    if unknown:
        raise UserError(
            f"fl_class_num: {', '.join(unknown)} has no true events; the ground truth has "
            f"{', '.join(sorted(set(true.event_label)))}. {WITH_COMMAS}"
        )
    return true[true.event_label.isin(labels)], [[t[t.event_label.isin(labels)] for t in tables] for tables in points]


def _notes(truth: GroundTruth, system: System, name: str) -> list[str]:
    """Remarks on a table of detections: classes without true events, overlaps, times after the end of a clip."""
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
