"""python fl_evaluate.py: the frame scores of a test -> detected events, named metrics and pictures.

Reads <heatmap_dir>/<test_file>.h5, which `python main.py test --fl_local True` writes, and puts beside it
<test_file>_events.tsv, <test_file>_detection.json and the folder <test_file>_pictures. Every setting of config.py is
a flag; fl_threshold is the one that matters here.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.detection import DetectionMetric, collar_f1, intersection_f1, psds1, score_tables
from evaluation.plots import draw_clip
from evaluation.postprocess import EVENT_COLUMNS, decode_events, truth_table
from evaluation.scores import Scores, load_scores
from main import Parser, add_settings
from settings import FRONTEND_SETTINGS, Config, resolve


def evaluate(scores: Scores, thresholds: np.ndarray) -> tuple[pd.DataFrame, list[DetectionMetric]]:
    """Detected events of a score store, and their metrics. thresholds: (K,) or (1,).

    Raises ValueError where the store has no frame scores or no true events.
    """
    if scores.framewise is None:
        raise ValueError("The score file has no frame scores: run test with --fl_local True.")
    if not scores.events or not any(scores.events):
        raise ValueError("The score file has no true events: the data set was prepared without times.")
    where: dict[str, Any] = {
        "names": scores.names,
        "labels": scores.labels,
        "durations": scores.durations,
        "seconds_per_frame": scores.seconds_per_frame,
    }
    found = decode_events(scores.framewise, thresholds=thresholds, **where)
    truth = truth_table(scores.names, scores.events, scores.labels)
    durations = dict(zip(scores.names, scores.durations.tolist(), strict=True))
    tables = score_tables(scores.framewise, **where)
    metrics = [
        intersection_f1(found, truth, durations, labels=scores.labels),
        collar_f1(tables, truth, labels=scores.labels, thresholds=thresholds),
        psds1(tables, truth, durations, labels=scores.labels),
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


def run(settings: Config, pictures: int) -> None:
    """Evaluate the score file of the settings and write everything beside it."""
    folder = Path(settings.heatmap_dir)
    scores = load_scores(folder / f"{settings.test_file}.h5")
    thresholds = np.asarray(settings.fl_threshold)
    if len(thresholds) not in (1, len(scores.labels)):
        raise ValueError(f"fl_threshold has {len(thresholds)} values: give 1, or one for each of {scores.labels}.")
    found, metrics = evaluate(scores, thresholds)
    events = folder / f"{settings.test_file}_events.tsv"
    found.to_csv(events, sep="\t", index=False, columns=EVENT_COLUMNS, float_format="%.4f")
    report = folder / f"{settings.test_file}_detection.json"
    content = {"clips": len(scores.names), "thresholds": thresholds.tolist(), "metrics": [m.as_dict() for m in metrics]}
    report.write_text(json.dumps(content, indent=2) + "\n")
    print_detection(metrics, scores.labels)
    print(f"{len(found)} events in {len(scores.names)} clips: {events}\nMetrics: {report}")
    drawn = draw_clips(scores, found, folder / f"{settings.test_file}_pictures", pictures)
    if drawn:
        print(f"Pictures: {drawn[0].parent} ({len(drawn)})")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 for a mistake in what was given."""
    try:
        parser = Parser(prog="fl_evaluate.py", description=__doc__, allow_abbrev=False)
        parser.add_argument("--pictures", type=int, default=6, help="how many clips to draw")
        add_settings(parser)
        values = vars(parser.parse_args(argv))
        given = {k.removeprefix("setting_"): v for k, v in values.items() if k.startswith("setting_") and v is not None}
        run(resolve(given), values["pictures"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
