"""The table of commands, and the parser made of it: python main.py COMMAND [--setting value ...]."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

from prepare.adapters import all_flags
from settings import all_settings, close_names, resolve

DESCRIPTION = (
    "Audio tagging and sound event detection. Each setting of config.py is a flag: --max_epoch 5. Several values are "
    """given with commas, or as a JSON list: --fl_class_num '["Speech, male", "Dog"]'."""
)

EVENT_COLUMNS = "filename, onset, offset (seconds), event_label, score, threshold"

Arguments = list[tuple[str, dict[str, Any]]]

# Sections of config.py, and single settings, that commands read; a checkpoint and the data bring most of the network's.
PLACES = ("workspace", "dataset_path")
NETWORK = ("starting weights", "encoder", "front-end", "clips", "network", "sizes")
TESTING = (
    "data set", "split", "run", "machine", "batch_size", "precision", "random_seed", *NETWORK, "test", "fl_dataset",
    "fl_audioset_mapping",
)  # fmt: skip
TRAINING = (
    "data set", "split", "run", "machine", "training", "training clips", "fine-tuning", *NETWORK, "averaged weights",
    "augmentation", "frame augmentation", "frame training", "semi-supervised",
)  # fmt: skip
TAGGING = ("resume_checkpoint", "accelerator", "precision", "dataset_type", "encoder", "frontend_from")
EVALUATION = (
    "workspace", "exp_name", "heatmap_dir", "test_file", "fl_class_num", "fl_clips", "event detection", "random_seed",
)  # fmt: skip


class Command(NamedTuple):
    """A row: what `--help` says of it, its own arguments beside the settings, and the settings it reads."""

    help: str
    arguments: Arguments | Callable[[], Arguments]
    reads: tuple[str, ...]


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        "make the clip store of a data set",
        lambda: [
            *all_flags(),
            ("--name", {"help": "name of the data set: into <workspace>/data/NAME", "metavar": "NAME"}),
            ("--overwrite", {"help": "replace a store that is there", "action": "store_true"}),
        ],
        (*PLACES, "data set", "split", "random_seed", "front-end", "clips"),
    ),
    "normalize": Command(
        "measure mean and deviation of the training clips' log-mel spectrograms, which train then takes",
        [("--augmented", {"help": "after the augmentation of waveforms in the settings", "action": "store_true"})],
        (*PLACES, "data set", "split", "machine", "batch_size", "random_seed", "encoder", "clips", "augmentation"),
    ),
    "encoders": Command("list the encoders and their options", [], ()),
    "train": Command("train a network, or resume a run (--resume auto)", [], TRAINING),
    "test": Command("evaluate a checkpoint (--resume_checkpoint PATH)", [], TESTING),
    "cross_validate": Command(
        "train and test every fold, chosen on held-out clips and as published",
        [("--protocols", {"help": "which rules to follow: held_out, paper or both", "default": "held_out,paper"})],
        (*TRAINING, "test"),
    ),
    "compare": Command(
        "train and test several encoders on the same data, and compare accuracy and cost",
        [
            ("--encoders", {"help": "which, as htsat,ast,tal; the first is compared with", "required": True}),
            ("--seeds", {"help": "a run of each encoder with each [1,2,3]", "default": "1,2,3"}),
            (
                "--flags_of",
                {
                    "help": "settings of one encoder, in quotes: 'ast --encoder_options depth=6'; once for each",
                    "action": "append",
                    "default": [],
                    "metavar": "FLAGS",
                },
            ),
            ("--steps", {"help": "steps of each measurement of speed, 0: none [10]", "type": int, "default": 10}),
        ],
        (*TRAINING, "test"),
    ),
    "calibrate": Command(
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
        (*TESTING, "fl_interpolation", "fl_maximum_gap"),
    ),
    "evaluate": Command(
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
        ("fl_class_num", "fl_clips", "event detection", "random_seed"),
    ),
    "esm_test": Command("evaluate several checkpoints as an ensemble", [], (*TESTING, "esm_test")),
    "teach": Command(
        "write the frame logits of a checkpoint, or of an ensemble (--esm_model_pathes A,B,...), to learn from",
        [
            (
                "--teach_split",
                {
                    "help": "clips to score [train]",
                    "choices": ["train", "validation", "test", "all"],
                    "default": "train",
                },
            ),
            ("--output", {"help": "file to write [<workspace>/teachers/<exp_name>.h5]", "metavar": "FILE"}),
        ],
        (*TESTING, "esm_test"),
    ),
    "weight_average": Command("average the weights of several checkpoints", [], (*TESTING, "weight_average")),
    "create_index": Command(
        "AudioSet: index the packed files of hdf5s/waveforms (--dataset_path FOLDER, that of hdf5s/)",
        [("--processes", {"help": "files read at once", "type": int, "default": 4})],
        PLACES,
    ),
    "save_idc": Command("list the clips of each class", [], (*PLACES, "data set", "split")),
    "check": Command(
        "report on a prepared data set; exit status 1 where a training would go wrong",
        [("--processes", {"help": "how many processes read clips [one a core]", "type": int, "default": None})],
        (*PLACES, "data set", "split", "front-end", "clips", "classes_num", "resume_checkpoint"),
    ),
    "plan": Command(
        "what a training will need, before it starts; exit status 1 where it cannot run",
        [
            (
                "--measure_steps",
                {"help": "most training steps to time, for about 5 s; 0: none [20]", "type": int, "default": 20},
            )
        ],
        TRAINING,
    ),
    "benchmark": Command(
        "measure training and inference on this machine",
        [
            ("--precisions", {"help": "32,bf16-mixed,16-mixed [that of --precision]", "metavar": "LIST"}),
            ("--compile_modes", {"help": "off,default,... [that of --compile]", "metavar": "LIST"}),
            ("--encoders", {"help": "names, or all; without it that of the settings", "metavar": "LIST"}),
            ("--steps", {"help": "steps of each measurement [20]", "type": int, "default": 20}),
            ("--json", {"help": "file to write the figures into as well", "dest": "json_file", "metavar": "FILE"}),
            ("--profile", {"help": "print the heaviest operations of training steps", "action": "store_true"}),
            ("--trace", {"help": "file for a trace of training steps; with the table of --profile", "metavar": "FILE"}),
        ],
        TRAINING,
    ),
    "compress": Command("keep the sound of the prepared stores as FLAC, without loss", [], (*PLACES, "data set")),
    "import_legacy": Command(
        "bring pickled .npy files of the published code into a store",
        [
            ("--legacy", {"help": "a .npy file; once for each file", "action": "append", "required": True}),
            ("--legacy_splits", {"help": "the split of each file, as train,validation,test", "default": None}),
        ],
        (*PLACES, "data set", "front-end", "classes_num"),
    ),
    "export": Command(
        "write a checkpoint (--resume_checkpoint PATH) as safetensors and ONNX, each checked before it is kept",
        [
            (
                "--formats",
                {
                    "help": "which, of safetensors, onnx, onnx-mel, onnx-int8",
                    "default": "safetensors,onnx,onnx-mel,onnx-int8",
                },
            ),
            ("--output", {"help": "folder to write into [export, beside the checkpoint]", "metavar": "FOLDER"}),
            ("--clips", {"help": "how many clips of the data set to check on", "type": int, "default": 60}),
        ],
        (*PLACES, *TAGGING, "data set"),
    ),
    "results": Command(
        "print the tests that were run; with --dataset_type those on one data set",
        [("--tsv", {"help": "file to write them into as well, tab-separated", "metavar": "FILE"})],
        ("workspace", "results_path", "data set"),
    ),
    "predict": Command(
        "tag audio files with a checkpoint (--resume_checkpoint PATH); the same command resumes an interrupted run",
        [
            ("files", {"nargs": "+", "help": "audio files, folders with all below them, - for standard input"}),
            ("--top_k", {"type": int, "default": 5, "help": "how many classes to print [5]"}),
            ("--runtime", {"default": "auto", "help": "torch, onnx or int8; auto: the fastest that agrees [auto]"}),
            ("--classes", {"help": "only these: dog,cat or '[\"Speech, male\"]' [all]", "metavar": "LIST"}),
            ("--min_score", {"help": "leave out tags and events of a lower score [0]", "type": float}),
            ("--output", {"help": "all of the following, in a folder", "metavar": "FOLDER"}),
            ("--jsonl", {"help": "tags and events, one JSON object a line", "metavar": "FILE"}),
            ("--csv", {"help": "all clip scores, a row a file; with --bins a row a bin", "metavar": "FILE"}),
            ("--events", {"help": f"TSV: {EVENT_COLUMNS}", "metavar": "FILE"}),
            ("--audacity", {"help": "a label file for Audacity for each recording", "metavar": "FOLDER"}),
            ("--raven", {"help": "a selection table for Raven for each recording", "metavar": "FOLDER"}),
            ("--scores", {"help": "all clip and frame scores, .h5", "metavar": "FILE"}),
            ("--embeddings", {"help": "embeddings, .h5 or .npz", "metavar": "FILE"}),
            (
                "--embeddings_of",
                {"help": "of clips, or of frames as well", "choices": ["clips", "frames"], "default": "clips"},
            ),
            ("--parquet", {"help": "clip and frame scores and embeddings, .parquet", "metavar": "FILE"}),
            ("--plot", {"help": "a picture of spectrogram, scores and events for each", "metavar": "FOLDER"}),
            ("--bins", {"help": "steps of a window, in place of the network's own", "type": int, "metavar": "N"}),
            ("--bins_by", {"help": "how frames make a bin", "choices": ["mean", "max"], "default": "mean"}),
            ("--shard", {"help": "the K-th of N shares of the files, for job arrays", "metavar": "K/N"}),
            ("--ray", {"help": "local, or a Ray cluster: a worker a device (--devices)", "metavar": "ADDRESS"}),
        ],
        (*TAGGING, "performance", "batch_size", "devices", "predict", "event detection"),
    ),
    "listen": Command(
        "tags and events while they sound, with a checkpoint (--resume_checkpoint PATH): microphone or standard input",
        [
            (
                "--pcm",
                {
                    "help": "raw samples on standard input, not the microphone",
                    "choices": ["s16le", "f32le"],
                    "default": None,
                },
            ),
            ("--rate", {"help": "--pcm: samples per second [the network's]", "type": int, "default": None}),
            ("--channels", {"help": "--pcm: interleaved channels [1]", "type": int, "default": 1}),
            ("--microphone", {"help": "number or name, as `python -m sounddevice` lists them", "default": None}),
            ("--hop_seconds", {"help": "seconds between evaluations [1.0]", "type": float, "default": 1.0}),
            (
                "--delay_seconds",
                {"help": "seconds after which scores are final [half a window]", "type": float, "default": None},
            ),
            (
                "--release",
                {
                    "help": "share of its threshold below which an event ends, 1: no hysteresis [0.8]",
                    "type": float,
                    "default": 0.8,
                },
            ),
            ("--events", {"help": f"TSV: {EVENT_COLUMNS}", "metavar": "FILE", "default": None}),
            ("--top_k", {"help": "how many classes the live line shows [3]", "type": int, "default": 3}),
        ],
        (*TAGGING, "performance", "event detection"),
    ),
    "serve": Command(
        "a local web page that tags files and recordings with a checkpoint (--resume_checkpoint PATH)",
        [
            ("--host", {"help": "address to listen on; 127.0.0.1: this machine alone", "default": "127.0.0.1"}),
            ("--port", {"help": "port to listen on, 0: a free one [8000]", "type": int, "default": 8000}),
            ("--most_megabytes", {"help": "largest file to take [100]", "type": float, "default": 100.0}),
            ("--most_seconds", {"help": "longest sound to take [600]", "type": float, "default": 600.0}),
            ("--most_waiting", {"help": "requests that may wait while one is computed [4]", "type": int, "default": 4}),
        ],
        (*TAGGING, "performance", "predict", "event detection"),
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse, with the near misses of the chosen command named."""

    command = ""  # the chosen one
    own: Sequence[str] = ()  # its flags, without the settings that it does not read

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        names = [word.lstrip("-").partition("=")[0] for word in unknown if word.startswith("--")]
        self.exit(2, f"error: {self._unknown_flag(names[0]) if names else message}\n")

    def _unknown_flag(self, name: str) -> str:
        close = dict.fromkeys([*close_names(name, self.own), *close_names(name, all_settings())])
        hint = f" Did you mean {' or '.join(f'--{flag}' for flag in list(close)[:3])}?" if close else ""
        program = f"{self.prog} {self.command}".strip()
        return f"{program} has no flag --{name}.{hint} `python {program} --help` lists its flags."


