"""config.py + flags -> one frozen, validated Config.

config.py is executed with the given values in place of its own, so whatever it computes from a setting follows. Its
own values count least; then those of the prepared data, of a checkpoint, and of the flags.
`python settings.py` writes config_fields.pyi, from which type checkers know the fields of Config.
"""

import ast
import difflib
import json
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Annotated, Any, Optional, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

if TYPE_CHECKING:
    from config_fields import ConfigFields
else:
    ConfigFields = BaseModel

CONFIG_PATH = Path(__file__).with_name("config.py")
FIELDS_PATH = CONFIG_PATH.with_name("config_fields.pyi")
RECIPES = CONFIG_PATH.with_name("recipes")
SECTION_LINE = re.compile(r"# --- (.+?) -+")

# Sections of config.py. A checkpoint's weights determine the first ones; the others say what they were trained on.
NETWORK_SECTIONS = ("encoder", "front-end", "sizes", "network")
TRAINED_SECTIONS = (*NETWORK_SECTIONS, "data set", "split", "clips")
# Of other commands than train.
OTHER_SECTIONS = ("test", "localization", "event detection", "predict", "esm_test", "weight_average")
# No part of an experiment: where a run is, how it is watched and how it is tested. What a run starts from is a part.
NOT_THE_EXPERIMENT = ("run", "machine", *OTHER_SECTIONS)
# Errors of pydantic in words.
REASONS = {"string_pattern_mismatch": "it is the name of one file or folder, without / and \\, and not . or .."}
Facts = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # values of all settings -> those that prepared data determine
WITH_COMMAS = """Names with commas are given as a JSON list: '["Speech, male", "Dog"]'."""
FINITE = ConfigDict(allow_inf_nan=False)  # of every float, in lists too
FRAME_LOSSES = ("frame_bce", "weak_strong_bce")  # those that learn from event times
SHORT = reprlib.Repr()  # of values in messages: one from a file may be of any size and depth
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 200


class UserError(ValueError):
    """A mistake in what a user gave. The message says what was given, what is allowed and what to do."""


class Config(ConfigFields):
    """All settings of a run, checked and frozen. The fields are those of config.py, in its order."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __reduce__(self) -> tuple[Any, ...]:  # its class is made from config.py: copies and processes make it again
        return _rebuild, (self.model_dump(),)

    @property
    def run_folder(self) -> Path:
        """Folder of this run's checkpoints, logs and records."""
        return Path(self.workspace) / "runs" / self.exp_name


@dataclass(frozen=True)
class Setting:
    """One assignment of config.py. section: the comment line above it; encoder: the one that alone has it, or none."""

    name: str
    type: Any
    comment: str
    section: str

    @property
    def encoder(self) -> str:
        return self.section.partition(", ")[2]

    @property
    def is_list(self) -> bool:
        kind = get_args(self.type)[0] if get_origin(self.type) is Annotated else self.type
        return get_origin(kind) is list

    @property
    def is_optional(self) -> bool:
        return get_origin(self.type) is Union and type(None) in get_args(self.type)

    def check(self, value: Any) -> Any:
        """`value` as this setting's type. Raises UserError that says what was given and what is allowed."""
        value = self.parsed(value)
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            reasons = "; ".join(REASONS.get(e["type"], e["msg"]) for e in error.errors())
            raise UserError(f"{self.name} = {SHORT.repr(value)} is not allowed: {reasons}. ({self.comment})") from None

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.type, config=FINITE)

    def parsed(self, text: Any) -> Any:
        """Text of the command line: None for an optional setting, a list as in `split_list`, a dict as a=1,b=2.

        Other values stay as they are.
        """
        if not isinstance(text, str):
            return text
        if self.is_optional and text in ("None", "none", ""):
            return None
        if get_origin(self.type) is dict:
            if text.startswith("{") and '"' in text:
                return _parse_json(text, dict, '{"a": "1", "b": "2"}')
            pairs = [pair.partition("=") for pair in text.strip("{} ").split(",") if pair.strip()]
            return {name.strip(): value.strip() for name, _, value in pairs}
        return split_list(text) if self.is_list else text


