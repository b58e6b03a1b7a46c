"""The table of commands, and the parser made of it: python main.py COMMAND [--setting value ...]."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn, get_args

from prepare.adapters import all_flags
from settings import all_settings, resolve, unknown_setting

DESCRIPTION = (
    "HTS-AT on the command line. Each setting of config.py is a flag: --max_epoch 5. Several values are given with "
    """commas, or as a JSON list: --fl_class_num '["Speech, male", "Dog"]'."""
)

Arguments = list[tuple[str, dict[str, Any]]]

# command: (help, its own arguments beside the settings)
COMMANDS: dict[str, tuple[str, Arguments | Callable[[], Arguments]]] = {
    "prepare": (
        "make the clip store of a data set",
        lambda: [
            *all_flags(),
            ("--name", {"help": "name of the data set: into <workspace>/data/NAME", "metavar": "NAME"}),
            ("--overwrite", {"help": "replace a store that is there", "action": "store_true"}),
        ],
    ),
    "encoders": ("list the encoders and their options", []),
    "train": ("train a network, or resume a run (--resume auto)", []),
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
    "teach": (
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
    ),
    "weight_average": ("average the weights of several checkpoints", []),
    "create_index": (
        "AudioSet: index the packed files of hdf5s/waveforms (--dataset_path FOLDER, that of hdf5s/)",
        [("--processes", {"help": "files read at once", "type": int, "default": 4})],
    ),
    "save_idc": ("list the clips of each class", []),
    "check": (
        "report on a prepared data set; exit status 1 where a training would go wrong",
        [("--processes", {"help": "how many processes read clips [one a core]", "type": int, "default": None})],
    ),
    "plan": (
        "what a training will need, before it starts; exit status 1 where it cannot run",
        [("--measure_steps", {"help": "training steps to time, 0: none", "type": int, "default": 20})],
    ),
    "benchmark": (
        "measure training and inference on this machine",
        [
            ("--precisions", {"help": "32,bf16-mixed,16-mixed; without it what performance takes", "metavar": "LIST"}),
            ("--compile_modes", {"help": "off,default,...; without it what performance takes", "metavar": "LIST"}),
            ("--steps", {"help": "steps of each measurement", "type": int, "default": 20}),
            ("--json", {"help": "file to write the figures into as well", "dest": "json_file", "metavar": "FILE"}),
            ("--profile", {"help": "folder for a trace of training steps", "metavar": "FOLDER"}),
        ],
    ),
    "compress": ("keep the sound of the prepared stores as FLAC, without loss", []),
    "import_legacy": (
        "bring pickled .npy files of the published code into a store",
        [
            ("--legacy", {"help": "a .npy file; once for each file", "action": "append", "required": True}),
            ("--legacy_splits", {"help": "the split of each file, as train,validation,test", "default": None}),
        ],
    ),
    "export": (
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
    ),
    "results": (
        "print the tests that were run; with --dataset_type those on one data set",
        [("--tsv", {"help": "file to write them into as well, tab-separated", "metavar": "FILE"})],
    ),
    "predict": (
        "tag audio files with a checkpoint (--resume_checkpoint PATH); the same command resumes an interrupted run",
        [
            ("files", {"nargs": "+", "help": "audio files, folders with all below them, - for standard input"}),
            ("--top_k", {"type": int, "default": 5, "help": "how many classes to print"}),
            ("--runtime", {"default": "auto", "help": "torch, or onnx for an exported file; auto: what it is for"}),
            ("--jsonl", {"help": "tags and events, one JSON object a line", "metavar": "FILE"}),
            ("--csv", {"help": "all clip scores, a row a file; with --bins a row a bin", "metavar": "FILE"}),
            ("--events", {"help": "TSV: filename, onset, offset, event_label", "metavar": "FILE"}),
            ("--audacity", {"help": "a label file for Audacity for each recording", "metavar": "FOLDER"}),
            ("--scores", {"help": "all clip and frame scores, .h5", "metavar": "FILE"}),
            ("--embeddings", {"help": "embeddings, .h5 or .npz", "metavar": "FILE"}),
            (
                "--embeddings_of",
                {"help": "of clips, or of frames as well", "choices": ["clips", "frames"], "default": "clips"},
            ),
            ("--plot", {"help": "a picture of spectrogram, scores and events for each", "metavar": "FOLDER"}),
            ("--bins", {"help": "steps of a window, in place of the network's own", "type": int, "metavar": "N"}),
            ("--bins_by", {"help": "how frames make a bin", "choices": ["mean", "max"], "default": "mean"}),
        ],
    ),
    "listen": (
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
            ("--events", {"help": "TSV: filename, onset, offset, event_label", "metavar": "FILE", "default": None}),
            ("--top_k", {"help": "how many classes the live line shows [3]", "type": int, "default": 3}),
        ],
    ),
    "serve": (
        "a local web page that tags files and recordings with a checkpoint (--resume_checkpoint PATH)",
        [
            ("--host", {"help": "address to listen on; 127.0.0.1: this machine alone", "default": "127.0.0.1"}),
            ("--port", {"help": "port to listen on, 0: a free one [8000]", "type": int, "default": 8000}),
            ("--most_megabytes", {"help": "largest file to take [100]", "type": float, "default": 100.0}),
            ("--most_seconds", {"help": "longest sound to take [600]", "type": float, "default": 600.0}),
            ("--most_waiting", {"help": "requests that may wait while one is computed [4]", "type": int, "default": 4}),
        ],
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse, with the near misses named."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        names = [word.lstrip("-").partition("=")[0] for word in unknown if word.startswith("--")]
        self.exit(2, f"error: {unknown_setting(names[0]) if names else message}\n")


def build_parser(chosen: str | None) -> Parser:
    """The parser; only the chosen command gets its flags, so that the others cost nothing."""
    parser = Parser(prog="main.py", description=DESCRIPTION, allow_abbrev=False)
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
            for flag, options in arguments() if callable(arguments) else arguments:
                number = {"type": finite_number} if options.get("type") is float else {}
                command.add_argument(flag, **{**options, **number})
            add_settings(command)
    return parser


def finite_number(text: str) -> float:
    """A number of the command line; NaN and infinity are none."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, with config.py's comment as its help."""
    defaults = resolve().model_dump()
    group = parser.add_argument_group("settings (config.py)")
    for setting in all_settings().values():
        choices = [str(v) for v in get_args(setting.type)] if "Literal" in str(setting.type) else []
        shown = f"{{{','.join(choices)}}}" if choices else 'VALUE,...|["VALUE",...]' if setting.is_list else "VALUE"
        text = f"{setting.comment} [{defaults[setting.name]}]".replace("%", "%%")
        group.add_argument(f"--{setting.name}", metavar=shown, help=text, dest=f"setting_{setting.name}")
