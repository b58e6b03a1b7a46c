"""The one place that loads weights. What is loaded cannot run code, and every load says what matched."""

import hashlib
import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import check_memory, memory_limit, whole_file
from model.foreign import OWN, PICKLES, NotAdmittedError, identify, plain
from model.network import Network
from model.registry import UNNAMED, encoder_module, find_checkpoint
from settings import SHORT, UserError, section

COUNTERS = ("num_batches_tracked",)  # endings of buffers that a file may leave out
LEAST_MATCHED = 0.99  # share of the backbone's parameters below which a file is refused
# What torch.load and zipfile raise, beside UnpicklingError, for files that are cut off or damaged.
UNREADABLE = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error,
    zipfile.BadZipFile, zlib.error, ArithmeticError, MemoryError,
)  # fmt: skip
ENTRIES = {"settings": Mapping, "labels": list, "frontend": Mapping, "postprocessing": Mapping, "sources": list}
RUN_ENTRIES = {  # what Lightning resumes from, by place
    "epoch": int, "global_step": int, "state_dict": Mapping, "callbacks": Mapping, "loops": Mapping,
    "loops/fit_loop": Mapping, "loops/fit_loop/epoch_progress": Mapping,
    "loops/fit_loop/epoch_loop.batch_progress": Mapping, "lr_schedulers": list, "lr_schedulers/0": Mapping,
    "optimizer_states": list, "optimizer_states/0": Mapping, "optimizer_states/0/state": Mapping,
    "optimizer_states/0/param_groups": list, "optimizer_states/0/param_groups/0": Mapping,
}  # fmt: skip
DESCRIPTION = ("settings", "labels", "frontend", "postprocessing")  # JSON in the metadata of safetensors files
DIGESTS = "digests"  # entry: {place of a tensor, as state_dict/sed_model.norm.bias, or name of a text: SHA-256}
EPOCH_SO_FAR = "epoch_so_far"  # entry: number of the epoch at work, its mean loss, clips, and unreadable ones

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
    data: Optional[dict[str, Any]] = None  # what it was trained on: see SEDDataModule.identity
    brought: dict[str, Any] = field(default_factory=dict)  # settings that the known name of a published file brings
    content: Mapping[Any, Any] = field(default_factory=dict, repr=False)  # all that the file holds, as it was read


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


def read_checkpoint(path: str | Path, encoder: Optional[str] = None) -> Checkpoint:
    """Read a file of weights and tell its kind from what it holds, whatever its name (see model/foreign.py).

    path: a file, or a name of assets/checkpoints.json. encoder: what it is wanted for, where several can begin from the
    same file (ImageNet's). The tensors of a file of today's torch.save, or of safetensors,
    are mapped into memory, not read. Raises UserError where there is no such file, where it is none of the known kinds
    or damaged, with the name of the entry, and where reading it could run code.
    """
    path, brought = find_checkpoint(path)
    content = _read_content(path)
    _check_tensors(path, content)
    try:
        weights = identify(content, encoder)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}.") from None
    about: dict[str, Any] = {name: check_entry(path, content.get(name), name, kind) for name, kind in ENTRIES.items()}
    settings = about["settings"] or weights.settings
    if settings and not about["frontend"]:
        about["frontend"] = {name: settings[name] for name in section("front-end") if name in settings}
    for name, value in (about["frontend"] or {}).items():
        check_entry(path, value, f"frontend/{name}", float if isinstance(value, float) else int)
    own = weights.kind == OWN
    epoch = check_entry(path, content.get("epoch"), "epoch", int) if own else None
    complete = check_entry(path, content.get("complete_epochs"), "complete_epochs", int) if own else None
    checkpoint = Checkpoint(
        path=path,
        state_dict=weights.state_dict,
        epoch=epoch,
        resumable="optimizer_states" in content,
        complete_epochs=epoch + 1 if complete is None and epoch is not None else complete,
        kind=weights.kind,
        images=weights.images,
        encoder=weights.encoder,
        data=check_entry(path, content.get("data"), "data", Mapping) if own else None,
        brought=brought,
        content=content,
        **{**about, "settings": settings},
    )
    if content.get(DIGESTS) is not None:
        _check_digests(path, content[DIGESTS], _digests({"state_dict": content.get("state_dict")}))
    return checkpoint


