"""Encoders of 10 s at 16 kHz with a frame every 40 ms: what they share, their heads and their files.

Schmid et al.: Effective Pre-Training of Audio Transformers for Sound Event Detection, ICASSP 2025, arXiv 2409.09546.
Shapes: B clips, F bands, T frames, L tokens, D channels, K classes.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from model.foreign import Weights
from model.frontend import Analysis, CentredLogMel, FillUp, KaldiFbank, resizing_matrix
from model.heads import FrameRNN, SequenceHead
from model.network import Layer, Network, Outputs
from model.registry import ENCODERS, read_options
from settings import Config, UserError

Bank = KaldiFbank | CentredLogMel
SAMPLE_RATE = 16000
FRAME_SAMPLES = 640  # 40 ms
LONGEST = 10 * SAMPLE_RATE  # samples: what the tables of positions are for
HEADS = ("strong_head.", "weak_head.", "seq_model.")  # beginnings of keys that are not the encoder's
HEAD_OF_LOSS = {"frame_bce": "strong", "weak_strong_bce": "both"}  # head = auto; of a loss of clips: weak
LEAST_SHARE = 1e-7  # of a frame in head = attention


class FrameNetwork(Network):
    """An encoder of tokens, brought to a frame every 40 ms, with the published heads and their state-dict names.

    A clip shorter than clip_samples is filled up with zeros: fewer tokens would be stretched over all the frames.

    head, K logits each: strong, a linear layer on each frame, the clip has its largest frame's; weak, a linear layer on
    the mean of the frames, and on each frame; both, strong for the frames and weak for the clip, as published;
    attention: strong for the frames, the clip is their mean, weighted by a softmax over the classes of weak's logits.
    sequence_head: gru and lstm replace the frames by theirs (2 * sequence_dim channels), attention and transformer add
    to them. Raises UserError for a clip_samples that is no number of whole frames, or beyond 10 s.
    """

    classifier = ("strong_head.", "weak_head.")
    additions = ("seq_model.",)
    mean: ClassVar[float]  # of the log-mel spectrogram
    scale: ClassVar[float]  # what it is divided by, without its mean

    def __init__(
        self,
        analysis: Bank,
        channels: int,
        *,
        num_classes: int = 527,
        clip_samples: int = LONGEST,
        softmax: bool = False,
        head: str = "both",
        sequence_head: str = "none",
        sequence_layers: int = 2,
        sequence_dim: int = 2048,
    ) -> None:
        super().__init__()
        if clip_samples % FRAME_SAMPLES or clip_samples > LONGEST:
            raise UserError(
                f"clip_samples = {clip_samples} is not allowed: give a multiple of {FRAME_SAMPLES} (frames of 40 ms), "
                f"up to {LONGEST} (10 s). Longer recordings are cut into windows."
            )
        self.sample_rate, self.clip_samples, self.num_classes = SAMPLE_RATE, clip_samples, num_classes
        self.frames, self.frame_seconds = clip_samples // FRAME_SAMPLES, FRAME_SAMPLES / SAMPLE_RATE
        self.softmax, self.head = softmax, head
        self.spectrum = Padded(analysis, clip_samples)
        self.seq_model: nn.Module | None = None
        if sequence_head in ("gru", "lstm"):
            self.seq_model = FrameRNN(sequence_head, channels, layers=sequence_layers, dim=sequence_dim)
            channels = 2 * sequence_dim
        elif sequence_head != "none":
            sizes = {"channels": channels, "layers": sequence_layers, "dim": sequence_dim, "steps": self.frames}
            self.seq_model = SequenceHead(sequence_head, **sizes)  # type: ignore[arg-type]
        self.channels = channels
        self.strong_head = None if head == "weak" else nn.Linear(channels, num_classes)
        self.weak_head = None if head == "strong" else nn.Linear(channels, num_classes)

    @abstractmethod
    def encode(self, features: Tensor) -> Tensor:
        """(B, F, T) features -> (B, L, D) tokens, in the order of time."""

    @abstractmethod
    def encoder_layers(self) -> list[Layer]:
        """As layers, of the encoder alone: what lies below the blocks, then an entry a block."""

    def log_mel(self, waveform: Tensor) -> Tensor:
        return self.spectrum(waveform)

    def normalize(self, log_mel: Tensor) -> Tensor:
        return ((log_mel - self.mean) / self.scale).transpose(1, 2)

    def decibel(self) -> Tensor:
        analysis = self.spectrum.analysis
        return analysis.get_buffer("bands").new_full((1,), analysis.decibel / self.scale)

    def forward_features(self, features: Tensor) -> Tensor:
        return self.encode(features)

    def forward_head(self, maps: Tensor) -> Outputs:
        """(B, L, D) tokens -> Outputs."""
        frames = to_steps(maps, self.frames)
        if isinstance(self.seq_model, SequenceHead):
            frames = self.seq_model(frames.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        elif self.seq_model is not None:
            frames = self.seq_model(frames)
        frames = frames.float()
        embedding = frames.mean(dim=1)
        strong, weak = self.strong_head, self.weak_head
        logits = (weak if strong is None else strong)(frames).float()  # type: ignore[misc]
        if self.head == "strong":
            clips = logits.amax(dim=1)
        elif self.head == "attention":
            assert weak is not None
            shares = weak(frames).float().softmax(dim=-1).clamp(min=LEAST_SHARE)
            clips = torch.logit((logits.sigmoid() * shares).sum(dim=1) / shares.sum(dim=1), eps=LEAST_SHARE)
        else:
            assert weak is not None
            clips = weak(embedding).float()
        return Outputs(clips, logits, frames, embedding)

    def layers(self) -> list[Layer]:
        below, *blocks = self.encoder_layers()
        heads = [part for part in (self.seq_model, self.strong_head, self.weak_head) if part is not None]
        return [[self.spectrum, *below], *blocks, heads]

    def onnx_frontend(self, samples: int) -> nn.Module:
        return self.spectrum.analysis.traced(samples)


class Padded(nn.Module):
    """(B, samples) -> (B, T, F) log-mel spectrogram of `samples`, those that a clip lacks being zero."""

    def __init__(self, analysis: Bank, samples: int) -> None:
        super().__init__()
        self.fill, self.analysis = FillUp(samples), analysis

    def forward(self, waveform: Tensor) -> Tensor:
        return self.analysis(self.fill(waveform))


def to_steps(tokens: Tensor, steps: int) -> Tensor:
    """(B, L, D) -> (B, steps, D): means of neighbours where there are more tokens, straight lines where fewer."""
    if tokens.shape[1] == steps:
        return tokens
    mode: Literal["mean", "bilinear"] = "mean" if tokens.shape[1] > steps else "bilinear"
    with torch.autocast(tokens.device.type, enabled=False):
        return resizing_matrix(tokens.shape[1], steps, tokens.device, mode) @ tokens.float()


# --- settings and files -----------------------------------------------------------------------------------------------


def builders(
    network: type[FrameNetwork], bank: Callable[[], Bank]
) -> tuple[Callable[[Config], FrameNetwork], Callable[[Config], nn.Module], Callable[[Config], Analysis]]:
    """What the registry asks of an encoder's file: build, build_frontend, build_analysis. bank: makes its log-mel."""

    def build(settings: Config) -> FrameNetwork:
        return network(**network_options(settings))

    def build_frontend(settings: Config) -> nn.Module:
        return Padded(bank(), settings.clip_samples)

    def build_analysis(settings: Config) -> Analysis:
        return bank().analysis()

    return build, build_frontend, build_analysis


