"""What test, esm_test and weight_average share: score the test clips, print, and write metrics and scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytorch_lightning as pl

from commands._ledger import (
    CheckpointRecord,
    Kind,
    MetricRecord,
    Result,
    append_result,
    file_sha256,
    joint_settings_hash,
)
from commands._localization import TestPlan, class_mapping, plan_test
from commands._performance import settle
from commands._records import (
    device_name,
    git_revision,
    is_first_process,
    print_first_page,
    print_metrics,
    write_json,
)
from commands._trainer import build_trainer
from data_generator import SEDDataModule
from evaluation.metrics import Metric, with_interval
from evaluation.scores import EventList, Scores
from model import build_model
from model.checkpoint import Checkpoint, decided_settings, load_network, read_checkpoint
from model.htsat import HTSAT_Swin_Transformer
from prepare.clip_store import ClipTable, open_store, read_events
from prepare.labels import published_labels
from sed_model import Evaluation, SEDWrapper
from settings import Config, requested, resolve


def checkpoint_labels(checkpoint: Checkpoint, settings: Config) -> list[str]:
    """The classes of a checkpoint: its own, or those of the published one where it carries none."""
    return checkpoint.labels or published_labels(settings.dataset_type, settings.classes_num)


def check_labels(checkpoint: Checkpoint, settings: Config, table: ClipTable) -> None:
    """Raise ValueError where a checkpoint and the data name their classes differently."""
    known = checkpoint_labels(checkpoint, settings)
    if class_mapping(known, settings, table) is not None:
        return
    if table.labels and known != table.labels and known[0] != "class 0":
        differing = [pair for pair in zip(known, table.labels, strict=False) if pair[0] != pair[1]]
        raise ValueError(
            f"{checkpoint.path} knows other classes than {table.paths[0]} has: {len(known)} against "
            f"{len(table.labels)}, first difference {differing[:1]}. Set --dataset_type or --dataset_path, or prepare "
            f"the data with the checkpoint's order of labels."
        )


@dataclass(frozen=True)
class Member:
    """A checkpoint to test, with the settings of its network."""

    checkpoint: Checkpoint
    settings: Config

    @classmethod
    def read(cls, path: str, given: dict[str, Any]) -> "Member":
        """Raises ValueError where the file cannot be used or does not fit what is given."""
        checkpoint = read_checkpoint(path)
        decided = decided_settings(checkpoint, requested("frontend_from", given))
        settings, _ = settle(resolve(given, checkpoint=decided), training=False)
        return cls(checkpoint, settings)

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
        """The names of the classes: the checkpoint's, the data's, or numbers."""
        return self.checkpoint.labels or table.labels or [f"class {k}" for k in range(self.settings.classes_num)]


def test_checkpoint(path: str, given: dict[str, Any]) -> None:
    """Print the metrics of a checkpoint and write them, with the scores, into heatmap_dir."""
    member = Member.read(path, given)
    settings = member.settings
    data = SEDDataModule(settings, (settings.test_split,))
    table = data.tables[settings.test_split]
    check_labels(member.checkpoint, settings, table)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = member.network()
    print_first_page(f"HTS-AT: test of {path}", settings, data, network)
    run_test(SEDWrapper(network, settings, member.labels(table)), settings, data, [path])


def run_test(module: Evaluation, settings: Config, data: SEDDataModule, checkpoints: list[str]) -> None:
    """Score the clips of test_split, print the table of metrics, and write <heatmap_dir>/<test_file>.json and .h5.

    A line goes into the ledger results_path, but with debug and test_shard, which do not score all clips.
    """
    known = checkpoint_labels(read_checkpoint(checkpoints[0]), settings)
    plan = plan_test(module, settings, data, checkpoints, known)
    trainer: pl.Trainer = build_trainer(settings, steps_per_epoch=None)
    trainer.test(module, data, verbose=False)
    if not is_first_process():
        return
    table = data.tables[settings.test_split]
    metrics = with_interval(module.test_metrics, module.test_clipwise, module.test_targets, seed=settings.random_seed)
    folder = Path(settings.heatmap_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "metrics": [metric.as_dict() for metric in metrics],
        "dataset_type": settings.dataset_type,
        "split": settings.test_split,
        "protocol": settings.protocol,
        "checkpoints": checkpoints,
        "tta_shifts": module.shifts,
        "data_fingerprint": table.fingerprint(),
        "device": device_name(settings),
        "git_revision": git_revision(),
    }
    write_json(folder / f"{plan.name}.json", summary)
    collect_scores(module, settings, table, plan).save(folder / f"{plan.name}.h5")
    print_metrics(f"HTS-AT: {settings.test_split} clips, {', '.join(checkpoints)}", metrics, settings)
    print(f"Metrics: {folder / plan.name}.json\nScores: {folder / plan.name}.h5")
    if plan.complete and not settings.debug:
        append_result(Path(settings.results_path), test_result(summary, metrics, settings))
        print(f"Ledger: {settings.results_path}, which `python main.py results` prints")


def test_result(summary: dict[str, Any], metrics: Sequence[Metric], settings: Config) -> Result:
    """The ledger's line of a test. Training settings and seed are the checkpoints' own, not those of the test.

    A foreign file tells no seed: what it was trained with is not known.
    """
    members = [read_checkpoint(path) for path in summary["checkpoints"]]
    seeds: list[Optional[int]] = [(member.settings or {}).get("random_seed") for member in members]
    trained = [member.settings if seed is not None else None for member, seed in zip(members, seeds, strict=True)]
    kind: Kind = "ensemble" if len(members) > 1 else "weight average" if members[0].sources else "single"
    known = [seed for seed in seeds if seed is not None]
    same = {name: summary[name] for name in summary.keys() - {"metrics", "checkpoints"}}
    return Result(
        **same,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kind=kind,
        esc_fold=settings.esc_fold if settings.dataset_type == "esc-50" else None,
        clips=metrics[0].clips,
        metrics=[MetricRecord(**metric.as_dict()) for metric in metrics],
        checkpoints=[CheckpointRecord(path=path, sha256=file_sha256(path)) for path in summary["checkpoints"]],
        settings_hash=joint_settings_hash(trained),
        random_seed=None if len(known) < len(seeds) else known[0] if len(known) == 1 else known,
    )


def collect_scores(module: Evaluation, settings: Config, table: ClipTable, plan: TestPlan) -> Scores:
    """The score store of a test: scores, truth and times of the clips that were scored."""
    chosen = module.test_index
    framewise = module.test_framewise
    clip_seconds = settings.clip_samples / settings.sample_rate
    scored = table.select(chosen)
    return Scores(
        names=[name.decode() for name in scored.names],
        clipwise=module.test_clipwise,
        targets=module.test_targets,
        durations=clip_durations(scored, clip_seconds),
        labels=module.labels,
        framewise=framewise,
        seconds_per_frame=clip_seconds / framewise.shape[1] if framewise is not None else 0.0,
        events=clip_events(scored) if framewise is not None else None,
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


def clip_events(table: ClipTable) -> list[EventList] | None:
    """True events of each clip, or None where the data has no times."""
    events = {number: read_events(path) for number, path in enumerate(table.paths)}
    if not any(any(clips) for clips in events.values()):
        return None
    places = zip(table.path_number.tolist(), table.row.tolist(), strict=True)
    return [[(e.label, e.onset, e.offset) for e in events[number][row]] for number, row in places]
