"""The model card beside a checkpoint: Markdown with the metadata header of Hugging Face's hub (card.md.j2)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from data.clip_store import STRONG, ClipTable
from data.files import write_text
from data_generator import SEDDataModule, Split, labelling, load_table
from evaluation.metrics import Metric
from model import build_model
from model.checkpoint import COUNTERS, network_class, read_checkpoint
from model.foreign import PREFIX
from model.registry import ENCODERS, UNNAMED
from runs.records import git_revision
from settings import FRAME_LOSSES, NOT_THE_EXPERIMENT, Config, UserError, all_settings, resolve, section
from training.callbacks import checkpoint_folder, chosen_by

CARD = "README.md"  # of a run folder
STATISTICS = ("running_mean", "running_var")  # of BatchNorm: measured, not learned
UNITS = {"sample_rate": "Hz", "window_size": "samples", "hop_size": "samples", "fmin": "Hz", "fmax": "Hz"}
# How a store's licence begins -> the identifier that the hub knows.
LICENCE_IDENTIFIERS = {
    "CC0 1.0": "cc0-1.0",
    "CC BY 4.0": "cc-by-4.0",
    "Creative Commons Attribution 4.0": "cc-by-4.0",
    "Creative Commons Attribution-NonCommercial 3.0": "cc-by-nc-3.0",
}


def describe_data(tables: Mapping[Split, ClipTable]) -> dict[str, Any]:
    """Clips and fingerprint of each split, source and licence of the store."""
    attributes = next(iter(tables.values())).attributes
    return {
        "splits": {split: {"clips": len(t), "fingerprint": t.fingerprint()} for split, t in tables.items()},
        "source": attributes.get("source"),
        "licence": attributes.get("licence"),
    }


def recorded_data(checkpoints: Sequence[Path], settings: Optional[Mapping[str, Any]]) -> dict[str, Any]:
    """describe_data of the data that the runs of checkpoints recorded; {} where they recorded none, or several.

    settings: those of the checkpoints. Source and licence come from their store, if it still holds the recorded clips.
    """
    recorded = [recorded_splits(path) for path in checkpoints]
    if not settings or not recorded[0] or any(each != recorded[0] for each in recorded):
        return {}
    facts = {"splits": recorded[0], "source": None, "licence": None}
    try:
        then = resolve({name: value for name, value in settings.items() if name in all_settings()})
        found = describe_data({split: load_table(then, split) for split in recorded[0]})
    except UserError:
        return facts
    return found if found["splits"] == recorded[0] else facts


def recorded_splits(checkpoint: Path) -> dict[Split, Any]:
    """Clips and fingerprint of each split, from the provenance.json of a checkpoint's run; {} where there is none."""
    path = checkpoint.parent.parent / "provenance.json"
    try:
        return dict(json.loads(path.read_text())[-1]["data"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write_run_card(settings: Config, data: SEDDataModule, score: Optional[float]) -> Path:
    """Write README.md into a run folder, the card of its best.ckpt with the metric `score` that it was chosen by."""
    best = checkpoint_folder(settings) / "best.ckpt"
    checkpoint = read_checkpoint(best)
    table = data.tables["validation"]
    if settings.loss_type in FRAME_LOSSES:  # frame_mAP is taken over the clips with event times
        table = table.select(labelling(table) == STRONG)
    metrics = []
    if score is not None:
        classes = int(table.targets.any(axis=0).sum())
        metrics = [Metric(chosen_by(settings), score, "best epoch", len(table), classes, table.targets.shape[1])]
    measured = {
        "held_out": "Measured on the validation clips, on which the best epoch was chosen; `python main.py test` "
        "measures on held-out clips.",
        "paper": "Measured on the test clips, on which the best epoch was chosen as well, as published.",
    }
    return write_card(
        settings.run_folder / CARD,
        vars(checkpoint),
        file=Path("checkpoints") / best.name,
        metrics=metrics,
        measured=measured[settings.protocol],
        data=describe_data(data.tables),
    )


def write_card(
    path: Path,
    content: Mapping[str, Any],
    *,
    file: Path,
    metrics: Sequence[Metric] = (),
    measured: str = "",
    data: Optional[Mapping[str, Any]] = None,
    more: str = "",
) -> Path:
    """Write the model card of a checkpoint; returns its path.

    content: state_dict, settings, labels, frontend and encoder as in the file, and of an average its sources. file: the
    checkpoint, as a path from the card's folder. metrics: with measured, a sentence on which clips they come from.
    data: as describe_data gives it. more: a section for the end.
    """
    settings = content.get("settings") or {}
    frontend = content.get("frontend") or settings
    if "random_seed" not in settings:  # a foreign file, of which only the network is known
        settings = {}
    encoder = content.get("encoder") or UNNAMED
    known = {"splits": {}, "source": None, "licence": None, **(data or {})}
    text = card_template().render(
        encoder=ENCODERS[encoder],
        parameters=count_parameters(content["state_dict"], encoder),
        settings=settings,
        epoch=content.get("epoch"),
        sources=[source_name(source) for source in content.get("sources") or []],
        identifier=licence_identifier(known["licence"]),
        tags=[
            "audio",
            "hts-at",
            "audio-tagging",
            "sound-event-detection",
            *filter(None, [settings.get("dataset_type")]),
        ],
        metrics=metrics,
        measured=measured,
        data=known,
        data_known=bool(data),
        revision=git_revision(),
        experiment=experiment(settings, encoder),
        frontend={
            name: f"{frontend[name]} {UNITS.get(name, '')}".strip()
            for name in section("front-end")
            if name in frontend and all_settings()[name].encoder in ("", encoder)
        },
        labels=content.get("labels") or [],
        frame_seconds=frame_seconds(settings) if settings else None,
        file=file.as_posix(),
        more=more,
    )
    write_text(path, text)
    return path


def card_template() -> Template:
    """card.md.j2, with the filter `cell` for values in a table."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    return environment.get_template("card.md.j2")


def experiment(settings: Mapping[str, Any], encoder: str) -> dict[str, Any]:
    """The settings that make the experiment; of a path only the file's name."""
    shown = {name for name, setting in all_settings().items() if setting.encoder in ("", encoder)}
    shown -= {*section("front-end", *NOT_THE_EXPERIMENT)}
    if settings.get("dataset_type") != "esc-50":
        shown -= {"esc_fold"}
    return {
        name: Path(value).name if isinstance(value, str) and "/" in value else value
        for name, value in settings.items()
        if name in shown
    }


def frame_seconds(settings: Mapping[str, Any]) -> float:
    """Of the network that the settings of a checkpoint describe; 0.0 where it has no time axis."""
    return build_model(resolve({}, checkpoint=settings)).frame_seconds


def count_parameters(state_dict: Mapping[str, Any], encoder: Optional[str] = None) -> int:
    """Numbers that were learned: without the front-end, computed buffers and BatchNorm's statistics."""
    network = network_class(encoder)
    constants = (*network.computed, *COUNTERS, *STATISTICS)
    learned = (
        value.numel()
        for key, value in state_dict.items()
        if not key.removeprefix(PREFIX).startswith(network.frontend) and not key.endswith(constants)
    )
    return sum(learned)


def licence_identifier(licence: Optional[str]) -> Optional[str]:
    """The hub's identifier of a store's licence; other where it knows none, None where there is no licence."""
    if not licence:
        return None
    # The longest first: one name begins like another.
    names = sorted(LICENCE_IDENTIFIERS, key=len, reverse=True)
    return next((LICENCE_IDENTIFIERS[name] for name in names if licence.startswith(name)), "other")


def source_name(source: str) -> str:
    """Run, file and start of the hash of an average's source, `path sha256:...`, without the machine's folders.

    Averages of earlier versions have the file's name alone.
    """
    path, _, digest = source.rpartition(" sha256:")
    if not path:
        return source
    parts = [part for part in Path(path).parts[-3:] if part != "checkpoints"]
    return f"{'/'.join(parts[-2:])} ({digest[:8]})"
