"""config.py + flags -> one frozen, validated Config.

config.py is executed with the given values in place of its own, so whatever it computes from a setting follows.
"""

import ast
import difflib
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Optional, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

CONFIG_PATH = Path(__file__).with_name("config.py")


# What a checkpoint decides: the network, what it hears, and what it was trained on. `test` and `predict` take these
# from the checkpoint; the rest (folders, batch size, device, ...) comes from config.py and the flags.
FRONTEND_SETTINGS = ("sample_rate", "window_size", "hop_size", "mel_bins", "fmin", "fmax")
NETWORK_SETTINGS = (
    *FRONTEND_SETTINGS, "classes_num", "loss_type", "enable_tscam",
    "enable_repeat_mode", "htsat_attn_heatmap", "htsat_spec_size", "htsat_patch_size", "htsat_stride",
    "htsat_window_size", "htsat_dim", "htsat_depth", "htsat_num_head", "htsat_drop_path", "htsat_time_stride",
    "htsat_readout_stage", "sequence_head", "sequence_layers", "sequence_dim",
)  # fmt: skip
TRAINED_SETTINGS = (
    *NETWORK_SETTINGS,
    "dataset_type",
    "task",
    "short_clips",
    "exp_name",
    "esc_fold",
    "protocol",
    "clip_samples",
)

FRAME_LOSSES = ("frame_bce", "weak_strong_bce")  # those that learn from event times
ONLY_FRAMES = (  # what no other loss has a use for
    "teacher_path", "mean_teacher", "labelling_shares", "gain_range", "frequency_warp", "filter_augment", "mix_style",
    "mixup_waveforms",
)  # fmt: skip

POSITIVE = (
    "batch_size", "learning_rate", "max_epoch", "sample_rate", "clip_samples", "window_size", "hop_size", "mel_bins",
    "fmax", "classes_num", "htsat_spec_size", "htsat_patch_size", "htsat_stride", "htsat_window_size", "htsat_dim",
    "shift_max", "crop_size", "esc_fold", "save_top_k", "layer_decay", "average_last_epochs",
    "accumulate_batches", "htsat_time_stride", "htsat_readout_stage", "sequence_layers", "sequence_dim",
    "mean_teacher_rampup",
)  # fmt: skip
NOT_NEGATIVE = (
    "weight_decay", "gradient_clip", "mixup_alpha", "devices", "num_workers", "fmin", "htsat_drop_path", "random_seed",
    "checkpoint_every_steps", "wa_top_k", "weak_weight", "gain_range", "frequency_warp", "filter_augment", "mix_style",
    "mean_teacher", "distillation_weight",
)  # fmt: skip


class UserError(ValueError):
    """A mistake in what a user gave. The message says what was given, what is allowed and what to do."""


class Config(BaseModel):
    """All settings of a run, checked and frozen. The fields are those of config.py, in its order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __getattr__(self, name: str) -> Any:  # the fields exist at run time only: tell type checkers so
        return super().__getattr__(name)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:  # its class is made from config.py: copies and processes make it again
        return _rebuild, (self.model_dump(),)

    @property
    def run_folder(self) -> Path:
        """Folder of this run's checkpoints, logs and records."""
        return Path(self.workspace) / "runs" / self.exp_name


@dataclass(frozen=True)
class Setting:
    """One line of config.py."""

    name: str
    type: Any
    comment: str

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is list

    @property
    def is_optional(self) -> bool:
        return get_origin(self.type) is Union and type(None) in get_args(self.type)

    def check(self, value: Any) -> Any:
        """`value` as this setting's type. Raises UserError that says what was given and what is allowed."""
        if isinstance(value, str):
            value = self._parse(value)
        try:
            return TypeAdapter(self.type).validate_python(value)
        except ValidationError as error:
            reasons = "; ".join(e["msg"] for e in error.errors())
            raise UserError(f"{self.name} = {value!r} is not allowed: {reasons}. ({self.comment})") from None

    def _parse(self, text: str) -> Any:
        """Text of the command line: None for an optional setting, a list as 1,2,3 or [1, 2, 3]."""
        if self.is_optional and text in ("None", "none", ""):
            return None
        if not self.is_list:
            return text
        return [part.strip().strip("'\"") for part in text.strip("[] ").split(",") if part.strip()]


@cache
def _source() -> tuple[str, dict[str, str]]:
    """The text of config.py, and the comment of each setting in it."""
    text = CONFIG_PATH.read_text()
    lines = text.splitlines()
    comments = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            statement = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            comments[node.target.id] = statement.rpartition("  # ")[2].splitlines()[0].strip()
    return text, comments


