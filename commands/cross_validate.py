"""python main.py cross_validate: train and test each fold of a data set, under both protocols, and compare them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.clip_store import read_store_table, store_path
from data.facts import store_facts
from data.files import check_writable, write_json
from runs.experiments import experiment_hash, run_command
from settings import Config, UserError, resolve
from training.callbacks import chosen_by, read_curves

PROTOCOLS = ("held_out", "paper")
Curve = dict[int, tuple[float, float]]  # epoch, from 0: metric of the validation set, metric of the test set


@dataclass(frozen=True)
class Outcome:
    """The test metric of each fold under one protocol and one rule. epochs: from 0, one a fold, those that count."""

    protocol: str
    rule: str
    values: list[float]
    epochs: list[int]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float:
        """Standard deviation over the folds (n - 1)."""
        return statistics.stdev(self.values)


def run(given: dict[str, Any], *, protocols: str) -> None:
    """Train every fold in a process of its own; folds that are complete already are not trained again.

    The metrics come from the runs' logs, of every epoch, whose weights are mostly not kept. So they are no tests of
    files, and the ledger gets no line: `test --resume_checkpoint <run>/checkpoints/last.ckpt` adds a fold's last epoch.
    """
    chosen = protocols.split(",")
    if not chosen or not set(chosen) <= set(PROTOCOLS):
        raise UserError(f"--protocols {protocols} is not allowed: give {', '.join(PROTOCOLS)}, or one of them.")
    for name in ("esc_fold", "protocol", "resume", "exp_name", "watch_test"):
        if name in given:
            raise UserError(f"cross_validate sets {name} itself, for each fold: leave --{name} out.")
    settings = resolve(given, facts=store_facts)
    folds, experiment = find_folds(settings), experiment_hash(settings)
    path = Path(settings.workspace) / "runs" / f"cross_validation_{settings.dataset_type}_{experiment}.json"
    check_writable(f"workspace = {settings.workspace}", path)
    outcomes: list[Outcome] = []
    for protocol in chosen:
        curves = [train_fold(given, protocol, fold, experiment) for fold in folds]
        outcomes += judge(protocol, curves)
    print_outcomes(outcomes, settings, folds)
    summary = [{**asdict(o), "mean": o.mean, "deviation": o.deviation} for o in outcomes]
    write_json(path, {"folds": folds, "metric": chosen_by(settings), "outcomes": summary})
    print(f"Written: {path}")


def find_folds(settings: Config) -> list[int]:
    """The folds of the data set's store. Raises UserError where it has none."""
    path = store_path(settings.dataset_path, settings.dataset_type)
    folds = sorted(set(read_store_table(path).fold.tolist()) - {0})
    if len(folds) < 3:
        raise UserError(f"{path} has the folds {folds}: cross-validation needs at least 3, as ESC-50 has them.")
    return folds


def train_fold(given: dict[str, Any], protocol: str, fold: int, experiment: str) -> Curve:
    """Train one fold, or resume it, and return the metrics of its epochs. experiment: see experiment_hash."""
    settings = resolve({**given, "esc_fold": fold, "protocol": protocol}, facts=store_facts)
    name = f"cv_{settings.dataset_type}_{protocol}_fold{fold}_{experiment}"
    watch_test = protocol == "held_out"  # otherwise the test clips are the validation clips
    more = {"esc_fold": fold, "protocol": protocol, "exp_name": name, "resume": "auto", "watch_test": watch_test}
    status = run_command("train", {**given, **more})
    if status:
        raise UserError(f"Training {name} ended with exit status {status}: see its error above.")
    metric = chosen_by(settings)
    columns = (metric, f"test_{metric}" if watch_test else metric)
    return read_curve(Path(settings.workspace) / "runs" / name, columns, settings.max_epoch)


def read_curve(run_folder: Path, columns: tuple[str, str], epochs: int) -> Curve:
    """Two metrics of the first `epochs` epochs of a run, from its logs; of one trained again the later ones."""
    logged = read_curves(run_folder / "logs")
    first, second = (logged.get(column, {}) for column in columns)
    curve: Curve = {n: (first[n + 1], second[n + 1]) for n in range(epochs) if n + 1 in first and n + 1 in second}
    missing = sorted(set(range(epochs)) - curve.keys())
    if missing:
        raise UserError(
            f"{run_folder / 'logs'} has no metrics of epoch {missing[0] + 1}: remove {run_folder} to train it again."
        )
    return curve


def judge(protocol: str, curves: Sequence[Curve]) -> list[Outcome]:
    """The test metric of each fold under three rules, of which two choose epochs on the validation set."""
    epochs = range(len(curves[0]))
    validation = np.array([[curve[epoch][0] for epoch in epochs] for curve in curves])  # (folds, epochs)
    test = np.array([[curve[epoch][1] for epoch in epochs] for curve in curves])
    rules = {
        "best of each fold": validation.argmax(axis=1),
        "best on average": np.full(len(curves), validation.mean(axis=0).argmax()),
        "last": np.full(len(curves), len(epochs) - 1),
    }
    return [
        Outcome(protocol, rule, test[np.arange(len(curves)), chosen].tolist(), chosen.tolist())
        for rule, chosen in rules.items()
    ]


def print_outcomes(outcomes: Sequence[Outcome], settings: Config, folds: Sequence[int]) -> None:
    metric = chosen_by(settings)
    table = Table(title=f"{settings.dataset_type}: {metric} of the test clips over {len(folds)} folds")
    shown = " ".join(f"{fold:5d}" for fold in folds)
    for column in ("protocol", "epoch that counts", "mean", "deviation", f"fold\n{shown}"):
        table.add_column(column, no_wrap=True)
    for o in outcomes:
        values = " ".join(f"{value:.3f}" for value in o.values)
        epochs = " ".join(f"{epoch + 1:5d}" for epoch in o.epochs)
        table.add_row(o.protocol, f"{o.rule}\n  epochs", f"{o.mean:.4f}", f"{o.deviation:.4f}", f"{values}\n{epochs}")
    Console().print(table)
    print("held_out: epochs chosen on the fold after the test fold. paper: on the test set itself, as published.")
