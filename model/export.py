"""The network as ONNX: from the waveform, from the log-mel spectrogram, and with 8-bit weights.

The graph is that of evaluation, for clips of one length and any number of them. It uses operators of the ONNX standard
only, and what a runtime must know beside it stands in its metadata, as JSON.
"""

import copy
import importlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model.encoders.htsat import HTSAT_Swin_Transformer
from model.frontend import POWER_FLOOR, bicubic_matrix
from model.layers.swin import SwinBlock, WindowAttention, attend
from settings import UserError

OUTPUTS = ("clipwise", "framewise", "embedding")  # as HTSAT_Swin_Transformer.probabilities returns them
OPSET = 20  # the first with GELU
LARGEST_FILE = 2**31 - 1  # bytes that one ONNX file can have
INSTALL = "pip install onnx onnxscript onnxruntime"


class GraphAttention(nn.Module):
    """WindowAttention of evaluation: its term of bias and mask is a constant, and its products are written out."""

    def __init__(self, attention: WindowAttention, mask: Optional[Tensor]) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj
        self.register_buffer("term", attention.term(mask).detach().clone())

    def forward(
        self, x: Tensor, windows: int, mask: Optional[Tensor], need_weights: bool = False
    ) -> tuple[Tensor, Optional[Tensor]]:
        """As WindowAttention; the mask is in the term already."""
        qkv = rearrange(self.qkv(x), "b (w n) (three h d) -> three (b w) h n d", w=windows, three=3, h=self.heads)
        query, key, value = qkv.unbind(0)
        mixed, weights = attend(query, key, value, self.get_buffer("term"))
        mixed = rearrange(mixed, "(b w) h n d -> b (w n) (h d)", w=windows)
        return self.proj(mixed), weights if need_weights else None


