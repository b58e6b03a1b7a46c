"""python main.py train: train a network, or go on with an interrupted run."""

from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl

from commands._records import is_first_process, print_first_page, save_provenance
from commands._trainer import build_trainer, checkpoint_folder, device_count
from data_generator import SEDDataModule
from model import build_model
from model.checkpoint import Checkpoint, load_network, read_checkpoint
from prepare.labels import published_labels
from sed_model import SEDWrapper
from settings import NETWORK_SETTINGS, Config, resolve

# What must not change when a run is gone on with: its network, and which clips it may learn from.
RUN_SETTINGS = (*NETWORK_SETTINGS, "dataset_type", "esc_fold", "protocol", "clip_samples")


def run(given: dict[str, Any]) -> None:
    """Train as the settings say, into <workspace>/runs/<exp_name>."""
    settings = resolve(given)
    device_count(settings)
    resumed = find_resumed(settings)
    if resumed and resumed.epoch is not None and resumed.epoch + 1 >= settings.max_epoch:
        print(f"{settings.run_folder} is complete: epoch {resumed.epoch + 1} of {settings.max_epoch}. Nothing to do.")
        return
    data = SEDDataModule(settings, ("train", "validation"))
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = build_model(settings)
    more = {}
    if settings.resume_checkpoint and not resumed:
        report = load_network(network, read_checkpoint(settings.resume_checkpoint), new_classifier=True)
        more["fine-tuned_from"] = str(report)
    if resumed:
        more["resumed_from"] = f"{resumed.path}, after epoch {(resumed.epoch or 0) + 1}"
    labels = data.tables["train"].labels or published_labels(settings.dataset_type, settings.classes_num)
    wrapper = SEDWrapper(network, settings, labels)
    print_first_page(f"HTS-AT: training {settings.exp_name}", settings, data, network, **more)
    save_provenance(settings, data, **more)
    trainer = build_trainer(settings, steps_per_epoch=data.steps_per_epoch(device_count(settings)))
    try:
        trainer.fit(wrapper, data, ckpt_path=str(resumed.path) if resumed else None, weights_only=True)
    except SystemExit:  # so Lightning ends a run that was interrupted at the keyboard
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    if is_first_process():
        best = checkpoint_folder(settings) / "best.ckpt"
        value = trainer.callback_metrics.get(wrapper.main_metric)
        print(f"Trained {trainer.global_step} steps; {wrapper.main_metric} of the last epoch {value:.4f}.")
        print(f"Best checkpoint: {best}\nTest it: python main.py test --resume_checkpoint {best}")


def find_resumed(settings: Config) -> Optional[Checkpoint]:
    """The checkpoint to go on from, or None for a new run.

    Raises ValueError where a new run would mix with an old one, and where the old one has another network.
    """
    folder = checkpoint_folder(settings)
    last = folder / "last.ckpt"
    if settings.resume is None:
        if is_first_process() and folder.is_dir() and any(folder.glob("*.ckpt")):
            raise ValueError(
                f"{settings.run_folder} holds a run already: --resume auto goes on with it, --exp_name NAME begins "
                f"another."
            )
        return None
    if settings.resume == "auto" and not last.is_file():
        return None
    resumed = read_checkpoint(last if settings.resume == "auto" else Path(settings.resume))
    if resumed.settings is None or resumed.epoch is None:
        raise ValueError(f"{resumed.path} belongs to no run: to start from its weights use --resume_checkpoint.")
    now, then = settings.model_dump(), resumed.settings
    changed = [name for name in RUN_SETTINGS if name in then and then[name] != now[name]]
    if changed:
        was = ", ".join(f"{name} = {then[name]!r} (now {now[name]!r})" for name in changed)
        raise ValueError(f"The run to go on with has {was}: give the same settings, or another --exp_name.")
    return resumed
