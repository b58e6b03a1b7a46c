"""Files of weights of any origin: what their pickles may name, and which encoder their keys are of."""

import datetime
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Optional

import numpy as np
import torch
from torch import Tensor

from model.registry import ENCODERS, UNNAMED, encoder_module
from settings import UserError

PREFIX = "sed_model."  # of the network's keys in a Lightning checkpoint
TEACHER = "teacher."  # of the mean teacher's keys beside them, which only a resumed run needs
# What stands in front of a network's keys, inside and outside of each other in any order: of DataParallel and
# AveragedModel, of torch.compile, of attributes of LightningModules.
WRAPPERS = ("module.", "_orig_mod.", "model.", PREFIX, "network.")
COUNTER = "n_averaged"  # of AveragedModel, beside the weights
CONTAINERS = ("state_dict", "model", "model_state_dict", "network", "module")  # entries that hold the weights
OWN, STATE_DICT = "checkpoint of this project", "state dict"  # kinds: with settings, and with the network's keys alone


@dataclass(frozen=True)
class Weights:
    """The weights of a file under the names of its encoder, and the kind of file.

    settings: what the file's own settings, or its kind, say about the network; None where nothing does. images: whether
    they were trained on images. encoder: name in the registry, None where the keys are those of none.
    """

    kind: str
    state_dict: dict[str, Tensor]
    settings: Optional[dict[str, Any]] = None
    images: bool = False
    encoder: Optional[str] = None


def identify(content: Mapping[Any, Any], wanted: Optional[str] = None) -> Weights:
    """Tell what kind of file `content` was, and rename its weights: {key: tensor}, tensors are not copied.

    content: what torch.load gave, or the tensors of a safetensors file beside its metadata. A file with settings is of
    this project; of any other, the registry's keys tell the encoder, whose file has a function `rename`. wanted: an
    encoder that is asked first, as it may begin from weights of images. Raises UserError with the reason where there
    are no weights, or where they cannot work in that network.
    """
    given = tensors(content)
    weights = unwrapped(given)
    if content.get("settings") is not None:
        settings = content["settings"]
        encoder = settings.get("encoder", UNNAMED) if isinstance(settings, Mapping) else UNNAMED
        if not isinstance(encoder, str) or encoder not in ENCODERS:
            raise UserError(f"its settings name the encoder {encoder!r}, and there are {', '.join(ENCODERS)}")
        own = {key: value for key, value in weights.items() if not key.startswith(TEACHER)}
        return Weights(OWN, own, settings, encoder=encoder)
    for name, row in sorted(ENCODERS.items(), key=lambda row: row[0] != wanted):
        patterns = row.keys + (row.images if name == wanted else ())
        if any(re.match(pattern, key) for pattern in patterns for key in weights):
            try:
                found: Weights = encoder_module(name).rename(weights)
            except (LookupError, RuntimeError) as error:
                raise UserError(
                    f"some keys are those of {row.title}, and others are missing or have other shapes "
                    f"({type(error).__name__}: {error})"
                ) from error
            published = found.kind == STATE_DICT and any(PREFIX in key for key in given)
            return replace(
                found, encoder=found.encoder or name, kind=f"published {row.title}" if published else found.kind
            )
    return Weights(STATE_DICT, weights)


def tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The weights in a file: all of it, or those in one of CONTAINERS, however deep. Raises UserError for none."""
    found, seen = content, [id(content)]
    while inside := [found[name] for name in CONTAINERS if isinstance(found.get(name), Mapping)]:
        found = inside[0]
        if id(found) in seen:
            raise UserError("it holds no weights: it contains itself")
        seen.append(id(found))
    weights = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        raise UserError(f"it holds no weights: its keys are {', '.join(map(str, list(content)[:8])) or 'none'}")
    return weights


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the prefixes of WRAPPERS and what averages count. Raises UserError for two networks."""
    found: dict[str, Tensor] = {}
    before: dict[str, str] = {}
    for key, value in weights.items():
        name = key.replace("_orig_mod.", "")  # torch.compile of a part stands in the middle of a key
        while (wrapper := next((each for each in WRAPPERS if name.startswith(each)), None)) is not None:
            name = name.removeprefix(wrapper)
        if name in found and not (found[name].shape == value.shape and torch.equal(found[name], value)):
            raise UserError(f"it holds two networks: {before[name]} and {key} are the same weight with other values")
        found[name], before[name] = value, key
    found.pop(COUNTER, None)
    return found


# --- pickles ----------------------------------------------------------------------------------------------------------


class Fields(dict[str, Any]):
    """A namespace, or another dictionary with a name."""

    def __setstate__(self, state: Any) -> None:
        self.update(state or {})


