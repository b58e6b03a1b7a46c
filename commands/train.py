"""python main.py train: train a network, or go on with an interrupted run."""

from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl

from data.labels import published_labels
from data_generator import SEDDataModule, Split
from frame_training import build_wrapper
from model import build_model
from model.checkpoint import Checkpoint, decided_settings, load_network, read_checkpoint
from runs.card import write_run_card
from runs.records import is_first_process, print_first_page, save_provenance
from runs.testing import checkpoint_labels
from settings import NETWORK_SETTINGS, Config, UserError, resolve
from training.performance import compile_network, settle
from training.trainer import build_trainer, checkpoint_folder, interruptible, process_count

# What must not change when a run is gone on with: its network, what of it learns, and from which clips.
RUN_SETTINGS = (
    *NETWORK_SETTINGS, "dataset_type", "esc_fold", "protocol", "clip_samples", "random_seed", "balanced_data",
    "class_filter", "freeze_backbone", "layer_decay", "weight_averaging", "ema_decay", "average_last_epochs",
    "balanced_by", "labelling_shares", "teacher_path", "distillation_weight", "mean_teacher", "mean_teacher_decay",
    "mean_teacher_rampup", "weak_weight",
)  # fmt: skip


def run(given: dict[str, Any]) -> None:
    """Train as the settings say, into <workspace>/runs/<exp_name>."""
    settings = resolve_with_frontend(given)
    process_count(settings)
    settings, performance = settle(settings, training=True)
    resumed = find_resumed(settings)
    done = (resumed.complete_epochs or 0) if resumed else 0
    if done >= settings.max_epoch:
        print(f"{settings.run_folder} is complete: epoch {done} of {settings.max_epoch}. Nothing to do.")
        return
    start = None if resumed else starting_weights(settings)
    splits: tuple[Split, ...] = ("train", "validation", "test") if settings.watch_test else ("train", "validation")
    data = SEDDataModule(settings, splits)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = build_model(settings)
    more = {}
    labels = data.tables["train"].labels or published_labels(settings.dataset_type, settings.classes_num)
    if start:
        report = load_network(
            network,
            start,
            new_classifier=True,
            labels=named(labels),
            file_labels=named(checkpoint_labels(start, settings)),
            frontend_from=settings.frontend_from,
            configured=settings.model_dump(),
        )
        more["fine-tuned_from"] = str(report)
    if resumed:
        middle = " and a part of the next" if resumed.epoch == done else ""
        more["resumed_from"] = f"{resumed.path}, after epoch {done}{middle}"
    compile_network(network, performance.compile_mode)
    more["performance"] = str(performance)
    wrapper = build_wrapper(network, settings, labels)
    print_first_page(f"HTS-AT: training {settings.exp_name}", settings, data, network, **more)
    save_provenance(settings, data, **more)
    trainer = build_trainer(settings, steps_per_epoch=data.steps_per_epoch(process_count(settings)))
    with interruptible(trainer):
        trainer.fit(wrapper, data, ckpt_path=str(resumed.path) if resumed else None, weights_only=True)
    if is_first_process():
        best = checkpoint_folder(settings) / "best.ckpt"
        value = trainer.callback_metrics.get(wrapper.main_metric)
        print(f"Trained {trainer.global_step} steps; {wrapper.main_metric} of the last epoch {value:.4f}.")
        print(f"Model card: {write_run_card(settings, data, trainer)}")
        print(f"Best checkpoint: {best}\nTest it: python main.py test --resume_checkpoint {best}")


def resolve_with_frontend(given: dict[str, Any]) -> Config:
    """The settings, with the front-end of the checkpoint to fine-tune from where frontend_from asks for it.

    Raises UserError where there are two files of weights to start from.
    """
    settings = resolve(given)
    if settings.swin_pretrain_path and settings.resume_checkpoint:
        raise UserError(
            f"swin_pretrain_path = {settings.swin_pretrain_path} and resume_checkpoint = {settings.resume_checkpoint}: "
            f"a training starts from one of them. Leave one out."
        )
    if not (settings.resume_checkpoint and settings.frontend_from == "checkpoint"):
        return settings
    start = read_checkpoint(settings.resume_checkpoint)
    return resolve(given, checkpoint=decided_settings(start, settings.frontend_from, fine_tuning=True))


def starting_weights(settings: Config) -> Optional[Checkpoint]:
    """The weights that a new training starts from, or None. Raises UserError for a wrong kind."""
    swin, tuned = settings.swin_pretrain_path, settings.resume_checkpoint
    if swin is None:
        return read_checkpoint(tuned) if tuned else None
    start = read_checkpoint(swin)
    if start.kind != "ImageNet Swin":
        raise UserError(
            f"swin_pretrain_path = {swin} is no ImageNet Swin; its kind seems to be: {start.kind}. To fine-tune from "
            f"it, use --resume_checkpoint."
        )
    return start


def named(labels: list[str]) -> Optional[list[str]]:
    """Labels that are names, or None where nothing tells the names and published_labels has numbered the classes."""
    return labels if labels[0] != "class 0" else None


def find_resumed(settings: Config) -> Optional[Checkpoint]:
    """The checkpoint to go on from, or None for a new run.

    Raises UserError where a new run would mix with an old one, and where the old one has another network.
    """
    folder = checkpoint_folder(settings)
    last = folder / "last.ckpt"
    if settings.resume is None:
        if is_first_process() and folder.is_dir() and any(folder.glob("*.ckpt")):
            raise UserError(
                f"{settings.run_folder} holds a run already: --resume auto goes on with it, --exp_name NAME begins "
                f"another."
            )
        return None
    if settings.resume == "auto" and not last.is_file():
        return None
    resumed = read_checkpoint(last if settings.resume == "auto" else Path(settings.resume))
    if resumed.settings is None or resumed.epoch is None or not resumed.resumable:
        raise UserError(f"{resumed.path} belongs to no run: to start from its weights use --resume_checkpoint.")
    now, then = settings.model_dump(), resumed.settings
    changed = [name for name in RUN_SETTINGS if name in then and then[name] != now[name]]
    if changed:
        was = ", ".join(f"{name} = {then[name]!r} (now {now[name]!r})" for name in changed)
        raise UserError(f"The run to go on with has {was}: give the same settings, or another --exp_name.")
    return resumed
