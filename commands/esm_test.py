"""python main.py esm_test: evaluate the mean of several checkpoints' scores on the test split."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from commands._evaluate import Member, check_labels, run_test
from commands._records import print_first_page
from commands._trainer import on_gpu
from data_generator import SEDDataModule
from sed_model import Ensemble_SEDWrapper
from settings import Config, requested


def run(given: dict[str, Any]) -> None:
    """Print the metrics of the ensemble of --esm_model_pathes A,B,... and write them into heatmap_dir."""
    paths = requested("esm_model_pathes", given)
    if not paths:
        raise ValueError("esm_test needs checkpoints: --esm_model_pathes A.ckpt,B.ckpt")
    members = [Member.read(path, given) for path in paths]
    settings = members[0].settings
    data = SEDDataModule(settings, (settings.test_split,))
    table = data.tables[settings.test_split]
    for member in members:
        check_labels(member.checkpoint, member.settings, table)
        check_alike(member, members[0])
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    networks = [member.network() for member in members]
    together = fit_together(networks, settings) if settings.esm_together is None else settings.esm_together
    print_first_page(
        f"HTS-AT: test of {len(networks)} networks", settings, data, networks[0],
        networks="all on the device" if together else "on the device one after another",
    )  # fmt: skip
    module = Ensemble_SEDWrapper(networks, settings, members[0].labels(table), together=together)
    run_test(module, settings, data, paths)


def check_alike(member: Member, first: Member) -> None:
    """Raise ValueError where the scores of two checkpoints cannot be averaged."""
    ours, theirs = member.settings, first.settings
    if (ours.sample_rate, ours.clip_samples, ours.classes_num) != (
        theirs.sample_rate, theirs.clip_samples, theirs.classes_num,
    ):  # fmt: skip
        raise ValueError(
            f"{member.checkpoint.path} takes {ours.clip_samples} samples at {ours.sample_rate} Hz and knows "
            f"{ours.classes_num} classes, {first.checkpoint.path} takes {theirs.clip_samples} at {theirs.sample_rate} "
            f"Hz and knows {theirs.classes_num}: they cannot be averaged."
        )
    known, other = first.checkpoint.labels, member.checkpoint.labels
    if known and other and known != other:
        raise ValueError(
            f"{member.checkpoint.path} and {first.checkpoint.path} have different labels: their scores cannot be "
            f"averaged."
        )


def fit_together(networks: Sequence[nn.Module], settings: Config) -> bool:
    """Whether the weights of all networks take at most half of a GPU's free memory; in main memory they are anyway."""
    if not on_gpu(settings):
        return True
    size = sum(t.numel() * t.element_size() for network in networks for t in network.state_dict().values())
    return size <= torch.cuda.mem_get_info()[0] / 2
