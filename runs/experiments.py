"""What commands that train several runs share: a name for all that results depend on, and a process for each run."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.clip_store import read_store_table, store_path
from data.facts import NORMALIZATION
from data.workers import CHILD
from data_generator import load_table
from model.registry import ENCODERS
from runs.ledger import file_sha256, settings_hash
from settings import Config

MAIN = Path(__file__).resolve().parents[1] / "main.py"


def experiment_hash(settings: Config) -> str:
    """8 hexadecimal digits of all that the results depend on: settings, seed and data.

    They are part of the names of the runs, so that no run of another experiment is resumed.
    """
    if settings.dataset_type == "audioset":
        data = "".join(load_table(settings, split).fingerprint() for split in ("train", "test"))
    else:
        data = read_store_table(store_path(settings.dataset_path, settings.dataset_type)).fingerprint()
    more = {"seed": settings.random_seed, "data": data, "shortened": settings.debug}
    measured = Path(settings.dataset_path) / NORMALIZATION
    if measured.is_file() and "mean" in ENCODERS[settings.encoder].options:
        more["normalization"] = file_sha256(measured)
    return settings_hash({**settings.model_dump(), **more})[:8]


def run_command(command: str, given: Mapping[str, Any]) -> int:
    """`python main.py command` with these settings, in a process of its own; returns its exit status."""
    words = [word for name, value in given.items() for word in (f"--{name}", as_word(value))]
    sys.stdout.flush()  # so that what it prints comes after what is printed here
    return subprocess.run([sys.executable, str(MAIN), command, *words], env={**os.environ, CHILD: "1"}).returncode


def as_word(value: Any) -> str:
    """A setting's value as text of the command line."""
    return ",".join(f"{key}={part}" for key, part in value.items()) if isinstance(value, dict) else str(value)
