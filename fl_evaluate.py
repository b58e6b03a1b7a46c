"""python fl_evaluate.py: the frame scores of a test -> detected events, named metrics, pictures and a report.

Reads <heatmap_dir>/<test_file>.h5, which `python main.py test --fl_local True` writes, and puts beside it
<test_file>_events.tsv, <test_file>_detection.json and .tsv, and the folder <test_file>_pictures; with --report also one
HTML file with everything in it. Every setting of config.py is a flag. Thresholds, filters and durations are those that
`python main.py calibrate` put into the checkpoint, else those of the class mapping, else 0.5 alone; fl_threshold,
fl_median_filter, ... stand in for them where they are given.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import pandas as pd

from commands.command_line import Parser, add_settings
from data.files import write_text
from evaluation.bootstrap import RESAMPLES
from evaluation.detection import DetectionMetric, measure, with_intervals
from evaluation.plots import ClipSound, ClipView, clip_figure, save_png
from evaluation.postprocess import EVENT_COLUMNS, PostProcessing
from evaluation.report import Evaluated, render_report, worst_clips
from evaluation.scores import Scores, export_tables, import_tables, load_scores
from evaluation.tables import (
    choose_postprocessing,
    print_metrics,
    system_of_scores,
    truth_of_scores,
    tsv_text,
)
from runs.ledger import file_sha256
from settings import Config, UserError, resolve, section

BESIDE = ""  # --report without a file


@dataclass(frozen=True)
class Options:
    """What the command line adds to the settings. report: None for none, BESIDE for <test_file>_report.html."""

    pictures: int = 6
    report: Optional[str] = None
    worst: int = 8
    resamples: int = RESAMPLES
    export_scores: Optional[str] = None
    import_scores: Optional[str] = None


def evaluate(
    scores: Scores, post: PostProcessing, *, resamples: int = 0, seed: int = 0
) -> tuple[pd.DataFrame, list[DetectionMetric]]:
    """Detected events of a score store, and all metrics, with bootstrap intervals where there are `resamples`.

    Raises UserError where the store has no frame scores or no true events.
    """
    truth = truth_of_scores(scores)
    system = system_of_scores(scores, post, truth.names)
    measured = measure(truth, system)
    if resamples:
        return system.events, with_intervals(measured, len(truth.names), resamples=resamples, seed=seed)
    return system.events, [each.metric for each in measured]


def read_sounds(scores: Scores, clips: Sequence[int]) -> dict[int, ClipSound]:
    """The sound of some clips (by their number) from the clip store; empty where that store is gone."""
    import torch

    from data.clip_store import Waveforms, open_store
    from model.frontend import LogMel, Spectrogram
    from utils import int16_to_float32

    store = Path(str(scores.attributes.get("clip_store", "")))
    if not store.is_file():
        print(f"No sound, in the pictures and in the report: the clips' store {store} is not there.")
        return {}
    rate, window, hop, bins, fmin, fmax = (scores.attributes[name] for name in section("front-end"))
    spectrogram = Spectrogram(int(window), int(hop))
    mel = LogMel(int(rate), int(window), int(bins), float(fmin), float(fmax))
    centres = mel.melW.argmax(dim=0).numpy() * int(rate) / int(window)
    sounds = {}
    with open_store(store, "audio_name") as file:
        waveforms = Waveforms(file)
        rows = {name.decode(): row for row, name in enumerate(file["audio_name"][:])}
        for clip in clips:
            samples = int(scores.durations[clip] * int(rate))
            waveform = int16_to_float32(torch.from_numpy(waveforms.read(rows[scores.names[clip]])[:samples]))
            logmel = mel(spectrogram(waveform[None]))[0].numpy()
            sounds[clip] = ClipSound(waveform.numpy(), int(rate), logmel, centres)
    return sounds


def view_clip(
    scores: Scores, post: PostProcessing, found: pd.DataFrame, clip: int, sound: Optional[ClipSound] = None
) -> ClipView:
    """A clip (by its number) for a figure. found: the detected events of all clips."""
    assert scores.framewise is not None
    seconds = scores.durations[clip : clip + 1]
    smoothed, step = post.smooth(
        scores.framewise[clip : clip + 1], durations=seconds, seconds_per_frame=scores.seconds_per_frame
    )
    detected = found[found.filename == scores.names[clip]]
    places = [scores.labels.index(label) for label in detected.event_label]
    return ClipView(
        duration=float(seconds[0]),
        labels=scores.labels,
        scores=smoothed[0],
        seconds_per_frame=step,
        thresholds=post.thresholds,
        truth=(scores.events or [[]] * (clip + 1))[clip],
        found=list(zip(places, detected.onset.tolist(), detected.offset.tolist(), strict=True)),
        sound=sound,
    )


def draw_clips(
    scores: Scores, post: PostProcessing, found: pd.DataFrame, sounds: dict[int, ClipSound], folder: Path
) -> list[Path]:
    """Draw the clips of `sounds` into a folder, as <clip>.png."""
    paths = []
    for clip, sound in sounds.items():
        paths.append(folder / f"{Path(scores.names[clip]).stem}.png")
        save_png(clip_figure(view_clip(scores, post, found, clip, sound)), paths[-1])
    return paths


def write_report(
    path: Path,
    scores: Scores,
    post: PostProcessing,
    found: pd.DataFrame,
    metrics: list[DetectionMetric],
    *,
    title: str,
    about: list[tuple[str, str]],
    worst: int,
) -> None:
    """One HTML file with metrics, curves, histograms, confusions, and the `worst` clips with their sound."""
    assert scores.framewise is not None
    truth = truth_of_scores(scores)
    smoothed, step = post.smooth(
        scores.framewise, durations=scores.durations, seconds_per_frame=scores.seconds_per_frame
    )
    evaluated = Evaluated(truth, truth.index(found), metrics, post, smoothed, step)
    errors = worst_clips(evaluated.detections, truth, worst)
    sounds = read_sounds(scores, [each.clip for each in errors])
    views = [(each, view_clip(scores, post, found, each.clip, sounds.get(each.clip))) for each in errors]
    write_text(path, render_report(evaluated, views, title=title, about=about))


def describe_system(file: Path, scores: Scores, post: PostProcessing, settings: Config) -> list[tuple[str, str]]:
    """What the report says of the system: where the scores come from, and how they became events."""
    summary = file.with_suffix(".json")
    test: dict[str, Any] = json.loads(summary.read_text()) if summary.is_file() else {}
    kept = scores.attributes
    lines = [
        ("score file", str(file)),
        ("data set", f"{kept.get('dataset_type', 'unknown')}, {kept.get('split', 'unknown')} clips"),
        ("clips", f"{len(scores.names)}, {scores.durations.sum() / 3600:.2f} hours"),
        ("protocol", test.get("protocol", "unknown")),
        *(("checkpoint", _name_checkpoint(path)) for path in test.get("checkpoints", [])),
        ("run", f"{kept.get('run_id', 'unknown')} (of checkpoints and clips, at the test)"),
        ("code of the test", f"git revision {test.get('git_revision', 'unknown')}"),
        ("device of the test", test.get("device", "unknown")),
        ("post-processing", f"{post.source}; {describe(post)}"),
        ("random seed", str(settings.random_seed)),
        ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    return [(name, str(text)) for name, text in lines]


def _name_checkpoint(path: str) -> str:
    if not Path(path).is_file():
        return f"{path} (no longer there)"
    return f"{path}, SHA-256 {file_sha256(path)} (of the file as it is now)"


def run(settings: Config, options: Options) -> None:
    """Evaluate the score file of the settings and write everything beside it.

    import_scores: a folder of sed_scores_eval's tables, whose scores stand in for those of the file; export_scores: a
    folder to write such tables into.
    """
    folder, name = Path(settings.heatmap_dir), settings.test_file
    file = folder / f"{name}.h5"
    scores = load_scores(file)
    if options.import_scores is not None:
        scores, name = import_tables(Path(options.import_scores), scores), f"{name}_imported"
    if settings.fl_class_num:
        scores = scores.select_classes(settings.fl_class_num)
    if options.export_scores is not None:
        export_tables(scores, Path(options.export_scores))
        print(f"Frame scores as tables of sed_scores_eval: {options.export_scores}")
    post = choose_postprocessing(scores, settings)
    found, metrics = evaluate(scores, post, resamples=options.resamples, seed=settings.random_seed)
    title = f"{name}: {len(found)} events in {len(scores.names)} clips"
    print_metrics(title, metrics, scores.labels)
    print(f"Post-processing: {post.source}; {describe(post)}")
    write_tables(folder / name, scores, post, found, metrics)
    with_events = [k for k, events in enumerate(scores.events or []) if events][: options.pictures]
    if with_events:
        drawn = draw_clips(scores, post, found, read_sounds(scores, with_events), folder / f"{name}_pictures")
        print(f"Pictures: {folder / f'{name}_pictures'} ({len(drawn)})")
    if options.report is not None:
        path = Path(options.report) if options.report != BESIDE else folder / f"{name}_report.html"
        title = f"Localization: {scores.attributes.get('dataset_type', name)}, {title}"
        about = describe_system(file, scores, post, settings)
        write_report(path, scores, post, found, metrics, title=title, about=about, worst=options.worst)
        print(f"Report: {path}")


def write_tables(
    prefix: Path, scores: Scores, post: PostProcessing, found: pd.DataFrame, metrics: list[DetectionMetric]
) -> None:
    """Write <prefix>_events.tsv, <prefix>_detection.json and <prefix>_detection.tsv, and say so."""
    content = {
        "clips": len(scores.names),
        "postprocessing": post.as_dict(),
        "metrics": [metric.as_dict() for metric in metrics],
    }
    events, report, table = (prefix.with_name(prefix.name + end) for end in _ENDS)
    write_text(events, found.to_csv(sep="\t", index=False, columns=EVENT_COLUMNS, float_format="%.4f"))
    write_text(report, json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(table, tsv_text(metrics))
    print(f"{len(found)} events: {events}\nMetrics: {report}, {table}")


_ENDS = ("_events.tsv", "_detection.json", "_detection.tsv")


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
        span = f"{min(values):.7g}" if min(values) == max(values) else f"{min(values):.7g} to {max(values):.7g}"
        shown.append(f"{name.replace('_', ' ')} {span}{unit}")
    return (
        f"{', '.join(shown)}, {'no interpolation' if post.interpolation == 1 else f'{post.interpolation} parts a step'}"
    )


def build_parser() -> Parser:
    """The flags of Options, and one for each setting."""
    parser = Parser(prog="fl_evaluate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=Options.pictures, help="how many clips to draw")
    parser.add_argument(
        "--report", nargs="?", const=BESIDE, metavar="FILE", help="write an HTML report [beside the other files]"
    )
    parser.add_argument("--worst", type=int, default=Options.worst, help="how many clips the report shows")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap; 0 for no intervals")
    parser.add_argument("--export_scores", metavar="FOLDER", help="write the frame scores for sed_scores_eval")
    parser.add_argument("--import_scores", metavar="FOLDER", help="evaluate such tables, with the file's truth")
    add_settings(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 for a mistake in what was given."""
    try:
        values = vars(build_parser().parse_args(argv))
        given = {k.removeprefix("setting_"): v for k, v in values.items() if k.startswith("setting_") and v is not None}
        options = Options(**{name: value for name, value in values.items() if not name.startswith("setting_")})
        if min(options.pictures, options.worst, options.resamples) < 0:
            raise UserError("--pictures, --worst and --resamples are numbers of 0 or more.")
        run(resolve(given), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