class NumpyType:
    """A dtype of NumPy, as its pickle describes it: kind and size, then (version, byte order, ...)."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">"}.get(str(state[1]), "=")

    def __str__(self) -> str:
        return self.code

    def read(self, data: Any) -> np.ndarray:
        """(N,) the numbers or text in `data`, bytes."""
        if not re.fullmatch(r"[biufcSU]\d{1,4}", self.code):
            raise pickle.UnpicklingError(f"numpy.dtype of {self.code}")
        return np.frombuffer(data, np.dtype(self.order + self.code)).astype(self.code)


class NumpyArray:
    """An array of NumPy, as its pickle describes it: (version, shape, type, whether columns come first, data)."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @classmethod
    def from_buffer(cls, data: Any, kind: NumpyType, shape: Any, order: str) -> "NumpyArray":
        """As protocol 5 has it."""
        array = cls()
        array.state = 1, shape, kind, order == "F", data
        return array

    def value(self) -> Tensor | list[Any]:
        """A tensor, or a list where the array holds text or objects."""
        _, shape, kind, columns_first, data = self.state
        if kind.code.startswith("O"):
            return list(data)
        array = kind.read(data).reshape(shape, order="F" if columns_first else "C")
        return array.tolist() if array.dtype.kind in "SU" else torch.from_numpy(np.array(array, order="C"))


# All that a pickle may name, and what is called for it: (modules, names, what). None of it runs code of the file, opens
# a file or imports a module; of NumPy's types, and of the classes of others, the values alone are kept.
ADMITTED: tuple[tuple[str, str, Any], ...] = (
    *(("torch", str(kind)[6:], kind) for kind in vars(torch).values() if isinstance(kind, torch.dtype)),
    ("torch", "Size", torch.Size),
    ("torch", "device", torch.device),
    ("torch torch.storage", "UntypedStorage", torch.UntypedStorage),
    ("torch._utils", "_rebuild_tensor", torch._utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2", torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3", torch._utils._rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter", torch._utils._rebuild_parameter),
    ("collections", "OrderedDict", OrderedDict),
    ("collections", "Counter", dict),
    ("collections", "defaultdict", lambda *_: {}),
    ("builtins __builtin__", "dict", dict),
    ("builtins __builtin__", "list", list),
    ("builtins __builtin__", "set", set),
    ("builtins __builtin__", "complex", complex),
    ("_codecs", "encode", lambda text, *_: text.encode("latin1")),  # bytes, in protocol 2
    ("numpy", "dtype", NumpyType),
    ("numpy", "ndarray", NumpyArray),
    ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct", NumpyArray),
    ("numpy.core.multiarray numpy._core.multiarray", "scalar", lambda kind, data: kind.read(data)[0].item()),
    ("numpy.core.numeric numpy._core.numeric", "_frombuffer", NumpyArray.from_buffer),
    ("argparse", "Namespace", Fields),
    ("types", "SimpleNamespace", Fields),
    ("pytorch_lightning.utilities.parsing lightning.pytorch.utilities.parsing", "AttributeDict", Fields),
    ("lightning_fabric.utilities.data lightning.fabric.utilities.data", "AttributeDict", Fields),
    ("datetime", "datetime", datetime.datetime),
    ("datetime", "date", datetime.date),
    ("datetime", "timedelta", datetime.timedelta),
    ("datetime", "timezone", datetime.timezone),
    ("pathlib pathlib._local", "PosixPath WindowsPath PurePosixPath PureWindowsPath Path", lambda *of: "/".join(of)),
)
GLOBALS = {(at, name): what for places, names, what in ADMITTED for at in places.split() for name in names.split()}
# Steps of old protocols and of registered classes, which call what is named in ways of their own.
REFUSED = (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4)


class NotAdmittedError(pickle.UnpicklingError):
    """A pickle names what is not in ADMITTED. Its text is the name."""


class Unpickler(pickle._Unpickler):
    """Reads pickles of protocol 2 to 5 that name nothing but ADMITTED, and give a state to nothing but its classes.

    torch.load(weights_only=True) reads protocol 2 alone, and would call NumPy's own constructors. Raises
    NotAdmittedError.
    """

    stack: list[Any]  # pickle._Unpickler's
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise NotAdmittedError(f"{module}.{name}")
        return GLOBALS[module, name]

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, (Fields, NumpyType, NumpyArray)):
            made.__setstate__(state)
        elif type(made) is not OrderedDict:  # whose attributes, as torch's _metadata, have no use here
            raise pickle.UnpicklingError(f"a state for {type(made).__name__}")

    def refuse(self) -> None:
        raise pickle.UnpicklingError("a step that no file of weights has")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch.update(dict.fromkeys((step[0] for step in REFUSED), refuse))


def _load(file: Any, **options: Any) -> Any:
    return Unpickler(file, **options).load()


PICKLES = SimpleNamespace(__name__="plain", Unpickler=Unpickler, load=_load)  # for torch.load, in place of pickle


def plain(value: Any, known: Optional[dict[int, Any]] = None) -> Any:
    """The content of a pickle as tensors, numbers, text, lists and dictionaries, which are filled anew.

    Arrays of NumPy become tensors, dates text. known: what has been changed already, by id.
    """
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][1]
    if isinstance(value, dict):
        found: Any = {} if isinstance(value, Fields) else value
        known[id(value)] = value, found
        found.update({key: plain(each, known) for key, each in value.items()})
        return found
    if isinstance(value, list):
        known[id(value)] = value, value
        value[:] = [plain(each, known) for each in value]
        return value
    if type(value) is tuple:
        found = tuple(plain(each, known) for each in value)
    elif isinstance(value, NumpyArray):
        found = plain(value.value(), known)
    elif isinstance(value, (NumpyType, datetime.date, datetime.timedelta, datetime.timezone)):
        found = str(value)
    else:
        return value
    known[id(value)] = value, found
    return found
