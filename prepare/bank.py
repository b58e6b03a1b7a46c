"""A bank of sounds to mix soundscapes of: clips of one class each, none of which serves two splits."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Optional

import numpy as np

from data.audio import mono_waveform, read_audio
from data.clip_store import SPLITS, Waveforms, open_store, read_store_table
from data.progress import with_progress
from prepare.mixing import GAP_SECONDS
from prepare.report import PrepareReport
from prepare.stratify import SHARES, share_out
from prepare.tables import read_class_folders
from settings import UserError

FRAME_SECONDS = 0.01
QUIET_DB = 30.0  # a frame of 10 ms so far below the loudest one of its clip does not sound
SILENT_RMS = 1e-4  # a clip whose loudest frame is below this (-80 dBFS) is silent
VALIDATION_SHARE = 0.2  # of the training folds, where no fold is left for validation
ESC_NAME = re.compile(r"\d+-(\d+)-[A-Z]-\d+\.\w+")  # fold, Freesound's number of the recording, take, class


@dataclass(frozen=True)
class Sounds:
    """The clips of a bank on the disk. read: number of a clip -> (samples,) float32 at the rate of the soundscapes.

    read raises UserError or OSError where a clip cannot be read.
    """

    names: list[str]
    targets: np.ndarray  # (N, K) bool
    fold: np.ndarray  # (N,) int, 0 without folds
    split: np.ndarray  # (N,) str, "" without splits
    labels: list[str]
    source: str
    licence: str  # "" where the bank names none
    read: Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Foreground:
    """A clip of one class that soundscapes of one split may use."""

    number: int  # its place in the bank's Sounds
    name: str
    label: int  # in the bank's labels
    split: str
    sounding: np.ndarray  # (frames of 10 ms,) bool: those at most 30 dB below the loudest


@dataclass(frozen=True)
class Bank:
    """The sounds of soundscapes. labels: the classes that have clips, in the order of the store."""

    labels: list[str]
    foregrounds: list[Foreground]
    sounds: Sounds

    @cached_property
    def by_class(self) -> dict[str, dict[int, list[Foreground]]]:
        """split -> class -> its clips; classes without clips are left out."""
        grouped: dict[str, dict[int, list[Foreground]]] = {split: {} for split in SPLITS}
        for foreground in self.foregrounds:
            grouped[foreground.split].setdefault(foreground.label, []).append(foreground)
        return grouped


@contextmanager
def open_sounds(path: Path, sample_rate: int, report: PrepareReport) -> Iterator[Sounds]:
    """The clips of a clip store, or of a folder with one folder of audio a class, at `sample_rate`.

    Files beside the class folders are reported as skipped. Raises UserError where there is neither, or no clip.
    """
    if path.is_dir():
        yield _folder_sounds(path, sample_rate, report)
        return
    table = read_store_table(path)
    labels = table.labels or [f"class {number}" for number in range(table.targets.shape[1])]
    if len(table) == 0:
        raise UserError(f"{path} has no clips: it cannot be the bank of soundscapes.")
    with open_store(path) as file:
        waveforms = Waveforms(file)
        yield Sounds(
            names=[name.decode() for name in table.names],
            targets=table.targets,
            fold=table.fold,
            split=np.array([split.decode() for split in table.split]),
            labels=labels,
            source=table.attributes.get("source") or path.name,
            licence=table.attributes.get("licence", ""),
            read=lambda number: mono_waveform(waveforms.read(number), table.sample_rate or sample_rate, sample_rate),
        )


def _folder_sounds(folder: Path, sample_rate: int, report: PrepareReport) -> Sounds:
    entries = read_class_folders(folder, report)
    labels = sorted(set().union(*(entry.labels for entry in entries)))
    return Sounds(
        names=[entry.name for entry in entries],
        targets=np.array([[label in entry.labels for label in labels] for entry in entries]),
        fold=np.zeros(len(entries), dtype=int),
        split=np.full(len(entries), ""),
        labels=labels,
        source=folder.resolve().name,
        licence="",
        read=lambda number: read_audio(entries[number].path, sample_rate),
    )


def build_bank(
    sounds: Sounds, sample_rate: int, report: PrepareReport, *, folds: Optional[str], esc_fold: int, seed: int
) -> Bank:
    """Read every clip and split them: by their own splits, else by folds, else by source, 70/15/15 % of each class.

    folds: those for train/validation/test, as `1,2/3/4`; with none in the middle, `1,2,3//4`, a fifth of the sources of
    each class of the training folds is for validation. None: esc_fold for testing, the next one for validation, the
    others for training, as in data_generator. Clips of one source (ESC-50's names contain it) stay together. Clips that
    have not exactly one class, are silent or cannot be read are reported as skipped. Raises UserError for folds that do
    not exist or are given twice, and where a split has no clip.
    """
    usable, sounding = [], {}
    for number, name in enumerate(with_progress(sounds.names, "clips of the bank are read")):
        try:
            if sounds.targets[number].sum() != 1:
                raise UserError("It has not exactly one class.")
            sounding[number] = sounding_frames(sounds.read(number), sample_rate)
            if not sounding[number].any():
                raise UserError("It is silent.")
        except (UserError, OSError) as error:
            report.skipped.append((name, str(error)))
            continue
        usable.append(number)
    if not usable:
        raise UserError(f"The bank has no clip that sounds and has exactly one class.\n{report}")
    splits = _splits(sounds, np.array(usable), folds, esc_fold, seed)
    classes = [k for k in range(len(sounds.labels)) if sounds.targets[usable, k].any()]
    foregrounds = [
        Foreground(number, sounds.names[number], classes.index(int(sounds.targets[number].argmax())), split, loud)
        for number, split, loud in zip(usable, splits.tolist(), (sounding[number] for number in usable), strict=True)
        if split
    ]
    for split in SPLITS:
        if not any(found.split == split for found in foregrounds):
            raise UserError(f"The bank has no clip for {split}: each split of the soundscapes needs clips of its own.")
    return Bank([sounds.labels[k] for k in classes], foregrounds, sounds)


def sounding_frames(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """(samples,) -> (frames of 10 ms,) bool: at most 30 dB below the loudest frame; none where the clip is silent."""
    hop = round(FRAME_SECONDS * sample_rate)
    padded = np.pad(sound.astype(np.float64), (0, -len(sound) % hop))
    power = np.mean(padded.reshape(-1, hop) ** 2, axis=1)
    return (power >= power.max() * 10 ** (-QUIET_DB / 10)) & (power.max() >= SILENT_RMS**2)


def choose_stretch(sounding: np.ndarray, shortest: float, longest: float, rng: np.random.Generator) -> tuple[int, int]:
    """First and last frame (exclusive) of a random stretch of a clip that begins and ends with a sounding frame.

    sounding: (frames,) bool with at least one True. Quiet parts of over 0.5 s are never inside. The length is drawn
    from shortest to longest (seconds); it is shorter where the clip sounds for less, and differs where the end would be
    in a quiet part of up to 0.5 s.
    """
    frames = np.flatnonzero(sounding)
    parts = np.split(frames, np.flatnonzero(np.diff(frames) > GAP_SECONDS / FRAME_SECONDS) + 1)
    lengths = np.array([part[-1] + 1 - part[0] for part in parts])
    least = min(shortest / FRAME_SECONDS, lengths.max())
    weight = np.where(lengths >= least, lengths, 0)
    part = parts[rng.choice(len(parts), p=weight / weight.sum())]
    length = max(rng.uniform(shortest, longest) / FRAME_SECONDS, 1.0)
    first = rng.choice(part[part <= max(part[0], part[-1] + 1 - length)])
    ends = part[part >= first] + 1
    within = ends[ends <= first + length]
    enough = ends[ends >= first + least]
    last = within[-1] if within[-1] >= first + least or len(enough) == 0 else enough[0]
    return int(first), int(last)


def _splits(sounds: Sounds, usable: np.ndarray, folds: Optional[str], esc_fold: int, seed: int) -> np.ndarray:
    """(N,) split of each usable clip, "" for unused ones."""
    given, fold = sounds.split[usable], sounds.fold[usable]
    sources = [_source(sounds.names[number]) for number in usable]
    labels = sounds.targets[usable].argmax(axis=1)
    if (given != "").any() or not fold.any():
        if folds is not None:
            raise UserError(f"--bank_folds {folds} is not allowed: the clips of this bank have no folds.")
        return given if (given != "").any() else share_out(sources, labels, SHARES, seed)
    chosen = _default_folds(fold, esc_fold) if folds is None else _parse_folds(folds, fold)
    splits = np.full(len(usable), "", dtype="U10")
    for split, numbers in zip(SPLITS, chosen, strict=True):
        splits[np.isin(fold, numbers)] = split
    if not chosen[1]:
        mine = np.flatnonzero(splits == "train")
        shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
        splits[mine] = share_out([sources[clip] for clip in mine], labels[mine], shares, seed)
    return splits


def _source(name: str) -> str:
    """The recording that a clip of ESC-50 was cut from, by its name; for other clips the clip itself."""
    match = ESC_NAME.fullmatch(Path(name).name)
    return f"recording {match[1]}" if match else name


def _default_folds(fold: np.ndarray, esc_fold: int) -> tuple[list[int], list[int], list[int]]:
    """The folds of train, validation and test, as data_generator chooses them."""
    present = np.unique(fold).tolist()
    if len(present) < 3 or esc_fold not in present:
        raise UserError(
            f"The bank has the folds {present}: esc_fold = {esc_fold} must be among three or more, or --bank_folds "
            f"must say which are for train/validation/test, as 1,2/3/4, or 1//2 to validate on clips of the training "
            f"folds that are kept apart."
        )
    following = present[(present.index(esc_fold) + 1) % len(present)]
    return [one for one in present if one not in (esc_fold, following)], [following], [esc_fold]


def _parse_folds(text: str, fold: np.ndarray) -> list[list[int]]:
    """`1,2/3/4` -> the folds of train, validation (perhaps none) and test."""
    present = np.unique(fold).tolist()
    try:
        chosen = [[int(word) for word in part.split(",") if word.strip()] for part in text.split("/")]
    except ValueError:
        chosen = []
    flat = [one for part in chosen for one in part]
    if len(chosen) != 3 or not (chosen[0] and chosen[2]) or len(set(flat)) != len(flat) or set(flat) - set(present):
        raise UserError(
            f"--bank_folds {text!r} is not allowed: give the folds for train/validation/test, as 1,2/3/4, each once, "
            f"out of {', '.join(map(str, present))}. With none in the middle (1,2,3//4) clips of the training folds "
            f"are kept apart for validation."
        )
    return chosen
