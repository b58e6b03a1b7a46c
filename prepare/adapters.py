"""The table of adapters: dataset_type -> the file of prepare/ that makes its clip store.

An adapter has these parts in this order: NAME (its dataset_type), SOURCE (publication, or where the sound comes from),
LICENCE, TASK, FLAGS (its flags on the command line) and `prepare(settings, **flags) -> PrepareReport`, which writes
into settings.dataset_path. A parameter `task` is the setting, where the user gives it. A flag without a default in the
signature of `prepare` is required. To add a data set, add its file here and its name to dataset_type in config.py.
"""

import ast
import importlib
import inspect
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from settings import UserError

Flags = dict[str, dict[str, Any]]  # flag without its dashes: argparse's type, metavar and help

ADAPTERS = {
    "demo": "demo",
    "audioset": "audioset",
    "audioset-strong": "audioset_strong",
    "esc-50": "esc50",
    "scv2": "scv2",
    "desed": "desed",
    "dcase2016-task2": "dcase2016",
    "folder": "folder",
    "soundscapes": "soundscapes",
}


def adapter_path(dataset_type: str) -> Path:
    """The file of an adapter."""
    return Path(__file__).with_name(f"{ADAPTERS[dataset_type]}.py")


def load_adapter(dataset_type: str) -> ModuleType:
    """The adapter of a data set."""
    return importlib.import_module(f"prepare.{ADAPTERS[dataset_type]}")


def check_flags(adapter: ModuleType, given: Iterable[str]) -> None:
    """Raise UserError where a flag is given that the adapter does not have, or a required one is lacking."""
    for name in given:
        if name not in adapter.FLAGS:
            others = [other for other in ADAPTERS if name in read_flags(other)]
            raise UserError(
                f"prepare --dataset_type {adapter.NAME} has no use for --{name}, which is for {', '.join(others)}. "
                f"Its own flags: {', '.join(f'--{flag}' for flag in adapter.FLAGS)}."
            )
    for name, parameter in inspect.signature(adapter.prepare).parameters.items():
        if name in adapter.FLAGS and parameter.default is parameter.empty and name not in given:
            raise UserError(f"prepare --dataset_type {adapter.NAME} needs --{name}: {adapter.FLAGS[name]['help']}.")


@cache
def read_flags(dataset_type: str) -> Flags:
    """FLAGS of an adapter, read without importing it: a help text does not wait for NumPy and torch."""
    path = adapter_path(dataset_type)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "FLAGS":
            assert node.value is not None
            return eval(compile(ast.Expression(node.value), str(path), "eval"), {"Path": Path})
    raise AssertionError(f"{path} has no FLAGS")


def all_flags() -> list[tuple[str, dict[str, Any]]]:
    """The flags of all adapters for argparse, each once; the help says which data sets a flag is for."""
    helps: dict[str, dict[str, list[str]]] = {}  # flag: help: data sets
    options: Flags = {}
    for dataset_type in ADAPTERS:
        for name, option in read_flags(dataset_type).items():
            options.setdefault(name, option)
            helps.setdefault(name, {}).setdefault(option["help"], []).append(dataset_type)
    return [
        (f"--{name}", {**option, "help": "; ".join(f"{', '.join(to)}: {text}" for text, to in helps[name].items())})
        for name, option in options.items()
    ]
