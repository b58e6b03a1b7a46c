"""python main.py calibrate: thresholds, filters and minimum durations from validation clips, kept in the checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.console import Console
from rich.table import Table

from data.clip_store import ClipTable, read_events
from data.files import sole_writer
from data.labels import AUDIOSET_CLASSES
from data.names import markup, score_text
from data_generator import load_test_data
from evaluation.calibration import Calibrated, Objective, calibrate
from evaluation.postprocess import PostProcessing
from evaluation.scores import Scores, load_scores
from model.checkpoint import Checkpoint, read_checkpoint, store_in_checkpoint
from runs.ledger import file_sha256
from runs.members import Member
from runs.test_plan import reported_split, weights_id
from runs.testing import test_member
from settings import UserError, requested
from training.devices import is_first_process

UNCALIBRATED = "uncalibrated_sha256"  # entry of a checkpoint: of its file before it was calibrated
REPORTED = "test"  # the split whose figures are reported: nothing is chosen on it


def run(given: dict[str, Any], calibrate_for: Objective, scores: Optional[str] = None) -> None:
    """Search on the validation clips what raises the metric `calibrate_for`, and store it in --resume_checkpoint.

    scores: a score file of these clips; without it they are scored first. fl_interpolation and fl_maximum_gap are kept
    as the settings have them. Raises UserError where the clips would be those that are reported.
    """
    path = requested("resume_checkpoint", given)
    if path is None:
        raise UserError("calibrate needs a checkpoint, which keeps what is found: --resume_checkpoint PATH.")
    checkpoint = read_checkpoint(path)
    file = Path(scores) if scores else _score_validation(path, given)
    if not is_first_process():
        return
    with sole_writer(checkpoint.path):
        found = load_scores(file)
        _check_split(found, file)
        _check_network(found, file, checkpoint)
        fitted = calibrate(found, calibrate_for, _start(found, given, calibrated=checkpoint.postprocessing is not None))
        before = checkpoint.content.get(UNCALIBRATED) or file_sha256(checkpoint.path)
        store_in_checkpoint(checkpoint.path, **{"postprocessing": fitted.post.as_dict(), UNCALIBRATED: before})
    print_calibrated(fitted, calibrate_for, len(found.names))
    print(f"Stored in {checkpoint.path}: test puts it into its score file, and fl_evaluate.py uses it.")


def _start(scores: Scores, given: dict[str, Any], *, calibrated: bool) -> PostProcessing:
    """What the search begins with: the thresholds of a mapping, or the default, but nothing that was calibrated."""
    start = (None if calibrated else scores.postprocessing) or PostProcessing(tuple(scores.labels))
    interpolation, gap = requested("fl_interpolation", given), requested("fl_maximum_gap", given)
    return replace(
        start,
        interpolation=start.interpolation if interpolation is None else interpolation,
        maximum_gap=tuple(gap) or start.maximum_gap,
    )


def _score_validation(path: str, given: dict[str, Any]) -> Path:
    """Score the validation clips (or those of --test_split) into <heatmap_dir>/calibration.h5."""
    split = given.get("test_split", "validation")
    chosen = {**given, "test_split": split, "fl_local": True, "test_file": "calibration", "test_shard": []}
    member = Member.read(path, chosen)
    settings = member.settings
    if reported_split(settings) == REPORTED:
        raise UserError(
            f"calibrate was asked to choose on the split {split} (protocol {settings.protocol}), which are the clips "
            f"that a test reports: choose on others, with --test_split validation and protocol held_out."
        )
    check_event_times(load_test_data(settings).tables[settings.test_split])
    # As before it was calibrated: again, the same scores and the same line in the ledger.
    before = member.checkpoint.content.get(UNCALIBRATED, member.sha256)
    test_member(replace(member, sha256=before, checkpoint=replace(member.checkpoint, postprocessing=None)))
    return Path(settings.heatmap_dir) / "calibration.h5"


def check_event_times(table: ClipTable) -> None:
    """Raise UserError where no clip of a table has an event: without times there is nothing to calibrate on."""
    for number, path in enumerate(table.paths):
        events = read_events(path)
        if any(events[row] for row in table.row[table.path_number == number].tolist()):
            return
    raise UserError(
        f"calibrate needs clips with event times, and none of the {len(table)} in {', '.join(map(str, table.paths))} "
        f"has any: prepare the data with a table of onsets and offsets, as docs/data.md shows."
    )


def _check_split(scores: Scores, file: Path) -> None:
    split = scores.attributes.get("split", REPORTED)
    if split == REPORTED:
        raise UserError(
            f"{file} holds scores of the test clips (or does not say of which), and those are to be reported: score "
            f"the validation clips, with test --test_split validation --fl_local True, or leave --scores out."
        )


def _check_network(scores: Scores, file: Path, checkpoint: Checkpoint) -> None:
    """Raise UserError where a score file is known to come from another network than the checkpoint's.

    A file that records no weights, as earlier versions wrote them, is known by its classes; those of AudioSet's
    network may have been mapped to others.
    """
    recorded, known = scores.attributes.get("weights"), checkpoint.labels
    if recorded is not None:
        reason = "" if recorded == weights_id([checkpoint]) else "was written by a test of other weights than those of"
    elif known is not None and len(known) != AUDIOSET_CLASSES and set(known) != set(scores.labels):
        other = sorted(set(known) ^ set(scores.labels))[:4]
        reason = f"has other classes ({', '.join(other)} are in one of them only) than"
    else:
        reason = ""
    if reason:
        raise UserError(
            f"{file} {reason} {checkpoint.path}: leave --scores out, and its validation clips are scored, or score "
            f"them with test --test_split validation --fl_local True."
        )


def print_calibrated(fitted: Calibrated, objective: str, clips: int) -> None:
    """A table with a line for each class: what was chosen, and the metric on the same clips before and after."""
    measured = "area under the PSD-ROC" if objective == "psds1" else objective
    table = Table(title=f"{fitted.post.source.capitalize()} ({clips})", title_justify="left", caption_justify="left")
    table.caption = f"before, after: {measured}, on these clips, which it was chosen for"
    for column in ("class", "threshold", "its logit", "filter (frames)", "shortest event (s)", "before", "after"):
        table.add_column(column, justify="left" if column == "class" else "right")
    post = fitted.post
    columns = (post.labels, post.thresholds, post.median_filter, post.minimum_duration)
    for label, threshold, length, seconds in zip(*columns, strict=True):
        values = (fitted.before[label], fitted.after[label])
        numbers = ("-" if np.isnan(value) else f"{value:.3f}" for value in values)
        logit = f"{np.log(threshold / (1 - threshold)):.2f}" if 0 < threshold < 1 else "-"
        last, cells = label == post.labels[-1], (score_text(threshold), logit, str(length), f"{seconds:.1f}")
        table.add_row(markup(label), *cells, *numbers, end_section=last)
    means = (f"{np.nanmean(list(values.values())):.3f}" for values in (fitted.before, fitted.after))
    table.add_row("macro", "", "", "", "", *means)
    Console().print(table)
