"""python main.py test: evaluate a checkpoint on the test split."""

from typing import Any

import pytorch_lightning as pl

from commands._evaluate import check_labels, run_test
from commands._records import is_first_process, print_first_page
from data_generator import SEDDataModule
from model import build_model
from model.checkpoint import load_network, read_checkpoint
from sed_model import SEDWrapper
from settings import requested, resolve


def run(given: dict[str, Any]) -> None:
    """Print the metrics of --resume_checkpoint and write them, with the scores, into heatmap_dir."""
    path = requested("resume_checkpoint", given)
    if path is None:
        raise ValueError(
            "test needs a checkpoint: --resume_checkpoint PATH, for example "
            f"{resolve().run_folder / 'checkpoints' / 'best.ckpt'} after a training."
        )
    checkpoint = read_checkpoint(path)
    settings = resolve(given, checkpoint=checkpoint.settings)
    data = SEDDataModule(settings, (settings.test_split,))
    check_labels(checkpoint, settings, data.tables[settings.test_split])
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = build_model(settings)
    report = load_network(network, checkpoint)
    if is_first_process():
        print(report)
    print_first_page(f"HTS-AT: test of {path}", settings, data, network)
    labels = (
        checkpoint.labels
        or data.tables[settings.test_split].labels
        or [f"class {k}" for k in range(settings.classes_num)]
    )
    run_test(SEDWrapper(network, settings, labels), settings, data, [path])
