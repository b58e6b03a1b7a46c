"""What test and esm_test share: run the Trainer over the test clips, print, and write metrics and scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from commands._records import device_name, git_revision, is_first_process, print_metrics, write_json
from commands._trainer import build_trainer
from data_generator import SEDDataModule
from evaluation.scores import EventList, Scores
from model.checkpoint import Checkpoint
from prepare.clip_store import ClipTable, open_store, read_events
from prepare.labels import published_labels
from sed_model import Evaluation
from settings import FRONTEND_SETTINGS, Config


def checkpoint_labels(checkpoint: Checkpoint, settings: Config) -> list[str]:
    """The classes of a checkpoint: its own, or those of the published one where it carries none."""
    return checkpoint.labels or published_labels(settings.dataset_type, settings.classes_num)


def check_labels(checkpoint: Checkpoint, settings: Config, table: ClipTable) -> None:
    """Raise ValueError where a checkpoint and the data name their classes differently."""
    known = checkpoint_labels(checkpoint, settings)
    if table.labels and known != table.labels and known[0] != "class 0":
        differing = [pair for pair in zip(known, table.labels, strict=False) if pair[0] != pair[1]]
        raise ValueError(
            f"{checkpoint.path} knows other classes than {table.paths[0]} has: {len(known)} against "
            f"{len(table.labels)}, first difference {differing[:1]}. Set --dataset_type or --dataset_path, or prepare "
            f"the data with the checkpoint's order of labels."
        )


def run_test(module: Evaluation, settings: Config, data: SEDDataModule, checkpoints: list[str]) -> None:
    """Score the clips of test_split, print the table of metrics, and write <heatmap_dir>/<test_file>.json and .h5."""
    trainer: pl.Trainer = build_trainer(settings, steps_per_epoch=None)
    trainer.test(module, data, verbose=False)
    if not is_first_process():
        return
    table = data.tables[settings.test_split]
    folder = Path(settings.heatmap_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "metrics": [metric.as_dict() for metric in module.test_metrics],
        "dataset_type": settings.dataset_type,
        "split": settings.test_split,
        "protocol": settings.protocol,
        "checkpoints": checkpoints,
        "tta_shifts": module.shifts,
        "data_fingerprint": table.fingerprint(),
        "device": device_name(settings),
        "git_revision": git_revision(),
    }
    write_json(folder / f"{settings.test_file}.json", summary)
    collect_scores(module, settings, table).save(folder / f"{settings.test_file}.h5")
    print_metrics(f"HTS-AT: {settings.test_split} clips, {', '.join(checkpoints)}", module.test_metrics, settings)
    print(f"Metrics: {folder / settings.test_file}.json\nScores: {folder / settings.test_file}.h5")


def collect_scores(module: Evaluation, settings: Config, table: ClipTable) -> Scores:
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
        attributes={
            "dataset_type": settings.dataset_type,
            "clip_store": str(scored.paths[0]),
            **{name: getattr(settings, name) for name in FRONTEND_SETTINGS},
        },
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
