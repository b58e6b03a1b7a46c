"""The one place that loads weights. What is loaded cannot run code, and every load says what matched."""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import whole_file
from model.foreign import OWN, identify
from model.network import Network
from model.registry import UNNAMED, encoder_module
from settings import UserError, section

COUNTERS = ("num_batches_tracked",)  # endings of buffers that a file may leave out
LEAST_MATCHED = 0.99  # share of the backbone's parameters below which a file is refused
# What torch.load and zipfile raise, beside UnpicklingError, for files that are cut off or damaged.
UNREADABLE = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip

FrontendFrom = Literal["auto", "settings", "checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights: the network's state dict without prefix, and what the file says about itself."""

    path: Path
    state_dict: dict[str, Tensor]
    settings: Optional[dict[str, Any]] = None  # None: neither the file nor its kind tells, they must be given
    labels: Optional[list[str]] = None
    epoch: Optional[int] = None  # None: the file belongs to no run of this project
    resumable: bool = False  # whether it holds what a run needs to go on, beside the weights
    complete_epochs: Optional[int] = None  # epochs of training; a checkpoint in the middle of one does not count it
    frontend: Optional[dict[str, Any]] = None  # settings of section "front-end", where they are known
    kind: str = OWN
    images: bool = False  # whether the weights were trained on images
    encoder: Optional[str] = None  # name in the registry, None where its keys are those of none
    sources: Optional[list[str]] = None  # of a weight average: the files that it is the mean of
    postprocessing: Optional[dict[str, Any]] = None  # thresholds and filters, as `calibrate` stored them
    best: Optional[tuple[str, float]] = None  # of a run: name and metric of the best checkpoint so far
    data: Optional[dict[str, Any]] = None  # what it was trained on: see SEDDataModule.identity


@dataclass(frozen=True)
class LoadReport:
    """What a load did, key by key. share: of the backbone's parameters, how many came from the file."""

    path: Path
    kind: str
    images: bool
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    fresh: list[str]  # of parts that start anew in fine-tuning, as the file has none that fit
    share: float
    classifier: str  # where it comes from, and why
    frontend: str

    def __str__(self) -> str:
        text = f"{self.path} ({self.kind}): {len(self.matched)} keys matched, "
        text += f"{self.share:.1%} of the backbone's parameters"
        for name in ("missing", "unexpected", "reshaped", "fresh"):
            keys = getattr(self, name)
            if keys:
                text += f"; {len(keys)} {name} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        return f"{text}; classifier {self.classifier}; front-end {self.frontend}"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of weights and tell its kind from what it holds, whatever its name (see model/foreign.py).

    The tensors of a file of today's torch.save, or of safetensors, are mapped into memory, not read. Raises UserError
    where there is no such file, where it is none of the known kinds, or where reading it would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}: give the path of a .ckpt file, as train prints it.")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, where a checkpoint or a state dict is needed.")
    try:
        weights = identify(content)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}.") from None
    settings = _described(path, weights.settings, "settings", Mapping)
    about = {name: settings[name] for name in section("front-end") if name in settings} if settings else None
    own = weights.kind == OWN
    epoch = _described(path, content.get("epoch"), "epoch", int) if own else None
    return Checkpoint(
        path=path,
        state_dict=weights.state_dict,
        settings=settings,
        labels=_described(path, content.get("labels"), "labels", list),
        epoch=epoch,
        resumable="optimizer_states" in content,
        complete_epochs=content.get("complete_epochs", None if epoch is None else epoch + 1),
        frontend=_described(path, content.get("frontend"), "frontend", Mapping) or about,
        kind=weights.kind,
        images=weights.images,
        encoder=weights.encoder,
        sources=_described(path, content.get("sources"), "sources", list),
        postprocessing=_described(path, content.get("postprocessing"), "postprocessing", Mapping),
        best=_best(content) if own else None,
        data=_described(path, content.get("data"), "data", Mapping) if own else None,
    )


def _best(content: Mapping[str, Any]) -> Optional[tuple[str, float]]:
    """The best checkpoint, as the callback that keeps it has recorded it."""
    states = content.get("callbacks")
    for state in states.values() if isinstance(states, Mapping) else ():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_path"):
            score = state.get("best_model_score")
            if isinstance(score, Tensor) and score.numel() == 1:
                return Path(str(state["best_model_path"])).name, float(score)
    return None


