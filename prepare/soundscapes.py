"""Soundscapes mixed from a bank of clips: events over a background, with their classes and times."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from data.audio import audio_seconds, read_audio
from data.clip_store import SPLITS, STRONG, UNLABELLED, WEAK, Clip, ClipStoreWriter, Event, Task, store_path
from data.finding import FoundAudio, find_audio
from data.progress import with_progress
from prepare.adapters import Flags
from prepare.bank import FRAME_SECONDS, Bank, Foreground, build_bank, choose_stretch, open_sounds
from prepare.mixing import CLIP_SECONDS, Generator, check_count, draw_clips, is_apart, to_int16
from prepare.report import PrepareReport
from prepare.stratify import SHARES, share_out
from settings import Config, UserError

NAME = "soundscapes"
SOURCE = "mixed by prepare/soundscapes.py from: {bank}"
LICENCE = "that of the bank's clips"  # where the bank names none
TASK: Task = "multilabel"
FLAGS: Flags = {
    "raw": {"type": Path, "metavar": "BANK", "help": "bank of sounds, a clip store (.h5) or a folder of audio a class"},
    "clips": {"type": int, "metavar": "N", "help": "how many clips to make [400]"},
    "bank_folds": {
        "type": str,
        "metavar": "FOLDS",
        "help": "folds of the bank for train/validation/test, as 1,2/3/4; with none in the middle, 1,2,3//4, a fifth "
        "of the clips of the training folds is for validation [by esc_fold]",
    },
    "backgrounds": {"type": Path, "metavar": "FOLDER", "help": "audio to mix events into [coloured noise]"},
    "polyphony": {"type": int, "metavar": "N", "help": "how many events at once, at most [3]"},
    "snr": {"type": str, "metavar": "DB,DB", "help": "dB of an event above the background, lowest,highest [6,24]"},
    "event_seconds": {"type": str, "metavar": "S,S", "help": "shortest,longest event [0.5,4]"},
    "weak_share": {"type": float, "metavar": "SHARE", "help": "share of the training clips without event times [0]"},
    "unlabelled_share": {"type": float, "metavar": "SHARE", "help": "share of the training clips without classes [0]"},
}

MOST_EVENTS = 6  # in a soundscape: 1 to so many are drawn
PLACEMENTS = 10  # onsets that are tried for an event before it is left out
RAMP_SECONDS = 0.01  # fade-in and fade-out of an event
BACKGROUND_DB = (-48.0, -38.0)  # root mean square of the background, full scale being 0
SLOPES = (0.0, 1.5)  # coloured noise: its power falls with frequency ** -slope; 0 white, 1 pink
LOWEST_HZ = 50.0  # coloured noise is white below, or most of it would be too low to hear


def prepare(
    settings: Config,
    raw: Path,
    clips: int = 400,
    bank_folds: Optional[str] = None,
    backgrounds: Optional[Path] = None,
    polyphony: int = 3,
    snr: str = "6,24",
    event_seconds: str = "0.5,4",
    weak_share: float = 0.0,
    unlabelled_share: float = 0.0,
) -> "SoundscapeReport":
    """Write `clips` soundscapes of the bank `raw`, 70 % for training, 15 % each for validation and test.

    raw: a clip store, or a folder with one folder of audio a class. bank_folds, esc_fold: which clips of the bank are
    for which split (prepare.bank.build_bank). backgrounds: a folder of recordings; None: coloured noise. The other
    flags: see Mix. The classes are those that the bank has clips of. A soundscape depends on the bank, random_seed, its
    split and its number only; of the training ones the last are weak and then unlabelled. Beyond the datasets of every
    store, event_source (E,) names the clip of the bank that an event was cut from. Raises UserError for fewer than 10
    clips, and for an unusable bank, folds or backgrounds.
    """
    check_count(clips)
    if not raw.exists():
        raise UserError(
            f"There is no {raw}: --raw must be the bank of the soundscapes, a clip store (.h5) or a folder with one "
            f"folder of audio a class."
        )
    mix = Mix(polyphony, _pair("snr", snr), _pair("event_seconds", event_seconds), weak_share, unlabelled_share)
    rate, seed = settings.sample_rate, settings.random_seed
    report = SoundscapeReport(store_path(settings.dataset_path, NAME))
    behind = Backgrounds(backgrounds, rate, seed, report)
    with open_sounds(raw, rate, report) as sounds:
        bank = build_bank(sounds, rate, report, folds=bank_folds, esc_fold=settings.esc_fold, seed=seed)
        _count(bank, report)
        with ClipStoreWriter(
            report.path, clip_samples=int(CLIP_SECONDS * rate), sample_rate=rate, labels=bank.labels,
            dataset_type=NAME, task=TASK, source=SOURCE.format(bank=sounds.source), licence=sounds.licence or LICENCE,
        ) as writer:  # fmt: skip
            _write(writer, bank, behind, mix, list(draw_clips(clips, seed)), report)
    return report


def _pair(name: str, text: str) -> tuple[float, float]:
    """Two numbers with a comma between. Raises UserError for anything else."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--{name} {text} is not allowed: give two numbers, as 0.5,4.") from None
    return first, second


