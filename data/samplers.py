"""Which clips an epoch takes, and in what order: the same on every process, and after a resume."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data.clip_store import STRONG, UNLABELLED, WEAK, class_index
from settings import UserError

BLOCK_DRAWS = 2**15  # draws that BalancedSampler makes at once


class EpochSampler(Sampler[int]):
    """A share of a sequence that is drawn anew each epoch, the same on every process that has the same seed.

    The shares of the `world` processes are disjoint and equally long; up to world - 1 draws of an epoch are left out.
    """

    def __init__(self, length: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.rank, self.world, self.epoch = length, seed, rank, world, 0
        self.start = 0  # draws of this share that the next iteration skips, to resume in the middle of an epoch
        if length < world:
            raise UserError(f"{length} training clips cannot be shared by {world} processes: set devices lower.")

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
            raise UserError("No clip has a class: balanced_data cannot draw from them; set --balanced_data False.")

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


class FrameBalancedSampler(EpochSampler):
    """Draws in which the classes sound equally long: a clip is drawn, with replacement, in proportion to its weight.

    Its weight is the sum over its events of their share of all the seconds that their class has. The clips without
    events have together the weight of a class. An epoch has as many draws as there are clips.
    """

    def __init__(
        self,
        events: tuple[np.ndarray, np.ndarray, np.ndarray],
        length: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """events: (E,) clip, (E,) class, (E,) seconds; length: how many clips. ValueError where there are no events."""
        super().__init__(length, seed=seed, rank=rank, world=world)
        clip, label, seconds = events
        if not len(clip):
            raise UserError("No clip has events: balanced_by = frames cannot draw from them; set it to clips.")
        total = np.bincount(label, weights=seconds)
        weight = np.bincount(clip, weights=seconds / total[label], minlength=length)
        silent = weight == 0
        weight[silent] = 1 / max(silent.sum(), 1)
        self.upto = np.cumsum(weight)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        place = np.searchsorted(self.upto, rng.random(self.length) * self.upto[-1], side="right")
        return np.minimum(place, self.length - 1)


class LabellingSampler(EpochSampler):
    """Batches in which strong, weak and unlabelled clips have given shares, as the DCASE baselines have them.

    Each kind is drawn in a random order, without replacement until all have been drawn. An epoch has as many draws as
    there are clips. Each process has the same shares. The order of the kinds in a batch is a palindrome, since mixup
    takes partners from the reversed batch; where two kinds have odd numbers, one pair differs.
    """

    def __init__(
        self,
        labelling: np.ndarray,
        shares: Sequence[float],
        batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """labelling: (N,) STRONG, WEAK or UNLABELLED; shares: of strong, weak, unlabelled clips, their sum is 1; batch:
        clips of a batch, all processes together. Raises UserError where a kind is asked for that there is none of, and
        where a process's part of a batch has no place for one.
        """
        super().__init__(len(labelling), seed=seed, rank=rank, world=world)
        self.kinds = [np.flatnonzero(labelling == kind) for kind in (STRONG, WEAK, UNLABELLED)]
        counts = np.diff([0, *np.rint(np.cumsum(shares) * (batch // world)).astype(int)])  # of one process
        for name, clips, share, count in zip(("strong", "weak", "unlabelled"), self.kinds, shares, counts, strict=True):
            if share and not len(clips):
                raise UserError(f"labelling_shares = {list(shares)}, but there are no {name} training clips.")
            if share and not count:
                raise UserError(
                    f"labelling_shares = {list(shares)} leaves no {name} clip among the {batch // world} of a batch: "
                    f"raise that share, or batch_size."
                )
        kinds = np.repeat(np.arange(3), counts)
        # The draws are dealt out to the processes in turn: `world` neighbours are one place of their batches.
        self.pattern = np.repeat(np.concatenate([kinds[::2], kinds[1::2][::-1]]), world)  # (batch,)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        order = np.resize(self.pattern, self.length)
        drawn = np.empty(self.length, dtype=np.int64)
        for kind, clips in enumerate(self.kinds):
            places = np.flatnonzero(order == kind)
            rounds = -(-len(places) // len(clips)) if len(clips) else 0
            if rounds:
                drawn[places] = np.concatenate([rng.permutation(clips) for _ in range(rounds)])[: len(places)]
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
