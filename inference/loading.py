"""Shared by predict, listen and serve: the Tagger of a checkpoint, and the post-processing for its events.

Of the runtimes and precisions, the Tagger takes the fastest that is known to agree with float32.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inference.onnx_runtime import FILES, REPORT, Exported, export_folder, find_exports, load_onnx
from inference.tagger import HALF, TF32, Precision, Tagger
from model.checkpoint import weights_digest
from model.network import PROBABILITY_TOLERANCE, has_bf16, keep_freed_memory
from model.registry import ENCODERS, find_checkpoint, known_names
from settings import NETWORK_SECTIONS, UserError, requested, section

if TYPE_CHECKING:
    from evaluation.postprocess import PostProcessing

DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda"}  # the setting accelerator -> Tagger's device
RUNTIMES = {"onnx": "onnx", "int8": "onnx-int8"}  # of --runtime -> format of an export
BF16_SPEED = 1.5  # of HTS-AT against float32, on a CPU with BF16 instructions: 1.55 with one clip, 1.51 with four


def load_tagger(given: dict[str, Any], command: str, runtime: str = "auto") -> Tagger:
    """The Tagger of --resume_checkpoint, which is required, on --accelerator.

    runtime: torch, or onnx and int8 for an export of the checkpoint; auto: the fastest that is known to agree, as
    `take_fastest` chooses. Prints the load report, and what computes. Raises UserError for a runtime that the file is
    not for.
    """
    path = requested("resume_checkpoint", given)
    if path is None:
        names = ", ".join(known_names())
        raise UserError(f"{command} needs a checkpoint: --resume_checkpoint PATH, or a known name ({names})")
    if runtime not in ("auto", "torch", *RUNTIMES):
        raise UserError(f"--runtime {runtime} is not allowed: give auto, torch, {' or '.join(RUNTIMES)}.")
    exported = path.endswith(".onnx")
    if runtime == "torch" and exported:
        raise UserError(f"{path} is run by onnxruntime: for --runtime torch give the checkpoint that it came from.")
    tagger = Tagger.from_checkpoint(path, DEVICES[requested("accelerator", given)], given=given)
    if tagger.device.type == "cpu" and tagger.settings.performance == "auto":
        keep_freed_memory()
    if tagger.report is not None:
        print(tagger.report, file=sys.stderr)
    if exported:
        said = f"onnxruntime, {path}"
    elif runtime in RUNTIMES:
        said = take_export(tagger, path, RUNTIMES[runtime])
    else:
        said = take_fastest(tagger, path, exports=runtime == "auto")
    print(f"Runtime: {said}", file=sys.stderr)
    return tagger


def take_fastest(tagger: Tagger, path: str, *, exports: bool) -> str:
    """Let the fastest compute whose probabilities are known to agree with float32's; returns what it is, and why.

    Unless performance is manual: with precision auto, bfloat16 or TF32 where the device has it, as measured now on
    one sound; on the CPU an export of these very weights (`exports`), by what `export` has measured.
    """
    if tagger.settings.performance != "auto":
        return f"torch, {tagger.device.type}, precision {tagger.precision}"
    speed, reason = take_precision(tagger)
    computes = f"torch, {tagger.device.type}, precision {tagger.precision}"
    if not exports or tagger.device.type != "cpu" or tagger.settings.precision in HALF:
        return f"{computes} ({reason})"
    if importlib.util.find_spec("onnxruntime") is None:
        return f"{computes} ({reason}; onnxruntime is not installed)"
    agreeing = (each for each in exports_of(tagger, path) if agrees(each, tagger.settings.precision))
    fastest = next(agreeing, None)
    if fastest is not None and fastest.speed > speed and take(tagger, fastest):
        return said_of(fastest)
    return f"{computes} ({reason}; no faster export of these weights in {export_place(tagger, path)})"


def take_export(tagger: Tagger, path: str, wanted: str) -> str:
    """Let the export of a format compute; returns what it is. Raises UserError where the checkpoint has none."""
    found = next((each for each in exports_of(tagger, path) if each.format == wanted), None)
    if found is None or not take(tagger, found):
        raise UserError(
            f"{export_place(tagger, path)} holds no {FILES[wanted]} of this checkpoint: `python main.py export "
            f"--resume_checkpoint {path}` writes it; or give the path of a file with --resume_checkpoint."
        )
    return said_of(found)


def said_of(export: Exported) -> str:
    return (
        f"onnxruntime, {export.path} (made of these weights: probabilities differ by {export.difference:.1e} at most, "
        f"{export.speed:.2f} times the speed, as export has measured)"
    )


def export_place(tagger: Tagger, path: str) -> Path:
    """Where `export` writes what it makes of a checkpoint; of a file that it wrote, where that lies."""
    file = find_checkpoint(path)[0]
    if (file.parent / REPORT).is_file():
        return file.parent
    return export_folder(file, tagger.settings.workspace, known_name=not Path(path).is_file())


def exports_of(tagger: Tagger, path: str) -> list[Exported]:
    return find_exports(export_place(tagger, path), lambda: weights_digest(tagger.encoder().state_dict()))


def agrees(export: Exported, precision: str) -> bool:
    """Whether auto may take an export in place of the network in this precision: 8 bits are not float32."""
    return export.difference <= PROBABILITY_TOLERANCE and (export.format != "onnx-int8" or precision == "auto")


def take(tagger: Tagger, export: Exported) -> bool:
    """Let an export compute in place of the network, if it has its weights, front-end and sizes."""
    loaded = load_onnx(export.path)
    names = (*section(*NETWORK_SECTIONS), "clip_samples")
    ours, theirs = tagger.settings.model_dump(include=set(names)), loaded.settings.model_dump(include=set(names))
    if ours != theirs or loaded.weights != export.weights:
        return False
    tagger.network, tagger.precision = loaded.network, "auto"
    return True


def take_precision(tagger: Tagger) -> tuple[float, str]:
    """Set the precision where settings.precision is auto; returns its speed against float32, and why it was taken."""
    if tagger.settings.precision != "auto":
        return 1.0, "as set"
    device, encoder = tagger.device.type, tagger.settings.encoder
    tagger.precision = "32"
    if device == "cpu" and ENCODERS[encoder].bf16_difference is None:
        return 1.0, f"auto: bfloat16's error is not measured for {encoder} on CPUs"
    tried: list[Precision] = ["bf16-mixed", TF32] if device == "cuda" else ["bf16-mixed"]
    if not has_bf16(device):
        return 1.0, f"auto: this {'GPU' if device == 'cuda' else 'CPU'} has no instructions for bfloat16"
    sound = made_up_sounds(1, tagger.settings.clip_samples, tagger.settings.sample_rate).to(tagger.device)
    exact = tagger.probabilities(sound)
    differences = []
    for name in tried:
        tagger.precision = name
        difference = largest_difference(exact, tagger.probabilities(sound))
        differences.append(f"{name} changes probabilities by {difference:.1e}")
        if difference <= PROBABILITY_TOLERANCE:
            said = f"auto: {', '.join(differences)} on a sound made up, at most {PROBABILITY_TOLERANCE:g} are allowed"
            return BF16_SPEED, said
    tagger.precision = "32"
    return 1.0, f"auto: {', '.join(differences)}, more than {PROBABILITY_TOLERANCE:g}"


def largest_difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Of the probabilities of clips and frames, which come first. NaN is infinitely far."""
    pairs = [(a.float() - b.float()).abs() for a, b in zip(ours[:2], theirs[:2], strict=True) if a.numel()]
    return max(float(torch.nan_to_num(each, nan=torch.inf).max()) for each in pairs)