def build_parser(chosen: str | None, *, everything: bool = False) -> Parser:
    """The parser; only the chosen command gets its flags, so that the others cost nothing.

    everything: its help has all settings, not those alone that the command reads.
    """
    parser = Parser(prog="main.py", description=DESCRIPTION, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, row in COMMANDS.items():
        command = subparsers.add_parser(
            name,
            help=row.help,
            description=row.help,
            usage=f"main.py {name} {'FILE ... ' if name == 'predict' else ''}[--setting VALUE ...]",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        if name == chosen:
            flags = row.arguments() if callable(row.arguments) else row.arguments
            for flag, options in flags:
                number = {"type": finite_number} if options.get("type") is float else {}
                command.add_argument(flag, **{**options, **number})
            add_settings(command, row.reads, everything=everything)
            parser.command, own = name, [flag.removeprefix("--") for flag, _ in flags if flag.startswith("--")]
            parser.own = [*own, *settings_read(row.reads)]
    return parser


def finite_number(text: str) -> float:
    """A number of the command line; NaN and infinity are none."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def settings_read(reads: Sequence[str]) -> list[str]:
    """Names of the settings that titles of sections, and single names, stand for."""
    settings = all_settings().values()
    return [setting.name for setting in settings if {setting.name, setting.section.partition(", ")[0]} & {*reads}]


def add_settings(parser: argparse.ArgumentParser, reads: Sequence[str], *, everything: bool = False) -> None:
    """One flag for each setting, with config.py's comment as its help; without `everything`, of those it reads."""
    defaults, listed = resolve().model_dump(), settings_read(reads)
    parser.add_argument("--help-all", action="help", help="this text, with all settings")
    group = parser.add_argument_group("settings (config.py)" if everything else "settings that it reads (config.py)")
    for setting in all_settings().values():
        kinds = setting.type, *get_args(setting.type)  # of Optional[Literal[...]] the second
        choices = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        metavar = f"{{{','.join(choices)}}}" if choices else 'VALUE,...|["VALUE",...]' if setting.is_list else "VALUE"
        text = f"{setting.comment} [{defaults[setting.name]}]".replace("%", "%%")
        text = text if everything or setting.name in listed else argparse.SUPPRESS
        group.add_argument(f"--{setting.name}", metavar=metavar, help=text, dest=f"setting_{setting.name}")
