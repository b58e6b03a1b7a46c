"""HTS-AT on the command line: python main.py COMMAND [--setting value ...]. One flag for each line of config.py."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import settings as settings_module

# command: (help, its own arguments beside the settings)
COMMANDS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "prepare": (
        "make the clip store of a data set",
        [
            ("--raw", {"help": "folder of the downloaded data set", "metavar": "FOLDER"}),
            ("--clips", {"help": "demo: how many clips to synthesize", "type": int, "default": 400}),
            ("--segments", {"help": "audioset: CSV of the segments", "metavar": "FILE"}),
            ("--table", {"help": "desed, folder: CSV or TSV of labels or events", "metavar": "FILE"}),
            (
                "--label_order",
                {"help": "scv2: sorted, or published as in the published checkpoint", "default": "sorted"},
            ),
            ("--processes", {"help": "audioset: how many parts to pack at once", "type": int, "default": 1}),
        ],
    ),
    "train": ("train a network, or go on with a run (--resume auto)", []),
    "test": ("evaluate a checkpoint (--resume_checkpoint PATH)", []),
    "cross_validate": (
        "train and test every fold, chosen on held-out clips and as published",
        [("--protocols", {"help": "which rules to follow: held_out, paper or both", "default": "held_out,paper"})],
    ),
    "calibrate": (
        "choose thresholds and filters on validation clips, and keep them in the checkpoint (--resume_checkpoint PATH)",
        [
            (
                "--calibrate_for",
                {
                    "help": "metric to raise: intersection_f1, collar_f1 or psds1",
                    "choices": ["intersection_f1", "collar_f1", "psds1"],
                    "default": "intersection_f1",
                },
            ),
            ("--scores", {"help": "score file of the validation clips; without it they are scored", "metavar": "FILE"}),
        ],
    ),
    "evaluate": (
        "metrics of detections with intervals; give --detections, --ground_truth and --durations, or --scores",
        [
            ("--detections", {"help": "TSV of detected events; several: a.tsv,b.tsv,... for PSDS", "metavar": "FILE"}),
            ("--ground_truth", {"help": "TSV of true events: filename, onset, offset, event_label", "metavar": "FILE"}),
            ("--durations", {"help": "TSV of the clips: filename, duration", "metavar": "FILE"}),
            ("--scores", {"help": "score file of a test with --fl_local True, in place of tables", "metavar": "FILE"}),
            ("--compare", {"help": "second system, as the first", "dest": "compare_with", "metavar": "FILE"}),
            ("--resamples", {"help": "how often the bootstrap draws the clips anew", "type": int, "default": 1000}),
            ("--output", {"help": "write PREFIX_metrics.json and PREFIX_metrics.tsv as well", "metavar": "PREFIX"}),
        ],
    ),
    "esm_test": ("evaluate several checkpoints as an ensemble", []),
    "weight_average": ("average the weights of several checkpoints", []),
    "save_idc": ("list the clips of each class", []),
    "check": (
        "report on a prepared data set; exit status 1 where a training would go wrong",
        [("--processes", {"help": "how many processes read clips [one a core]", "type": int, "default": None})],
    ),
    "compress": ("keep the sound of the prepared stores as FLAC, without loss", []),
    "import_legacy": (
        "bring pickled .npy files of the published code into a store",
        [
            ("--legacy", {"help": "a .npy file; once for each file", "action": "append", "required": True}),
            ("--legacy_splits", {"help": "the split of each file, as train,validation,test", "default": None}),
        ],
    ),
    "results": (
        "print the tests that were run; with --dataset_type those on one data set",
        [("--tsv", {"help": "file to write them into as well, tab-separated", "metavar": "FILE"})],
    ),
    "predict": (
        "tag audio files with a checkpoint",
        [
            ("files", {"nargs": "+", "help": "audio files"}),
            ("--top_k", {"type": int, "default": 5, "help": "how many classes to print"}),
        ],
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse, with the near misses named."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        names = [word.lstrip("-").partition("=")[0] for word in unknown if word.startswith("--")]
        self.exit(2, f"error: {settings_module.unknown_setting(names[0]) if names else message}\n")


def build_parser(chosen: str | None) -> Parser:
    """The parser; only the chosen command gets its flags, so that the others cost nothing."""
    parser = Parser(prog="main.py", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (text, arguments) in COMMANDS.items():
        command = subparsers.add_parser(
            name,
            help=text,
            description=text,
            usage=f"main.py {name} {'FILE ... ' if name == 'predict' else ''}[--setting VALUE ...]",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        if name == chosen:
            for flag, options in arguments:
                command.add_argument(flag, **options)
            add_settings(command)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, with config.py's comment as its help."""
    defaults = settings_module.resolve().model_dump()
    group = parser.add_argument_group("settings (config.py)")
    for setting in settings_module.all_settings().values():
        choices = [str(v) for v in get_args(setting.type)] if "Literal" in str(setting.type) else []
        shown = f"{{{','.join(choices)}}}" if choices else "VALUE,..." if setting.is_list else "VALUE"
        text = f"{setting.comment} [{defaults[setting.name]}]".replace("%", "%%")
        group.add_argument(f"--{setting.name}", metavar=shown, help=text, dest=f"setting_{setting.name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a mistake in what was given, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser(next((word for word in words if not word.startswith("-")), None))
        values = vars(parser.parse_args(words))
        command = values.pop("command")
        given = {k.removeprefix("setting_"): values.pop(k) for k in list(values) if k.startswith("setting_")}
        settings_module.check_values(given)  # a wrong value is told before anything heavy is imported
        importlib.import_module(f"commands.{command}").run(given, **values)
    except ValueError as error:
        # torch puts a traceback in front of what a worker of a DataLoader says.
        print(f"error: {str(error).rpartition('ValueError: ')[2].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. `python main.py train --resume auto` with the same settings goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
