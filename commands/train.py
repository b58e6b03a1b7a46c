"""python main.py train: train a network, or resume an interrupted run."""

from typing import Any, Optional

import pytorch_lightning as pl

from data.facts import store_facts
from data.labels import published_labels
from data_generator import Split, load_training_data
from model import build_model
from model.checkpoint import Checkpoint, decided_settings, load_network, read_checkpoint
from model.foreign import OWN
from model.registry import encoder_titles
from runs.card import write_run_card
from runs.records import print_first_page, save_provenance
from runs.resume import find_resumed
from sed_model import build_wrapper, schedule_warnings
from settings import Config, UserError, resolve
from training.callbacks import checkpoint_folder
from training.devices import is_first_process, process_count
from training.performance import compile_network, settle
from training.trainer import build_trainer, interruptible


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
    data = load_training_data(settings, splits)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = build_model(settings)
    more = {}
    published = published_labels(settings.dataset_type, settings.classes_num)
    labels = data.tables["train"].labels or published
    if start:
        report = load_network(
            network,
            start,
            new_classifier=True,
            labels=named(labels),
            file_labels=named(start.labels or published),
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
    if is_first_process():
        print(end="".join(f"warning: {message}\n" for message in schedule_warnings(settings)))
    title = f"{encoder_titles(settings.encoder)}: training {settings.exp_name}"
    print_first_page(title, settings, data, network, **more)
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
    """The settings, with encoder and sizes of the checkpoint to fine-tune from, its front-end if frontend_from says so.

    Raises UserError where there are two files of weights to start from.
    """
    settings = resolve(given, facts=store_facts)
    if settings.swin_pretrain_path and settings.resume_checkpoint:
        raise UserError(
            f"swin_pretrain_path = {settings.swin_pretrain_path} and resume_checkpoint = {settings.resume_checkpoint}: "
            f"a training starts from one of them. Leave one out."
        )
    path = settings.resume_checkpoint or settings.swin_pretrain_path
    if path is None:
        return settings
    start = read_checkpoint(path)
    decided = decided_settings(start, settings.frontend_from, fine_tuning=True)
    settings = resolve(given, checkpoint=decided, facts=store_facts, fine_tuning=True)
    if start.kind != OWN:
        return settings
    own = resolve(checkpoint=start.settings)
    clip_samples = own.clip_samples * settings.sample_rate // own.sample_rate  # as many seconds
    decided = {"clip_samples": clip_samples, **decided}
    return resolve(given, checkpoint=decided, facts=store_facts, fine_tuning=True)


def starting_weights(settings: Config) -> Optional[Checkpoint]:
    """The weights that a new training starts from, or None. Raises UserError for a wrong kind."""
    swin, tuned = settings.swin_pretrain_path, settings.resume_checkpoint
    if swin is None:
        return read_checkpoint(tuned) if tuned else None
    start = read_checkpoint(swin)
    if not start.images:
        raise UserError(
            f"swin_pretrain_path = {swin} holds no weights of ImageNet; its kind seems to be: {start.kind}. To "
            f"fine-tune from it, use --resume_checkpoint."
        )
    return start


def named(labels: list[str]) -> Optional[list[str]]:
    """Labels that are names, or None for the numbers that published_labels gives unknown classes."""
    return labels if labels[0] != "class 0" else None
