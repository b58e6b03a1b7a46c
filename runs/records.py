"""What a run writes about itself, and the first page of its log."""

import importlib.metadata
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.files import read_json, write_json
from data.names import markup
from data_generator import SEDDataModule
from evaluation.metrics import Metric
from settings import Config
from training.devices import device_count, is_first_process, node_count, on_gpu, process_count

PACKAGES = ("torch", "torchaudio", "pytorch-lightning", "numpy", "h5py", "soundfile", "soxr", "scikit-learn")
BYTES_PER_TRAINED_PARAMETER = 16  # float32 weight, gradient and AdamW's two moments


def save_provenance(settings: Config, data: SEDDataModule, **more: Any) -> None:
    """Write config.json, and add an entry to provenance.json, in the run folder."""
    if not is_first_process():
        return
    folder = settings.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings.model_dump())
    path = folder / "provenance.json"
    entries = read_json(path, list) if path.is_file() else []
    entries.append(
        {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": ["python", *sys.argv],
            "git_revision": git_revision(),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "device": device_name(settings),
            "data": {split: {"clips": len(t), "fingerprint": t.fingerprint()} for split, t in data.tables.items()},
            **more,
        }
    )
    write_json(path, entries)


def git_revision() -> str:
    """Revision of this code, with + where files differ from it; 'unknown' outside a git checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def device_name(settings: Config) -> str:
    machines = f", {node_count()} machines" if node_count() > 1 else ""
    if on_gpu(settings):
        return f"{device_count(settings)} x {torch.cuda.get_device_name()}{machines}"
    return f"CPU, {device_count(settings)} process(es) of {torch.get_num_threads()} threads{machines}"


def print_first_page(title: str, settings: Config, data: SEDDataModule, network: torch.nn.Module, **more: str) -> None:
    """What will run: device, clips, parameters, steps, memory; more (performance, ...) is added as it is called."""
    if not is_first_process():
        return
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    table = Table(title=markup(title), show_header=False, title_justify="left")
    table.add_row("data set", f"{settings.dataset_type}, protocol {settings.protocol}")
    table.add_row("prepared data", escape(settings.dataset_path))
    table.add_row("clips", ", ".join(f"{split} {len(t)}" for split, t in data.tables.items()))
    table.add_row("device", device_name(settings))
    table.add_row("parameters", f"{count:,} ({trained:,} trained)")
    if "train" in data.tables:
        steps = data.steps_per_epoch(process_count(settings))
        table.add_row(
            "steps", f"{steps} an epoch, each of {settings.batch_size} clips; {steps * settings.max_epoch:,} in all"
        )
        needed = trained * BYTES_PER_TRAINED_PARAMETER / 2**30
        table.add_row("memory", f"{needed:.2f} GiB for weights, gradients and optimizer, beside activations")
    for name, text in more.items():
        table.add_row(name.replace("_", " "), markup(text))
    Console().print(table)


def print_metrics(title: str, metrics: list[Metric], settings: Config) -> None:
    """The table of named metrics, with the bootstrap intervals of those that have one."""
    intervals = [metric.interval for metric in metrics if metric.interval is not None]
    table = Table(title=markup(title), title_justify="left", caption_justify="left")
    columns = ["metric", "value", "criterion", "clips", "classes", "protocol"]
    if intervals:
        columns.insert(2, f"{intervals[0].level:.0%} interval")
        table.caption = (
            f"Interval: percentile bootstrap over clips, {intervals[0].resamples} resamples; mAP's corrected for bias"
        )
    for column in columns:
        right = column in ("value", "clips", "classes")
        table.add_column(column, justify="right" if right else "left", no_wrap=column.endswith("interval"))
    for m in metrics:
        between = [str(m.interval or "")] if intervals else []
        classes = f"{m.classes} of {m.all_classes}"
        table.add_row(m.name, f"{m.value:.4f}", *between, m.criterion, str(m.clips), classes, settings.protocol)
    Console().print(table)
