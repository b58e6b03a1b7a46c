"""Which clips an epoch takes, and in what order: the same on every process, and after a resume."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from prepare.clip_store import class_index

BLOCK_DRAWS = 2**15  # draws that BalancedSampler makes at once


class EpochSampler(Sampler[int]):
    """A share of a sequence that is drawn anew each epoch, the same on every process that has the same seed.

    The shares of the `world` processes are disjoint and equally long; up to world - 1 draws of an epoch are left out.
    """

    def __init__(self, length: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.rank, self.world, self.epoch = length, seed, rank, world, 0
        self.start = 0  # draws of this share that the next iteration leaves out: it goes on in the middle of an epoch
        if length < world:
            raise ValueError(f"{length} training clips cannot be shared by {world} processes: set devices lower.")

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """(length,) clip numbers of one epoch, for all processes together."""
        return rng.permutation(self.length)

    def __iter__(self) -> Iterator[int]:
        drawn = self.draw(np.random.default_rng([self.seed, self.epoch]))
        return iter(drawn[self.rank :: self.world][self.start : len(self)].tolist())

    def __len__(self) -> int:
        return self.length // self.world


class BalancedSampler(EpochSampler):
    """Class-balanced draws (paper, section 3.1): a random order of the classes, one random clip of each, and again.

    targets: (N, K) bool. An epoch has N draws. Classes without clips are left out.
    """

    def __init__(self, targets: np.ndarray, *, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(len(targets), seed=seed, rank=rank, world=world)
        self.clips, starts, counts = class_index(targets)
        self.counts, self.starts = counts[counts > 0], starts[:-1][counts > 0]
        if len(self.counts) == 0:
            raise ValueError("No clip has a class: balanced_data cannot draw from them; set --balanced_data False.")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        classes = np.arange(len(self.counts), dtype=np.uint64)
        drawn = np.empty(self.length, dtype=np.int64)
        block = max(1, BLOCK_DRAWS // len(classes)) * len(classes)  # whole rounds, that a processor's cache holds
        for start in range(0, self.length, block):
            count = min(block, self.length - start)
            rounds = -(-count // len(classes))
            # A random number with its class in the lower half: sorted, a row is a random order of the classes.
            keys = rng.integers(2**32, size=(rounds, len(classes)), dtype=np.uint64) << np.uint64(32) | classes
            keys.sort(axis=1)
            order = (keys.ravel()[:count] & np.uint64(2**32 - 1)).astype(np.int64)
            which = (rng.random(count) * self.counts[order]).astype(np.int64)
            drawn[start : start + count] = self.clips[self.starts[order] + which]
        return drawn


class ShardSampler(Sampler[int]):
    """Every clip once, in order, dealt out to the processes: no clip is repeated to fill up a share.

    Only where there are fewer clips than processes do those without any take the first one, since Lightning leaves
    out a process that has nothing to do; sed_model.py counts a clip once all the same.
    """

    def __init__(self, length: int, *, rank: int = 0, world: int = 1) -> None:
        self.share = range(rank, length, world) or range(1)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)
