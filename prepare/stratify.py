"""Clips -> train, validation and test, stratified by class, from a seed."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.clip_store import SPLITS
from settings import UserError

TRAIN, VALIDATION, TEST = range(3)  # places in SPLITS
SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
ATTEMPTS = 30  # orders to try where clips of several classes leave a class out of a split: nearly always one


def stratified_split(targets: np.ndarray, seed: int) -> np.ndarray:
    """Split of each clip: about 70 % train, 15 % validation and 15 % test of every class.

    targets: (N, K) bool. Returns (N,) of "train", "validation", "test"; the same for the same targets and seed. Clips
    are grouped by their rarest class, the rarest first; those without a class are a group of their own. A class
    with 3 clips or more is in all three splits; one with fewer is in train. Where clips have several classes this can
    be impossible: then the best of 30 tries counts, and a class of one or two clips may leave train. Raises UserError
    for another shape.
    """
    if targets.ndim != 2:
        raise UserError(f"targets must be (clips, classes); an array of shape {targets.shape} was given.")
    targets = targets.astype(bool)
    rng = np.random.default_rng(seed)
    best, fewest = np.zeros(0, dtype=int), np.inf
    for _ in range(ATTEMPTS):
        assigned = _attempt(targets, rng.permutation(len(targets)))
        here = np.stack([targets[assigned == place].sum(axis=0) for place in range(3)])  # (3, K) clips
        missing = (here[:, targets.sum(axis=0) >= 3] == 0).sum()
        if missing < fewest:
            best, fewest = assigned, missing
        if missing == 0:
            break
    return np.array(SPLITS)[best]


def _attempt(targets: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(N,) places in SPLITS, clips of one class taken in `order`."""
    counts = targets.sum(axis=0)
    rarest = np.full(len(targets), -1)  # -1: no class
    for label in np.argsort(-counts, kind="stable"):  # the rarest class writes last
        rarest[targets[:, label]] = label
    assigned = np.full(len(targets), -1)
    for label in np.argsort(counts, kind="stable"):
        _fill(assigned, order[rarest[order] == label], targets[:, label])
    _fill(assigned, order[rarest[order] == -1], rarest == -1)
    _cover(assigned, targets, order)
    return assigned


def _quota(clips: int) -> tuple[int, int, int]:
    """How many clips of a class go to train, validation and test. Halves go to test, so 10 clips become 7, 1, 2."""
    if clips < 3:
        return clips, 0, 0
    validation, test = max(1, (15 * clips + 49) // 100), max(1, (15 * clips + 50) // 100)
    return clips - validation - test, validation, test


def _fill(assigned: np.ndarray, members: np.ndarray, of_class: np.ndarray) -> None:
    """Assign the clips `members` of a class, seeing which of its clips (N,) bool rarer classes have placed already."""
    placed = np.bincount(assigned[of_class & (assigned >= 0)], minlength=3)
    lack = np.maximum(np.array(_quota(int(of_class.sum()))) - placed, 0)
    # Where a split has too many already, the others lack more than is left: train goes short.
    wanted = np.repeat([TEST, VALIDATION, TRAIN], lack[[TEST, VALIDATION, TRAIN]])
    assigned[members] = wanted[: len(members)]


def _cover(assigned: np.ndarray, targets: np.ndarray, order: np.ndarray) -> None:
    """Move clips until every class with 3 clips or more is in all splits, as far as no other class leaves one."""
    large = np.flatnonzero(targets.sum(axis=0) >= 3)
    moved = True
    while moved:  # each move brings a class to one more split and takes none from any: this ends
        moved = False
        for label in large:
            for split in range(3):
                members = order[targets[order, label]]
                if (assigned[members] == split).any():
                    continue
                here = np.stack([targets[assigned == place].sum(axis=0) for place in range(3)])  # (3, K) clips
                spare = [
                    i for i in members if (here[assigned[i], large] - targets[i, large] > 0)[targets[i, large]].all()
                ]
                if spare:
                    assigned[spare[0]] = split
                    moved = True


def share_out(sources: Sequence[str], labels: np.ndarray, shares: dict[str, float], seed: int) -> np.ndarray:
    """(N,) split of each clip: about `shares` of the clips of every class, all clips of one source in one split.

    sources: (N,) names; labels: (N,) classes. A class with as many sources as there are splits, or more, is in all of
    them; one with fewer fills the splits in their order.
    """
    rng = np.random.default_rng(seed)
    place: dict[str, str] = {}
    for label in np.unique(labels):
        sizes = Counter(sources[clip] for clip in np.flatnonzero(labels == label).tolist())
        names = sorted(set(sizes) - set(place))
        free = sorted((names[i] for i in rng.permutation(len(names))), key=lambda name: -sizes[name])
        have = Counter(dict.fromkeys(shares, 0))
        for name in sizes.keys() & place.keys():  # a recording with sounds of two classes
            have[place[name]] += sizes[name]
        for name in free:  # the largest first, each to the split that lacks most
            split = max(shares, key=lambda one: shares[one] * sizes.total() - have[one])
            place[name] = split
            have[split] += sizes[name]
        for empty in [split for split in shares if not have[split]]:
            used = Counter(place[name] for name in sizes)
            spare = [name for name in free if used[place[name]] > 1]
            if spare:
                place[spare[-1]] = empty
    return np.array([place[source] for source in sources], dtype="U10")
