"""python main.py prepare: a raw data set -> its clip store."""

from pathlib import Path
from typing import Any, Optional

from prepare.clip_store import store_path
from prepare.demo import prepare_demo
from prepare.esc50 import prepare_esc50
from prepare.report import PrepareReport
from settings import Config, resolve

ADAPTERS = ("demo", "esc-50")


def run(given: dict[str, Any], raw: Optional[str] = None, clips: int = 400) -> None:
    """Write the store of dataset_type into dataset_path. raw: folder of the download; clips: size of the demo."""
    settings = resolve(given)
    if settings.dataset_type not in ADAPTERS:
        raise ValueError(f"prepare knows --dataset_type {', '.join(ADAPTERS)}; {settings.dataset_type} was given.")
    print(prepare(settings, raw, clips))


def prepare(settings: Config, raw: Optional[str], clips: int) -> PrepareReport:
    store = store_path(settings.dataset_path, settings.dataset_type)
    if settings.dataset_type == "demo":
        return prepare_demo(store, settings.sample_rate, settings.random_seed, clips)
    if raw is None:
        raise ValueError(f"prepare --dataset_type {settings.dataset_type} needs --raw FOLDER, the unpacked download.")
    return prepare_esc50(Path(raw), store, settings.sample_rate)