def split_list(text: str) -> list[str]:
    """Several values in one text: 1,2,3 or [1, 2, 3], or a JSON list, in which a value may hold commas.

    Raises UserError for a list of quoted values that is no JSON.
    """
    text = text.strip()
    if text.startswith("[") and '"' in text:
        found = _parse_json(text, list, '["Speech, male", "Dog"]')
        if any(isinstance(value, (list, dict)) or value is None for value in found):
            raise UserError(f"{text} holds more than texts and numbers. {WITH_COMMAS}")
        return [value if isinstance(value, str) else json.dumps(value) for value in found]
    return [part.strip().strip("'\"") for part in text.strip("[] ").split(",") if part.strip()]


def _parse_json(text: str, kind: type, example: str) -> Any:
    """A JSON list or object. Raises UserError for other text."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{text} is no JSON: {error}. Give it as {example}.") from None
    if not isinstance(found, kind):
        raise UserError(f"{text} is no JSON {kind.__name__}. Give it as {example}.")
    return found


@cache
def _source() -> str:
    return CONFIG_PATH.read_text()


def _assignments(tree: ast.Module) -> dict[str, ast.AnnAssign | ast.Assign]:
    """What config.py assigns, by name: settings, which are annotated, and what they are computed or made from."""
    nodes = [node for node in tree.body if isinstance(node, (ast.AnnAssign, ast.Assign))]
    return {ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]): node for node in nodes}


def _execute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Run config.py with the values of `given` in place of its own; returns its namespace."""
    namespace: dict[str, Any] = {"_given": dict(given), "__name__": "config", "__file__": str(CONFIG_PATH)}
    exec(_code(frozenset(given)), namespace)
    return namespace


@cache
def _code(given: frozenset[str]) -> CodeType:
    """config.py, which takes the settings of these names from _given."""
    tree = ast.parse(_source())
    for name, node in _assignments(tree).items():
        if name in given:
            node.value = ast.Subscript(ast.Name("_given", ast.Load()), ast.Constant(name), ast.Load())
    return compile(ast.fix_missing_locations(tree), str(CONFIG_PATH), "exec")


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting of config.py by name, in order."""
    lines, types, found = _source().splitlines(), _execute({})["__annotations__"], {}
    nodes = _assignments(ast.parse(_source()))
    for name, node in ((name, nodes[name]) for name in types):
        comment = "\n".join(lines[node.lineno - 1 : node.end_lineno]).rpartition("  # ")[2].splitlines()[0].strip()
        titles = [match[1] for match in map(SECTION_LINE.fullmatch, lines[: node.lineno]) if match]
        found[name] = Setting(name, types[name], comment, titles[-1])
    return found


def section(*titles: str) -> tuple[str, ...]:
    """Names of the settings below these section lines of config.py, in its order.

    `network` stands for `network, htsat` too: what follows the comma is the encoder that alone has them.
    """
    sections = {name: setting.section.partition(", ")[0] for name, setting in all_settings().items()}
    unknown = set(titles) - set(sections.values())
    assert not unknown, f"config.py has no section {unknown}"
    return tuple(name for name in sections if sections[name] in titles)


def fields_stub() -> str:
    """The text of config_fields.pyi: config.py's imports and types, and a class with one annotation a setting."""
    tree = ast.parse(_source())
    nodes = _assignments(tree)
    lines = ["# Written by `python settings.py`, from config.py.", "from pydantic import BaseModel"]
    lines += [ast.unparse(node) for node in tree.body if isinstance(node, ast.ImportFrom)]
    lines += [ast.unparse(node) for name, node in nodes.items() if name[0].isupper()]
    lines += ["class ConfigFields(BaseModel):"]
    lines += [f"    {name}: {ast.unparse(n.annotation)}" for name, n in nodes.items() if isinstance(n, ast.AnnAssign)]
    return "\n".join(lines) + "\n"