def _described(path: Path, value: Any, name: str, kind: type) -> Any:
    """What a file says about itself, or None. Raises UserError for a wrong type."""
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{path} is damaged: its entry {name} is a {type(value).__name__}.")
    return value


def _read_torch(path: Path) -> Any:
    """The content of a file of torch.save: tensors and plain values, or a UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise UserError(f"{path} is no checkpoint: it is no file of torch.save, nor of safetensors.") from None
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{path} holds more than tensors and plain values{f' (it wants {wanted[1]})' if wanted else ''}, and "
            f"loading it could run code: refused. Have its weights alone saved where it was made: the tensors of its "
            f"state_dict (of a Swin, of its model), by torch.save or as safetensors; such a file is taken here."
        ) from None
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no checkpoint, or it is cut off: {reason}") from None


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values as torch.save does. Raises UserError as data.files.whole_file."""
    with whole_file(path) as partial, partial.open("wb") as file:
        torch.save(content, file)


def store_in_checkpoint(path: str | Path, name: str, value: Any) -> None:
    """Keep a plain value (numbers, text, lists, dictionaries) in a file of torch.save, beside what it holds.

    The file is replaced when the new one is whole; a second name of the old one (a hard link) stays as it is. Raises
    ValueError for a file of another format.
    """
    path = Path(path)
    read_checkpoint(path)
    if _is_safetensors(path):
        raise UserError(f"{path} is a safetensors file: {name} can be kept in a .ckpt file only.")
    write_checkpoint(path, {**_read_torch(path), name: value})


def _is_safetensors(path: Path) -> bool:
    """Such a file begins with the length of its header, a little-endian 64-bit number, and the header's brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Any]:
    """state_dict, and what save_safetensors put into the metadata: settings, labels, front-end, post-processing."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            keys = file.keys()
            state_dict = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise UserError(f"{path} is no checkpoint, or it is cut off: {error}") from None
    names = [name for name in ("settings", "labels", "frontend", "postprocessing") if name in about]
    try:
        return {"state_dict": state_dict, **{name: json.loads(about[name]) for name in names}}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: its metadata {', '.join(names)} should be JSON: {error}") from None


