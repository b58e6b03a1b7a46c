"""Networks whose scores are known and sounds for them, and a small checkpoint: for predict, listen and serve."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.postprocess import PostProcessing
from inference import Tagger
from inference.streaming import Event, Listener
from model.checkpoint import store_in_checkpoint
from settings import resolve
from tests.helpers import save_network

RATE, STEPS = 8000, 32
STEP = 10 / STEPS  # seconds
EXACT: dict[str, Any] = {"hop_seconds": 5.0, "delay_seconds": 10.0, "release": 1.0}  # all of Tagger's windows count
LABELS = ("up", "down")
# A network for less than a second of 8 kHz, 2 steps of 0.315 s.
NANO: dict[str, Any] = {"sample_rate": RATE, "clip_samples": 5040, "htsat_spec_size": 64, "classes_num": 3}
Row = tuple[str, float, float]


class Levels:
    """A network whose scores are known: class 0 is the mean of what is above zero in a step, class 1 below."""

    frames = STEPS

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = waveform.unflatten(1, (STEPS, -1))
        frames = torch.stack([steps.clamp(min=0).mean(dim=2), (-steps).clamp(min=0).mean(dim=2)], dim=2)
        return frames.mean(dim=1), frames, frames.mean(dim=1)


class FramelessTagger(Tagger):
    """A Tagger of an encoder without a time axis."""

    @property
    def has_frames(self) -> bool:
        return False

    def _tag_all(self, *given: Any) -> Generator[Any, None, None]:
        for name, found in super()._tag_all(*given):
            assert not isinstance(found, Exception)
            yield name, replace(found, framewise=found.framewise[:0], seconds_per_frame=0.0)


def levels_tagger(rate: int = RATE, kind: type[Tagger] = Tagger, **given: Any) -> Tagger:
    return kind(Levels(), resolve({"sample_rate": rate, **given}), LABELS)


def save_nano(path: Path, labels: list[str], thresholds: tuple[float, ...]) -> Path:
    """A calibrated checkpoint of NANO."""
    calibrated = PostProcessing(tuple(labels), thresholds=thresholds, source="calibrated").as_dict()
    store_in_checkpoint(save_network(path, labels, **NANO), postprocessing=calibrated)
    return path


def levels(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Stretches of 0.2 to 3 s, each of another level between -1 and 1."""
    rng = np.random.default_rng(seed)
    sound = np.concatenate(
        [np.full(int(rng.integers(rate // 5, 3 * rate)), rng.uniform(-1, 1)) for _ in range(int(seconds * 5) + 2)]
    )
    return sound[: round(seconds * rate)].astype(np.float32)


def stretches(*parts: tuple[float, float]) -> np.ndarray:
    """(seconds, level), one behind the other."""
    return np.concatenate([np.full(round(seconds * RATE), level, np.float32) for seconds, level in parts])


def events_of(listener: Listener, blocks: list[np.ndarray]) -> list[Event]:
    updates = [update for block in blocks for update in listener.feed(block)] + listener.finish()
    return [event for update in updates for event in update.events]


def rows(events: list[Event]) -> list[Row]:
    return sorted((event.label, round(event.onset, 6), round(event.offset, 6)) for event in events)


def taggers_rows(of: Tagger, sound: np.ndarray, processing: PostProcessing | None = None) -> list[Row]:
    table = of.tag(sound).events(processing)
    times = zip(table.event_label, table.onset, table.offset, strict=True)
    return sorted((str(label), round(float(a), 6), round(float(b), 6)) for label, a, b in times)