def network_options(settings: Config) -> dict[str, Any]:
    """What a FrameNetwork is built with: the options of its row, and the settings. Raises UserError for wrong ones."""
    options: dict[str, Any] = read_options(settings.encoder, settings.encoder_options)
    if settings.sample_rate != SAMPLE_RATE:
        title = ENCODERS[settings.encoder].title
        raise UserError(f"sample_rate = {settings.sample_rate} is not allowed: {title} takes {SAMPLE_RATE} Hz.")
    if options["head"] == "auto":
        options["head"] = HEAD_OF_LOSS.get(settings.loss_type, "weak")
    return {
        "num_classes": settings.classes_num,
        "clip_samples": settings.clip_samples,
        "softmax": settings.loss_type == "clip_ce",
        "sequence_head": settings.sequence_head,
        "sequence_layers": settings.sequence_layers,
        "sequence_dim": settings.sequence_dim,
        **options,
    }


def check_sizes(dim: int, depth: int, heads: int, drop_layers: int) -> None:
    """Raise UserError for sizes of a transformer that do not fit together."""
    if min(dim, depth, heads) < 1 or dim % heads or depth > 100 or not 0 <= drop_layers < depth:
        raise UserError(
            f"encoder_options: dim = {dim} must be a multiple of heads = {heads}, depth = {depth} 1 to 100, and "
            f"drop_layers = {drop_layers} less than depth."
        )


def described(title: str, prefix: str, weights: Mapping[str, Tensor], sizes: Mapping[str, float]) -> Weights:
    """Weights with the encoder's prefix where they lack it, and the settings that follow from their shapes.

    prefix: of the encoder's keys, as "beats."; sizes: encoder_options. A file has a strong head, a weak one, both, or,
    after self-supervised training, none; loss_type is what such heads learn by.
    """
    found = {key if key.startswith((prefix, *HEADS)) else prefix + key: value for key, value in weights.items()}
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": {k: f"{v:g}" for k, v in sizes.items()}}
    classes = {name: len(found[f"{name}.weight"]) for name in ("strong_head", "weak_head") if f"{name}.weight" in found}
    if classes:
        both = len(classes) == 2 and len(set(classes.values())) == 1
        settings["classes_num"] = classes.get("strong_head", classes.get("weak_head"))
        settings["loss_type"] = "weak_strong_bce" if both else "frame_bce" if "strong_head" in classes else "clip_bce"
    recurrent = [key for key in found if key.startswith("seq_model.rnn.weight_hh_l") and not key.endswith("_reverse")]
    if recurrent:
        lstm = "seq_model.embedding.weight" in found
        dim = found[recurrent[0]].shape[1]
        settings |= {"sequence_head": "lstm" if lstm else "gru", "sequence_layers": len(recurrent), "sequence_dim": dim}
    return Weights(title, found, settings)


def transformer_sizes(weights: Mapping[str, Tensor], blocks: str, dim: int) -> dict[str, int]:
    """Options of a transformer whose heads have 64 channels. blocks: what stands before their numbers in the keys."""
    numbers = {int(found[1]) for key in weights if (found := re.search(rf"(?:^|\.){blocks}\.(\d+)\.", key))}
    return {"dim": dim, "depth": len(numbers), "heads": max(1, dim // 64)}


def find(weights: Mapping[str, Tensor], ending: str) -> Tensor:
    """The tensor whose key ends so. Raises KeyError."""
    try:
        return next(value for key, value in weights.items() if key.endswith(ending))
    except StopIteration:
        raise KeyError(ending) from None
