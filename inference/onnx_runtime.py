"""A network that `python main.py export` wrote as ONNX, run by onnxruntime, and finding that of a checkpoint."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from data.files import read_json as read_json_file
from model.checkpoint import ENTRIES, check_entry, check_labels, read_json
from model.registry import encoder_module
from settings import Config, UserError, resolve

INSTALL = "pip install onnxruntime"
ABOUT = ("settings", "labels", "frontend")  # what the metadata of an exported file must hold
REPORT = "export.json"  # what `export` writes beside its files
FILES = {  # of the formats of an export
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "onnx-mel": "model-mel.onnx",
    "onnx-int8": "model-int8.onnx",
}


@dataclass(frozen=True)
class Exported:
    """A file that `export` kept. difference: the largest of a probability from the network's. weights: their digest.

    speed: against the network in float32 on a CPU, on the machine of the export.
    """

    path: Path
    format: str
    difference: float
    speed: float
    weights: str


def export_folder(checkpoint: Path, workspace: str, *, known_name: bool) -> Path:
    """Beside the checkpoint; of a known name, whose file lies among other downloads, <workspace>/runs/<file>/export."""
    return (Path(workspace, "runs", checkpoint.stem) if known_name else checkpoint.parent) / "export"


def find_exports(folder: Path, weights: Callable[[], str]) -> list[Exported]:
    """The ONNX files in a folder that `export` made of these weights and kept, the fastest first.

    weights: gives their digest (model.checkpoint.weights_digest), which takes a moment. Raises UserError where the
    report of the export is damaged.
    """
    report = folder / REPORT
    if not report.is_file():
        return []
    content = read_json_file(report, dict)
    if "weights" not in content or content["weights"] != weights():
        return []
    try:
        found = [
            Exported(
                folder / FILES[entry["format"]],
                entry["format"],
                max(entry["clip_difference"], entry["frame_difference"]),
                float(entry["speed"]),
                content["weights"],
            )
            for entry in content["exports"]
            if entry["kept"] and entry["format"] != "safetensors"
        ]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{report} is damaged: export the checkpoint again, or remove it.") from None
    return sorted((each for each in found if each.path.is_file()), key=lambda each: -each.speed)


class OnnxNetwork:
    """What inference.Tagger needs of a network, from an ONNX file: `probabilities`, on the CPU.

    frames: of a window, 0 where the encoder has no time axis. num_classes, softmax: as of the network.
    """

    def __init__(self, session: Any, settings: Config) -> None:
        self.session, self.num_classes, self.softmax = session, settings.classes_num, settings.loss_type == "clip_ce"
        self.source = session.get_inputs()[0].name  # waveform or logmel
        self._frontend: Optional[torch.nn.Module] = None
        if self.source == "logmel":
            self._frontend = encoder_module(settings.encoder).build_frontend(settings)
        self._outputs = [output.name for output in session.get_outputs()]
        timed = "framewise" in self._outputs
        self.frames = session.get_outputs()[self._outputs.index("framewise")].shape[1] if timed else 0

    @torch.inference_mode()
    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, samples) -> (B, K) of the clips, (B, T, K) of the frames, embeddings (B, D).

        The samples are clip_samples of the settings: other lengths raise UserError, inference.Tagger cuts and fills.
        """
        x = waveform.cpu().float()
        if self._frontend is not None:
            x = self._frontend(x)
        shape = self.session.get_inputs()[0].shape
        if list(x.shape[1:]) != shape[1:]:
            raise UserError(f"The ONNX file takes {self.source} of shape {shape}; {list(x.shape)} was given.")
        found = self.session.run(None, {self.source: x.contiguous().numpy()})
        named = {name: torch.from_numpy(value) for name, value in zip(self._outputs, found, strict=True)}
        clipwise = named["clipwise"]
        frames = named.get("framewise", clipwise.new_zeros(len(clipwise), 0, self.num_classes))
        return clipwise, frames, named["embedding"]


@dataclass(frozen=True)
class LoadedOnnx:
    """An ONNX file and what it says about itself."""

    network: OnnxNetwork
    settings: Config
    labels: list[str]
    postprocessing: Optional[dict[str, Any]]  # thresholds and filters, as `calibrate` stored them
    weights: str  # digest of those that it was made from; empty: an older file


def load_onnx(path: str | Path, given: Optional[dict[str, Any]] = None, threads: int = 0) -> LoadedOnnx:
    """Load what `export` wrote. given: settings, as for a checkpoint; threads: 0 lets onnxruntime choose.

    Raises UserError where the file is missing, no export of this project or damaged, where onnxruntime is not
    installed, and where `given` contradicts the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the path of an .onnx file, as export prints it.")
    session = open_session(path, threads)
    found = session.get_modelmeta().custom_metadata_map
    missing = [name for name in ABOUT if name not in found]
    if missing:
        raise UserError(
            f"{path} is no export of this project: its metadata has no {', '.join(missing)}. `python main.py export` "
            f"writes such files from a checkpoint."
        )
    names = (*ABOUT, "postprocessing", "weights")
    about = {name: read_json(path, name, found[name]) for name in names if name in found}
    for name, value in about.items():
        check_entry(path, value, name, ENTRIES.get(name, str))
    settings = resolve(given or {}, checkpoint={**about["settings"], **about["frontend"]})
    check_labels(path, about["labels"], settings.classes_num)
    _check_outputs(path, session, settings)
    network = OnnxNetwork(session, settings)
    return LoadedOnnx(network, settings, about["labels"], about.get("postprocessing"), about.get("weights", ""))


def _check_outputs(path: Path, session: Any, settings: Config) -> None:
    """Raise UserError for a file without the outputs of an export, or with others of their shapes."""
    shapes = {output.name: output.shape[1:] for output in session.get_outputs()}
    classes = settings.classes_num
    wanted: dict[str, list[Optional[int]]] = {"clipwise": [classes], "framewise": [None, classes], "embedding": [None]}
    if "framewise" not in shapes:  # of an encoder without a time axis
        del wanted["framewise"]
    for name, sizes in wanted.items():
        shape = shapes.get(name, ())
        if len(shape) != len(sizes) or any(size not in (None, b) for size, b in zip(sizes, shape, strict=True)):
            raise UserError(
                f"{path} is no export of this project, or damaged: of its outputs {', '.join(shapes)}, {name} has "
                f"the shape {shape}, for {classes} classes."
            )


def open_session(path: Path, threads: int = 0) -> Any:
    """onnxruntime's session of a file, on the CPU. Raises UserError where it cannot be read."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        raise UserError(f"Running {path} needs onnxruntime, which is not installed: {INSTALL}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read by onnxruntime: {reason}") from None