def check_resumable(checkpoint: Checkpoint) -> None:
    """Raise UserError where a checkpoint of a run does not hold what Lightning resumes from, with the entry's name."""
    path, content = checkpoint.path, checkpoint.content
    for place, kind in RUN_ENTRIES.items() if content else ():
        value: Any = content
        for key in place.split("/"):
            value = value.get(key) if isinstance(value, Mapping) else next(iter(value), None)  # "0": the first one
        if not _is_a(value, kind):
            raise UserError(
                f"{path} cannot be resumed from: its entry {place} is a {type(value).__name__}, not a {kind.__name__}. "
                f"Use another checkpoint of the run."
            )
    so_far = check_entry(path, content.get(EPOCH_SO_FAR), EPOCH_SO_FAR, list)
    if so_far is not None and (len(so_far) != 4 or not all(type(value) in (int, float) for value in so_far)):
        raise UserError(f"{path} is damaged: its entry {EPOCH_SO_FAR} must be four numbers.")
    if content.get(DIGESTS) is not None:
        _check_digests(path, content[DIGESTS], _digests({"optimizer_states": content.get("optimizer_states")}))


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_entry(path: Path, value: Any, name: str, kind: type) -> Any:
    """What a file says about itself, or None. Raises UserError for a wrong type."""
    if value is not None and not _is_a(value, kind):
        raise UserError(f"{path} is damaged: its entry {name} is a {type(value).__name__}, not a {kind.__name__}.")
    return value


def _check_tensors(path: Path, content: Any) -> None:
    """Raise UserError for tensors that are no plain ones, and where memory does not hold them; no value is read."""
    size, allowed = 0, memory_limit() // 2
    for key, tensor in _tensors_in(content):
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise UserError(f"{path} cannot be used: {key} is no plain tensor (sparse, quantized or without values).")
        size += tensor.numel() * tensor.element_size()
        if size > allowed:
            check_memory(f"{path}: its tensors up to {key}, of the shape {tuple(tensor.shape)},", size)


def check_labels(path: Path, labels: Sequence[Any], classes: Any) -> None:
    """Raise UserError for class names that are no text, occur twice, or are more or fewer than the classes."""
    wrong = next((label for label in labels if not isinstance(label, str)), None)
    if wrong is not None:
        raise UserError(f"{path} is damaged: its entry labels holds {SHORT.repr(wrong)}, and names are text.")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise UserError(f"{path} is damaged: its entry labels has the class {SHORT.repr(twice[0])} more than once.")
    if len(labels) != classes:
        raise UserError(
            f"{path} is damaged: its entry labels names {len(labels)} classes, and its network has "
            f"{SHORT.repr(classes)}."
        )


def _read_content(path: Path) -> Mapping[Any, Any]:
    """What a file of weights holds: state_dict and what describes it, or the tensors alone. Raises UserError."""
    if not path.is_file():
        best = path / "checkpoints" / "best.ckpt"  # of a run
        example = f"as {best}" if best.is_file() else "as train prints it"
        raise UserError(f"There is no checkpoint {path}: give the path of a .ckpt file, {example}.")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, where a checkpoint or a state dict is needed.")
    return content


def _read_torch(path: Path) -> Any:
    """The content of a file of torch.save as tensors and plain values, or a UserError."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_archive(path)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError:  # it holds more, or in a newer protocol
            # No code of the file runs here either: the Unpickler of PICKLES admits a stated list of names, and the load
            # above has refused archives of TorchScript. weights_only=False is what lets it take torch's place.
            loaded = torch.load(path, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=PICKLES)
            return plain(loaded)
    except NotAdmittedError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values: it names {error}, which is not among what is admitted, "
            f"and calling it could run code. Have its weights alone saved where it was made: the tensors of its "
            f"state_dict (of a Swin, of its model), by torch.save or as safetensors; such a file is taken here."
        ) from None
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise UserError(f"{path} is no checkpoint: it is no file of torch.save, nor of safetensors.") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no checkpoint, or it is cut off: {reason}") from None


def _check_archive(path: Path) -> None:
    """Raise ValueError where a record of a zip file is not what its checksum says; torch.load does not compare them."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type for record in records):
            raise ValueError("a record is compressed, which torch.save never does")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records declare more bytes than it has")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its record {damaged} is damaged")


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values as torch.save does, with digests. Raises UserError as data.files.whole_file."""
    digested = {name: content[name] for name in ("state_dict", "optimizer_states") if name in content}
    with whole_file(path) as partial, partial.open("wb") as file:
        torch.save({**content, DIGESTS: _digests(digested)}, file)


def _tensors_in(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in nested dictionaries and lists, with its place in them; what is in several places counts once."""
    waiting, seen = [("", content)], {id(content)}
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            yield place, value
        elif isinstance(value, (Mapping, list, tuple)):
            for key, inside in value.items() if isinstance(value, Mapping) else enumerate(value):
                if isinstance(inside, Tensor) or id(inside) not in seen:
                    seen.add(id(inside))
                    waiting.append((f"{place}/{key}" if place else str(key), inside))


def _digests(content: Any) -> dict[str, str]:
    """SHA-256 of each tensor with its type and shape, by its place."""
    found = {}
    for place, tensor in _tensors_in(content):
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
        found[place] = digest.hexdigest()
    return found


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 of a network's weights, whatever file they came from."""
    return _text_digest(json.dumps(_digests(dict(state_dict)), sort_keys=True))


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor, as they stand in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_digests(path: Path, wanted: Any, found: Mapping[str, str]) -> None:
    """Raise UserError where something is not as it was written. Files of others and older ones have no digests.

    wanted: the file's entry; found: digests of what has been read, of an entry or of several.
    """
    known, entries = check_entry(path, wanted, DIGESTS, Mapping) or {}, {place.split("/")[0] for place in found}
    here = {place: digest for place, digest in known.items() if str(place).split("/")[0] in entries}
    changed = [place for place, digest in here.items() if found.get(place) != digest]
    if changed:
        raise UserError(
            f"{path} is damaged: {changed[0]} is not as it was written, as its digest shows. Use another copy; if it "
            f"was changed on purpose, remove the entry {DIGESTS}."
        )