@cache
def _config_class() -> type[Config]:
    fields: dict[str, Any] = {name: (setting.type, ...) for name, setting in all_settings().items()}
    return create_model("Config", __base__=Config, **fields)


def _checked(values: Mapping[str, Any]) -> Config:
    """All settings as one Config. Raises UserError, as Setting.check does, for the first value that is not allowed."""
    known = all_settings()
    try:
        return _config_class()(**{name: setting.parsed(values[name]) for name, setting in known.items()})
    except ValidationError:  # one by one, for a message that says which: together they are faster
        return _config_class()(**{name: setting.check(values[name]) for name, setting in known.items()})


def _rebuild(values: dict[str, Any]) -> Config:
    return _config_class()(**values)


def _edited_in_session(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook changed by `import config; config.max_epoch = 3`, compared with the file itself."""
    module = sys.modules.get("config")
    if module is None:
        return {}
    known = all_settings()
    stray = [n for n, v in vars(module).items() if n not in values and not n.startswith("_") and _is_plain(v)]
    if stray:
        raise UserError(unknown_setting(stray[0]))
    return {name: getattr(module, name) for name in known if getattr(module, name) != values[name]}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))


def close_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Those of `known` that a misspelt name may stand for, the closest first."""
    return difflib.get_close_matches(name.replace("-", "_"), list(known), n=count)


def unknown_setting(name: str) -> str:
    """The message for a setting that does not exist, with close names."""
    close = close_names(name, all_settings())
    hint = f"Did you mean {' or '.join(close)}?" if close else "config.py lists the settings."
    return f"There is no setting {name!r}. {hint}"


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of recipes/<name>.py: a docstring, then lines `setting = value`, read as data and never executed.

    Raises UserError where there is no such recipe, and for any other line.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.py"))
    if name not in known:
        raise UserError(f"There is no recipe {name!r}. The recipes are {', '.join(known)}.")
    path, found = RECIPES / f"{name}.py", {}
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and len(node.targets) == 1:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                raise ValueError(f"line {node.lineno}")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no recipe: it may hold lines as max_epoch = 30 alone. ({error})") from None
    return found


def check_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, and what its recipe adds, each value as its setting's type.

    Raises UserError for unknown names and wrong values.
    """
    known, recipe = all_settings(), all_settings()["recipe"].check(given.get("recipe"))
    settings = read_recipe(recipe) if recipe else {}
    for name in (*settings, *given):
        if name not in known:
            raise UserError(unknown_setting(name))
    values = {name: known[name].check(value) for name, value in settings.items()}
    for name, value in given.items():
        wanted = known[name].check(value)
        values[name] = {**values.get(name, {}), **wanted} if isinstance(wanted, dict) else wanted
    return values


def fewest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest of these values from which config.py computes the others: the flags that would give them."""
    kept: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    while True:
        if kept.get("recipe") and not recipe:
            with suppress(UserError):  # the run is over, and the recipe may be gone
                recipe = read_recipe(kept["recipe"])
        computed = _execute({**recipe, **kept})
        others = (name for name in all_settings() if name in values and name not in kept)
        name = next((name for name in others if computed[name] != values[name]), None)
        if name is None:
            return kept
        kept[name] = values[name]


def place_flags(settings: Config, *more: str) -> str:
    """For a command that is printed: the flags, each after a space, that say where its data and runs are.

    more: further settings. Empty where config.py says all of them.
    """
    values = fewest(settings.model_dump())
    names = [name for name in ("workspace", "dataset_path", *more) if name in values]
    return "".join(f" --{name} {shlex.quote(str(values[name]))}" for name in names)


def requested(name: str, given: Mapping[str, Any]) -> Any:
    """One setting, given or from config.py, whatever a checkpoint determines."""
    return getattr(resolve({name: given[name]} if name in given else {}), name)


def resolve(
    given: Optional[Mapping[str, Any]] = None,
    *,
    checkpoint: Optional[Mapping[str, Any]] = None,
    facts: Optional[Facts] = None,
    fine_tuning: bool = False,
) -> Config:
    """Settings of a run: config.py, then what the prepared data say, then a checkpoint, then what is given.

    given: {name: value}, as from flags, with those of its recipe. checkpoint: the settings saved in one; those of
    TRAINED_SECTIONS count, and exp_name, so that what is made of a checkpoint goes into the folder of its run. facts:
    what the data say, by all values without them (data/facts.py). fine_tuning: other sizes than the checkpoint's may be
    given. Raises UserError for unknown names, wrong values, values that do not fit together, and flags that contradict
    the checkpoint or the data. Of a dictionary (encoder_options) each key counts by itself.
    """
    given = check_values(given or {})
    session = check_values(_edited_in_session(_execute({})))
    trained = _trained(checkpoint or {}, given, {**session, **given}, fine_tuning)
    given = {k: {**trained.get(k, {}), **v} if isinstance(v, dict) else v for k, v in given.items()}
    values = _execute({**session, **trained, **given})
    if facts is not None:
        of_data = facts(values)
        _check_given({**session, **given}, of_data, f"the prepared data in {values['dataset_path']}, which have")
        values = _execute({**session, **of_data, **trained, **given})
    config = _checked(values)
    _check_encoder({**session, **given}, config.encoder)
    _check_together(config)
    if "loss_type" not in trained:  # else a checkpoint is evaluated, where settings of training have no effect
        _check_frame_training(config)
    return config


def _trained(
    checkpoint: Mapping[str, Any], given: Mapping[str, Any], chosen: Mapping[str, Any], fine_tuning: bool
) -> dict[str, Any]:
    """The settings that a checkpoint determines; for another data set than its own, not its split.

    chosen: what is given or edited: where it says nothing of the place of the data, they are where the training found
    them, if they still are. Raises UserError where `given` contradicts its network or its split; for fine-tuning,
    sizes may be others.
    """
    names = {*section(*TRAINED_SECTIONS), "exp_name"}
    if not chosen.keys() & {"workspace", "dataset_path", "dataset_type"}:
        names |= {"dataset_path"} if os.path.isdir(str(checkpoint.get("dataset_path", ""))) else set()
    try:
        trained = {name: all_settings()[name].check(value) for name, value in checkpoint.items() if name in names}
    except UserError as error:
        raise UserError(f"The checkpoint has settings that are not allowed: {error}") from None
    if trained.get("dataset_type") != given.get("dataset_type", trained.get("dataset_type")):
        trained = {name: value for name, value in trained.items() if name not in section("split")}
    sizes = (*section("sizes"), "encoder_options") if fine_tuning else ()
    fixed = {name: trained[name] for name in section(*NETWORK_SECTIONS, "split") if name in trained.keys() - sizes}
    _check_given(given, fixed, "the checkpoint, which was trained with")
    return trained


def _check_given(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a given value is not the known one; of dictionaries, that of a key that both have."""
    for name, value in known.items():
        if name not in given:
            continue
        wanted = {**value, **given[name]} if isinstance(value, dict) else given[name]
        if wanted != ({**given[name], **value} if isinstance(value, dict) else value):
            raise UserError(
                f"{name} = {given[name]!r} contradicts {where} {name} = {value!r}. Leave {name} out: it is known."
            )


def _check_encoder(chosen: Mapping[str, Any], encoder: str) -> None:
    """Raise UserError for settings that another encoder has."""
    owners = {name: all_settings()[name].encoder for name in chosen}
    wrong = [name for name, owner in owners.items() if owner not in ("", encoder)]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: only encoder = {owners[wrong[0]]} has this, and encoder = {encoder}. Leave it out; "
            f"the sizes of {encoder} are its encoder_options."
        )


def _check_together(config: Config) -> None:
    """Raise UserError for settings that do not fit together."""
    if sorted(config.lr_scheduler_epoch) != config.lr_scheduler_epoch:
        raise UserError(f"lr_scheduler_epoch = {config.lr_scheduler_epoch} must rise.")
    if config.lr_milestones and config.lr_schedule != "milestones":
        raise UserError(f"lr_milestones = {config.lr_milestones} needs lr_schedule = milestones.")
    if config.oversample_weak and not (config.dataset_type == "audioset" and config.balanced_data):
        raise UserError(
            f"oversample_weak = {config.oversample_weak:g} is for AudioSet's classes: set dataset_type = audioset and "
            f"balanced_data = True, or leave it out."
        )
    if config.dataset_type == "audioset" and config.protocol == "held_out":
        raise UserError("AudioSet has no validation set: protocol must be paper.")
    if config.enable_label_enhance and config.class_map_path is None:
        raise UserError("enable_label_enhance needs class_map_path, AudioSet's ontology.json.")
    if sorted(config.token_label_range) != config.token_label_range:
        raise UserError(f"token_label_range = {config.token_label_range} must rise, as in [0.2, 0.6].")
    if config.freeze_backbone and not (config.resume_checkpoint or config.swin_pretrain_path):
        raise UserError(
            "freeze_backbone and linear_probe train a classifier on a pretrained network: give "
            "--resume_checkpoint or --swin_pretrain_path."
        )
    if config.loss_type == "clip_ce" and config.task == "multilabel":
        raise UserError(
            "loss_type = clip_ce expects one class a clip, but task = multilabel allows several: use clip_bce or "
            "asl_loss, or set task = single_label."
        )


def _check_frame_training(config: Config) -> None:
    """Raise UserError for settings of a training on event times that have no effect, or do not fit together."""
    frames = config.loss_type in FRAME_LOSSES
    asked = [name for name in section("semi-supervised") if getattr(config, name)]
    asked += ["random_crops"] if config.random_crops else []
    asked += [f"balanced_by = {config.balanced_by}"] if config.balanced_by != "clips" else []
    if asked and not frames:
        raise UserError(f"{', '.join(asked)}: only loss_type = {' or '.join(FRAME_LOSSES)} has a use for this.")
    if config.balanced_by != "clips" and not config.balanced_data:
        raise UserError(
            f"balanced_by = {config.balanced_by} says how balanced_data draws the classes: set --balanced_data True, "
            f"too."
        )
    if config.balanced_by == "clips" and not config.balanced_replacement:
        raise UserError("balanced_replacement = False needs balanced_by = active_frames, or frames.")
    if config.random_crops and config.teacher_path:
        raise UserError("random_crops changes the clips that teacher_path has logits for: leave one of them out.")
    if config.mixup_waveforms and not config.mixup_alpha:
        raise UserError("mixup_waveforms has no effect with mixup_alpha = 0: set mixup_alpha, as 0.5.")
    if frames and config.task == "single_label":
        raise UserError(f"loss_type = {config.loss_type} learns several classes a clip: set task = multilabel.")
    if frames and (config.enable_token_label or config.enable_label_enhance or config.enable_repeat_mode):
        raise UserError(
            f"enable_token_label, enable_label_enhance and enable_repeat_mode do not go with loss_type = "
            f"{config.loss_type}."
        )
    shares = config.labelling_shares
    if shares and (len(shares) != 3 or abs(sum(shares) - 1) > 1e-6):
        raise UserError(
            f"labelling_shares = {shares} is not allowed: give the shares of strong, weak and unlabelled clips, as in "
            f"0.25,0.25,0.5."
        )
    if shares and config.balanced_data:
        raise UserError("labelling_shares and balanced_data both say which clips a batch has: set one of them.")


if __name__ == "__main__":
    FIELDS_PATH.write_text(fields_stub())