@dataclass(frozen=True)
class Mix:
    """How soundscapes are mixed. Raises UserError for impossible values.

    polyphony: events at once, at most. snr: dB of an event above the background, lowest and highest, both as root mean
    squares. event_seconds: shortest and longest event.
    """

    polyphony: int
    snr: tuple[float, float]
    event_seconds: tuple[float, float]
    weak_share: float  # of the training soundscapes: stored with classes, without times
    unlabelled_share: float  # of the training soundscapes: stored without annotation

    def __post_init__(self) -> None:
        if self.polyphony < 1:
            raise UserError(f"--polyphony {self.polyphony} is not allowed: at least 1 event must have room.")
        if not self.snr[0] <= self.snr[1] < np.inf or not np.isfinite(self.snr[0]):
            raise UserError(f"--snr {_shown(self.snr)} is not allowed: give the lowest and the highest dB, as 6,24.")
        if not FRAME_SECONDS <= self.event_seconds[0] <= self.event_seconds[1] <= CLIP_SECONDS:
            raise UserError(
                f"--event_seconds {_shown(self.event_seconds)} is not allowed: give the shortest and the longest "
                f"event, from {FRAME_SECONDS} to {CLIP_SECONDS:.0f} s, as 0.5,4."
            )
        if min(self.weak_share, self.unlabelled_share) < 0 or self.weak_share + self.unlabelled_share > 1:
            raise UserError(
                f"--weak_share {self.weak_share} and --unlabelled_share {self.unlabelled_share} are not allowed: they "
                f"are shares of the training soundscapes, from 0 on and together at most 1."
            )


def _shown(values: tuple[float, float]) -> str:
    return f"{values[0]:g},{values[1]:g}"


@dataclass
class SoundscapeReport(PrepareReport):
    """Counts of events and sounds. skipped: clips of the bank, and backgrounds, that could not be used."""

    events: int = 0
    foregrounds: dict[str, int] = field(default_factory=dict)  # clips of the bank for each split
    absent: dict[str, list[str]] = field(default_factory=dict)  # classes without a clip in a split

    def __str__(self) -> str:
        shared = ", ".join(f"{split} {count}" for split, count in self.foregrounds.items())
        lines = [super().__str__(), f"{self.events} events, out of clips of the bank: {shared}"]
        lines += [f"no clip of the bank for {split}: {', '.join(names)}" for split, names in self.absent.items()]
        return "\n".join(lines)


class Backgrounds:
    """The source of backgrounds: recordings below a folder, each for one split only, or coloured noise."""

    def __init__(self, folder: Optional[Path], sample_rate: int, seed: int, report: PrepareReport) -> None:
        """folder: None for noise. Files that cannot be read are reported; raises UserError where 3 are not left."""
        self.sample_rate, self.recordings = sample_rate, folder is not None
        self.seconds: dict[Path, float] = {}
        found = find_audio(folder) if folder else FoundAudio()
        if folder:
            report.add_left_out(found, folder)
        for path in found.audio:
            try:
                self.seconds[path] = audio_seconds(path)
            except UserError as error:
                report.skipped.append((path.name, str(error)))
        if folder and len(self.seconds) < len(SPLITS):
            raise UserError(
                f"{folder} has {len(self.seconds)} audio files that can be read: --backgrounds needs 3 at least, as no "
                f"background serves two splits."
            )
        paths = list(self.seconds)
        splits = share_out([str(path) for path in paths], np.zeros(len(paths), dtype=int), SHARES, seed)
        self.of = {split: [path for path, mine in zip(paths, splits, strict=True) if mine == split] for split in SPLITS}

    def draw(self, split: str, rng: Generator) -> np.ndarray:
        """(samples,) float64 of 10 s with a root mean square of 1; a recording that is shorter is repeated."""
        samples = int(CLIP_SECONDS * self.sample_rate)
        if not self.recordings:
            return coloured_noise(samples, self.sample_rate, rng)
        path = self.of[split][rng.integers(len(self.of[split]))]
        start = rng.uniform(0, max(self.seconds[path] - CLIP_SECONDS, 0))
        sound = read_audio(path, self.sample_rate, start=start, seconds=CLIP_SECONDS).astype(np.float64)
        sound = np.resize(sound, samples)
        return sound / (np.sqrt(np.mean(sound**2)) + 1e-9)


