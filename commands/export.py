"""python main.py export: a checkpoint as safetensors and ONNX, each checked against the network before it is kept."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.files import check_writable, sole_writer, whole_file, write_each, write_json
from data.names import markup
from data_generator import SEDDataModule, Split, load_table
from inference.loading import made_up_sounds
from inference.onnx_runtime import FILES, REPORT, export_folder, load_onnx
from model import Network
from model.checkpoint import save_safetensors, weights_digest
from model.export import build_onnx, join, quantize, save_onnx
from model.network import resample
from model.opening import open_network
from runs.card import write_card
from runs.members import Member
from runs.records import git_revision
from settings import TRAINED_SECTIONS, Config, UserError, requested, section
from utils import int16_to_float32

FLOAT_TOLERANCE = 1e-4  # largest difference of a probability
LEAST_AGREEMENT = 0.95  # int8: share of the clips whose highest class stays the same
BATCHES = (1, 2, 5)  # clips in a batch, in turn: a file must take any number
Outputs = tuple[Tensor, Tensor, Tensor]
Probabilities = Callable[[Tensor], Outputs]


@dataclass(frozen=True)
class Export:
    """One file, and how it differs from the network that it was made from."""

    format: str
    file: str
    size: int  # bytes
    clip_difference: float  # largest, of a clip's probability
    frame_difference: float  # largest, of a frame's
    embedding_difference: float  # largest, as a share of the network's largest value
    top1_agreement: float  # share of the clips with the same highest class
    speed: float  # on the clips it was checked on, against the network in float32, here on the CPU
    kept: bool


@dataclass(frozen=True)
class Reference:
    """The clips that exports are checked on, and the network's outputs for them."""

    waveforms: Tensor  # (N, clip_samples)
    said: str  # what they are
    outputs: Outputs = field(repr=False)
    seconds: float


def run(given: dict[str, Any], formats: str = ",".join(FILES), output: Optional[str] = None, clips: int = 60) -> int:
    """Write a checkpoint in several formats into a folder, with a report (export.json) and a card (README.md).

    formats: names of FILES; output: the folder, without it that of export_folder; clips: at most so many of
    the data set's are checked. Returns the exit status: 1 where a file differed too much and was not kept.
    """
    wanted = chosen_formats(formats)
    if clips < 1:
        raise UserError(f"--clips {clips} is not allowed: at least one clip is needed to check on.")
    path = requested("resume_checkpoint", given)
    if path is None:
        raise UserError("export needs a checkpoint: --resume_checkpoint PATH")
    member = Member.read(path, given)
    network = member.network().eval()
    settings, known_name = member.settings, not Path(path).is_file()
    folder = (
        Path(output) if output else export_folder(member.checkpoint.path, settings.workspace, known_name=known_name)
    )
    check_writable(f"--output {folder}", *(folder / FILES[name] for name in wanted))
    waveforms, said = clips_to_check(settings, clips)
    reference = Reference(waveforms, said, *timed(network.probabilities, waveforms))
    about, weights = describe(member), weights_digest(network.state_dict())
    writers = prepare_writers(wanted, network, settings.clip_samples, about, weights)
    exports: list[Export] = []
    refused: list[str] = []
    with sole_writer(folder):
        for name, write in writers:
            try:
                exports.append(write_checked(name, folder / FILES[name], write, reference))
            except UserError as error:  # a full disk: what is smaller may fit
                refused.append(str(error))
        print_report(exports, reference, folder)
        write_report(exports, reference, member, about, weights, folder)
    if refused:
        raise UserError(" ".join(refused))
    return 0 if all(export.kept for export in exports) else 1


def chosen_formats(text: str) -> list[str]:
    """The formats of a flag, in the order of FILES. Raises UserError for unknown ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FILES]
    if unknown or not names:
        raise UserError(f"--formats {text!r} is not allowed: give some of {','.join(FILES)}.")
    return [name for name in FILES if name in names]


def describe(member: Member) -> dict[str, Any]:
    """What a file records: settings (without the paths of this machine), labels, front-end, thresholds.

    Of a foreign file without the settings of runs: it belongs to none, and its protocol may be unknown.
    """
    known = member.checkpoint.settings or {}
    of_run = ("exp_name", *section("split"))  # a run's own name and clips, where the file belongs to one
    trained = {name: getattr(member.settings, name) for name in section(*TRAINED_SECTIONS) if name not in of_run}
    trained |= {name: known[name] for name in of_run if name in known}
    if member.protocol != "unknown":
        trained["protocol"] = member.protocol
    about: dict[str, Any] = {
        "settings": {**{name: value for name, value in known.items() if not _has_path(value)}, **trained},
        "labels": member.known_labels,
        "frontend": {name: getattr(member.settings, name) for name in section("front-end")},
    }
    processing = member.checkpoint.postprocessing
    return about | ({"postprocessing": processing} if processing else {})


def _has_path(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, str) and ("/" in part or "\\" in part) for part in parts)


def clips_to_check(settings: Config, count: int) -> tuple[Tensor, str]:
    """(N, clip_samples) float, and what they are: test or validation clips spread over the split, or made-up sounds."""
    splits: tuple[Split, ...] = ("test", "validation")
    for split in splits:
        try:
            table = load_table(settings, split)
        except UserError:
            continue
        chosen = torch.linspace(0, len(table) - 1, min(count, len(table))).long().unique().tolist()
        read = SEDDataModule(settings, {split: table}).dataset(split).__getitems__(chosen)
        clips = resample(int16_to_float32(read["waveform"]), read["sample_rate"], settings.sample_rate)
        return clips, f"{len(clips)} of the {len(table)} {split} clips of {settings.dataset_type}"
    clips = made_up_sounds(min(count, 16), settings.clip_samples, settings.sample_rate)
    return clips, f"{len(clips)} made-up sounds (tones in noise): there are no clips in {settings.dataset_path}"


@torch.inference_mode()
def in_batches(probabilities: Probabilities, waveforms: Tensor) -> Outputs:
    """The outputs for all clips, from batches of BATCHES clips in turn."""
    parts = []
    sizes, start = itertools.cycle(BATCHES), 0
    while start < len(waveforms):
        stop = start + next(sizes)
        parts.append(probabilities(waveforms[start:stop]))
        start = stop
    clipwise, framewise, embedding = (torch.cat(part).float() for part in zip(*parts, strict=True))
    return clipwise, framewise, embedding


def timed(probabilities: Probabilities, waveforms: Tensor) -> tuple[Outputs, float]:
    """The outputs for all clips, and the seconds that they took, after a first clip that does not count."""
    in_batches(probabilities, waveforms[:1])
    started = time.perf_counter()
    return in_batches(probabilities, waveforms), time.perf_counter() - started


def prepare_writers(
    formats: Sequence[str], network: Network, clip_samples: int, about: dict[str, Any], weights: str
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each format, and a function that writes it to a path."""
    if "safetensors" in formats:
        yield "safetensors", lambda path: save_safetensors(path, network.state_dict(), **about)
    if set(formats) == {"safetensors"}:
        return
    start, body = build_onnx(network, clip_samples)
    makers = {
        "onnx": lambda: join(start, body),
        "onnx-mel": lambda: body,
        "onnx-int8": lambda: join(start, quantize(body)),
    }
    for name in formats:
        if name in makers:
            yield name, functools.partial(_save_made, makers[name], about={**about, "weights": weights})