def store_in_checkpoint(path: str | Path, **values: Any) -> None:
    """Keep plain values (numbers, text, lists, dictionaries) in a file of torch.save, beside what it holds.

    The file is replaced when the new one is whole; a second name of the old one (a hard link) stays as it is. Raises
    ValueError for a file of another format.
    """
    path = read_checkpoint(path).path
    if _is_safetensors(path):
        raise UserError(f"{path} is a safetensors file: {', '.join(values)} can be kept in a .ckpt file only.")
    write_checkpoint(path, {**_read_torch(path), **values})


def _is_safetensors(path: Path) -> bool:
    """Such a file begins with the length of its header, a little-endian 64-bit number, and the header's brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Any]:
    """state_dict, and what save_safetensors put into the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            keys = file.keys()
            state_dict = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, *UNREADABLE) as error:
        raise UserError(f"{path} is no checkpoint, or it is cut off: {error}") from None
    texts = {name: about[name] for name in DESCRIPTION if name in about}
    digests = read_json(path, DIGESTS, about[DIGESTS]) if DIGESTS in about else None
    _check_digests(path, digests, {name: _text_digest(text) for name, text in texts.items()})
    described = {name: read_json(path, name, text) for name, text in texts.items()}
    return {"state_dict": state_dict, DIGESTS: digests, **described}


def read_json(path: Path, name: str, text: str) -> Any:
    """An entry of a file's metadata. Raises UserError, with its name, where it is no JSON."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its metadata {name} should be JSON: {error}") from None


def save_safetensors(
    path: Path,
    state_dict: Mapping[str, Tensor],
    *,
    settings: Mapping[str, Any],
    labels: Sequence[str],
    frontend: Mapping[str, Any],
    postprocessing: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write weights (names without prefix) as safetensors, with what describes them, and digests, in the metadata."""
    about: dict[str, Any] = {"settings": dict(settings), "labels": list(labels), "frontend": dict(frontend)}
    about |= {} if postprocessing is None else {"postprocessing": dict(postprocessing)}
    texts = {name: json.dumps(value) for name, value in about.items()}
    digests = _digests({"state_dict": state_dict}) | {name: _text_digest(text) for name, text in texts.items()}
    with whole_file(path) as partial:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in state_dict.items()},
            partial,
            {"format": "pt", **texts, DIGESTS: json.dumps(digests)},
        )


def decided_settings(
    checkpoint: Checkpoint, frontend_from: FrontendFrom, *, fine_tuning: bool = False
) -> dict[str, Any]:
    """What a checkpoint decides of the settings, for settings.resolve: all; for fine-tuning, the encoder and its sizes.

    The number of classes is that of its classifier, where the file does not say it.

    frontend_from: `settings` leaves the front-end to config.py and the flags, `checkpoint` takes it from the file in
    fine-tuning as well.
    """
    known = dict(checkpoint.settings or {})
    if checkpoint.encoder is not None:
        known["encoder"] = checkpoint.encoder
        classifier = network_class(checkpoint.encoder).classifier
        biases = [key for key in checkpoint.state_dict if key.startswith(classifier) and key.endswith("bias")]
        last = checkpoint.state_dict[max(biases)] if biases else torch.zeros(())  # of its last layer
        if last.ndim and not checkpoint.images:
            known.setdefault("classes_num", len(last))
    frontend = (*section("front-end"), "clip_samples")  # its samples are counted at the front-end's rate
    if fine_tuning:
        sizes = (*section("encoder", "sizes"), *network_class(checkpoint.encoder).frontend_sizes)
        names = (*sizes, *(frontend if frontend_from == "checkpoint" else ()))
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
    if checkpoint.labels is not None:
        theirs = decided_settings(checkpoint, "auto").get("classes_num", len(checkpoint.labels))
        check_labels(checkpoint.path, checkpoint.labels, theirs if new_classifier else network.num_classes)
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
    if report.share >= LEAST_MATCHED and not any(key.startswith(network.classifier) for key in given):
        return "It has no classifier, and thus no scores: fine-tune from it with train."
    if report.reshaped and all(key.startswith(network.classifier) for key in report.reshaped):
        return "Its classifier has another number of classes: set classes_num, or fine-tune from it with train."
    if report.reshaped and all(key.startswith(network.frontend) for key in report.reshaped):
        return "Its front-end has other sizes: set window_size, or frontend_from = settings to keep the configured one."
    return network.misfit(given, reshaped=bool(report.reshaped), images=report.images)
