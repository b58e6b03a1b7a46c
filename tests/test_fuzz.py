"""Damaged files of every kind are refused, or read without a change that nobody notices."""

import pytest

from benchmarks.fuzz import FINDINGS, KINDS, run


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str) -> None:
    outcomes = list(run(kind, 1, list(range(500))))
    assert not [each for each in outcomes if each[1] in FINDINGS]
    assert {"refused", "read", "warned"} & {each[1] for each in outcomes[:50]}
