"""Test one network or an ensemble: score the clips, print the metrics, write metrics, scores and ledger."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytorch_lightning as pl

from data.clip_store import ClipTable, open_store, read_events
from data.files import check_writable, sole_writer, write_each, write_json
from data_generator import SEDDataModule, load_test_data
from evaluation.bootstrap import with_interval
from evaluation.mapping import NAMED, ClassMapping
from evaluation.metrics import Metric, class_results
from evaluation.scores import EventList, Scores
from evaluation.tables import write_classes
from model.registry import encoder_titles
from runs.ledger import (
    CheckpointRecord,
    Kind,
    MetricRecord,
    Result,
    append_result,
    check_ledger,
    file_sha256,
    joint_settings_hash,
)
from runs.members import Member
from runs.records import device_name, git_revision, print_first_page, print_metrics
from runs.test_plan import TestPlan, plan_test, reported_split
from sed_model import Evaluation, SEDWrapper
from settings import Config, UserError, place_flags, section
from training.devices import is_first_process
from training.trainer import build_trainer, interruptible


def test_checkpoint(path: str, given: dict[str, Any]) -> None:
    """Print the metrics of a checkpoint and write them, with the scores, into heatmap_dir."""
    test_member(Member.read(path, given))


def test_member(member: Member) -> list[Metric]:
    """Test one checkpoint, as test_checkpoint does; returns the metrics, in the first process only."""
    settings = member.settings
    data = load_test_data(settings)
    table = data.tables[settings.test_split]
    member.check_labels(table)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = member.network()
    print_first_page(
        f"{encoder_titles(settings.encoder)}: test of {member.checkpoint.path}", member.reported(), data, network
    )
    return run_test(SEDWrapper(network, settings, member.labels(table)), data, [member])


def run_test(module: Evaluation, data: SEDDataModule, members: Sequence[Member]) -> list[Metric]:
    """Score the clips of test_split, print the table of metrics, and write <heatmap_dir>/<test_file>.json and .h5.

    The first member's settings count. A line goes into the ledger results_path, but with debug and test_shard, which
    do not score all clips. Returns the metrics, in the first process only. Raises UserError where the files could not
    be written, before the test.
    """
    settings = members[0].settings
    if settings.fl_local and not module.has_frames:
        raise UserError(
            f"fl_local = True needs frame scores, and encoder = {settings.encoder} has no time axis: test without it."
        )
    checkpoints, hashes = [member.checkpoint for member in members], [member.sha256 for member in members]
    plan = plan_test(module, settings, data, checkpoints, hashes, members[0].known_labels)
    whole = plan.complete and not settings.debug
    folder, ledger = Path(settings.heatmap_dir), Path(settings.results_path)
    places = folder / f"{plan.name}.json", folder / f"{plan.name}.h5"
    trainer: pl.Trainer = build_trainer(settings, steps_per_epoch=None)
    with ExitStack() as stack:
        if is_first_process():
            check_writable(f"heatmap_dir = {folder}", *places)
            if whole:
                check_ledger(ledger)
            classes = [folder / f"{plan.name}_{end}" for end in ("classes.tsv", "confusion.tsv", "confusion.png")]
            stack.enter_context(sole_writer(folder / plan.name, *places, *classes, ledger))
        with interruptible(trainer):
            trainer.test(module, data, verbose=False)
        return write_test(module, data, members, plan) if is_first_process() else []


def write_test(module: Evaluation, data: SEDDataModule, members: Sequence[Member], plan: TestPlan) -> list[Metric]:
    """Print the metrics of a test and write its files. Raises UserError after all that can be written."""
    settings, reported = members[0].settings, members[0].reported()
    paths = [str(member.checkpoint.path) for member in members]
    folder, ledger = Path(settings.heatmap_dir), Path(settings.results_path)
    table = data.tables[settings.test_split]
    metrics = with_interval(module.test_metrics, module.test_clipwise, module.test_targets, seed=settings.random_seed)
    scores = collect_scores(module, settings, table, plan)
    encoders = encoder_titles(*(member.settings.encoder for member in members))
    print_metrics(f"{encoders}: {settings.test_split} clips, {', '.join(paths)}", metrics, reported)
    summary = summarize(module, reported, table, metrics, paths, plan.mapping)
    writes: dict[Path, Callable[[Path], object]] = {
        folder / f"{plan.name}.json": lambda path: write_json(path, summary),
        folder / f"{plan.name}.h5": scores.save,
    }
    made: list[Path] = []
    if plan.complete:
        classes, prefix = class_results(module.task, scores.clipwise, scores.targets, scores.labels), folder / plan.name
        writes[Path(f"{prefix}_classes.tsv")] = lambda _: made.extend(write_classes(str(prefix), classes))
    if plan.complete and not settings.debug:
        writes[ledger] = lambda path: append_result(path, test_result(summary, metrics, settings, members))
    write_each(writes)
    print(f"Metrics: {folder / plan.name}.json\nScores: {folder / plan.name}.h5")
    if made:
        print(f"Classes: {', '.join(map(str, made))}")
    if settings.fl_local:
        print(f"Localize: python fl_evaluate.py{place_of_scores(settings)} --report")
    if ledger in writes:
        print(f"Ledger: {ledger}, which `python main.py results{place_flags(settings, 'results_path')}` prints")
    return metrics


def place_of_scores(settings: Config) -> str:
    """The flags that name a score file: the run's name alone, where the file lies where it belongs."""
    own = Path(settings.heatmap_dir) == settings.run_folder / "scores"
    name, folder = shlex.quote(settings.exp_name), shlex.quote(settings.heatmap_dir)
    place = f" --exp_name {name}{place_flags(settings)}" if own else f" --heatmap_dir {folder}"
    return place + ("" if settings.test_file == "test" else f" --test_file {shlex.quote(settings.test_file)}")


