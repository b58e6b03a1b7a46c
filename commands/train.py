"""python main.py train: train a network, or resume an interrupted run."""

import shlex
from typing import Any, Optional

import pytorch_lightning as pl
from torch import nn

from data.facts import measured_as, read_normalization
from data.files import FULL, check_writable, explained, sole_writer
from data.labels import published_labels
from data_generator import SEDDataModule, Split, load_training_data
from model import build_model
from model.checkpoint import Checkpoint, check_resumable, load_network, read_checkpoint
from model.registry import ENCODERS, encoder_titles, read_options
from runs.card import CARD, write_run_card
from runs.records import print_first_page, save_provenance
from runs.resume import best_checkpoint, find_resumed, resolve_training, say_changes
from sed_model import build_wrapper
from settings import Config, UserError, place_flags
from training.callbacks import checkpoint_folder, chosen_by, draw_curves, read_curves, restore_best
from training.devices import is_first_process, process_count
from training.performance import settle, speed_up
from training.schedule import schedule_warnings
from training.trainer import build_trainer, interruptible


def run(given: dict[str, Any]) -> None:
    """Train as the settings say, into <workspace>/runs/<exp_name>."""
    settings = resolve_training(given)
    process_count(settings)
    if not is_first_process():
        train(settings)
        return
    said = f"workspace = {settings.workspace}, exp_name = {settings.exp_name}"
    check_writable(said, settings.run_folder / "config.json", checkpoint_folder(settings) / "last.ckpt")
    with sole_writer(settings.run_folder):
        train(settings)


def train(settings: Config) -> None:
    """Train a new run, or the rest of one."""
    resumed = find_resumed(settings)
    if resumed:
        check_resumable(resumed)
    done = (resumed.complete_epochs or 0) if resumed else 0
    splits: tuple[Split, ...] = ("train", "validation", "test") if settings.watch_test else ("train", "validation")
    data = load_training_data(settings, splits)
    steps = data.steps_per_epoch(process_count(settings))
    settings, performance = settle(settings, training=True, steps=steps * (settings.max_epoch - done))
    more = say_changes(resumed, settings, data.identity, process_count(settings)) if resumed else {}
    best = best_checkpoint(resumed.content) if resumed else None
    if best and is_first_process():
        restore_best(checkpoint_folder(settings), best[0])
    if done >= settings.max_epoch:
        if is_first_process():
            print(f"{settings.run_folder} is complete: epoch {done} of {settings.max_epoch}. Nothing to do.")
            if not (settings.run_folder / CARD).is_file():  # it was killed at its end
                finish(settings, data, best[1] if best else None)
        return
    if not resumed:
        settings, taken = normalized(settings, data)
        more |= taken
    start = None if resumed else starting_weights(settings)
    pl.seed_everything(settings.random_seed, workers=True, verbose=False)
    network = build_model(settings)
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
    if is_first_process():
        said = f"workspace = {settings.workspace}"
        check_writable(said, checkpoint_folder(settings) / "last.ckpt", size=checkpoint_bytes(network))
    wrapper = build_wrapper(network, settings, labels)
    speed_up(wrapper, performance)
    more["performance"] = str(performance)
    warnings = schedule_warnings(settings, steps * settings.max_epoch)
    if is_first_process():
        print(end="".join(f"warning: {message}\n" for message in warnings))
    title = f"{encoder_titles(settings.encoder)}: training {settings.exp_name}"
    print_first_page(title, settings, data, network, **more)
    save_provenance(settings, data, **more)
    trainer = build_trainer(settings, steps_per_epoch=steps)
    try:
        with explained(settings.run_folder, FULL), interruptible(trainer):
            trainer.fit(wrapper, data, ckpt_path=str(resumed.path) if resumed else None, weights_only=True)
    except UserError as error:
        raise UserError(f"{error} {saved(settings)}") from error
    if is_first_process():
        value = trainer.callback_metrics.get(wrapper.main_metric)
        print(f"Trained {trainer.global_step} steps; {wrapper.main_metric} of the last epoch {value:.4f}.")
        score = getattr(trainer.checkpoint_callback, "best_model_score", None)
        finish(settings, data, None if score is None else float(score))


def normalized(settings: Config, data: SEDDataModule) -> tuple[Config, dict[str, str]]:
    """With what `normalize` has measured on these clips, where the encoder takes it and no option says another.

    Returns the settings, and a row for the first page.
    """
    options, taken = settings.encoder_options, ENCODERS[settings.encoder].options
    if "mean" not in taken or {"mean", "deviation"} & options.keys():
        return settings, {}
    frontend = str(read_options(settings.encoder, options).get("frontend", settings.encoder))
    found = read_normalization(settings.dataset_path, measured_as(settings, frontend, data.tables["train"]))
    if found is None:
        return settings, {}
    mean, deviation = (f"{value:.9g}" for value in found)
    settings = settings.model_copy(update={"encoder_options": {**options, "mean": mean, "deviation": deviation}})
    return settings, {"normalization": f"mean {mean}, deviation {deviation}, as measured on these clips"}


def finish(settings: Config, data: SEDDataModule, score: Optional[float]) -> None:
    """Draw the curves, write the card of the best checkpoint, with its metric `score`, and print what to do with it."""
    draw_curves(read_curves(settings.run_folder / "logs"), chosen_by(settings), settings.run_folder / "curves.png")
    best = checkpoint_folder(settings) / "best.ckpt"
    print(f"Model card: {write_run_card(settings, data, score)}")
    test = f"python main.py test --resume_checkpoint {shlex.quote(str(best))}{place_flags(settings)}"
    print(f"Best checkpoint: {best}\nTest it: {test}")


def saved(settings: Config) -> str:
    """What a training that ended with an error has left."""
    last = checkpoint_folder(settings) / "last.ckpt"
    if not last.is_file():
        return "No checkpoint was saved."
    epochs = read_checkpoint(last).complete_epochs
    flags = f"--exp_name {shlex.quote(settings.exp_name)}{place_flags(settings)}"
    return f"Saved: {last}, after epoch {epochs}. To resume: python main.py train --resume auto {flags}"


def checkpoint_bytes(network: nn.Module) -> int:
    """About what a checkpoint takes: float32 weights, and AdamW's two moments of those that are trained."""
    return sum(4 * p.numel() * (3 if p.requires_grad else 1) for p in network.parameters())


def starting_weights(settings: Config) -> Optional[Checkpoint]:
    """The weights that a new training starts from, or None. Raises UserError for a wrong kind."""
    swin, tuned = settings.swin_pretrain_path, settings.resume_checkpoint
    if swin is None:
        return read_checkpoint(tuned, settings.encoder) if tuned else None
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