def _save_made(make: Callable[[], Any], path: Path, about: dict[str, Any]) -> None:
    save_onnx(make(), path, about)


class TooDifferentError(Exception):
    """An exported file does not give the outputs of the checkpoint."""


def write_checked(name: str, path: Path, write: Callable[[Path], None], reference: Reference) -> Export:
    """Write a file and run it on the clips; it is kept if its outputs are close enough."""
    with suppress(TooDifferentError), whole_file(path) as partial:
        write(partial)
        probabilities = load_safetensors(partial) if name == "safetensors" else load_onnx(partial).network.probabilities
        outputs, seconds = timed(probabilities, reference.waveforms)
        pairs = zip(outputs, reference.outputs, strict=True)
        differences = [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs]  # without frames: 0
        agreement = float((outputs[0].argmax(dim=1) == reference.outputs[0].argmax(dim=1)).float().mean())
        passed = agreement >= LEAST_AGREEMENT if name == "onnx-int8" else max(differences[:2]) <= FLOAT_TOLERANCE
        size = partial.stat().st_size
        if not passed:
            raise TooDifferentError
    largest = float(reference.outputs[2].abs().max()) or 1.0
    return Export(
        name, FILES[name], size, differences[0], differences[1], differences[2] / largest, agreement,
        reference.seconds / seconds, passed,
    )  # fmt: skip


def load_safetensors(path: Path) -> Probabilities:
    """The network of an exported safetensors file."""
    return open_network(path).network.eval().probabilities


def table_rows(exports: Sequence[Export]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the report, as text."""
    columns = ["file", "MiB", "clip difference", "frame difference", "same top-1", "times as fast", "kept"]
    rows = [
        [
            export.file, f"{export.size / 2**20:.1f}", f"{export.clip_difference:.1e}",
            f"{export.frame_difference:.1e}", f"{export.top1_agreement:.1%}", f"{export.speed:.2f}",
            "yes" if export.kept else "no",
        ]
        for export in exports
    ]  # fmt: skip
    return columns, rows


def print_report(exports: Sequence[Export], reference: Reference, folder: Path) -> None:
    """The table, and which files were not kept."""
    columns, rows = table_rows(exports)
    table = Table(title=f"exports in {markup(str(folder))}, checked on {reference.said}", title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for export in exports:
        if not export.kept:
            rule = f"the same top-1 class in {LEAST_AGREEMENT:.0%} of the clips"
            rule = rule if export.format == "onnx-int8" else f"differences of at most {FLOAT_TOLERANCE:g}"
            print(f"{export.file} was not kept: it needs {rule}.")


def write_report(
    exports: Sequence[Export],
    reference: Reference,
    member: Member,
    about: dict[str, Any],
    weights: str,
    folder: Path,
) -> None:
    """Write export.json, and README.md: the checkpoint's card with the files in it."""
    checkpoint = member.checkpoint.path.name
    content = {
        "checkpoint": checkpoint,
        "weights": weights,
        "clips": reference.said,
        "torch": torch.__version__,
        "git_revision": git_revision(),
        "exports": [asdict(export) for export in exports],
    }
    kept = {export.format for export in exports if export.kept}
    loaded = FILES["safetensors"] if "safetensors" in kept else checkpoint
    columns, rows = table_rows([export for export in exports if export.kept])
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    files = (
        f"## Files\n\nWritten from `{checkpoint}` and compared with it on {reference.said}; differences "
        f"are the largest of any probability, speed is against the network on one CPU. The ONNX files take any number "
        f"of clips of {about['settings']['clip_samples']} samples (`model-mel.onnx` their log-mel spectrograms in dB) "
        f"and hold settings, labels and front-end, as JSON, in their metadata.\n\n" + "\n".join(lines)
    )
    described = {**vars(member.checkpoint), **about}
    report, card = write_each(
        {
            folder / REPORT: lambda path: write_json(path, content),
            folder / "README.md": lambda path: write_card(path, described, file=Path(loaded), more=files),
        }
    )
    print(f"Report: {report}\nModel card: {card}")
