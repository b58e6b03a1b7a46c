"""The settings of a training; what a resumed run goes by: what it has recorded, its checkpoint, what has changed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch

from data.facts import store_facts
from data.files import read_json
from model.checkpoint import Checkpoint, decided_settings, read_checkpoint
from model.foreign import OWN
from settings import (
    OTHER_SECTIONS,
    TRAINED_SECTIONS,
    Config,
    UserError,
    all_settings,
    check_values,
    fewest,
    requested,
    resolve,
    section,
)
from training.callbacks import checkpoint_folder
from training.devices import is_first_process

# Sections of config.py that must not change when a run is resumed: its network, what of it learns, from which clips.
RUN_SECTIONS = (
    *TRAINED_SECTIONS, "training clips", "starting weights", "fine-tuning", "averaged weights", "frame training",
    "semi-supervised",
)  # fmt: skip


def with_recorded(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and where it resumes a run the settings that this run was given before, but for those of other commands.

    They are recorded in config.json of its folder, else in its checkpoint. What the prepared data say is left out.
    Raises UserError where config.json is damaged.
    """
    resume = requested("resume", given)
    if resume is None:
        return dict(given)
    if resume == "auto":
        values = check_values(given)  # with those of a recipe
        wanted = {*section("data set", "split", "run")} - {"recipe"}
        place = resolve({name: value for name, value in values.items() if name in wanted})
        folder = place.run_folder
        here = {"exp_name": place.exp_name, "workspace": place.workspace}
    else:
        folder = Path(resume).absolute().parent.parent
        workspace = folder.parents[1] if Path(resume).is_absolute() else os.path.relpath(folder.parents[1])
        here = {"exp_name": folder.name, "workspace": str(workspace)} if folder.parent.name == "runs" else {}
    known = all_settings()
    recorded = {name: value for name, value in _recorded(folder, resume).items() if name in known}
    left_out = {*section(*OTHER_SECTIONS), "resume"}
    kept = {name: value for name, value in fewest(recorded).items() if name not in left_out}
    options = {name: value for name, value in kept.items() if isinstance(value, dict) and name in given}
    joined = {name: {**value, **known[name].check(given[name])} for name, value in options.items()}
    chosen = {**kept, **here, **given, **joined}
    of_data = store_facts(resolve(chosen).model_dump())
    return {name: value for name, value in chosen.items() if name in given or name not in of_data}


def _recorded(folder: Path, resume: str) -> Mapping[str, Any]:
    config, last = folder / "config.json", folder / "checkpoints" / "last.ckpt"
    if config.is_file():
        found: dict[str, Any] = read_json(config, dict)
        return found
    checkpoint = last if resume == "auto" else Path(resume)
    return read_checkpoint(checkpoint).settings or {} if checkpoint.is_file() else {}


def resolve_training(given: Mapping[str, Any]) -> Config:
    """The settings of the training that is asked for.

    Those of a run that it resumes, or encoder and sizes of the checkpoint to fine-tune from, its front-end if
    frontend_from says so. Raises UserError where there are two files of weights to start from.
    """
    given = with_recorded(given)
    settings = resolve(given, facts=store_facts)
    if settings.swin_pretrain_path and settings.resume_checkpoint:
        raise UserError(
            f"swin_pretrain_path = {settings.swin_pretrain_path} and resume_checkpoint = {settings.resume_checkpoint}: "
            f"a training starts from one of them. Leave one out."
        )
    path = settings.resume_checkpoint or settings.swin_pretrain_path
    if path is None or resumes(settings):  # its settings are recorded, and this file may be gone
        return settings
    start = read_checkpoint(path, given.get("encoder"))
    decided = decided_settings(start, settings.frontend_from, fine_tuning=True)
    settings = resolve(given, checkpoint=decided, facts=store_facts, fine_tuning=True)
    if start.kind != OWN:
        return settings
    own = resolve(checkpoint=start.settings)
    clip_samples = own.clip_samples * settings.sample_rate // own.sample_rate  # as many seconds
    decided = {"clip_samples": clip_samples, **decided}
    return resolve(given, checkpoint=decided, facts=store_facts, fine_tuning=True)


