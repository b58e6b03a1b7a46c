"""python main.py esm_test: evaluate the mean of several checkpoints' scores on the test split."""

import hashlib
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl

from data_generator import load_test_data
from model.registry import encoder_titles
from runs.members import Member, check_alike, fit_together, member_paths
from runs.records import print_first_page
from runs.testing import run_test
from sed_model import Ensemble_SEDWrapper
from settings import UserError, requested


def run(given: dict[str, Any]) -> None:
    """Print the metrics of the ensemble of --esm_model_pathes A,B,... and write them into heatmap_dir.

    A folder stands for its checkpoints: of a run, the epochs that it has kept. The files are named
    ensemble_<8 hexadecimal digits of the members, in any order>, unless test_file is given.
    """
    paths = member_paths(requested("esm_model_pathes", given))
    if not paths:
        raise UserError("esm_test needs checkpoints: --esm_model_pathes A.ckpt,B.ckpt")
    members = [Member.read(path, given) for path in paths]
    for member in members[1:]:
        check_alike(member, members[0])
    first = members[0].named(f"ensemble_{joint_sha256(members)[:8]}", given)
    settings = first.settings
    data = load_test_data(settings)
    table = data.tables[settings.test_split]
    for member in members:
        member.check_labels(table)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    networks = [member.network() for member in members]
    together = fit_together(networks, settings) if settings.esm_together is None else settings.esm_together
    encoders = encoder_titles(*(member.settings.encoder for member in members))
    print_first_page(
        f"{encoders}: test of {len(networks)} networks", first.reported(), data, networks[0],
        networks="all on the device" if together else "on the device one after another",
    )  # fmt: skip
    module = Ensemble_SEDWrapper(networks, settings, first.labels(table), together=together)
    run_test(module, data, [first, *members[1:]])


def joint_sha256(members: Sequence[Member]) -> str:
    """Of the members' hashes, whatever their order: 64 hexadecimal digits."""
    return hashlib.sha256(" ".join(sorted(member.sha256 for member in members)).encode()).hexdigest()