class Probabilities(nn.Module):
    """HTSAT_Swin_Transformer.probabilities as a forward pass, from the log-mel spectrogram (B, T, F) in dB.

    The spectrogram is as LogMel gives it, before the normalization over bands, which is a part of this graph.
    """

    def __init__(self, network: HTSAT_Swin_Transformer) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
        self.network.spectrogram_extractor = nn.Identity()  # type: ignore[assignment]
        self.network.logmel_extractor = nn.Identity()  # type: ignore[assignment]
        self.network.frames_per_step = 1  # the repeats of a step are left out
        for block in self.network.modules():
            if isinstance(block, SwinBlock):
                block.attn = GraphAttention(block.attn, block.attn_mask)  # type: ignore[assignment]

    def forward(self, logmel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.network.probabilities(logmel)


class Frontend(nn.Module):
    """(B, samples) -> (B, T, F), the log-mel spectrogram in dB, with the window and the filterbank of a network.

    The Fourier transform of N samples is taken in two steps of about sqrt(N) each (Cooley and Tukey 1965), as products
    with constant matrices: that takes an eighth of the operations of the convolution that published networks have, and
    onnxruntime half its time; ONNX's operator STFT is no faster there than the convolution, and fewer runtimes know it.
    With n = n1 R2 + n2 and k = k1 + R1 k2: X[k] = sum over n2 of exp(-2 pi i n2 k / N) (sum over n1 of
    exp(-2 pi i n1 k1 / R1) x[n]). k1 goes up to R1 / 2: the other frequencies mirror these, as the samples are real.
    """

    def __init__(self, network: HTSAT_Swin_Transformer, samples: int) -> None:
        super().__init__()
        stft, bands = network.spectrogram_extractor, network.logmel_extractor.melW.detach().cpu()
        window = stft.stft.window.detach().cpu()
        size, hop = len(window), stft.hop_size
        second = size // max(k for k in range(1, math.isqrt(size) + 1) if size % k == 0)
        first = size // second
        self.pad, self.block = size // 2, math.gcd(size, hop)  # the frames are put together from whole blocks
        self.frames = (samples + 2 * self.pad - size) // hop + 1
        starts = torch.arange(self.frames) * (hop // self.block)
        self.register_buffer("blocks", (starts[:, None] + torch.arange(size // self.block)).flatten())
        self.register_buffer("window", window.reshape(first, second).T.contiguous())

        k1, k2 = torch.arange(first // 2 + 1), torch.arange(second)
        angle = torch.outer(torch.arange(first), k1).double() * (2 * math.pi / first)
        self.register_buffer("first", torch.cat([angle.cos(), -angle.sin()], dim=1).float())  # (n1, real | imaginary)
        frequency = k1[:, None] + first * k2  # (k1, k2)
        angle = (torch.arange(second)[:, None] * frequency[:, None] % size).double() * (2 * math.pi / size)
        real, imaginary = angle.cos(), -angle.sin()  # (k1, n2, k2)
        rows = torch.cat([real, imaginary], dim=2), torch.cat([-imaginary, real], dim=2)
        self.register_buffer("second", torch.cat(rows, dim=1).float())

        mirrored = torch.minimum(frequency, size - frequency).flatten()
        twice = torch.tensor([int(k) in mirrored[:place] for place, k in enumerate(mirrored)])
        weights = torch.where(twice[:, None], 0.0, bands[mirrored])  # each frequency counts once
        self.register_buffer("bands", weights.unflatten(0, frequency.shape).contiguous())  # (k1, k2, F)

    def forward(self, waveform: Tensor) -> Tensor:
        padded = F.pad(waveform[:, None], (self.pad, self.pad), mode="reflect")[:, 0]
        whole = padded.shape[1] // self.block * self.block
        blocks = padded[:, :whole].unflatten(1, (-1, self.block)).index_select(1, self.get_buffer("blocks"))
        window = self.get_buffer("window")  # (n2, n1)
        samples = blocks.reshape(-1, self.frames, window.shape[1], window.shape[0])
        samples = samples.transpose(2, 3) * window  # (B, T, n2, n1)
        short = samples @ self.get_buffer("first")
        short = rearrange(short, "b t n2 (c k1) -> b k1 t (c n2)", c=2)
        real, imaginary = (short @ self.get_buffer("second")).chunk(2, dim=-1)  # (B, k1, T, k2)
        power = ((real**2 + imaginary**2) @ self.get_buffer("bands")).sum(dim=1)
        return 10.0 * torch.log10(torch.clamp(power, min=POWER_FLOOR))


def build_onnx(network: HTSAT_Swin_Transformer, clip_samples: int) -> tuple[Any, Any]:
    """Two ONNX models for clips of clip_samples: waveform -> log-mel spectrogram, and from there to the outputs.

    Inputs: waveform (batch, clip_samples) in [-1, 1], or logmel (batch, T, F) in dB. Outputs: logmel, and OUTPUTS.
    `join` makes one model of the two. Raises UserError where the packages for it are missing, or where the network is
    too large for one file.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):  # told now, not after minutes of work
        require(package)
    frontend = Frontend(network, clip_samples).eval()
    waveform = torch.zeros(2, clip_samples)
    logmel = frontend(waveform)
    if logmel.shape[1] != network.image_frames:
        bicubic_matrix(logmel.shape[1], network.image_frames, torch.device("cpu"))  # made and kept outside of tracing
    if logmel.shape[2] != network.image_bands:
        bicubic_matrix(logmel.shape[2], network.image_bands, torch.device("cpu"))
    body = _trace(Probabilities(network), logmel, "logmel", OUTPUTS)
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
        program = torch.onnx.export(
            module.eval(),
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

    The products of the Swin blocks and the merging are quantized: nine tenths of the work; so are those of the layers
    over the steps, where there are any. The stretch in time, patch embedding and classifier stay float32. Weights take
    7 of the 8 bits, or CPUs without VNNI instructions overflow.
    """
    quantization = require("onnxruntime.quantization")
    nodes = list(body.graph.node)
    operators = [node.op_type for node in nodes]
    last = len(nodes) - operators[::-1].index("LayerNormalization")
    outside = nodes[: operators.index("Conv")] + nodes[last:]  # before the patch embedding, after the last norm
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