def coloured_noise(samples: int, sample_rate: int, rng: Generator) -> np.ndarray:
    """(samples,) float64 Gaussian noise with a root mean square of 1, whose power falls with a random slope."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / sample_rate), LOWEST_HZ)
    noise = np.fft.irfft(spectrum * frequency ** (-rng.uniform(*SLOPES) / 2), samples)
    return noise / np.sqrt(np.mean(noise**2))


def cut_event(sound: np.ndarray, foreground: Foreground, mix: Mix, sample_rate: int, rng: Generator) -> np.ndarray:
    """(samples,) float64 of a random sounding part of a clip, with a root mean square of 1 and ramps of 10 ms."""
    hop = round(FRAME_SECONDS * sample_rate)
    first, last = choose_stretch(foreground.sounding, *mix.event_seconds, rng)
    event = sound[first * hop : last * hop].astype(np.float64)
    ramp = max(1, min(round(RAMP_SECONDS * sample_rate), len(event) // 2))
    rise = (np.arange(ramp) + 0.5) / ramp
    event[:ramp] *= rise
    event[-ramp:] *= rise[::-1]
    return event / np.sqrt(np.mean(event**2))


def mix_soundscape(
    name: str, split: str, bank: Bank, backgrounds: Backgrounds, mix: Mix, rng: Generator
) -> tuple[Clip, list[str]]:
    """One soundscape of 10 s with all its events, and the clip of the bank that each event was cut from.

    1 to 6 events are drawn, their classes equally often; one for which 10 random onsets find no room, because of
    `polyphony` or of another event of its class within 0.5 s, is left out.
    """
    rate = backgrounds.sample_rate
    level = 10 ** (rng.uniform(*BACKGROUND_DB) / 20)
    sound = level * backgrounds.draw(split, rng)
    clips = list(bank.by_class[split].values())
    events: list[Event] = []
    sources: list[str] = []
    for _ in range(rng.integers(1, MOST_EVENTS + 1)):
        of_class = clips[rng.integers(len(clips))]
        chosen = of_class[rng.integers(len(of_class))]
        event = cut_event(bank.sounds.read(chosen.number), chosen, mix, rate, rng)
        start = _place(events, chosen.label, len(event), len(sound), mix.polyphony, rate, rng)
        if start is None:
            continue
        sound[start : start + len(event)] += level * 10 ** (rng.uniform(*mix.snr) / 20) * event
        events.append(Event(chosen.label, start / rate, (start + len(event)) / rate))
        sources.append(chosen.name)
    labels = sorted({event.label for event in events})
    return Clip(name, to_int16(sound), labels, split=split, events=events, labelling=STRONG), sources


def _place(
    events: list[Event], label: int, length: int, samples: int, polyphony: int, rate: int, rng: Generator
) -> Optional[int]:
    """First sample of a new event of `length` samples, None where no room is found."""
    for _ in range(PLACEMENTS):
        start = int(rng.integers(samples - length + 1))
        onset, offset = start / rate, (start + length) / rate
        if is_apart(events, label, onset, offset) and _most_at_once(events, onset, offset) < polyphony:
            return start
    return None


def _most_at_once(events: list[Event], onset: float, offset: float) -> int:
    """The most events that sound at once between two times; that maximum is reached where one of them begins."""
    times = [onset, *(event.onset for event in events if onset < event.onset < offset)]
    return max(sum(event.onset <= time < event.offset for event in events) for time in times)


def _write(
    writer: ClipStoreWriter,
    bank: Bank,
    backgrounds: Backgrounds,
    mix: Mix,
    drawn: Sequence[tuple[str, str, int, Generator]],
    report: SoundscapeReport,
) -> None:
    training = _labellings(sum(split == "train" for _, split, _, _ in drawn), mix)
    sources: list[str] = []
    for name, split, number, rng in with_progress(drawn, "soundscapes are mixed"):
        clip, used = mix_soundscape(name, split, bank, backgrounds, mix, rng)
        labelling = training[number] if split == "train" else STRONG
        if labelling != STRONG:
            labels = clip.labels if labelling == WEAK else []
            clip, used = Clip(clip.name, clip.waveform, labels, split=split, labelling=labelling), []
        writer.add(clip)
        sources += used
        report.clips += 1
        report.events += len(used)
    writer.file["event_source"] = np.array([name.encode() for name in sources], dtype="S")


def _labellings(count: int, mix: Mix) -> list[int]:
    """The annotation of each training soundscape, strong ones first: a larger share changes only the last ones."""
    weak, unlabelled = round(count * mix.weak_share), round(count * mix.unlabelled_share)
    unlabelled = min(unlabelled, count - weak)
    return [STRONG] * (count - weak - unlabelled) + [WEAK] * weak + [UNLABELLED] * unlabelled


def _count(bank: Bank, report: SoundscapeReport) -> None:
    """Report how many clips of the bank each split has, and which classes have none in it."""
    for split in SPLITS:
        report.foregrounds[split] = sum(found.split == split for found in bank.foregrounds)
        absent = [label for k, label in enumerate(bank.labels) if k not in bank.by_class[split]]
        if absent:
            report.absent[split] = absent
