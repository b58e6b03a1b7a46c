"""A network whose scores are known, and sounds for it: what the tests of listening share."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.postprocess import PostProcessing
from inference import Tagger
from inference.streaming import Event, Listener
from settings import resolve

RATE, STEPS = 8000, 32
STEP = 10 / STEPS  # seconds
EXACT: dict[str, Any] = {"hop_seconds": 5.0, "delay_seconds": 10.0, "release": 1.0}  # all of Tagger's windows count
LABELS = ("up", "down")
Row = tuple[str, float, float]


class Levels:
    """A network whose scores are known: class 0 is the mean of what is above zero in a step, class 1 below."""

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = waveform.unflatten(1, (STEPS, -1))
        frames = torch.stack([steps.clamp(min=0).mean(dim=2), (-steps).clamp(min=0).mean(dim=2)], dim=2)
        return frames.mean(dim=1), frames, frames.mean(dim=1)


def levels_tagger(rate: int = RATE, **given: Any) -> Tagger:
    return Tagger(Levels(), resolve({"sample_rate": rate, **given}), LABELS)


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


def heard(listener: Listener, blocks: list[np.ndarray]) -> list[Event]:
    updates = [update for block in blocks for update in listener.feed(block)] + listener.finish()
    return [event for update in updates for event in update.events]


def rows(events: list[Event]) -> list[Row]:
    return sorted((event.label, round(event.onset, 6), round(event.offset, 6)) for event in events)


def taggers_rows(of: Tagger, sound: np.ndarray, processing: PostProcessing | None = None) -> list[Row]:
    table = of.tag(sound).events(processing)
    times = zip(table.event_label, table.onset, table.offset, strict=True)
    return sorted((str(label), round(float(a), 6), round(float(b), 6)) for label, a, b in times)
