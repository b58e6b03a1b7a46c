"""The model card beside a checkpoint: Markdown with the metadata header of Hugging Face's hub."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl

from data.clip_store import STRONG, ClipTable
from data.files import write_text
from data_generator import SEDDataModule, Split, labelling, load_table
from evaluation.metrics import Metric
from model.checkpoint import COUNTERS, network_class, read_checkpoint
from model.foreign import PREFIX
from model.registry import ENCODERS, UNNAMED
from runs.records import git_revision
from settings import FRAME_LOSSES, NOT_THE_EXPERIMENT, Config, UserError, all_settings, resolve, section
from training.callbacks import checkpoint_folder, chosen_by

LIBRARY = "hts-at"
STATISTICS = ("running_mean", "running_var")  # of BatchNorm: measured, not learned
UNITS = {"sample_rate": "Hz", "window_size": "samples", "hop_size": "samples", "fmin": "Hz", "fmax": "Hz"}
# How a store's licence begins -> the identifier that the hub knows.
LICENCE_IDENTIFIERS = {
    "CC0 1.0": "cc0-1.0",
    "CC BY 4.0": "cc-by-4.0",
    "Creative Commons Attribution 4.0": "cc-by-4.0",
    "Creative Commons Attribution-NonCommercial 3.0": "cc-by-nc-3.0",
}
NO_LICENCE = "The store of the data that the weights were trained on names no licence. "
UNKNOWN_LICENCE = "Under which licence the data is that the weights were trained on is not known here. "
STATE_YOUR_OWN = "Weights: state your own, here and in the header as `license`, before you publish them."


def describe_data(tables: Mapping[Split, ClipTable]) -> dict[str, Any]:
    """What a card says about data: clips and fingerprint of each split, source and licence of the store."""
    attributes = next(iter(tables.values())).attributes
    return {
        "splits": {split: {"clips": len(t), "fingerprint": t.fingerprint()} for split, t in tables.items()},
        "source": attributes.get("source"),
        "licence": attributes.get("licence"),
    }


def recorded_data(checkpoints: Sequence[Path], settings: Optional[Mapping[str, Any]]) -> dict[str, Any]:
    """What describe_data says, of the data that the runs of checkpoints recorded; {} where they tell none or several.

    settings: those of the checkpoints. Source and licence come from the store that they name, where it is still there
    and holds the clips that were recorded.
    """
    recorded = [_recorded_splits(path) for path in checkpoints]
    if not settings or not recorded[0] or any(each != recorded[0] for each in recorded):
        return {}
    facts = {"splits": recorded[0], "source": None, "licence": None}
    try:
        then = resolve({name: value for name, value in settings.items() if name in all_settings()})
        found = describe_data({split: load_table(then, split) for split in recorded[0]})
    except UserError:
        return facts
    return found if found["splits"] == recorded[0] else facts


def _recorded_splits(checkpoint: Path) -> dict[Split, Any]:
    """Clips and fingerprint of each split, from the provenance.json of a checkpoint's run; {} where there is none."""
    path = checkpoint.parent.parent / "provenance.json"
    try:
        return dict(json.loads(path.read_text())[-1]["data"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write_run_card(settings: Config, data: SEDDataModule, trainer: pl.Trainer) -> Path:
    """Write README.md into a run folder, the card of its best.ckpt with the metric that it was chosen by."""
    best = checkpoint_folder(settings) / "best.ckpt"
    checkpoint = read_checkpoint(best)
    table = data.tables["validation"]
    if settings.loss_type in FRAME_LOSSES:  # frame_mAP is taken over the clips with event times
        table = table.select(labelling(table) == STRONG)
    score = getattr(trainer.checkpoint_callback, "best_model_score", None)
    metrics = []
    if score is not None:
        classes = int(table.targets.any(axis=0).sum())
        metrics = [Metric(chosen_by(settings), float(score), "best epoch", len(table), classes, table.targets.shape[1])]
    measured = {
        "held_out": "Measured on the validation clips, on which the best epoch was chosen; `python main.py test` "
        "measures on held-out clips.",
        "paper": "Measured on the test clips, on which the best epoch was chosen as well, as published.",
    }
    return write_card(
        settings.run_folder / "README.md",
        vars(checkpoint),
        file=Path("checkpoints") / best.name,
        metrics=metrics,
        measured=measured[settings.protocol],
        data=describe_data(data.tables),
    )


def write_card(
    path: Path,
    checkpoint_content: Mapping[str, Any],
    *,
    file: Path,
    metrics: Sequence[Metric] = (),
    measured: str = "",
    data: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write the model card of a checkpoint; returns its path.

    checkpoint_content: state_dict, settings, labels and frontend as in the file, and of an average its sources.
    file: the checkpoint, as a path from the card's folder. metrics: with measured, a sentence on which clips they come
    from. data: as describe_data gives it.
    """
    settings = checkpoint_content.get("settings") or {}
    known = bool(data)
    frontend = checkpoint_content.get("frontend") or settings
    if "random_seed" not in settings:  # a foreign file, of which only the network is known
        settings = {}
    data = data or {}
    sections = [
        _header(settings, data.get("licence")),
        _introduction(checkpoint_content, settings),
        _metrics(metrics, measured, settings),
        _data(data, settings),
        _training(checkpoint_content, settings),
        _frontend(frontend),
        _labels(checkpoint_content.get("labels") or []),
        _use(settings),
        f"## Licence\n\n{_licence(data.get('licence'), known=known)}",
        _loading(file),
    ]
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


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


def _header(settings: Mapping[str, Any], licence: Optional[str]) -> str:
    """YAML; its values are written as JSON, which YAML contains."""
    values: dict[str, Any] = {"pipeline_tag": "audio-classification", "library_name": LIBRARY}
    identifier = licence_identifier(licence)
    if identifier:
        values["license"] = identifier
    if identifier == "other":
        values["license_name"] = "as-the-training-data"
    tags = ["audio", "hts-at", "audio-tagging", "sound-event-detection"]
    values["tags"] = [*tags, *([settings["dataset_type"]] if settings else [])]
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items()), "---"])


def _introduction(content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    row = ENCODERS[content.get("encoder") or UNNAMED]
    title = f"# {row.title}: {settings['exp_name']}" if settings else f"# {row.title}"
    learned = count_parameters(content["state_dict"], content.get("encoder"))
    text = f"{row.title} ({row.paper}) of {learned:,} parameters, for sound classification and detection."
    if content.get("epoch") is not None:
        text += f" Weights after epoch {content['epoch'] + 1}."
    if content.get("sources"):
        names = ", ".join(_source_name(source) for source in content["sources"])
        text += f" The weights are the mean of {len(content['sources'])} checkpoints: {names}."
    return f"{title}\n\n{text}"


def _source_name(source: str) -> str:
    """Of a source of an average, `path sha256:...`: run, file and the start of the hash, without the machine's folders.

    Averages of earlier versions have the file's name alone.
    """
    path, _, digest = source.rpartition(" sha256:")
    if not path:
        return source
    parts = [part for part in Path(path).parts[-3:] if part != "checkpoints"]
    return f"{'/'.join(parts[-2:])} ({digest[:8]})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in (columns, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _metrics(metrics: Sequence[Metric], measured: str, settings: Mapping[str, Any]) -> str:
    if not metrics:
        return "## Metrics\n\nNone recorded with these weights: `python main.py test` measures them."
    protocol = settings.get("protocol", "")
    rows = [
        (m.name, f"{m.value:.4f}", m.interval or "", m.criterion, m.clips, f"{m.classes} of {m.all_classes}", protocol)
        for m in metrics
    ]
    columns = ("metric", "value", "95 % interval", "criterion", "clips", "classes", "protocol")
    return f"## Metrics\n\n{_table(columns, rows)}" + (f"\n\n{measured}" if measured else "")


def _data(data: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    rows = [["data set", settings["dataset_type"]]] if settings else []
    for split, facts in data.get("splits", {}).items():
        rows.append([split, f"{facts['clips']} clips, fingerprint {facts['fingerprint']}"])
    rows += [["source", data.get("source") or "not recorded"], ["licence", data.get("licence") or "not recorded"]]
    return f"## Data\n\n{_table(('', ''), rows)}"


def _training(content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The settings that make the experiment; of a path only the file's name."""
    if not settings:
        return "## Training\n\nThe file says nothing about how it was trained."
    left_out = section("front-end", *NOT_THE_EXPERIMENT)
    rows = [
        [f"`{name}`", Path(value).name if isinstance(value, str) and "/" in value else value]
        for name, value in settings.items()
        if name not in left_out and (name != "esc_fold" or settings["dataset_type"] == "esc-50")
    ]
    return f"## Training\n\nCode revision {git_revision()}. Settings:\n\n{_table(('setting', 'value'), rows)}"


def _frontend(frontend: Mapping[str, Any]) -> str:
    if not frontend:
        return ""
    rows = [[f"`{name}`", f"{frontend[name]} {UNITS.get(name, '')}".strip()] for name in section("front-end")]
    return (
        f"## Front-end\n\nLog-mel spectrogram: periodic Hann window, centred frames, Slaney mel scale, "
        f"10 log10 of the power.\n\n{_table(('setting', 'value'), rows)}"
    )


def _labels(labels: Sequence[str]) -> str:
    if not labels:
        return "## Labels\n\nThe file names no classes."
    listed = "\n".join(f"{number}. {html.escape(label)}" for number, label in enumerate(labels))
    return f"## Labels\n\n<details><summary>{len(labels)} classes</summary>\n\n{listed}\n\n</details>"


def _use(settings: Mapping[str, Any]) -> str:
    text = "## Intended use and limits\n\nTagging sounds, and saying when they happen."
    if not settings:
        return text
    seconds = settings["clip_samples"] / settings["sample_rate"]
    last_size = settings["htsat_spec_size"] // settings["htsat_stride"] // 2 ** (len(settings["htsat_depth"]) - 1)
    steps = last_size * (settings["htsat_spec_size"] // settings["mel_bins"])
    one = settings["task"] == "single_label"
    return (
        f"{text} The network hears {seconds:g} s at a time, as mono sound of {settings['sample_rate']} Hz, and gives a "
        f"score for each class and step of {1000 * seconds / steps:g} ms: events that are shorter, or closer to one "
        f"another, are not told apart. Longer recordings are cut into windows, shorter ones are filled up "
        f"({settings['short_clips']}).\n\nIt knows the classes below Labels and no others, and the kind of recordings "
        f"that it was trained on ({settings['dataset_type']}); on others its scores can be lower, or wrong with high "
        f"scores. "
        + ("It names one class for each clip, also where there is none of them. " if one else "")
        + "The scores are no calibrated probabilities: choose thresholds on recordings of your own. It is not meant "
        "for decisions about people or for safety without a test on the recordings of that use."
    )


def _licence(licence: Optional[str], *, known: bool) -> str:
    """known: whether the data is."""
    if not licence:
        return (NO_LICENCE if known else UNKNOWN_LICENCE) + STATE_YOUR_OWN
    return f"The weights come from data with this licence: {licence}. The code is under the MIT licence."


def _loading(file: Path) -> str:
    return f"""## How to load

With the code of this project, in the folder of this card:

    python main.py predict --resume_checkpoint {file.as_posix()} sound.wav
    python main.py test --resume_checkpoint {file.as_posix()}

```python
from inference import Tagger

tagger = Tagger.from_checkpoint("{file.as_posix()}")
tagged = tagger.tag_file("sound.wav")
print(tagged.top(5, tagger.labels))
```

The checkpoint holds tensors and plain values only: `torch.load(..., weights_only=True)` reads it."""
