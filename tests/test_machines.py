"""Several machines: how many processes there are, and which one speaks, as torchrun, Lightning and SLURM tell."""

import pytest

from settings import UserError, resolve
from tests.helpers import TINY
from training.devices import is_first_process, node_count, process_count

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}
SHELL = {**SLURM, "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}  # a shell that was asked for with srun --pty


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SLURM, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("told", "machines", "first"),
    [
        ({}, 1, True),
        (TORCHRUN, 2, False),
        ({**TORCHRUN, "RANK": "4", "LOCAL_RANK": "0"}, 2, False),  # the first of the second machine
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}, 2, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, 1, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, 1, False),
        (SLURM, 2, False),
        ({**SLURM, "SLURM_PROCID": "0"}, 2, True),
        (SHELL, 1, True),
    ],
)
def test_who_is_first_of_how_many(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], machines: int, first: bool
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert node_count() == machines
    assert is_first_process() == first


def test_a_batch_is_shared_by_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    settings = resolve({**TINY, "devices": 4, "batch_size": 16})
    assert process_count(settings) == 8
    with pytest.raises(UserError, match="8 processes on 2 machines"):
        process_count(resolve({**TINY, "devices": 4, "batch_size": 12}))
