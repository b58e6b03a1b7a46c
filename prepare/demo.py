"""The demo data set: synthetic soundscapes of 10 s with timed events of ten classes, from a seed."""

from collections.abc import Callable

import numpy as np

from data.clip_store import Clip, ClipStoreWriter, Event, Task, store_path
from prepare.adapters import Flags
from prepare.mixing import CLIP_SECONDS, Generator, check_count, draw_clips, is_apart, to_int16
from prepare.report import PrepareReport
from settings import Config

NAME = "demo"
SOURCE = "synthesized by prepare/demo.py"
LICENCE = "CC0 1.0"
TASK: Task = "multilabel"
FLAGS: Flags = {
    "clips": {"type": int, "metavar": "N", "help": "how many clips to make [400]"},
}


def prepare(settings: Config, clips: int = 400) -> PrepareReport:
    """Write `clips` soundscapes, 70 % for training, 15 % each for validation and test.

    A clip depends on random_seed, its split and its number only. Raises UserError for fewer than 10 clips.
    """
    check_count(clips)
    rate = settings.sample_rate
    report = PrepareReport(store_path(settings.dataset_path, NAME))
    with ClipStoreWriter(
        report.path, clip_samples=int(CLIP_SECONDS * rate), sample_rate=rate, labels=LABELS,
        dataset_type=NAME, task=TASK, source=SOURCE, licence=LICENCE,
    ) as writer:  # fmt: skip
        for name, split, _, rng in draw_clips(clips, settings.random_seed):
            writer.add(synthesize_clip(name, split, rate, rng))
            report.clips += 1
    return report


def _times(seconds: float, rate: int) -> np.ndarray:
    return np.arange(int(seconds * rate)) / rate


def _tone(frequency: np.ndarray, rate: int) -> np.ndarray:
    """Sine whose frequency in Hz is given for each sample."""
    return np.sin(2 * np.pi * np.cumsum(frequency) / rate)


def _band_noise(rng: Generator, samples: int, low: float, high: float, rate: int) -> np.ndarray:
    """Gaussian noise between two frequencies in Hz, with unit variance."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    spectrum[(frequency < low) | (frequency > high)] = 0
    noise = np.fft.irfft(spectrum, samples)
    return noise / (noise.std() + 1e-9)


def _pulses(rng: Generator, t: np.ndarray, per_second: float, decay: float, jitter: float) -> np.ndarray:
    """Envelope of sharp attacks with exponential decay (1 / s), at jittered times."""
    envelope = np.zeros_like(t)
    starts = np.arange(0, t[-1], 1 / per_second)
    for start in np.abs(starts + rng.uniform(-jitter, jitter, len(starts)) / per_second):
        envelope += np.where(t >= start, np.exp(-decay * np.maximum(t - start, 0)), 0)
    return envelope


def siren(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Tone that swings slowly between about 600 and 1,400 Hz, with harmonics."""
    centre, width, speed = rng.uniform(850, 1050), rng.uniform(300, 420), rng.uniform(0.35, 0.7)
    frequency = centre + width * np.sin(2 * np.pi * speed * t + rng.uniform(0, 6.28))
    return _tone(frequency, rate) + 0.4 * _tone(2 * frequency, rate) + 0.2 * _tone(3 * frequency, rate)


