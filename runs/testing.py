"""What test, esm_test and weight_average share: score the test clips, print, and write metrics and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytorch_lightning as pl

from data.clip_store import ClipTable, open_store, read_events
from data.labels import published_labels
from data_generator import SEDDataModule
from evaluation.mapping import NAMED, ClassMapping
from evaluation.metrics import Metric, with_interval
from evaluation.scores import EventList, Scores
from model import build_model
from model.checkpoint import Checkpoint, decided_settings, load_network, read_checkpoint
from model.encoders.htsat import HTSAT_Swin_Transformer
from runs.ledger import (
    CheckpointRecord,
    Kind,
    MetricRecord,
    Result,
    append_result,
    check_ledger,
    file_sha256,
    joint_settings_hash,
    make_folder,
)
from runs.records import (
    device_name,
    git_revision,
    is_first_process,
    print_first_page,
    print_metrics,
    write_json,
)
from runs.test_plan import TestPlan, class_mapping, plan_test, reported_split
from sed_model import Evaluation, SEDWrapper
from settings import FRONTEND_SETTINGS, Config, UserError, requested, resolve
from training.performance import settle
from training.trainer import build_trainer, interruptible

DEFAULT_TEST_FILE = "test"  # of config.py


def checkpoint_labels(checkpoint: Checkpoint, settings: Config) -> list[str]:
    """The classes of a checkpoint: its own, or those of the published one where it carries none."""
    return checkpoint.labels or published_labels(settings.dataset_type, settings.classes_num)


def check_labels(checkpoint: Checkpoint, settings: Config, table: ClipTable) -> None:
    """Raise UserError where a checkpoint and the data name their classes differently."""
    known = checkpoint_labels(checkpoint, settings)
    if class_mapping(known, settings, table) is not None:
        return
    if table.labels and known != table.labels and known[0] != "class 0":
        differing = [pair for pair in zip(known, table.labels, strict=False) if pair[0] != pair[1]]
        raise UserError(
            f"{checkpoint.path} knows other classes than {table.paths[0]} has: {len(known)} against "
            f"{len(table.labels)}, first difference {differing[:1]}. Set --dataset_type or --dataset_path, or prepare "
            f"the data with the checkpoint's order of labels."
        )


@dataclass(frozen=True)
class Member:
    """A checkpoint to test, with the settings of its network.

    sha256: of the file as it was when it was read. protocol: held_out, paper, or unknown, of a foreign file.
    """

    checkpoint: Checkpoint
    settings: Config
    sha256: str
    protocol: str

    @classmethod
    def read(cls, path: str, given: dict[str, Any]) -> "Member":
        """Raises UserError where the file cannot be used or does not fit what is given."""
        checkpoint = read_checkpoint(path)
        sha256 = file_sha256(path)
        decided = decided_settings(checkpoint, requested("frontend_from", given))
        settings, _ = settle(resolve(given, checkpoint=decided), training=False)
        settings = settings.model_copy(update={"heatmap_dir": score_folder(checkpoint, settings, given)})
        return cls(checkpoint, settings, sha256, known_protocol(checkpoint, settings, given))

    def network(self) -> HTSAT_Swin_Transformer:
        """The network with the checkpoint's weights; what was loaded is printed."""
        network = build_model(self.settings)
        configured = self.settings.model_dump()
        report = load_network(
            network, self.checkpoint, frontend_from=self.settings.frontend_from, configured=configured
        )
        if is_first_process():
            print(report)
        return network

    def labels(self, table: ClipTable) -> list[str]:
        """The names of the classes: the checkpoint's, those of the published one, the data's, or numbers."""
        known = checkpoint_labels(self.checkpoint, self.settings)
        return table.labels or known if known[0] == "class 0" else known

    def reported(self) -> Config:
        """The settings with the protocol as it is known, to be printed."""
        return self.settings.model_copy(update={"protocol": self.protocol})

    def named(self, name: str, given: dict[str, Any]) -> "Member":
        """With another default of test_file, so that tests of different kinds leave one another's files alone."""
        if "test_file" in given or self.settings.test_file != DEFAULT_TEST_FILE:
            return self
        return replace(self, settings=self.settings.model_copy(update={"test_file": name}))


def known_protocol(checkpoint: Checkpoint, settings: Config, given: dict[str, Any]) -> str:
    """The protocol behind a checkpoint: its own, or the given one; else paper for a published HTS-AT, or unknown."""
    if "protocol" in given or "protocol" in (checkpoint.settings or {}):
        return str(settings.protocol)
    return "paper" if checkpoint.kind == "published HTS-AT" else "unknown"


