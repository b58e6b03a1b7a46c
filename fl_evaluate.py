"""python fl_evaluate.py: the frame scores of a test -> detected events, named metrics and pictures.

Reads <heatmap_dir>/<test_file>.h5, which `python main.py test --fl_local True` writes, and puts beside it
<test_file>_events.tsv, <test_file>_detection.json and the folder <test_file>_pictures. Every setting of config.py is
a flag. Thresholds, filters and durations are those that `python main.py calibrate` put into the checkpoint, else those
of the class mapping, else 0.5 alone; fl_threshold, fl_median_filter, ... stand in for them where they are given.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd

from commands._detection import choose_postprocessing
from evaluation.detection import DetectionMetric, collar_f1, intersection_f1, psds1, score_tables
from evaluation.plots import draw_clip
from evaluation.postprocess import EVENT_COLUMNS, PostProcessing, detected_frames, truth_table
from evaluation.scores import Scores, export_tables, import_tables, load_scores
from main import Parser, add_settings
from settings import FRONTEND_SETTINGS, Config, resolve


def evaluate(scores: Scores, post: PostProcessing) -> tuple[pd.DataFrame, list[DetectionMetric]]:
    """Detected events of a score store, and their metrics.

    Raises ValueError where the store has no frame scores or no true events.
    """
    if scores.framewise is None:
        raise ValueError("The score file has no frame scores: run test with --fl_local True.")
    if not scores.events or not any(scores.events):
        raise ValueError("The score file has no true events: the data set was prepared without times.")
    names, labels, seconds = scores.names, scores.labels, scores.durations
    found = post.decode(scores.framewise, names=names, durations=seconds, seconds_per_frame=scores.seconds_per_frame)
    truth = truth_table(names, scores.events, labels)
    durations = dict(zip(names, seconds.tolist(), strict=True))
    smoothed, step = post.smooth(scores.framewise, durations=seconds, seconds_per_frame=scores.seconds_per_frame)
    active = detected_frames(found, names=names, labels=labels, frames=smoothed.shape[1], seconds_per_frame=step)
    where: dict[str, Any] = {"names": names, "labels": labels, "durations": seconds, "seconds_per_frame": step}
    metrics = [
        intersection_f1(found, truth, durations, labels=labels),
        collar_f1(score_tables(active, **where), truth, labels=labels, thresholds=np.array([0.5])),
        psds1(score_tables(smoothed, **where), truth, durations, labels=labels),
    ]
    return found, metrics


def draw_clips(scores: Scores, found: pd.DataFrame, folder: Path, count: int) -> list[Path]:
    """Draw the first `count` clips with events, from the audio of the clip store. Empty where that store is gone."""
    import torch

    from model.frontend import LogMel, Spectrogram
    from prepare.clip_store import Waveforms, open_store
    from utils import int16_to_float32

    store = Path(str(scores.attributes["clip_store"]))
    rate = int(scores.attributes["sample_rate"])
    if not store.is_file():
        print(f"No pictures: the clips' audio {store} is not there.")
        return []
    frontend = {name: scores.attributes[name] for name in FRONTEND_SETTINGS}
    spectrogram = Spectrogram(int(frontend["window_size"]), int(frontend["hop_size"]))
    mel = LogMel(
        rate, int(frontend["window_size"]), int(frontend["mel_bins"]), float(frontend["fmin"]), float(frontend["fmax"])
    )
    assert scores.framewise is not None
    centres = mel.melW.argmax(dim=0).numpy() * rate / int(frontend["window_size"])
    pictures = []
    with open_store(store, "audio_name") as file:
        waveforms = Waveforms(file)
        rows = {name.decode(): row for row, name in enumerate(file["audio_name"][:])}
        for clip in [k for k, events in enumerate(scores.events or []) if events][:count]:
            name, duration = scores.names[clip], float(scores.durations[clip])
            waveform = int16_to_float32(torch.from_numpy(waveforms.read(rows[name])[: int(duration * rate)]))
            detected = found[found.filename == name]
            places = [scores.labels.index(label) for label in detected.event_label]
            pictures.append(folder / f"{Path(name).stem}.png")
            draw_clip(
                pictures[-1],
                title=name,
                logmel=mel(spectrogram(waveform[None]))[0].numpy(),
                mel_edges=centres,
                framewise=scores.framewise[clip],
                seconds_per_frame=scores.seconds_per_frame,
                labels=scores.labels,
                truth=(scores.events or [])[clip],
                found=list(zip(places, detected.onset, detected.offset, strict=True)),
                duration=duration,
            )
    return pictures


def print_detection(metrics: list[DetectionMetric], labels: list[str]) -> None:
    """A table with one column for each metric: its name and criterion, the macro value, and that of each class."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Localization", title_justify="left")
    table.add_column("class")
    for metric in metrics:
        table.add_column(f"{metric.name}\n{metric.criterion}\n({metric.tool})", justify="right")
    table.add_row("macro", *(f"{metric.macro:.4f}" for metric in metrics), end_section=True)
    for label in labels:
        values = [metric.per_class[label] for metric in metrics]
        table.add_row(label, *("-" if np.isnan(value) else f"{value:.4f}" for value in values))
    Console().print(table)


