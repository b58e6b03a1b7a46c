"""python fl_evaluate.py: the frame scores of a test -> detected events, named metrics, pictures and a report.

Reads <heatmap_dir>/<test_file>.h5 from `python main.py test --fl_local True`, and writes beside it
<test_file>_events.tsv, <test_file>_detection.json and .tsv, and the folder <test_file>_pictures; with --report also one
HTML file with everything in it. Every setting of config.py is a flag. Thresholds, filters and durations are those that
`python main.py calibrate` has put into the checkpoint, else those of the class mapping, else 0.5 alone; the flags
fl_threshold, fl_median_filter, ... replace them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from commands import report_missing

try:
    from commands.command_line import EVALUATION, Parser, add_settings, settings_read
    from data.files import check_writable, read_json, write_text
    from data.names import terminal_text
    from evaluation.bootstrap import RESAMPLES
    from evaluation.clips import draw_clips, read_sounds
    from evaluation.detection import measure, with_intervals
    from evaluation.postprocess import PostProcessing, choose_postprocessing
    from evaluation.report import build_report
    from evaluation.score_tables import export_tables, import_tables
    from evaluation.scores import Scores, load_scores
    from evaluation.systems import evaluated_scores, system_of_scores, truth_of_scores
    from evaluation.tables import describe, print_metrics, write_detections
    from runs.ledger import file_sha256
    from settings import Config, UserError, resolve
except ModuleNotFoundError as error:
    sys.exit(report_missing(error))

BESIDE = ""  # --report without a file


@dataclass(frozen=True)
class Options:
    """The flags besides the settings. report: None for none, BESIDE for <test_file>_report.html."""

    pictures: int = 6
    report: Optional[str] = None
    worst: int = 8
    resamples: int = RESAMPLES
    export_scores: Optional[str] = None
    import_scores: Optional[str] = None


def run(settings: Config, options: Options) -> None:
    """Evaluate the score file of the settings and write everything beside it.

    import_scores: a folder of sed_scores_eval's tables with the scores to evaluate; export_scores: a folder for such
    tables of the file's scores.
    """
    folder, name = Path(settings.heatmap_dir), settings.test_file
    file = folder / f"{name}.h5"
    scores = load_scores(file)
    check_writable(f"heatmap_dir = {folder}", folder / f"{name}_detection.json")
    if options.report:
        check_writable(f"--report {options.report}", options.report)
    if options.import_scores is not None:
        scores, name = import_tables(Path(options.import_scores), scores), f"{name}_imported"
    scores = evaluated_scores(scores, settings)
    if options.export_scores is not None:
        export_tables(scores, Path(options.export_scores))
        print(f"Frame scores as tables of sed_scores_eval: {options.export_scores}")
    post = choose_postprocessing(scores.postprocessing, scores.labels, settings)
    system, truth = system_of_scores(scores, post), truth_of_scores(scores)
    found, clips = system.events, len(scores.names)
    metrics = with_intervals(measure(truth, system), clips, resamples=options.resamples, seed=settings.random_seed)
    title = f"{name}: {len(found)} events in {clips} clips"
    print_metrics(title, metrics, scores.labels)
    print(f"Post-processing: {post.source}; {describe(post)}")
    events, *tables = write_detections(str(folder / name), clips, post, found, metrics)
    print(f"{len(found)} events: {events}\nMetrics: {', '.join(map(str, tables))}")
    with_events = [k for k, events in enumerate(scores.true_events()) if events][: options.pictures]
    if with_events:
        drawn = draw_clips(scores, post, found, read_sounds(scores, with_events), folder / f"{name}_pictures")
        print(f"Pictures: {folder / f'{name}_pictures'} ({len(drawn)})")
    if options.report is not None:
        path = Path(options.report) if options.report != BESIDE else folder / f"{name}_report.html"
        title = f"Localization: {scores.attributes.get('dataset_type', name)}, {title}"
        about = describe_system(file, scores, post, settings)
        write_text(
            path, build_report(scores, truth, post, found, metrics, title=title, about=about, worst=options.worst)
        )
        print(f"Report: {path}")


def describe_system(file: Path, scores: Scores, post: PostProcessing, settings: Config) -> list[tuple[str, str]]:
    """The report's section on the system: the origin of the scores, and the way from scores to events."""
    summary = file.with_suffix(".json")
    test: dict[str, Any] = read_json(summary, dict) if summary.is_file() else {}
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


def build_parser(*, everything: bool = False) -> Parser:
    """The flags of Options, and one for each setting; everything: its help has all settings."""
    parser = Parser(prog="fl_evaluate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=Options.pictures, help="how many clips to draw")
    parser.add_argument(
        "--report", nargs="?", const=BESIDE, metavar="FILE", help="write an HTML report [beside the other files]"
    )
    parser.add_argument("--worst", type=int, default=Options.worst, help="how many clips the report shows")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap; 0 for no intervals")
    parser.add_argument("--export_scores", metavar="FOLDER", help="write the frame scores for sed_scores_eval")
    parser.add_argument("--import_scores", metavar="FOLDER", help="evaluate such tables, with the file's truth")
    add_settings(parser, EVALUATION, everything=everything)
    parser.own = [*vars(Options()), *settings_read(EVALUATION)]
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 for a mistake in what was given."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        values = vars(build_parser(everything="--help-all" in words).parse_args(words))
        given = {k.removeprefix("setting_"): v for k, v in values.items() if k.startswith("setting_") and v is not None}
        options = Options(**{name: value for name, value in values.items() if not name.startswith("setting_")})
        if min(options.pictures, options.worst, options.resamples) < 0:
            raise UserError("--pictures, --worst and --resamples are numbers of 0 or more.")
        run(resolve(given), options)
    except UserError as error:
        print(f"error: {terminal_text(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