def summarize(
    module: Evaluation,
    reported: Config,
    table: ClipTable,
    metrics: Sequence[Metric],
    paths: Sequence[str],
    mapping: Optional[ClassMapping],
) -> dict[str, Any]:
    """The content of <test_file>.json: metrics, the clips and how they were scored."""
    configured = {name: getattr(reported, name) for name in section("front-end")}
    return {
        "metrics": [metric.as_dict() for metric in metrics],
        "dataset_type": reported.dataset_type,
        "split": reported_split(reported),
        "protocol": reported.protocol,
        "checkpoints": list(paths),
        "tta_shifts": module.shifts,
        "class_mapping": mapping_name(mapping),
        "precision": reported.precision,
        "frontend": configured if reported.frontend_from == "settings" else {},
        "data_fingerprint": table.fingerprint(),
        "unreadable_clips": module.not_scored,
        "device": device_name(reported),
        "git_revision": git_revision(),
    }


def mapping_name(mapping: Optional[ClassMapping]) -> Optional[str]:
    """The name of a class mapping; of one in a file, whose content may change, with the start of its SHA-256."""
    if mapping is None:
        return None
    return mapping.name if mapping.name in NAMED else f"{Path(mapping.name).name} {file_sha256(mapping.name)[:8]}"


def test_result(
    summary: dict[str, Any], metrics: Sequence[Metric], settings: Config, members: Sequence[Member]
) -> Result:
    """The ledger's line of a test. Training settings and seed are the checkpoints' own, not those of the test.

    A foreign file has no seed, and so no hash of its training settings.
    """
    seeds: list[Optional[int]] = [(member.checkpoint.settings or {}).get("random_seed") for member in members]
    trained = [
        member.checkpoint.settings if seed is not None else None for member, seed in zip(members, seeds, strict=True)
    ]
    single: Kind = "weight average" if members[0].checkpoint.sources else "single"
    known = [seed for seed in seeds if seed is not None]
    same = {name: summary[name] for name in summary.keys() - {"metrics", "checkpoints"}}
    return Result(
        **same,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kind="ensemble" if len(members) > 1 else single,
        esc_fold=settings.esc_fold if settings.dataset_type == "esc-50" else None,
        clips=metrics[0].clips,
        metrics=[MetricRecord(**metric.as_dict()) for metric in metrics],
        checkpoints=[CheckpointRecord(path=str(m.checkpoint.path), sha256=m.sha256) for m in members],
        settings_hash=joint_settings_hash(trained),
        random_seed=None if len(known) < len(seeds) else known[0] if len(known) == 1 else known,
    )


def collect_scores(module: Evaluation, settings: Config, table: ClipTable, plan: TestPlan) -> Scores:
    """The score store of a test: scores, truth and times of the clips that were scored."""
    chosen = module.test_index
    framewise = module.test_framewise
    clip_seconds = settings.clip_samples / settings.sample_rate
    scored = table.select(chosen)
    durations = clip_durations(scored, clip_seconds)
    return Scores(
        names=[name.decode() for name in scored.names],
        clipwise=module.test_clipwise,
        targets=module.test_targets,
        durations=durations,
        labels=module.labels,
        framewise=framewise,
        seconds_per_frame=clip_seconds / framewise.shape[1] if framewise is not None else 0.0,
        events=clip_events(scored, durations) if framewise is not None else None,
        clip_index=plan.share[chosen],
        attributes={**plan.attributes, "task": module.task},
    )


def clip_durations(table: ClipTable, clip_seconds: float) -> np.ndarray:
    """(N,) seconds of each clip, at most what the network was given."""
    durations = np.full(len(table), clip_seconds)
    for number, path in enumerate(table.paths):
        with open_store(path, "audio_name") as file:
            if "real_len" in file:
                here = table.path_number == number
                durations[here] = file["real_len"][:][table.row[here]] / table.waveform_rate
    return np.minimum(durations, clip_seconds)


def clip_events(table: ClipTable, durations: np.ndarray) -> list[EventList] | None:
    """True events of each clip as far as it was scored, (N,) seconds; None where the data has no times."""
    events = {number: read_events(path) for number, path in enumerate(table.paths)}
    if not any(any(clips) for clips in events.values()):
        return None
    places = zip(table.path_number.tolist(), table.row.tolist(), durations.tolist(), strict=True)
    return [
        [(e.label, e.onset, min(e.offset, end)) for e in events[number][row] if e.onset < end]
        for number, row, end in places
    ]
