"""The network as ONNX: from the waveform, from the log-mel spectrogram, and with 8-bit weights.

The graph is that of evaluation, for clips of one length and any number of them. It uses operators of the ONNX standard
only, and what a runtime must know beside it stands in its metadata, as JSON.
"""

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.network import Network
from settings import UserError

OUTPUTS = ("clipwise", "framewise", "embedding")  # as Network.probabilities returns them
OPSET = 20  # the first with GELU
LARGEST_FILE = 2**31 - 1  # bytes that one ONNX file can have
INSTALL = "pip install onnx onnxscript onnxruntime"


class Probabilities(nn.Module):
    """Network.probabilities from the log-mel spectrogram (B, T, F), not normalized; no frames without a time axis."""

    def __init__(self, network: Network, log_mel: Tensor) -> None:
        super().__init__()
        self.network = network.for_export(log_mel)

    def forward(self, log_mel: Tensor) -> tuple[Tensor, ...]:
        network = self.network
        clips, frames, _, embedding = network.forward_head(network.forward_features(network.normalize(log_mel)))
        clipwise = network.class_probabilities(clips)
        return (clipwise, network.class_probabilities(frames), embedding) if network.frames else (clipwise, embedding)


def build_onnx(network: Network, clip_samples: int) -> tuple[Any, Any]:
    """Two ONNX models for clips of clip_samples: waveform -> log-mel spectrogram, and from there to the outputs.

    Inputs: waveform (batch, clip_samples) in [-1, 1], or logmel (batch, T, F). Outputs: logmel, and those of OUTPUTS
    that the encoder has. `join` makes one model of the two. Raises UserError where the packages for it are missing, or
    where the network is too large for one file.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):  # now, not after minutes of work
        require(package)
    frontend = network.onnx_frontend(clip_samples).eval()
    waveform = torch.zeros(2, clip_samples)
    logmel = frontend(waveform)
    outputs = OUTPUTS if network.frames else tuple(name for name in OUTPUTS if name != "framewise")
    body = _trace(Probabilities(network, logmel), logmel, "logmel", outputs)
    if body.ByteSize() > LARGEST_FILE:
        raise UserError(f"The network has {body.ByteSize():,} bytes, an ONNX file has at most {LARGEST_FILE:,}.")
    start = _trace(frontend, waveform, "waveform", ("logmel",))
    return start, body


def join(start: Any, body: Any) -> Any:
    """One ONNX model of a front-end and a network that begins with the log-mel spectrogram."""
    compose = require("onnx").compose
    start = compose.add_prefix(start, "frontend/", rename_inputs=False, rename_outputs=False)
    return compose.merge_models(start, body, io_map=[("logmel", "logmel")])


def _trace(module: nn.Module, example: Tensor, source: str, outputs: tuple[str, ...]) -> Any:
    with _quiet(), torch.no_grad():
        module.eval()(example)  # matrices that are made once, and kept, are made outside of the tracing
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[source],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None, "dynamo=True returns the program"
    model = program.model_proto
    clips = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert clips.dim_param, "a graph for any number of clips: nothing in it may take the number as a constant"
    _forget_sources(model)
    return model


def _forget_sources(model: Any) -> None:
    """Take out what the exporter notes of the code, with the paths of this machine, and of inner shapes.

    Those are inferred anew where they are needed; of a weight that is used twice, the exporter notes a wrong one.
    """
    del model.graph.value_info[:]
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of operators that other packages would bring, and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def quantize(body: Any) -> Any:
    """The model from the log-mel spectrogram with 8-bit weights, one scale a channel; activations are scaled as met.

    The products of the blocks are quantized: nine tenths of the work; so are those of the layers over the frames, where
    there are any. What lies before the patch embedding, it, and the classifier stay float32. Weights take
    7 of the 8 bits, or CPUs without VNNI instructions overflow. Raises UserError for a network without such blocks.
    """
    quantization = require("onnxruntime.quantization")
    nodes = list(body.graph.node)
    operators = [node.op_type for node in nodes]
    if "LayerNormalization" not in operators:
        raise UserError("onnx-int8 is for transformers, and this network is none: leave it out of --formats.")
    last = len(nodes) - operators[::-1].index("LayerNormalization")
    first = next(operators.index(name) for name in ("Conv", "MatMul", "Gemm") if name in operators)
    outside = nodes[: first + 1] + nodes[last:]  # up to the patch embedding, after the last norm
    products = {"MatMul": "", "Gemm": "_MatMul"}  # what onnxruntime adds to the name where it makes a MatMul of a Gemm
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises a preparation that the graph has behind it
    try:
        with tempfile.TemporaryDirectory() as folder:
            quantization.quantize_dynamic(
                body,
                Path(folder) / "quantized.onnx",
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=[n.name + products[n.op_type] for n in outside if n.op_type in products],
                extra_options={"MatMulConstBOnly": True},
            )
            return require("onnx").load(Path(folder) / "quantized.onnx")
    finally:
        logging.root.setLevel(level)


def save_onnx(model: Any, path: Path, about: Mapping[str, Any]) -> None:
    """Write an ONNX model with what describes it (settings, labels, ...) as JSON in its metadata."""
    onnx = require("onnx")
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def require(package: str) -> Any:
    """Import a package that not everyone has. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"This needs the package {error.name}, which is not installed: {INSTALL}") from None
