"""python main.py evaluate: the metrics of any system's detections, or of a score file, with intervals."""

from pathlib import Path
from typing import Any, Optional

from data.files import check_writable
from evaluation.bootstrap import RESAMPLES
from evaluation.detection import compare, measure, with_intervals
from evaluation.systems import Task, task_of_scores, task_of_tables
from evaluation.tables import print_comparison, print_metrics, write_results
from settings import UserError, resolve

FEWEST_RESAMPLES = 20  # fewer have no 2.5 % at either end


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
    compare_with: a second system, given in the same way (with scores also as a TSV). Raises UserError for missing and
    contradicting inputs.
    """
    settings = resolve(given)
    if resamples < FEWEST_RESAMPLES:
        raise UserError(
            f"resamples = {resamples} is not allowed: give {FEWEST_RESAMPLES} or more, such as {RESAMPLES}."
        )
    if output is not None:
        check_writable(f"--output {output}", f"{output}_metrics.json", f"{output}_metrics.tsv")
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
    """Measure the systems of a task; print the metrics, and write them where `output` says."""
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