def score_folder(checkpoint: Checkpoint, settings: Config, given: dict[str, Any]) -> str:
    """heatmap_dir; of a file that belongs to no run <workspace>/runs/<its name>/scores, unless a place is given.

    Otherwise it would be the folder of the run that exp_name happens to name.
    """
    belongs = "exp_name" in (checkpoint.settings or {})
    chosen = bool(given.keys() & {"heatmap_dir", "exp_name"})
    if belongs or chosen or Path(settings.heatmap_dir) != settings.run_folder / "scores":
        return str(settings.heatmap_dir)
    return str(Path(settings.workspace) / "runs" / checkpoint.path.stem / "scores")


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """`name a against b` for each setting that both have, and have differently."""
    both = [name for name in names if name in ours and name in theirs]
    return [f"{name} {ours[name]} against {theirs[name]}" for name in both if ours[name] != theirs[name]]


def test_checkpoint(path: str, given: dict[str, Any]) -> None:
    """Print the metrics of a checkpoint and write them, with the scores, into heatmap_dir."""
    test_member(Member.read(path, given))


def test_member(member: Member) -> list[Metric]:
    """Test one checkpoint, as test_checkpoint does; returns the metrics, in the first process only."""
    settings = member.settings
    data = SEDDataModule(settings, (settings.test_split,))
    table = data.tables[settings.test_split]
    check_labels(member.checkpoint, settings, table)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = member.network()
    print_first_page(f"HTS-AT: test of {member.checkpoint.path}", member.reported(), data, network)
    return run_test(SEDWrapper(network, settings, member.labels(table)), data, [member])


def run_test(module: Evaluation, data: SEDDataModule, members: Sequence[Member]) -> list[Metric]:
    """Score the clips of test_split, print the table of metrics, and write <heatmap_dir>/<test_file>.json and .h5.

    The first member's settings count. A line goes into the ledger results_path, but with debug and test_shard, which
    do not score all clips. Returns the metrics, in the first process only. Raises UserError where the files could not
    be written, before the test.
    """
    settings, reported = members[0].settings, members[0].reported()
    paths = [str(member.checkpoint.path) for member in members]
    plan = plan_test(module, settings, data, paths, checkpoint_labels(members[0].checkpoint, settings))
    whole = plan.complete and not settings.debug
    folder, ledger = Path(settings.heatmap_dir), Path(settings.results_path)
    if is_first_process():
        make_folder(folder, "heatmap_dir", folder)
        if whole:
            check_ledger(ledger)
    trainer: pl.Trainer = build_trainer(settings, steps_per_epoch=None)
    with interruptible(trainer):
        trainer.test(module, data, verbose=False)
    if not is_first_process():
        return []
    table = data.tables[settings.test_split]
    metrics = with_interval(module.test_metrics, module.test_clipwise, module.test_targets, seed=settings.random_seed)
    summary = summarize(module, reported, table, metrics, paths)
    write_json(folder / f"{plan.name}.json", summary)
    collect_scores(module, settings, table, plan).save(folder / f"{plan.name}.h5")
    print_metrics(f"HTS-AT: {settings.test_split} clips, {', '.join(paths)}", metrics, reported)
    print(f"Metrics: {folder / plan.name}.json\nScores: {folder / plan.name}.h5")
    if settings.fl_local:
        print(f"Localize: python fl_evaluate.py --heatmap_dir {folder} --test_file {settings.test_file}")
    if whole:
        append_result(ledger, test_result(summary, metrics, settings, members))
        print(f"Ledger: {ledger}, which `python main.py results` prints")
    return metrics


def summarize(
    module: Evaluation, reported: Config, table: ClipTable, metrics: Sequence[Metric], paths: Sequence[str]
) -> dict[str, Any]:
    """What <test_file>.json says: metrics, and on what and how they were measured."""
    configured = {name: getattr(reported, name) for name in FRONTEND_SETTINGS}
    return {
        "metrics": [metric.as_dict() for metric in metrics],
        "dataset_type": reported.dataset_type,
        "split": reported_split(reported),
        "protocol": reported.protocol,
        "checkpoints": list(paths),
        "tta_shifts": module.shifts,
        "class_mapping": mapping_name(module.mapping),
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

    A foreign file tells no seed: what it was trained with is not known.
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
        attributes=plan.attributes,
    )


def clip_durations(table: ClipTable, clip_seconds: float) -> np.ndarray:
    """(N,) seconds of each clip, at most what the network was given."""
    durations = np.full(len(table), clip_seconds)
    for number, path in enumerate(table.paths):
        with open_store(path, "audio_name") as file:
            if "real_len" in file and table.sample_rate:
                here = table.path_number == number
                durations[here] = file["real_len"][:][table.row[here]] / table.sample_rate
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
