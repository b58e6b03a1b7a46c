"""Train, validation and test: every class in all of them, near 70/15/15, sources kept together."""

import numpy as np
import pytest

from data.clip_store import SPLITS
from prepare.stratify import SHARES, share_out, stratified_split
from settings import UserError


def share(split: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Clips in train, validation and test among those that `wanted` picks."""
    return [int((split[wanted] == name).sum()) for name in SPLITS]


def test_single_classes() -> None:
    sizes = [1, 2, 3, 4, 10, 40, 100]
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))
    targets = np.eye(len(sizes), dtype=bool)[labels]
    split = stratified_split(targets, seed=3)
    assert [share(split, targets[:, label]) for label in range(len(sizes))] == [
        [1, 0, 0], [2, 0, 0], [1, 1, 1], [2, 1, 1], [7, 1, 2], [28, 6, 6], [70, 15, 15],
    ]  # fmt: skip
    assert np.array_equal(split, stratified_split(targets, seed=3))
    assert not np.array_equal(split, stratified_split(targets, seed=4))


@pytest.mark.parametrize("seed", range(5))
def test_several_classes(seed: int) -> None:
    """Random targets with common and rare classes, and clips without any."""
    rng = np.random.default_rng(seed)
    targets = rng.random((600, 12)) < np.geomspace(0.006, 0.5, 12)
    split = stratified_split(targets, seed)
    for label in np.flatnonzero(targets.sum(axis=0) >= 3):
        assert min(share(split, targets[:, label])) > 0
    for clips in (np.arange(600), np.flatnonzero(~targets.any(axis=1)), np.flatnonzero(targets[:, -1])):
        assert [count / len(clips) for count in share(split, clips)] == pytest.approx([0.7, 0.15, 0.15], abs=0.05)


def test_classes_that_are_hard_to_cover() -> None:
    """Class 0 has three clips, each with a rarer class that would put it in train; four classes share four clips."""
    targets = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]], dtype=bool)
    assert sorted(stratified_split(targets, seed=0)) == ["test", "train", "validation"]
    targets = ~np.eye(4, dtype=bool)
    assert set(stratified_split(targets, seed=0)) == set(SPLITS)
    with pytest.raises(UserError, match=r"\(4,\)"):
        stratified_split(targets[0], seed=0)


def test_sources_stay_together() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        sources = [f"r{number}" for number in rng.integers(0, 30, 120)]
        labels = np.array([int(source[1:]) % 3 for source in sources])
        splits = share_out(sources, labels, SHARES, seed)
        assert all(len({s for s, name in zip(splits, sources, strict=True) if name == one}) == 1 for one in sources)
        for label in range(3):
            shares = [np.mean(splits[labels == label] == split) for split in SPLITS]
            assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.15)
            assert min(shares) > 0