def knock(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Dull knocks, three to five a second."""
    body = np.sin(2 * np.pi * rng.uniform(110, 190) * t) + 0.7 * _band_noise(rng, len(t), 80, 700, rate)
    return body * _pulses(rng, t, rng.uniform(3, 5), rng.uniform(25, 45), 0.1)


def chirp(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Bird-like upward chirps between 3 and 7 kHz."""
    per_second, low = rng.uniform(4, 7), rng.uniform(3000, 4200)
    phase = (t * per_second) % 1.0
    return _tone(low + rng.uniform(1500, 2800) * phase, rate) * np.sin(np.pi * np.minimum(phase / 0.6, 1.0)) ** 2


def hum(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Mains-like hum: steady harmonics of 90 to 130 Hz."""
    base = rng.uniform(90, 130)
    harmonics = [np.sin(2 * np.pi * base * k * t + rng.uniform(0, 6.28)) / k**0.5 for k in range(1, 9)]
    return np.sum(harmonics, axis=0)


def noise_burst(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Broad hiss, like steam, from 2 kHz up."""
    return _band_noise(rng, len(t), rng.uniform(1800, 2600), 13000, rate)


def alarm_beep(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Square-like beeps of one pitch, on and off three to four times a second."""
    frequency, per_second = rng.uniform(1900, 2500), rng.uniform(3, 4.2)
    gate = ((t * per_second) % 1.0) < 0.55
    return (np.sin(2 * np.pi * frequency * t) + np.sin(2 * np.pi * 3 * frequency * t) / 3) * gate


def bell(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Struck bell: inharmonic partials, struck again each second or so."""
    base = rng.uniform(480, 650)
    partials = [np.sin(2 * np.pi * base * ratio * t) / (k + 1) for k, ratio in enumerate((1, 2.76, 5.4, 8.93))]
    return np.sum(partials, axis=0) * _pulses(rng, t, rng.uniform(1.0, 1.6), 3.0, 0.02)


def engine(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Rough engine: low noise and a sawtooth, both beating 20 to 30 times a second."""
    beat = rng.uniform(20, 30)
    rough = 0.5 + 0.5 * np.abs(np.sin(np.pi * beat * t))
    saw = 2 * ((beat * 2 * t) % 1.0) - 1
    return rough * (saw + 0.9 * _band_noise(rng, len(t), 150, 1500, rate))


def whistle(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Human-like whistle: one pure tone with vibrato between 1.3 and 1.8 kHz."""
    frequency = rng.uniform(1300, 1800) * (1 + 0.02 * np.sin(2 * np.pi * rng.uniform(5, 7) * t))
    return _tone(frequency, rate)


def crackle(rng: Generator, t: np.ndarray, rate: int) -> np.ndarray:
    """Fire-like crackle: sparse clicks of wide band."""
    clicks = (rng.random(len(t)) < rng.uniform(25, 45) / rate) * rng.uniform(0.3, 1.0, len(t))
    tail = np.exp(-np.arange(int(0.004 * rate)) / (0.001 * rate))
    return np.convolve(clicks, tail)[: len(t)] * _band_noise(rng, len(t), 500, 12000, rate)


# name: (synthesizer, shortest and longest event in seconds)
EVENTS: dict[str, tuple[Callable[[Generator, np.ndarray, int], np.ndarray], float, float]] = {
    "alarm_beep": (alarm_beep, 1.5, 4.0),
    "bell": (bell, 1.5, 4.0),
    "chirp": (chirp, 1.0, 4.0),
    "crackle": (crackle, 1.5, 5.0),
    "engine": (engine, 2.0, 6.0),
    "hum": (hum, 2.0, 7.0),
    "knock": (knock, 1.0, 3.0),
    "noise_burst": (noise_burst, 0.7, 3.0),
    "siren": (siren, 2.0, 6.0),
    "whistle": (whistle, 0.7, 3.0),
}
LABELS = list(EVENTS)


def synthesize_event(label: str, seconds: float, rate: int, rng: Generator) -> np.ndarray:
    """(seconds * rate,) float64 event with unit root mean square and 10 ms ramps."""
    t = _times(seconds, rate)
    sound = EVENTS[label][0](rng, t, rate)
    ramp = np.minimum(1.0, np.minimum(t, t[-1] - t) / 0.01)
    sound = sound * ramp
    return sound / (np.sqrt(np.mean(sound**2)) + 1e-9)


def synthesize_clip(name: str, split: str, rate: int, rng: Generator) -> Clip:
    """One soundscape: coloured noise, and one to four events 6 to 24 dB above it that may overlap."""
    samples = int(CLIP_SECONDS * rate)
    level = 10 ** (rng.uniform(-48, -38) / 20)
    background = rng.standard_normal(samples) + rng.uniform(0.5, 2.0) * _band_noise(rng, samples, 50, 800, rate)
    mix = level * background / background.std()
    events: list[Event] = []
    for label in rng.choice(len(LABELS), size=rng.integers(1, 4), replace=False).tolist():
        for _ in range(int(rng.integers(1, 3))):
            _, shortest, longest = EVENTS[LABELS[label]]
            seconds = float(rng.uniform(shortest, longest))
            onset = float(rng.uniform(0, CLIP_SECONDS - seconds))
            if not is_apart(events, label, onset, onset + seconds):
                continue
            sound = synthesize_event(LABELS[label], seconds, rate, rng)
            start = int(onset * rate)
            mix[start : start + len(sound)] += level * 10 ** (rng.uniform(6, 24) / 20) * sound
            events.append(Event(label, start / rate, (start + len(sound)) / rate))
    return Clip(name, to_int16(mix), sorted({event.label for event in events}), split=split, events=events)