def _execute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Run config.py with the values of `given` in place of its own; returns its namespace."""
    tree = ast.parse(_source()[0])
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in given:
            node.value = ast.Subscript(ast.Name("_given", ast.Load()), ast.Constant(node.target.id), ast.Load())
    namespace: dict[str, Any] = {"_given": dict(given), "__name__": "config", "__file__": str(CONFIG_PATH)}
    exec(compile(ast.fix_missing_locations(tree), str(CONFIG_PATH), "exec"), namespace)
    return namespace


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting of config.py by name, in order."""
    annotations = _execute({})["__annotations__"]
    comments = _source()[1]
    return {name: Setting(name, kind, comments[name]) for name, kind in annotations.items()}


@cache
def _config_class() -> type[Config]:
    fields: dict[str, Any] = {name: (setting.type, ...) for name, setting in all_settings().items()}
    return create_model("Config", __base__=Config, **fields)


def _rebuild(values: dict[str, Any]) -> Config:
    return _config_class()(**values)


def _edited_in_session(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook changed by `import config; config.max_epoch = 3`, compared with the file itself."""
    module = sys.modules.get("config")
    if module is None:
        return {}
    known = all_settings()
    stray = [n for n, v in vars(module).items() if n not in known and not n.startswith("_") and _is_plain(v)]
    if stray:
        raise UserError(unknown_setting(stray[0]))
    return {name: getattr(module, name) for name in known if getattr(module, name) != values[name]}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))


def unknown_setting(name: str) -> str:
    """The message for a setting that does not exist: close names first, then all of them."""
    close = difflib.get_close_matches(name, all_settings(), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"There is no setting {name!r}.{hint} The settings are: {', '.join(all_settings())}."


def check_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with each value as its setting's type. Raises UserError for unknown names and wrong values."""
    known = all_settings()
    for name in given:
        if name not in known:
            raise UserError(unknown_setting(name))
    return {name: known[name].check(value) for name, value in given.items()}


def requested(name: str, given: Mapping[str, Any]) -> Any:
    """One setting, given or from config.py, before a checkpoint has had its say about the others."""
    return getattr(resolve({name: given[name]} if name in given else {}), name)


def resolve(given: Optional[Mapping[str, Any]] = None, *, checkpoint: Optional[Mapping[str, Any]] = None) -> Config:
    """Settings of a run: config.py, then what a checkpoint decides, then what is given.

    given: {name: value}, as from flags. checkpoint: the settings saved in a checkpoint; those in TRAINED_SETTINGS
    count. Raises UserError for unknown names, wrong values and values that do not fit together.
    """
    known = all_settings()
    given = check_values(given or {})
    session = _edited_in_session(_execute({}))
    session = {name: known[name].check(value) for name, value in session.items()}
    trained = {name: known[name].check(v) for name, v in (checkpoint or {}).items() if name in TRAINED_SETTINGS}
    for name in NETWORK_SETTINGS:
        if name in trained and name in given and given[name] != trained[name]:
            raise UserError(
                f"{name} = {given[name]!r} contradicts the checkpoint, whose network has {name} = {trained[name]!r}. "
                f"Leave --{name} out: the checkpoint brings its own."
            )
    if trained.get("dataset_type") != given.get("dataset_type", trained.get("dataset_type")):
        for name in ("esc_fold", "protocol"):  # they speak of the clips of the other data set
            trained.pop(name, None)
    else:
        for name in ("esc_fold", "protocol"):
            if name in trained and name in given and given[name] != trained[name]:
                raise UserError(
                    f"{name} = {given[name]!r} contradicts the checkpoint, which was trained with {name} = "
                    f"{trained[name]!r}: the clips to test would be among those it was trained or chosen on."
                )
    values = _execute({**session, **trained, **given})
    config = _config_class()(**{name: known[name].check(values[name]) for name in known})
    _check_together(config)
    if "loss_type" not in trained:  # else it is a checkpoint that is used: what config.py says of training is idle
        _check_frame_training(config)
    return config


def _check_together(config: Config) -> None:
    """What no single setting shows. Raises UserError, or warns where a value is legal but odd."""
    values = config.model_dump()
    for name in POSITIVE:
        if values[name] is not None and values[name] <= 0:
            raise UserError(f"{name} = {values[name]} is not allowed: it must be greater than 0.")
    for name in NOT_NEGATIVE:
        if values[name] < 0:
            raise UserError(f"{name} = {values[name]} is not allowed: it must be 0 or greater.")
    if config.fmin >= config.fmax:
        raise UserError(f"fmin = {config.fmin} Hz must lie below fmax = {config.fmax} Hz.")
    if config.fmax > config.sample_rate / 2:
        warnings.warn(
            f"fmax = {config.fmax} Hz lies above half the sample rate ({config.sample_rate / 2} Hz): the mel bands "
            f"up there stay empty.",
            stacklevel=3,
        )
    if len(config.lr_rate) != 3 or len(config.lr_scheduler_epoch) != 3:
        raise UserError("lr_rate and lr_scheduler_epoch each need three values, as in config.py.")
    if sorted(config.lr_scheduler_epoch) != config.lr_scheduler_epoch:
        raise UserError(f"lr_scheduler_epoch = {config.lr_scheduler_epoch} must rise.")
    if config.htsat_drop_path >= 1:
        raise UserError(f"htsat_drop_path = {config.htsat_drop_path} must be below 1: nothing would be left.")
    frames, most = config.clip_samples // config.hop_size + 1, config.htsat_spec_size**2 // config.mel_bins
    if frames > most:
        raise UserError(
            f"clip_samples = {config.clip_samples} makes {frames} frames, the network takes {most}: lower clip_samples "
            f"(longer recordings are cut into windows) or raise hop_size."
        )
    if config.dataset_type == "audioset" and config.protocol == "held_out":
        raise UserError("AudioSet has no validation clips to choose on: protocol must be paper.")
    if config.enable_label_enhance and config.class_map_path is None:
        raise UserError("enable_label_enhance needs class_map_path, AudioSet's ontology.json.")
    shares = config.token_label_range
    if len(shares) != 2 or not 0 <= shares[0] <= shares[1] <= 1:
        raise UserError(f"token_label_range = {shares} is not allowed: give two shares of a clip, as in [0.2, 0.6].")
    if config.freeze_backbone and not (config.resume_checkpoint or config.swin_pretrain_path):
        raise UserError(
            "freeze_backbone and linear_probe train a classifier on a network that has learned already: give "
            "--resume_checkpoint or --swin_pretrain_path."
        )
    if config.layer_decay > 1 or not 0 <= config.ema_decay < 1:
        raise UserError(
            f"layer_decay = {config.layer_decay} may be at most 1, and ema_decay = {config.ema_decay} must lie below 1."
        )
    if not 0 <= config.window_overlap < 1:
        raise UserError(f"window_overlap = {config.window_overlap} is not allowed: it must be 0 or more, and below 1.")
    if not config.tta_shifts:
        raise UserError("tta_shifts is empty: give [0] for no averaging over shifts.")
    if config.loss_type == "clip_ce" and config.task == "multilabel":
        raise UserError(
            "loss_type = clip_ce expects one class a clip, but task = multilabel allows several: use clip_bce or "
            "asl_loss, or set task = single_label."
        )


def _check_frame_training(config: Config) -> None:
    """Settings that only a training on event times has a use for. Raises UserError where they cannot be."""
    frames = config.loss_type in FRAME_LOSSES
    asked = [name for name in ONLY_FRAMES if getattr(config, name)]
    asked += ["balanced_by = frames"] if config.balanced_by == "frames" else []
    if asked and not frames:
        raise UserError(f"{', '.join(asked)}: only loss_type = {' or '.join(FRAME_LOSSES)} has a use for this.")
    if config.balanced_by == "frames" and not config.balanced_data:
        raise UserError("balanced_by = frames says how balanced_data draws the classes: set --balanced_data True, too.")
    if config.mixup_waveforms and not config.mixup_alpha:
        raise UserError("mixup_waveforms has no effect with mixup_alpha = 0: set mixup_alpha, as 0.5.")
    if frames and config.task == "single_label":
        raise UserError(f"loss_type = {config.loss_type} learns several classes a clip: set task = multilabel.")
    if frames and (config.enable_token_label or config.enable_label_enhance or config.enable_repeat_mode):
        raise UserError(
            f"enable_token_label, enable_label_enhance and enable_repeat_mode do not go with loss_type = "
            f"{config.loss_type}."
        )
    if config.distillation_weight > 1 or config.mix_style > 1 or config.frequency_warp >= 1:
        raise UserError("distillation_weight and mix_style may be at most 1, and frequency_warp must lie below 1.")
    if not 0 <= config.mean_teacher_decay < 1:
        raise UserError(f"mean_teacher_decay = {config.mean_teacher_decay} is not allowed: it must be below 1.")
    shares = config.labelling_shares
    if shares and (len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6):
        raise UserError(
            f"labelling_shares = {shares} is not allowed: give the shares of strong, weak and unlabelled clips, as in "
            f"0.25,0.25,0.5."
        )
    if shares and config.balanced_data:
        raise UserError("labelling_shares and balanced_data both say which clips a batch has: set one of them.")