def resumes(settings: Config) -> bool:
    """Whether there is a checkpoint to resume from."""
    last = checkpoint_folder(settings) / "last.ckpt"
    return settings.resume is not None and (settings.resume != "auto" or last.is_file())


def find_resumed(settings: Config) -> Optional[Checkpoint]:
    """The checkpoint from which to resume, or None for a new run.

    Raises UserError where a new run would mix with an old one, and where the old one has another network.
    """
    folder = checkpoint_folder(settings)
    last = folder / "last.ckpt"
    if settings.resume is None:
        if is_first_process() and folder.is_dir() and any(folder.glob("*.ckpt")):
            raise UserError(
                f"{settings.run_folder} holds a run already: --resume auto resumes it, --exp_name NAME starts another."
            )
        return None
    if not resumes(settings):
        return None
    resumed = read_checkpoint(last if settings.resume == "auto" else Path(settings.resume))
    if resumed.settings is None or resumed.epoch is None or not resumed.resumable:
        raise UserError(f"{resumed.path} belongs to no run: to start from its weights use --resume_checkpoint.")
    then = resumed.settings
    changed = changes(then, settings, *RUN_SECTIONS)
    if changed:
        was = ", ".join(f"{name} = {then[name]!r} (now {getattr(settings, name)!r})" for name in changed)
        raise UserError(f"The run to resume has {was}: give the same settings, or another --exp_name.")
    return resumed


def changes(then: Mapping[str, Any], settings: Config, *sections: str) -> list[str]:
    """Names of the settings of these sections that were other ones."""
    now = settings.model_dump()
    return [name for name in section(*sections) if name in then and then[name] != now[name]]


def say_changes(resumed: Checkpoint, settings: Config, data: Mapping[str, Any], processes: int) -> dict[str, str]:
    """A row for the first page and provenance.json: what a resumed run takes anew. data: SEDDataModule.identity.

    Raises UserError where the clips of a split, their classes or their events are others than those of the run.
    """
    then = resumed.settings or {}
    titles = {setting.section.partition(", ")[0] for setting in all_settings().values()}
    free = titles - {*RUN_SECTIONS, *OTHER_SECTIONS}
    said = [
        f"{name} {then[name]} -> {getattr(settings, name)}"
        for name in changes(then, settings, *free)
        if name not in ("resume", "exp_name")
    ]
    if resumed.data is not None:
        said += _other_data(resumed, {**data, "processes": processes})
    return {"changed": ", ".join(said)} if said else {}


def _other_data(resumed: Checkpoint, now: Mapping[str, Any]) -> list[str]:
    before = resumed.data or {}
    if not isinstance(before.get("splits"), Mapping):
        raise UserError(f"{resumed.path} is damaged: its entry data has no splits.")
    for split in before["splits"].keys() & now["splits"].keys():
        if before["splits"][split] != now["splits"][split]:
            raise UserError(
                f"The run to resume has for {split} {before['splits'][split]}, of {before.get('store')}; "
                f"{now['store']} has {now['splits'][split]}. Other clips, classes, events or splits are another run: "
                f"give the data of the run with --dataset_path, or another --exp_name."
            )
    return [
        f"{name} {before.get(name)} -> {now[name]}" for name in ("store", "processes") if before.get(name) != now[name]
    ]


def best_checkpoint(content: Mapping[Any, Any]) -> Optional[tuple[str, float]]:
    """Name and metric of a run's best checkpoint so far, as the callback that keeps it has recorded them."""
    states = content.get("callbacks")
    for state in states.values() if isinstance(states, Mapping) else ():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_path"):
            score = state.get("best_model_score")
            if isinstance(score, torch.Tensor) and score.numel() == 1:
                return Path(str(state["best_model_path"])).name, float(score)
    return None