def run(
    settings: Config, pictures: int, export_scores: Optional[str] = None, import_scores: Optional[str] = None
) -> None:
    """Evaluate the score file of the settings and write everything beside it.

    import_scores: a folder of sed_scores_eval's tables, whose scores stand in for those of the file; export_scores: a
    folder to write such tables into.
    """
    folder, name = Path(settings.heatmap_dir), settings.test_file
    scores = load_scores(folder / f"{name}.h5")
    if import_scores is not None:
        scores, name = import_tables(Path(import_scores), scores), f"{name}_imported"
    if settings.fl_class_num:
        scores = scores.select_classes(settings.fl_class_num)
    if export_scores is not None:
        export_tables(scores, Path(export_scores))
        print(f"Frame scores as tables of sed_scores_eval: {export_scores}")
    post = choose_postprocessing(scores, settings)
    found, metrics = evaluate(scores, post)
    events = folder / f"{name}_events.tsv"
    _write(events, found.to_csv(sep="\t", index=False, columns=EVENT_COLUMNS, float_format="%.4f"))
    report = folder / f"{name}_detection.json"
    content = {
        "clips": len(scores.names),
        "postprocessing": post.as_dict(),
        "metrics": [metric.as_dict() for metric in metrics],
    }
    _write(report, json.dumps(content, indent=2) + "\n")
    print_detection(metrics, scores.labels)
    print(f"Post-processing: {post.source}; {describe(post)}")
    print(f"{len(found)} events in {len(scores.names)} clips: {events}\nMetrics: {report}")
    drawn = draw_clips(scores, found, folder / f"{name}_pictures", pictures)
    if drawn:
        print(f"Pictures: {drawn[0].parent} ({len(drawn)})")


def describe(post: PostProcessing) -> str:
    """The values in one line: one where all classes have the same, else the smallest and the largest."""
    shown = []
    for name, unit in (
        ("thresholds", ""),
        ("median_filter", " steps"),
        ("minimum_duration", " s"),
        ("maximum_gap", " s"),
    ):
        values = getattr(post, name)
        span = f"{min(values):g}" if min(values) == max(values) else f"{min(values):.3g} to {max(values):.3g}"
        shown.append(f"{name.replace('_', ' ')} {span}{unit}")
    return (
        f"{', '.join(shown)}, {'no interpolation' if post.interpolation == 1 else f'{post.interpolation} parts a step'}"
    )


def _write(path: Path, text: str) -> None:
    """Write a file under a temporary name first."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 for a mistake in what was given."""
    try:
        parser = Parser(prog="fl_evaluate.py", description=__doc__, allow_abbrev=False)
        parser.add_argument("--pictures", type=int, default=6, help="how many clips to draw")
        parser.add_argument("--export_scores", metavar="FOLDER", help="write the frame scores for sed_scores_eval")
        parser.add_argument("--import_scores", metavar="FOLDER", help="evaluate such tables, with the file's truth")
        add_settings(parser)
        values = vars(parser.parse_args(argv))
        given = {k.removeprefix("setting_"): v for k, v in values.items() if k.startswith("setting_") and v is not None}
        run(resolve(given), values["pictures"], values["export_scores"], values["import_scores"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