def save_safetensors(
    path: Path,
    state_dict: Mapping[str, Tensor],
    *,
    settings: Mapping[str, Any],
    labels: Sequence[str],
    frontend: Mapping[str, Any],
    postprocessing: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write weights (names without prefix) as safetensors, with what describes them as JSON in the metadata."""
    about: dict[str, Any] = {"settings": dict(settings), "labels": list(labels), "frontend": dict(frontend)}
    about |= {} if postprocessing is None else {"postprocessing": dict(postprocessing)}
    metadata = {"format": "pt", **{name: json.dumps(value) for name, value in about.items()}}
    with whole_file(path) as partial:
        save_file({key: value.detach().cpu().contiguous() for key, value in state_dict.items()}, partial, metadata)


def decided_settings(
    checkpoint: Checkpoint, frontend_from: FrontendFrom, *, fine_tuning: bool = False
) -> dict[str, Any]:
    """What a checkpoint decides of the settings, for settings.resolve: all it says; for fine-tuning, the encoder.

    The number of classes is that of its classifier, where the file does not say it.

    frontend_from: `settings` leaves the front-end to config.py and the flags, `checkpoint` takes it from the file in
    fine-tuning as well.
    """
    known = dict(checkpoint.settings or {})
    if checkpoint.encoder is not None:
        known["encoder"] = checkpoint.encoder
        classifier = network_class(checkpoint.encoder).classifier
        biases = [key for key in checkpoint.state_dict if key.startswith(classifier) and key.endswith("bias")]
        if biases and not checkpoint.images:
            known.setdefault("classes_num", len(checkpoint.state_dict[max(biases)]))  # of its last layer
    frontend = (*section("front-end"), "clip_samples")  # its samples are counted at the front-end's rate
    if fine_tuning:
        names = (*section("encoder"), *(frontend if frontend_from == "checkpoint" else ()))
        return {name: known[name] for name in names if name in known}
    return {name: value for name, value in known.items() if name not in frontend or frontend_from != "settings"}


def network_class(encoder: Optional[str]) -> type[Network]:
    """The class of an encoder, which says what its state-dict keys are. encoder: as Checkpoint.encoder."""
    found: type[Network] = encoder_module(encoder or UNNAMED).NETWORK
    return found


def load_network(
    network: Network,
    checkpoint: Checkpoint,
    *,
    new_classifier: bool = False,
    labels: Optional[Sequence[str]] = None,
    file_labels: Optional[Sequence[str]] = None,
    frontend_from: FrontendFrom = "auto",
    configured: Optional[Mapping[str, Any]] = None,
) -> LoadReport:
    """Copy a checkpoint's weights into a network.

    new_classifier: for fine-tuning, keep the network's own classifier where its shape differs, or where `labels` (of
    the network) and `file_labels` (the checkpoint's own, unless given) are both known and differ; and its own readout
    and sequence head where the file has none, or others. Otherwise every parameter must come from the file.
    frontend_from: auto takes the file's front-end, but the network's in fine-tuning. configured: the settings of
    the network, to name what differs in the warning that is then given. Raises UserError when too little matches, and
    where ImageNet's weights are to be evaluated.
    """
    if checkpoint.images and not new_classifier:
        raise UserError(
            f"{checkpoint.path} holds an {checkpoint.kind}, which has learned no sounds: train from it, and use what "
            f"that training writes."
        )
    own, given = network.state_dict(), checkpoint.state_dict
    if new_classifier:
        given = network.adapted(given, checkpoint.settings)
    broken = next((k for k, v in given.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if broken is not None:
        raise UserError(
            f"{checkpoint.path} holds weights that are no finite numbers ({broken}): its training had diverged. Use an "
            f"earlier checkpoint."
        )
    kept: tuple[str, ...] = ()  # keys that stay as they are in the network, whatever the file has
    if _keeps_frontend(network, own, checkpoint, frontend_from, new_classifier, configured):
        kept += network.frontend
    from_file, classifier, fresh = True, "the file's", []
    if new_classifier:
        kept += (added := _unfit_parts(network, own, given))
        fresh = [key for key in own if added and key.startswith(added)]
        from_file, classifier = _choose_classifier(network, own, given, labels, file_labels or checkpoint.labels)
    if not from_file:
        kept += network.classifier
    if checkpoint.images:
        kept += network.not_in_images

    fitting = [key for key in own if key in given and own[key].shape == given[key].shape]
    matched = [key for key in fitting if not key.startswith(kept)]
    reshaped = [key for key in own if key in given and own[key].shape != given[key].shape]
    report = LoadReport(
        path=checkpoint.path,
        kind=checkpoint.kind,
        images=checkpoint.images,
        matched=matched,
        missing=[key for key in own if key not in given and key not in fresh],
        unexpected=[key for key in given if key not in own],
        reshaped=[key for key in reshaped if not key.endswith(network.computed) and key not in fresh],
        fresh=fresh,
        share=_share(network, own, matched),
        classifier=classifier,
        frontend="the file's" if any(key.startswith(network.frontend) for key in matched) else "the network's",
    )
    _check(report, network, own, given, kept)
    taken = {key: given[key] for key in matched if not key.endswith(network.computed)}
    network.load_state_dict({**own, **taken})
    return report


def _unfit_parts(network: Network, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Those additions of the network that a file does not have whole or in the same shapes."""
    unfit = [key for key in own if key not in given or given[key].shape != own[key].shape]
    return tuple(part for part in network.additions if any(key.startswith(part) for key in unfit))


def _keeps_frontend(
    network: Network,
    own: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    frontend_from: FrontendFrom,
    fine_tuning: bool,
    configured: Optional[Mapping[str, Any]],
) -> bool:
    """Whether a file has another front-end than the network, and the network's is kept. Warns where it has another."""
    given, theirs, ours = checkpoint.state_dict, checkpoint.frontend or {}, configured or {}
    different = [
        f"{name} {value}, configured {ours[name]}" for name, value in theirs.items() if ours.get(name, value) != value
    ]
    constants = [key for key in own if key.startswith(network.frontend) and key in given]
    different += [key for key in constants if not _close(own[key], given[key])]
    if not different:
        return False
    keeps = frontend_from == "settings" or (frontend_from == "auto" and fine_tuning)
    if fine_tuning and not keeps and not theirs:
        raise UserError(
            f"{checkpoint.path} has another filterbank or window than the settings describe, and does not say which "
            f"sample_rate and mel bands they are for: leave frontend_from = checkpoint out, or set them as it was "
            f"trained."
        )
    chosen = "the configured one is kept" if keeps else "the file's filterbank and window are used"
    warnings.warn(
        f"{checkpoint.path} holds another front-end than the settings describe ({'; '.join(different)}): {chosen}, "
        f"as frontend_from = {frontend_from} says.",
        stacklevel=3,
    )
    return keeps


def _close(own: Tensor, given: Tensor) -> bool:
    """Whether two front-end tensors are the same but for how they were rounded."""
    return own.shape == given.shape and torch.allclose(own.cpu(), given.cpu().to(own.dtype), rtol=1e-3, atol=1e-5)


def _choose_classifier(
    network: Network,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    labels: Optional[Sequence[str]],
    file_labels: Optional[Sequence[str]],
) -> tuple[bool, str]:
    """For fine-tuning: whether the classifier comes from the file, and why."""
    keys = [key for key in own if key.startswith(network.classifier) and key not in _unused(network)]
    if any(key not in given for key in keys):
        return False, "new (the file has none)"
    for key in keys:
        if given[key].shape != own[key].shape:
            shapes = tuple(given[key].shape), tuple(own[key].shape)
            return False, f"new (the file's has the shape {shapes[0]}, the network's {shapes[1]})"
    if not labels or not file_labels:
        return True, "kept (the same shape; the labels of one side are unknown)"
    if list(labels) != list(file_labels):
        first, second = next(pair for pair in zip_longest(file_labels, labels) if pair[0] != pair[1])
        return False, f"new (other labels: {first!r} in the file, {second!r} in the data)"
    return True, "kept (the same labels)"


def _unused(network: Network) -> set[str]:
    """Names of the parameters that no output depends on."""
    unused = set(map(id, network.unused_parameters()))
    return {name for name, parameter in network.named_parameters() if id(parameter) in unused}


def _check(
    report: LoadReport, network: Network, own: Mapping[str, Tensor], given: Mapping[str, Tensor], kept: tuple[str, ...]
) -> None:
    """Raise UserError where a file leaves out, or has in another shape, what must come from it."""
    needed = [key for key in report.reshaped if not key.startswith(kept)]
    spare = _unused(network)  # what a file may leave out, as the constants of the front-end
    needed += [key for key in report.missing if not key.startswith((*kept, *network.frontend)) and key not in spare]
    needed = [key for key in needed if not key.endswith((*network.computed, *COUNTERS))]
    if report.share < LEAST_MATCHED or needed:
        raise UserError(
            f"{report}. This file does not fit the network; its kind seems to be: {report.kind}. "
            f"{_advice(report, network, given)} "
            f"Keys that are needed: {', '.join(needed[:4])}{', ...' if len(needed) > 4 else ''}"
        )


def _share(network: Network, own: Mapping[str, Tensor], matched: Sequence[str]) -> float:
    """Share of the elements among `matched`, of the backbone: no classifier, added part, front-end, computed buffer."""
    outside = (*network.classifier, *network.additions, *network.frontend)
    ends = (*network.computed, *COUNTERS)
    sizes = {k: v.numel() for k, v in own.items() if not k.startswith(outside) and not k.endswith(ends)}
    return sum(sizes.get(key, 0) for key in matched) / sum(sizes.values())


def _advice(report: LoadReport, network: Network, given: Mapping[str, Tensor]) -> str:
    """What is wrong with a file, and what to do."""
    if report.reshaped and all(key.startswith(network.classifier) for key in report.reshaped):
        return "Its classifier has another number of classes: set classes_num, or fine-tune from it with train."
    if report.reshaped and all(key.startswith(network.frontend) for key in report.reshaped):
        return "Its front-end has other sizes: set window_size, or frontend_from = settings to keep the configured one."
    return network.misfit(given, reshaped=bool(report.reshaped), images=report.images)
