"""What synthesized and mixed soundscapes share: their length, splits, levels, and the gaps between events."""

from collections.abc import Iterable, Iterator

import numpy as np

from data.clip_store import SPLITS, Event
from prepare.stratify import SHARES
from settings import UserError
from utils import float32_to_int16

CLIP_SECONDS = 10.0
GAP_SECONDS = 0.5  # between two events of one class in a clip
LARGEST_PEAK = 0.99  # of full scale

Generator = np.random.Generator


def check_count(clips: int) -> None:
    """Raise UserError for fewer than 10 clips."""
    if clips < 10:
        raise UserError(f"--clips {clips} is not allowed: at least 10 are needed to fill the three splits.")


def draw_clips(clips: int, seed: int) -> Iterator[tuple[str, str, int, Generator]]:
    """Name, split, number in the split and random generator of each clip: 70 % train, 15 % validation, 15 % test.

    The generator depends on seed, split and number alone, so that a larger data set contains a smaller one.
    """
    for split, share in SHARES.items():
        for number in range(round(clips * share)):
            rng = np.random.default_rng([seed, SPLITS.index(split), number])
            yield f"{split}_{number:05d}.wav", split, number, rng


def is_apart(events: Iterable[Event], label: int, onset: float, offset: float) -> bool:
    """Whether an event from onset to offset (seconds) leaves GAP_SECONDS to all others of its class."""
    same = (event for event in events if event.label == label)
    return not any(onset < e.offset + GAP_SECONDS and e.onset < offset + GAP_SECONDS for e in same)


def to_int16(mix: np.ndarray) -> np.ndarray:
    """(samples,) float -> int16, scaled down where its peak is above 0.99."""
    peak = np.abs(mix).max()
    return float32_to_int16(mix if peak < LARGEST_PEAK else mix * (LARGEST_PEAK / peak))
