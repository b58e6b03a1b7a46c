"""python main.py esm_test: evaluate the mean of several checkpoints' scores on the test split."""

from typing import Any

from commands._evaluate import check_labels, run_test
from commands._records import is_first_process, print_first_page
from data_generator import SEDDataModule
from model import build_model
from model.checkpoint import load_network, read_checkpoint
from sed_model import Ensemble_SEDWrapper
from settings import requested, resolve


def run(given: dict[str, Any]) -> None:
    """Print the metrics of the ensemble of --esm_model_pathes A,B,... and write them into heatmap_dir."""
    paths = requested("esm_model_pathes", given)
    if not paths:
        raise ValueError("esm_test needs checkpoints: --esm_model_pathes A.ckpt,B.ckpt")
    checkpoints = [read_checkpoint(path) for path in paths]
    members = [resolve(given, checkpoint=checkpoint.settings) for checkpoint in checkpoints]
    settings = members[0]
    data = SEDDataModule(settings, (settings.test_split,))
    networks = []
    for checkpoint, member in zip(checkpoints, members, strict=True):
        check_labels(checkpoint, member, data.tables[settings.test_split])
        if (member.sample_rate, member.classes_num) != (settings.sample_rate, settings.classes_num):
            raise ValueError(
                f"{checkpoint.path} listens at {member.sample_rate} Hz for {member.classes_num} classes, {paths[0]} at "
                f"{settings.sample_rate} Hz for {settings.classes_num}: they cannot be averaged."
            )
        networks.append(build_model(member))
        report = load_network(networks[-1], checkpoint)
        if is_first_process():
            print(report)
    print_first_page(f"HTS-AT: test of {len(networks)} networks together", settings, data, networks[0])
    labels = (
        checkpoints[0].labels
        or data.tables[settings.test_split].labels
        or [f"class {k}" for k in range(settings.classes_num)]
    )
    run_test(Ensemble_SEDWrapper(networks, settings, labels), settings, data, paths)
