"""The encoders, one row each, and their published files by name. Nothing of torch is imported here."""

import importlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

from data.files import download
from settings import Config, UserError, close_names


@dataclass(frozen=True)
class Option:
    """One size of an encoder, which --encoder_options sets, as in time_stride=8."""

    kind: type[int] | type[float] | type[str]
    default: int | float | str | None
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """What is said of an encoder without building it.

    module: file in model/encoders/. frame_seconds: its time axis for 10 s clips, None: it has none. parameters: with
    527 classes and the default sizes. keys: regular expressions, one of which a key of its published files begins with,
    without the prefixes of wrappers. images: the same of networks of images that it can begin from, where it is wanted.
    published: names of assets/checkpoints.json. clips_per_second: of 10 s, on one core. bf16_difference: the largest
    of a clip's probability, by bfloat16 on a CPU, None: not measured (both in benchmarks/RESULTS.md). at_most,
    at_least: settings that bound the size of its networks, at those of the published one.
    """

    module: str
    title: str
    paper: str
    address: str
    sample_rate: int
    frame_seconds: Optional[float]
    parameters: int
    licence: str
    keys: tuple[str, ...]
    images: tuple[str, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    clips_per_second: Optional[float] = None
    bf16_difference: Optional[float] = None
    at_most: Mapping[str, int | list[int]] = field(default_factory=dict)
    at_least: Mapping[str, int] = field(default_factory=dict)


KNOWN = Path(__file__).parents[1] / "assets" / "checkpoints.json"
FOLDER_VARIABLE = "HTSAT_CHECKPOINTS"
DEFAULT_FOLDER = "~/.cache/hts-at"
LARGEST_OPTION = 2**20  # of a number in encoder_options
NO_SIZES = {"head", "frontend", "mean", "deviation", "pooling"}  # encoder_options that change no size of the network
UNNAMED = "htsat"  # encoder of checkpoints of this project that name none: there was no other

PRETRAINED_SED = "https://github.com/fschmid56/PretrainedSED"
HEAD_OPTIONS = {
    "head": Option(
        str,
        "auto",
        "what frames and clips are scored by; auto: as loss_type learns",
        ("auto", "strong", "weak", "both", "attention"),
    ),
}
TRANSFORMER_OPTIONS = {
    **HEAD_OPTIONS,
    "dim": Option(int, 768, "channels"),
    "depth": Option(int, 12, "blocks"),
    "heads": Option(int, 12, "attention heads"),
    "drop_layers": Option(int, 0, "blocks left out at the top"),
}

DONE_RIGHT = "https://github.com/lijuncheng16/AudioTaggingDoneRight"
FBANK, LOGMEL = (  # front-ends of ClipNetworks, by the one that is the default
    {
        "frontend": Option(
            str, default, "128 Kaldi bands every 10 ms, or 64 Slaney bands every 25 ms", ("fbank128", "logmel64")
        ),
        "mean": Option(float, None, "of the log-mel spectrogram; None: AudioSet's"),
        "deviation": Option(float, None, "of the log-mel spectrogram; None: AudioSet's"),
    }
    for default in ("fbank128", "logmel64")
)
POOLING = {"pooling": Option(str, "att", "of the steps' probabilities over time", ("max", "ave", "lin", "exp", "att"))}
CONVOLUTIONS = {
    "dim": Option(int, None, "channels; None: 16 a band"),
    "conv_layers": Option(int, 10, "convolutions"),
}
AROUND = {"dropout": Option(float, 0.0, "around the layers, in training")}
INSIDE = {"transformer_dropout": Option(float, 0.25, "in the transformer layers, in training")}
WIDTH = {"width": Option(float, 1.0, "factor of the channels")}
MOMENTUM = {
    "norm_momentum": Option(float, 0.01, "share of a step in BatchNorm's statistics; from scratch in few steps: 0.1")
}

ENCODERS: dict[str, Encoder] = {
    "htsat": Encoder(
        module="htsat",
        title="HTS-AT",
        paper="Chen et al., ICASSP 2022, arXiv 2202.00874",
        address="https://github.com/RetroCirce/HTS-Audio-Transformer",
        sample_rate=32000,
        frame_seconds=0.3125,
        parameters=31_325_143,
        licence="MIT",
        keys=(r"layers\.0\.blocks\.", r"audio_branch\.", r"(audio_model\.)?audio_encoder\.layers\."),
        published=("htsat-audioset", "htsat-esc50", "htsat-scv2"),
        clips_per_second=5.9,
        bf16_difference=2.3e-3,
        at_most={
            "htsat_dim": 96,
            "htsat_depth": [2, 2, 6, 2],
            "htsat_num_head": [4, 8, 16, 32],
            "htsat_spec_size": 256,
            "htsat_window_size": 8,
            "htsat_patch_size": 4,
            "mel_bins": 64,
            "window_size": 1024,
        },
        at_least={"htsat_stride": 4, "htsat_time_stride": 4},
    ),
    "atst-f": Encoder(
        module="atst_f",
        title="ATST-Frame",
        paper="Li, Shao, Li, TASLP 2024, arXiv 2306.04186",
        address=PRETRAINED_SED,
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=85_823_759,
        licence="weights CC BY 4.0",
        keys=(r"atst\.", r"(mask_embed|norm_frame\.)"),
        options={
            **TRANSFORMER_OPTIONS,
            "floor": Option(
                str, "clip", "80 dB below the loudest cell of the clip, or of the batch", ("clip", "batch")
            ),
        },
        published=("atst-f-strong", "atst-f-weak", "atst-f-ssl"),
        clips_per_second=2.2,
    ),
    "beats": Encoder(
        module="beats",
        title="BEATs",
        paper="Chen et al., ICML 2023, arXiv 2212.09058",
        address="https://github.com/microsoft/unilm/tree/master/beats",
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=90_717_055,
        licence="MIT",
        keys=(r"beats\.", r"patch_embedding\.", r"post_extract_proj\."),
        options=TRANSFORMER_OPTIONS,
        published=("beats-strong", "beats-weak", "beats-ssl"),
        clips_per_second=0.82,
    ),
    "fpasst": Encoder(
        module="fpasst",
        title="Frame-PaSST",
        paper="Koutini et al., Interspeech 2022, arXiv 2110.05069",
        address=PRETRAINED_SED,
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=88_826_895,
        licence="Apache 2.0",
        keys=(r"fpasst\.", r"(time|freq)_new_pos_embed"),
        images=(r"dist_token",),
        options=TRANSFORMER_OPTIONS,
        published=("fpasst-strong", "fpasst-weak", "fpasst-ssl"),
        clips_per_second=2.1,
    ),
    "m2d": Encoder(
        module="m2d",
        title="M2D",
        paper="Niizumi et al., TASLP 2024, arXiv 2404.06095",
        address="https://github.com/nttcslab/m2d",
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=87_517_199,
        licence="NTT's own",
        keys=(r"m2d\.", r"backbone\.(norm_stats|pos_embed|blocks\.)"),
        options=TRANSFORMER_OPTIONS,
        published=("m2d-strong", "m2d-weak", "m2d-ssl"),
        clips_per_second=1.7,
    ),
    "ast": Encoder(
        module="ast",
        title="AST",
        paper="Gong, Chung, Glass, Interspeech 2021, arXiv 2104.01778",
        address="https://github.com/YuanGongND/ast",
        sample_rate=16000,
        frame_seconds=None,
        parameters=86_594_063,
        licence="BSD 3-Clause",
        keys=(
            r"v\.(cls_token|pos_embed)",
            r"(audio_spectrogram_transformer\.)?embeddings\.distillation_token",
            r"dist_token",
        ),
        options={
            **FBANK,
            "frequency_stride": Option(int, 10, "of the 16 x 16 patches, in bands"),
            "time_stride": Option(int, 10, "of the 16 x 16 patches, in frames"),
            "dim": Option(int, 768, "channels"),
            "depth": Option(int, 12, "blocks"),
            "heads": Option(int, 12, "attention heads"),
        },
        published=("ast-audioset",),
        clips_per_second=0.34,
    ),
    "asit": Encoder(
        module="asit",
        title="ASiT",
        paper="Ahmed et al., TASLP 2024, arXiv 2211.13189",
        address=PRETRAINED_SED,
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=85_887_503,
        licence="not stated",
        keys=(r"asit\.", r"pos_embed"),
        options=TRANSFORMER_OPTIONS,
        published=("asit-strong", "asit-weak", "asit-ssl"),
        clips_per_second=1,
    ),
    "psla": Encoder(
        module="psla",
        title="PSLA",
        paper="Gong, Chung, Glass, TASLP 2021, arXiv 2102.01243",
        address="https://github.com/YuanGongND/psla",
        sample_rate=16000,
        frame_seconds=0.08,
        parameters=13_640_766,
        licence="not stated",
        keys=(r"effnet\.", r"_blocks\.0\._depthwise_conv\.", r"blocks\.0\.0\.se\.conv_reduce\."),
        options={
            **FBANK,
            "variant": Option(str, "b2", "of EfficientNet", tuple(f"b{number}" for number in range(8))),
            "heads": Option(int, 4, "of the attention pooling; 0: mean over time"),
            **WIDTH,
            **MOMENTUM,
        },
        clips_per_second=8.1,
    ),
    "resnet50": Encoder(
        module="resnet50",
        title="ResNet50",
        paper="Li et al., Interspeech 2022, arXiv 2203.13448",
        address=DONE_RIGHT,
        sample_rate=16000,
        frame_seconds=0.08,
        parameters=25_661_406,
        licence="BSD 3-Clause",
        keys=(r"layer4\.\d+\.conv3\.",),
        options={**FBANK, **WIDTH},
        clips_per_second=3.4,
    ),
    "mobilenetv2": Encoder(
        module="mobilenetv2",
        title="MobileNetV2",
        paper="Li et al., Interspeech 2022, arXiv 2203.13448",
        address=DONE_RIGHT,
        sample_rate=16000,
        frame_seconds=None,
        parameters=2_898_383,
        licence="BSD 3-Clause",
        keys=(r"(mobilenet\.)?features\.\d+\.conv\.",),
        options={**FBANK, **WIDTH},
        clips_per_second=16,
    ),
    "cnn14": Encoder(
        module="cnn14",
        title="PANNs Cnn14",
        paper="Kong et al., TASLP 2020, arXiv 1912.10211",
        address="https://github.com/qiuqiangkong/audioset_tagging_cnn",
        sample_rate=32000,
        frame_seconds=None,
        parameters=81_837_071,
        licence="MIT, weights CC BY 4.0",
        keys=(r"conv_block1\.",),
        options={
            "pooling": Option(
                str,
                "max_mean",
                "over time: max_mean of the features, or decision_max of scores every 320 ms, which are frame scores",
                ("max_mean", "decision_max"),
            ),
            **WIDTH,
        },
        published=("cnn14-audioset", "cnn14-max-audioset"),
        clips_per_second=1.9,
    ),
    "mn10": Encoder(  # before frame_mn: its files have keys of those, too
        module="mn10",
        title="EfficientAT mn10",
        paper="Schmid et al., ICASSP 2023, arXiv 2211.04772",
        address="https://github.com/fschmid56/EfficientAT",
        sample_rate=32000,
        frame_seconds=None,
        parameters=4_876_831,
        licence="MIT",
        keys=(r"mn\.features\.", r"classifier\.5\."),
        options={**WIDTH, **MOMENTUM},
        published=("mn10-audioset",),
        clips_per_second=22,
    ),
    "frame_mn06": Encoder(
        module="frame_mn",
        title="frame MobileNet 0.6",
        paper="Schmid et al., ICASSP 2025, arXiv 2409.09546",
        address=PRETRAINED_SED,
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=1_403_263,
        licence="MIT",
        keys=(r"frame_mn\.", r"features\.\d+\.block\."),
        options={**HEAD_OPTIONS, "width": Option(float, 0.6, "factor of the channels"), **MOMENTUM},
        published=("frame_mn06-strong",),
        clips_per_second=32,
    ),
    "frame_mn10": Encoder(
        module="frame_mn",
        title="frame MobileNet 1.0",
        paper="Schmid et al., ICASSP 2025, arXiv 2409.09546",
        address=PRETRAINED_SED,
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=3_478_111,
        licence="MIT",
        keys=(r"frame_mn\.", r"features\.\d+\.block\."),
        options={**HEAD_OPTIONS, **WIDTH, **MOMENTUM},
        published=("frame_mn10-strong",),
        clips_per_second=18,
    ),
    "tal": Encoder(
        module="tal",
        title="TAL",
        paper="Wang, Li, Metze, ICASSP 2019, arXiv 1810.09050",
        address=DONE_RIGHT,
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=25_761_918,
        licence="BSD 3-Clause",
        keys=(r"gru\.weight_ih_l0",),
        options={**FBANK, **POOLING, **CONVOLUTIONS, **AROUND},
        clips_per_second=1.6,
    ),
    "taltrans": Encoder(
        module="taltrans",
        title="TALtrans",
        paper="Li et al., Interspeech 2022, arXiv 2203.13448",
        address=DONE_RIGHT,
        sample_rate=16000,
        frame_seconds=0.04,
        parameters=32_061_566,
        licence="BSD 3-Clause",
        keys=(r"enc_layer\.",),
        options={
            **FBANK,
            **POOLING,
            **CONVOLUTIONS,
            "layers": Option(int, 2, "passes through the transformer layer"),
            "addpos": Option(str, "yes", "whether a code of time is added to the features", ("yes", "no")),
            **AROUND,
            **INSIDE,
        },
        clips_per_second=1.4,
    ),
    "transformer": Encoder(
        module="transformer",
        title="Transformer",
        paper="Li et al., Interspeech 2022, arXiv 2203.13448",
        address=DONE_RIGHT,
        sample_rate=16000,
        frame_seconds=0.1,
        parameters=17_948_702,
        licence="BSD 3-Clause",
        keys=(r"layer_stack\.",),
        options={
            **LOGMEL,
            **POOLING,
            "dim": Option(int, 1024, "channels"),
            "layers": Option(int, 2, "transformer layers"),
            **AROUND,
            **INSIDE,
        },
        clips_per_second=5.9,
    ),
    "fnet": Encoder(
        module="fnet",
        title="FNet",
        paper="Lee-Thorp et al., NAACL 2022, arXiv 2105.03824",
        address=DONE_RIGHT,
        sample_rate=16000,
        frame_seconds=0.01,
        parameters=13_500_958,
        licence="BSD 3-Clause",
        keys=(r"input\.hidden_mapping\.",),
        options={
            **FBANK,
            "dim": Option(int, 256, "channels"),
            "layers": Option(int, 50, "Fourier layers"),
            "dropout": Option(float, 0.1, "of the input and of each MLP, in training"),
        },
        clips_per_second=2.2,
    ),
    "linear": Encoder(
        module="linear",
        title="linear",
        paper="Li et al., Interspeech 2022, arXiv 2203.13448",
        address=DONE_RIGHT,
        sample_rate=16000,
        frame_seconds=0.025,
        parameters=194_590,
        licence="BSD 3-Clause",
        keys=(r"linear\.6\.",),
        options={
            **LOGMEL,
            **POOLING,
            "dim": Option(int, 128, "channels"),
            "dropout": Option(float, 0.1, "before each layer, in training"),
        },
        clips_per_second=58,
    ),
}


def encoder_module(name: str) -> ModuleType:
    """The file of an encoder, imported when it is needed. Raises KeyError for a name without a row.

    It has NETWORK, the class; build(settings), a network; build_frontend(settings), its log_mel alone; and
    rename(weights), which brings files of others to the names of the network.
    """
    return importlib.import_module(f"model.encoders.{ENCODERS[name].module}")


def within_published_size(settings: Config) -> bool:
    """Whether a network of these settings is at most as large as the encoder's published one (10 s, 527 classes)."""
    row = ENCODERS[settings.encoder]
    bounds = {**row.at_most, "clip_samples": 10 * row.sample_rate, "classes_num": 527}
    for name, most in bounds.items():
        value = getattr(settings, name)
        if isinstance(most, list):
            if len(value) > len(most) or any(a > b for a, b in zip(value, most, strict=False)):
                return False
        elif value > most:
            return False
    return (
        all(getattr(settings, name) >= least for name, least in row.at_least.items())
        and settings.encoder_options.keys() <= NO_SIZES
        and settings.sequence_head == "none"
    )


def read_options(name: str, given: Mapping[str, str]) -> dict[str, int | float | str | None]:
    """All options of an encoder, those of `given` in place of the defaults. Raises UserError for wrong ones."""
    known = ENCODERS[name].options
    values = {key: option.default for key, option in known.items()}
    for key, text in given.items():
        if key not in known:
            raise UserError(
                f"encoder_options: {name} has no option {key}; it has {', '.join(known) or 'none, but settings'}."
            )
        option = known[key]
        try:
            value = values[key] = option.kind(text)
            if not isinstance(value, str) and not abs(value) <= LARGEST_OPTION:
                raise ValueError
        except (ValueError, OverflowError):
            raise UserError(
                f"encoder_options: {key} = {text} is not allowed: give {option.kind.__name__}, up to {LARGEST_OPTION}."
            ) from None
        if option.choices and text not in option.choices:
            raise UserError(f"encoder_options: {key} = {text} is not allowed: give {' or '.join(option.choices)}.")
    return values


def find_checkpoint(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a path or of a known name (htsat-audioset, ...), and the settings that the name brings.

    Known names, those of assets/checkpoints.json, are looked up in the folder that the environment variable
    HTSAT_CHECKPOINTS names, or in ~/.cache/hts-at; where the file is not there, it is downloaded into it. Raises
    UserError, with what to download and where to put it, where that cannot be done, and for a misspelt name.
    """
    known = json.loads(KNOWN.read_text())["names"]
    if Path(path).is_file() or str(path) not in known:
        _check_spelling(path, known)
        return Path(path), {}
    entry = known[str(path)]
    folder = Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()
    found = next((folder / name for name in entry["files"] if (folder / name).is_file()), None)
    return found or _download(str(path), entry, folder), dict(entry["settings"])


def _download(name: str, entry: Mapping[str, Any], folder: Path) -> Path:
    """The file of a known name, fetched into the folder. Raises UserError with what to do by hand."""
    file, missing = folder / entry["files"][0], f"{name} ({entry['about']}) is not in {folder}."
    by_hand = (
        f"Put {' or '.join(entry['files'])} there by hand ({entry['source']}; licence {entry['licence']}), or set the "
        f"environment variable {FOLDER_VARIABLE} to the folder that has it."
    )
    if "address" not in entry:
        raise UserError(f"{missing} {by_hand}")
    try:
        download(entry["address"], file, sha256=entry.get("sha256"))
    except UserError as error:
        raise UserError(f"{missing} {error} {by_hand}") from error
    print(f"{name}: {file}, licence {entry['licence']}", file=sys.stderr)
    return file


def _check_spelling(path: str | Path, known: Iterable[str]) -> None:
    """Raise UserError for what is neither there nor looks like a path, where a known name is close to it."""
    close = [] if Path(path).exists() or len(Path(path).parts) > 1 else close_names(str(path), known)
    if close:
        raise UserError(f"There is no file {path}, and no known name {path}: did you mean {' or '.join(close)}?")


def known_names() -> list[str]:
    """The names that find_checkpoint knows."""
    return list(json.loads(KNOWN.read_text())["names"])


def encoder_titles(*names: str) -> str:
    """What encoders are called in titles, each once: HTS-AT, or HTS-AT and Audio Spectrogram Transformer."""
    return " and ".join(dict.fromkeys(ENCODERS[name].title for name in names))
