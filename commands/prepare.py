"""python main.py prepare: a raw data set -> its clip store."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from prepare.audioset import prepare_audioset
from prepare.clip_store import ClipTable, read_store_table, store_path
from prepare.demo import prepare_demo
from prepare.desed import prepare_desed
from prepare.esc50 import prepare_esc50
from prepare.folder import prepare_folder
from prepare.report import PrepareReport
from prepare.scv2 import prepare_scv2
from settings import Config, resolve


@dataclass(frozen=True)
class Source:
    """What the command line says of a raw data set."""

    settings: Config
    raw: Optional[str]
    clips: int
    segments: Optional[str]
    table: Optional[str]
    label_order: str
    processes: int

    def need(self, name: str, what: str) -> Path:
        """The path of a flag. Raises ValueError where it was not given."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"prepare --dataset_type {self.settings.dataset_type} needs --{name}, {what}.")
        return Path(value)

    def folder(self) -> Path:
        return self.need("raw", "the folder of the unpacked download")

    def store(self) -> Path:
        return store_path(self.settings.dataset_path, self.settings.dataset_type)


def _audioset(source: Source) -> PrepareReport:
    segments = source.need("segments", "AudioSet's CSV of segments")
    target, rate = Path(source.settings.dataset_path), source.settings.sample_rate
    return prepare_audioset(source.folder(), segments, target, rate, source.processes)


def _demo(source: Source) -> PrepareReport:
    if source.raw is not None:
        raise ValueError("The demo is synthesized: --raw has no meaning. For your own audio use --dataset_type folder.")
    return prepare_demo(source.store(), source.settings.sample_rate, source.settings.random_seed, source.clips)


def _desed(source: Source) -> PrepareReport:
    table = source.need("table", "the TSV of the events")
    return prepare_desed(source.folder(), source.store(), source.settings.sample_rate, table)


def _esc50(source: Source) -> PrepareReport:
    return prepare_esc50(source.folder(), source.store(), source.settings.sample_rate)


def _folder(source: Source) -> PrepareReport:
    table = Path(source.table) if source.table else None
    seed = source.settings.random_seed
    return prepare_folder(source.folder(), source.store(), source.settings.sample_rate, table, seed)


def _scv2(source: Source) -> PrepareReport:
    return prepare_scv2(source.folder(), source.store(), source.settings.sample_rate, source.label_order)


ADAPTERS: dict[str, Callable[[Source], PrepareReport]] = {
    "audioset": _audioset,
    "demo": _demo,
    "desed": _desed,
    "esc-50": _esc50,
    "folder": _folder,
    "scv2": _scv2,
}


def run(
    given: dict[str, Any],
    raw: Optional[str] = None,
    clips: int = 400,
    segments: Optional[str] = None,
    table: Optional[str] = None,
    label_order: str = "sorted",
    processes: int = 1,
) -> None:
    """Write the store of dataset_type into dataset_path, and print what was packed and what was not."""
    settings = resolve(given)
    source = Source(settings, raw, clips, segments, table, label_order, processes)
    print(ADAPTERS[settings.dataset_type](source))
    if settings.dataset_type != "audioset":
        print(next_step(settings, read_store_table(source.store())))


def next_step(settings: Config, table: ClipTable) -> str:
    """The command that trains on a store, with the flags that its classes need."""
    flags = [f"--dataset_type {settings.dataset_type}"]
    if len(table.labels) != settings.classes_num:
        flags.append(f"--classes_num {len(table.labels)}")
    if settings.task == "multilabel" and (table.targets.sum(axis=1) == 1).all():
        flags.append("--task single_label")
    return f"{len(table.labels)} classes. Train: python main.py train {' '.join(flags)}"