def made_up_sounds(count: int, samples: int, sample_rate: int) -> Tensor:
    """(count, samples): in each, a tone of its own pitch that comes and goes, in noise of its own level."""
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(samples) / sample_rate
    pitch = sample_rate / 4 * 2 ** -torch.linspace(0, 5, count)[:, None]
    swell = torch.sin(2 * torch.pi * torch.linspace(0.2, 2, count)[:, None] * seconds).clamp(min=0)
    noise = torch.randn(count, samples, generator=generator) * torch.logspace(-3, -1, count)[:, None]
    return 0.4 * swell * torch.sin(2 * torch.pi * pitch * seconds) + noise


def event_processing(tagger: Tagger) -> "PostProcessing":
    """Thresholds and filters for events: the settings fl_..., else the checkpoint's, else 0.5 alone, with a line."""
    from evaluation.postprocess import DEFAULT_SOURCE, DEFAULT_THRESHOLD, choose_postprocessing

    chosen = choose_postprocessing(tagger.postprocessing, tagger.labels, tagger.settings)
    if tagger.has_frames and chosen.source.startswith(DEFAULT_SOURCE) and not tagger.settings.fl_threshold:
        print(
            f"Events: not calibrated: threshold {DEFAULT_THRESHOLD}. `python main.py calibrate` chooses one a class on "
            f"clips with event times; --fl_threshold sets it.",
            file=sys.stderr,
        )
    return chosen
