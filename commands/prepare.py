"""python main.py prepare: a raw data set -> its clip store."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from data.clip_store import STRONG, UNLABELLED, ClipTable, open_store, read_store_table, store_path
from prepare.audioset import prepare_audioset
from prepare.audioset_strong import prepare_audioset_strong
from prepare.demo import prepare_demo
from prepare.desed import prepare_desed
from prepare.esc50 import prepare_esc50
from prepare.folder import prepare_folder
from prepare.report import PrepareReport
from prepare.scv2 import prepare_scv2
from prepare.soundscapes import Mix, prepare_soundscapes
from settings import Config, UserError, resolve


@dataclass(frozen=True)
class Source:
    """What the command line says of a raw data set: its flags, as command_line.COMMANDS explains them."""

    settings: Config
    raw: Optional[str] = None
    clips: int = 400
    segments: Optional[str] = None
    table: Optional[str] = None
    label_order: str = "sorted"
    processes: int = 1
    strong: Optional[str] = None
    weak: Optional[str] = None
    unlabelled: Optional[str] = None
    validation: Optional[str] = None
    class_names: Optional[str] = None
    bank_folds: Optional[str] = None
    backgrounds: Optional[str] = None
    polyphony: int = 3
    snr: str = "6,24"
    event_seconds: str = "0.5,4"
    weak_share: float = 0.0
    unlabelled_share: float = 0.0
    segment_seconds: Optional[float] = None

    def need(self, name: str, what: str) -> Path:
        """The path of a flag. Raises UserError where it was not given."""
        path = self.path(name)
        if path is None:
            raise UserError(f"prepare --dataset_type {self.settings.dataset_type} needs --{name}, {what}.")
        return path

    def path(self, name: str) -> Optional[Path]:
        """The path of a flag, None where it was not given."""
        value = getattr(self, name)
        return None if value is None else Path(value)

    def pair(self, name: str) -> tuple[float, float]:
        """Two numbers with a comma between. Raises UserError for anything else."""
        try:
            first, second = map(float, getattr(self, name).split(","))
        except ValueError:
            raise UserError(f"--{name} {getattr(self, name)} is not allowed: give two numbers, as 0.5,4.") from None
        return first, second

    def folder(self) -> Path:
        return self.need("raw", "the folder of the unpacked download")

    def store(self) -> Path:
        return store_path(self.settings.dataset_path, self.settings.dataset_type)


def _audioset(source: Source) -> PrepareReport:
    segments = source.need("segments", "AudioSet's CSV of segments")
    target, rate = Path(source.settings.dataset_path), source.settings.sample_rate
    return prepare_audioset(source.folder(), segments, target, rate, source.processes)


def _audioset_strong(source: Source) -> PrepareReport:
    return prepare_audioset_strong(
        source.folder(),
        source.store(),
        source.settings.sample_rate,
        source.need("strong", "the TSV of the training segments (audioset_train_strong.tsv)"),
        source.path("table"),
        class_names=source.path("class_names"),
        seed=source.settings.random_seed,
    )


def _demo(source: Source) -> PrepareReport:
    if source.raw is not None:
        raise UserError("The demo is synthesized: --raw has no meaning. For your own audio use --dataset_type folder.")
    return prepare_demo(source.store(), source.settings.sample_rate, source.settings.random_seed, source.clips)


def _desed(source: Source) -> PrepareReport:
    if not (source.strong or source.weak or source.validation):
        source.need("table", "the TSV of the events to test on, or --strong, --weak or --validation")
    return prepare_desed(
        source.folder(),
        source.store(),
        source.settings.sample_rate,
        source.path("table"),
        strong=[Path(name) for name in (source.strong or "").split(",") if name],
        weak=source.path("weak"),
        unlabelled=source.path("unlabelled"),
        validation=source.path("validation"),
    )


def _esc50(source: Source) -> PrepareReport:
    return prepare_esc50(source.folder(), source.store(), source.settings.sample_rate)


def _folder(source: Source) -> PrepareReport:
    rate, seed = source.settings.sample_rate, source.settings.random_seed
    return prepare_folder(source.folder(), source.store(), rate, source.path("table"), seed, source.segment_seconds)


def _scv2(source: Source) -> PrepareReport:
    return prepare_scv2(source.folder(), source.store(), source.settings.sample_rate, source.label_order)


def _soundscapes(source: Source) -> PrepareReport:
    mix = Mix(
        source.polyphony,
        source.pair("snr"),
        source.pair("event_seconds"),
        source.weak_share,
        source.unlabelled_share,
    )
    return prepare_soundscapes(
        source.need("raw", "the bank of clips: a prepared store (.h5), or a folder with a folder of audio a class"),
        source.store(),
        source.settings.sample_rate,
        seed=source.settings.random_seed,
        clips=source.clips,
        mix=mix,
        backgrounds=source.path("backgrounds"),
        folds=source.bank_folds,
        esc_fold=source.settings.esc_fold,
    )


ADAPTERS: dict[str, Callable[[Source], PrepareReport]] = {
    "audioset": _audioset,
    "audioset-strong": _audioset_strong,
    "demo": _demo,
    "desed": _desed,
    "esc-50": _esc50,
    "folder": _folder,
    "scv2": _scv2,
    "soundscapes": _soundscapes,
}


def run(given: dict[str, Any], **flags: Any) -> None:
    """Write the store of dataset_type into dataset_path, and print what was packed and what was not."""
    settings = resolve(given)
    source = Source(settings, **flags)
    print(ADAPTERS[settings.dataset_type](source))
    if settings.dataset_type != "audioset":
        print(next_step(settings, read_store_table(source.store())))
        if settings.dataset_type == "folder":
            print(end=too_long(settings, source.store()))


def too_long(settings: Config, store: Path) -> str:
    """A line on clips of which a network hears a part only; "" where there are none."""
    with open_store(store, "real_len") as file:
        seconds = file["real_len"][:] / settings.sample_rate
    heard = settings.clip_samples / settings.sample_rate
    count = int((seconds > heard + 0.5).sum())
    if not count:
        return ""
    return (
        f"{count} clips are longer than {heard:g} s, up to {seconds.max():.1f} s: train and test hear the first "
        f"{heard:g} s of each. With a table of events, --segment_seconds {heard:g} cuts recordings into clips.\n"
    )


def next_step(settings: Config, table: ClipTable) -> str:
    """The commands that train on a store, with the flags that its classes and what is known of its clips need."""
    flags = [f"--dataset_type {settings.dataset_type}"]
    if len(table.labels) != settings.classes_num:
        flags.append(f"--classes_num {len(table.labels)}")
    command = f"python main.py train {' '.join(flags)}"
    training = ~np.isin(table.split, [b"validation", b"test"])
    known = set() if table.labelling is None else set(table.labelling[training].tolist())
    steps = [f"{len(table.labels)} classes."]
    if UNLABELLED not in known:  # to clip_bce, a clip of which nothing is known would be one without any class
        single = settings.task == "multilabel" and (table.targets.sum(axis=1) == 1).all()
        steps[0] += f" Train: {command}{' --task single_label' if single else ''}"
    if STRONG in known and any(len(events.onset) for events in table.events):
        steps.append(
            f"Train on the times: {command} --loss_type {'frame_bce' if known == {STRONG} else 'weak_strong_bce'}"
        )
    elif UNLABELLED in known:
        steps[0] += f" Train: {command} --loss_type weak_strong_bce"
    return "\n".join(steps)
