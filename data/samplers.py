"""Which clips an epoch takes, and in what order: the same on every process, and after a resume."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from data.clip_store import STRONG, UNLABELLED, WEAK, class_index
from settings import UserError

PARTS = 2**16  # of a clip, in which EpochSampler says where a crop begins
BLOCK_DRAWS = 2**15  # draws that BalancedSampler makes at once
SMOOTHING = 30  # active frames, for FrameBalancedSampler


class EpochSampler(Sampler[int]):
    """A share of a sequence that is drawn anew each epoch, the same on every process that has the same seed.

    clips: how many there are; draws: how many an epoch takes, 0: all of them. crops: with each clip's number comes a
    random one below PARTS, as number + clips * it. The shares of the `world` processes are disjoint and equally long;
    up to world - 1 draws of an epoch are left out.
    """

    def __init__(
        self, clips: int, *, seed: int, draws: int = 0, rank: int = 0, world: int = 1, crops: int = False
    ) -> None:
        self.count, self.length, self.crops = clips, draws or clips, crops
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0
        self.start = 0  # draws of this share that the next iteration skips, to resume in the middle of an epoch
        if self.length < world:
            raise UserError(f"{self.length} training clips cannot be shared by {world} processes: set devices lower.")

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """(length,) clip numbers of one epoch, for all processes together; none twice before all were there."""
        rounds = -(-self.length // self.count)
        return np.concatenate([rng.permutation(self.count) for _ in range(rounds)])[: self.length]

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = self.draw(rng)
        drawn = drawn + self.count * rng.integers(PARTS, size=len(drawn)) if self.crops else drawn
        return iter(drawn[self.rank :: self.world][self.start : len(self)].tolist())

    def __len__(self) -> int:
        return self.length // self.world


class BalancedSampler(EpochSampler):
    """Class-balanced draws (paper, section 3.1): a random order of the classes, one random clip of each, and again.

    targets: (N, K) bool. Classes without clips are left out.
    """

    def __init__(self, targets: np.ndarray, **share: int) -> None:
        """share: seed, draws, rank and world, as EpochSampler."""
        super().__init__(len(targets), **share)
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


class WeightedSampler(EpochSampler):
    """Independent draws with replacement, each clip in proportion to its weight.

    The weight is the sum over its classes of 1000 / (clips of the class + 0.01) + `added`, as AudioTagging Done Right
    has it (Li et al., Interspeech 2022, arXiv 2203.13448).
    """

    def __init__(self, targets: np.ndarray, added: np.ndarray, **share: int) -> None:
        """targets: (N, K) bool; added: (K,); share: as EpochSampler."""
        super().__init__(len(targets), **share)
        clips, _, counts = class_index(targets)
        of_class = 1000 / (counts + 0.01) + added
        self.upto = np.cumsum(np.bincount(clips, weights=np.repeat(of_class, counts), minlength=len(targets)))
        if not self.upto[-1] > 0:
            raise UserError("No clip has a class: balanced_data cannot draw from them; set --balanced_data False.")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        place = np.searchsorted(self.upto, rng.random(self.length) * self.upto[-1], side="right")
        return np.minimum(place, len(self.upto) - 1)


class FrameBalancedSampler(EpochSampler):
    """Draws in which the classes sound equally long: a clip is drawn in proportion to its weight.

    Its weight is the sum over its events of their share of all the seconds that their class has. The clips without
    events have together the weight of a class. published: as PretrainedSED has it (Schmid et al., ICASSP 2025), in
    active frames in place of seconds: SMOOTHING is added to those that a class has, and clips without events are never
    drawn. replacement: whether an epoch may take a clip several times; else the heavy ones tend to come first.
    """

    def __init__(
        self,
        events: tuple[np.ndarray, np.ndarray, np.ndarray],
        length: int,
        *,
        published: bool = False,
        replacement: bool = True,
        **share: int,
    ) -> None:
        """events: (E,) clip, (E,) class, (E,) seconds or frames; length: how many clips; share: as EpochSampler.

        Raises UserError where there are no events, and too few clips to draw without replacement.
        """
        super().__init__(length, **share)
        clip, label, amount = events
        if not len(clip):
            raise UserError("No clip has events: balanced_by = frames cannot draw from them; set it to clips.")
        total = np.bincount(label, weights=amount) + (SMOOTHING if published else 0)
        self.weight = np.bincount(clip, weights=amount / total[label], minlength=length)
        silent = self.weight == 0
        if not published:
            self.weight[silent] = 1 / max(silent.sum(), 1)
        self.upto, self.replacement = np.cumsum(self.weight), replacement
        there = np.count_nonzero(self.weight)
        if not replacement and there < self.length:
            raise UserError(
                f"balanced_replacement = False needs {self.length} training clips with events for an epoch, and there "
                f"are {there}: set epoch_clips to that, or balanced_replacement True."
            )

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        if not self.replacement:  # by exponential times (Efraimidis and Spirakis 2006)
            there = np.flatnonzero(self.weight)
            times = rng.exponential(size=len(there)) / self.weight[there]
            return there[np.argsort(times)[: self.length]]
        place = np.searchsorted(self.upto, rng.random(self.length) * self.upto[-1], side="right")
        return np.minimum(place, len(self.upto) - 1)


class LabellingSampler(EpochSampler):
    """Batches in which strong, weak and unlabelled clips have given shares, as the DCASE baselines have them.

    Each kind is drawn in a random order, without replacement until all have been drawn. Each process has the same
    shares. The order of the kinds in a batch is a palindrome, since mixup takes partners from the reversed batch; where
    two kinds have odd numbers, one pair differs.
    """

    def __init__(self, labelling: np.ndarray, shares: Sequence[float], batch: int, **share: int) -> None:
        """labelling: (N,) STRONG, WEAK or UNLABELLED; shares: of strong, weak, unlabelled clips, their sum is 1; batch:
        clips of a batch, all processes together; share: as EpochSampler. Raises UserError where a kind is asked for
        that there is none of, and where a process's part of a batch has no place for one.
        """
        super().__init__(len(labelling), **share)
        world = self.world
        self.kinds = [np.flatnonzero(labelling == kind) for kind in (STRONG, WEAK, UNLABELLED)]
        counts = np.diff([0, *np.rint(np.cumsum(shares) * (batch // world)).astype(int)])  # of one process
        for name, clips, part, count in zip(("strong", "weak", "unlabelled"), self.kinds, shares, counts, strict=True):
            if part and not len(clips):
                raise UserError(f"labelling_shares = {list(shares)}, but there are no {name} training clips.")
            if part and not count:
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
