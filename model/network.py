"""The contract of an encoder: what every command may ask of a network, and what all networks share.

Shapes: B clips, F bands, T frames, K classes, D channels.
"""

import copy
import ctypes
import os
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple, Optional

import torch
import torchaudio
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Layer = Sequence[nn.Module | nn.Parameter]

PROBABILITY_TOLERANCE = 5e-3  # largest difference of a probability that automatic choices accept for speed
ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA"  # variable of the environment by which oneDNN leaves out newer instructions

# Of glibc's mallopt: how many blocks may be mapped on their own, and how much free memory is given back.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class Outputs(NamedTuple):
    """What a network computes of B clips. T is 0 for an encoder without a time axis."""

    clip_logits: Tensor  # (B, K)
    frame_logits: Tensor  # (B, T, K)
    frames: Tensor  # (B, T, D), what the frame scores are made of
    embedding: Tensor  # (B, D)


class Network(nn.Module, ABC):
    """An encoder with its front-end and head.

    sample_rate: of its input in Hz. clip_samples: its longest input. frames, frame_seconds: its time axis, which covers
    clip_samples (0 and 0.0: none). channels: D. softmax: whether the probabilities of the classes sum to 1, of a clip
    and of each frame (trained by cross entropy).
    """

    sample_rate: int
    clip_samples: int
    frames: int
    frame_seconds: float
    channels: int
    num_classes: int
    softmax: bool

    # Beginnings of state-dict keys: what depends on the classes; what published networks do not have; constants of the
    # front-end; what weights of images do not bring.
    classifier: ClassVar[tuple[str, ...]]
    additions: ClassVar[tuple[str, ...]] = ()
    frontend: ClassVar[tuple[str, ...]] = ()
    not_in_images: ClassVar[tuple[str, ...]] = ()
    # Settings of the front-end that are sizes of weights: fine-tuning takes them from the file.
    frontend_sizes: ClassVar[tuple[str, ...]] = ()
    # Endings of state-dict keys: buffers that follow from the sizes, and are never taken from a file.
    computed: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._frozen: list[nn.Module] = []

    @abstractmethod
    def log_mel(self, waveform: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, T, F) log-mel spectrogram before its normalization."""

    @abstractmethod
    def normalize(self, log_mel: Tensor) -> Tensor:
        """(B, T, F) log-mel spectrogram -> (B, F, T) features."""

    @abstractmethod
    def forward_features(self, features: Tensor) -> Any:
        """(B, F, T) features -> the encoder's own maps, which forward_head takes."""

    @abstractmethod
    def forward_head(self, maps: Any) -> Outputs:
        """The encoder's own maps -> clip and frame logits, embeddings."""

    @abstractmethod
    def layers(self) -> list[Layer]:
        """All modules and parameters from below: the input, one entry a block, last the classifier.

        Freezing, layer-wise learning rates, compilation and recomputation follow it.
        """

    @abstractmethod
    def decibel(self) -> Tensor:
        """(F,) or (1,): what one decibel more of sound adds to the features."""

    def features(self, waveform: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, F, T) normalized features. float32 under autocast, too."""
        with torch.autocast(waveform.device.type, enabled=False):
            return self.normalize(self.log_mel(waveform.float()))

    def forward(self, waveform: Tensor) -> Outputs:
        """(B, samples) in [-1, 1], at most clip_samples -> Outputs. Nothing is augmented here."""
        return self.forward_head(self.forward_features(self.features(waveform)))

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, samples) -> probabilities (B, K) of the clips and (B, T, K) of the frames, embeddings (B, D)."""
        clips, frames, _, embedding = self(waveform)
        return self.class_probabilities(clips), self.class_probabilities(frames), embedding

    def outputs_of_clip(self, embedding: Tensor, logits: Tensor) -> Outputs:
        """(B, D), (B, K) -> Outputs without frames."""
        sizes = (embedding.shape[0], 0, logits.shape[1]), (embedding.shape[0], 0, embedding.shape[1])
        no_logits, no_frames = (embedding.new_zeros(size, dtype=torch.float32) for size in sizes)
        return Outputs(logits.float(), no_logits, no_frames, embedding.float())

    def class_probabilities(self, logits: Tensor) -> Tensor:
        """(..., K) logits of clips or frames -> (..., K): a softmax over the classes, or a sigmoid of each."""
        return logits.softmax(dim=-1) if self.softmax else logits.sigmoid()

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that no output depends on."""
        return []

    def parameters_by_layer(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Each parameter with the number of its layer, from 0."""
        for number, layer in enumerate(self.layers()):
            for part in layer:
                for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                    yield number, parameter

    def blocks(self) -> list[nn.Module]:
        """The modules of the layers between the input and the classifier."""
        return [part for layer in self.layers()[1:-1] for part in layer if isinstance(part, nn.Module)]

    def compiled_parts(self) -> list[nn.Module]:
        """What torch.compile is applied to, each by itself: the blocks, where the arithmetic is."""
        return self.blocks()

    def freeze_backbone(self, *, from_images: bool = False) -> None:
        """Train the classifier alone. What lies below it stays in eval mode.

        from_images: also train the parts that weights of images do not bring.
        """
        last = len(self.layers()) - 1
        learning = {parameter for number, parameter in self.parameters_by_layer() if number == last}
        for name, parameter in self.named_parameters():
            if parameter not in learning and not (from_images and name.startswith(self.not_in_images)):
                parameter.requires_grad_(False)
        modules = [part for layer in self.layers()[:-1] for part in layer if isinstance(part, nn.Module)]
        self._frozen = [m for m in modules if not any(p.requires_grad for p in m.parameters())]
        self.train(self.training)

    def train(self, mode: bool = True) -> "Network":
        """As every module's, but a frozen backbone stays in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for block in self.blocks():
            if enabled:
                block.forward = partial(_recomputed, block)
            else:
                block.__dict__.pop("forward", None)

    def adapted(
        self, state_dict: Mapping[str, Tensor], settings: Optional[Mapping[str, Any]] = None
    ) -> dict[str, Tensor]:
        """Another network's weights for fine-tuning, in this one's shapes where that can be; here: as they are.

        settings: of the other network, where its file holds them.
        """
        return dict(state_dict)

    def misfit(self, state_dict: Mapping[str, Tensor], *, reshaped: bool, images: bool) -> str:
        """What to do about weights that do not fit. reshaped: whether some have other shapes; images: of images."""
        if reshaped:
            return "Its network has other sizes: set encoder_options as it was trained."
        return "It seems to hold another architecture: set encoder as it was trained."

    def onnx_frontend(self, samples: int) -> nn.Module:
        """log_mel for clips of so many samples, in operators of the ONNX standard."""
        raise NotImplementedError

    def for_export(self, log_mel: Tensor) -> "Network":
        """A copy in eval mode on the CPU that can be traced. log_mel: (B, T, F), an example of its input."""
        network = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        network.set_gradient_checkpointing(False)
        return network


def has_bf16(device_type: str) -> bool:
    """Whether cuda or the cpu has instructions for bfloat16, without which it is slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    limit = os.environ.get(ONEDNN_LIMIT, "ALL")
    allowed = re.search("ALL|DEFAULT|BF16|FP16|AMX|AVX10", limit.upper()) is not None
    found = torch.cpu.get_capabilities()
    return allowed and any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: each batch asks for the same large blocks again, whose pages need not fault anew.

    It holds for the process, until its end. No effect with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _recomputed(block: nn.Module, *inputs: Any) -> Any:
    """`block`'s forward pass, whose activations are not kept for the backward pass."""
    forward = partial(type(block).forward, block)
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


@lru_cache(maxsize=8)
def _resampler(rate: int, wanted: int, device: torch.device) -> nn.Module:
    with torch.inference_mode(False):  # its kernel may be used in training later
        return torchaudio.transforms.Resample(rate, wanted).to(device)


def resample(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """(B, samples) float at `rate` -> the same sound at `wanted` Hz, on the device, by torchaudio's windowed sinc."""
    return waveform if rate == wanted else _resampler(rate, wanted, waveform.device)(waveform)
