"""Encoders of clips at 16 kHz: their two front-ends, their time axis, their options.

Li, Qu, Huang, Metze: AudioTagging Done Right, Interspeech 2022, arXiv 2203.13448. Shapes: B clips, F bands, T frames of
the front-end, S steps of the encoder, D channels, K classes.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.foreign import Weights
from model.frontend import Analysis, KaldiFbank, SlaneyDecibels
from model.heads import LEAST, POOLINGS, probabilities
from model.layers.readout import frame_samples
from model.network import Network, Outputs
from model.registry import ENCODERS, read_options
from settings import Config, UserError

SAMPLE_RATE = 16000
BANDS = {"fbank128": 128, "logmel64": 64}
# Mean and deviation of the log-mel spectrogram: AST's own of AudioSet; AudioTagging Done Right's without augmentation.
AUDIOSET = {"fbank128": (-4.2677393, 4.5689974), "logmel64": (-38.193954, 45.802143)}
SECONDS = (10, 5, 1)  # of published networks' clips


class ClipNetwork(Network):
    """An encoder whose input is fbank128 or logmel64 (frontend), and whose clip score is the one that is trained.

    clip_samples: longest input at 16 kHz, which decides T. mean, deviation: of the log-mel spectrogram, None:
    AudioSet's. softmax: clip probabilities sum to 1. Without set_time_axis, it has no frames.
    """

    def __init__(
        self,
        *,
        num_classes: int = 527,
        clip_samples: int = 10 * SAMPLE_RATE,
        frontend: str = "fbank128",
        mean: Optional[float] = None,
        deviation: Optional[float] = None,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.sample_rate, self.clip_samples = SAMPLE_RATE, clip_samples
        self.num_classes, self.softmax = num_classes, softmax
        self.frames, self.frame_seconds = 0, 0.0
        usual = AUDIOSET[frontend]
        self.mean, self.deviation = usual[0] if mean is None else mean, usual[1] if deviation is None else deviation
        if not self.deviation > 0:
            raise UserError(f"encoder_options: deviation = {self.deviation} must be above 0.")
        self.spectrum = Spectrum(frontend, clip_samples)

    def set_time_axis(self, steps: int, step_frames: int) -> None:
        """The frames, of an encoder with so many steps of so many frames of the front-end each.

        The steps go on behind the clip, where the spectrogram is filled up, and need not divide it: a frame is the
        longest stretch that divides both a step and the clip, and has the scores of its step. Raises UserError as
        frame_samples.
        """
        step = step_frames * self.spectrum.analysis.hop
        frame = frame_samples(step, steps, self.clip_samples)
        self.frames, self.frame_seconds = self.clip_samples // frame, frame / SAMPLE_RATE
        step_of_frame = (torch.arange(self.frames) * frame // step).clamp(max=steps - 1)
        self.register_buffer("step_of_frame", step_of_frame, persistent=False)

    def log_mel(self, waveform: Tensor) -> Tensor:
        if waveform.shape[1] > self.clip_samples:
            raise UserError(
                f"A waveform of {waveform.shape[1]} samples is longer than the network's {self.clip_samples}: cut it "
                f"into windows."
            )
        return self.spectrum(waveform)

    def normalize(self, log_mel: Tensor) -> Tensor:
        return ((log_mel - self.mean) / (2 * self.deviation)).transpose(1, 2)

    def decibel(self) -> Tensor:
        analysis = self.spectrum.analysis
        return analysis.get_buffer("bands").new_full((1,), analysis.decibel / (2 * self.deviation))

    def onnx_frontend(self, samples: int) -> nn.Module:
        spectrum = copy.deepcopy(self.spectrum).cpu()
        spectrum.analysis = spectrum.analysis.traced(samples)  # type: ignore[assignment]
        return spectrum

    def outputs_of_steps(self, steps: Tensor, logits: Tensor, clips: Tensor) -> Outputs:
        """(B, S, D), their class logits (B, S, K), and the probabilities (B, K) pooled from them -> Outputs.

        The clip has the logit of its probability under any loss: where all steps have the same logits, it has them too.
        """
        of_frame = self.get_buffer("step_of_frame")
        frames = steps[:, of_frame].float()
        clips = clips.float().clamp(LEAST, 1 - LEAST)
        return Outputs(torch.log(clips / (1 - clips)), logits[:, of_frame].float(), frames, frames.mean(dim=1))


class PooledNetwork(ClipNetwork):
    """A ClipNetwork with class scores of each step by fc_prob, pooled over time; fc_att is there for pooling = att."""

    classifier = ("fc_prob.", "fc_att.")

    def __init__(self, channels: int, *, pooling: str = "att", **shared: Any) -> None:
        super().__init__(**shared)
        if channels < 1:
            raise UserError(f"encoder_options: dim = {channels} must be at least 1.")
        self.channels, self.pooling = channels, pooling
        self.fc_prob = nn.Linear(channels, self.num_classes)
        self.fc_att = nn.Linear(channels, self.num_classes) if pooling == "att" else None
        for layer in self.heads():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def heads(self) -> list[nn.Linear]:
        return [self.fc_prob] if self.fc_att is None else [self.fc_prob, self.fc_att]

    def forward_head(self, maps: Tensor) -> Outputs:
        """(B, S, D) -> Outputs."""
        logits = self.fc_prob(maps)
        weights = logits if self.fc_att is None else self.fc_att(maps)
        return self.outputs_of_steps(maps, logits, POOLINGS[self.pooling](probabilities(logits), weights))

    def misfit(self, state_dict: Mapping[str, Tensor], *, reshaped: bool, images: bool) -> str:
        if self.fc_att is not None and "fc_prob.weight" in state_dict and "fc_att.weight" not in state_dict:
            return "It has no attention pooling: set encoder_options to pooling = max, ave, lin or exp, as in training."
        return super().misfit(state_dict, reshaped=reshaped, images=images)


class Spectrum(nn.Module):
    """(B, samples) -> (B, T, F) log-mel spectrogram; the clip's mean is subtracted first.

    A clip shorter than `samples` is filled up behind with frames of the value 0, which is a loud one, as published.
    """

    def __init__(self, frontend: str, samples: int) -> None:
        super().__init__()
        bands = BANDS[frontend]
        self.analysis = KaldiFbank(bands) if frontend == "fbank128" else SlaneyDecibels(bands, SAMPLE_RATE)
        self.frames = frame_count(frontend, samples)

    def forward(self, waveform: Tensor) -> Tensor:
        found = self.analysis(waveform - waveform.mean(dim=1, keepdim=True))[:, : self.frames]
        return F.pad(found, (0, 0, 0, self.frames - found.shape[1]))


def frame_count(frontend: str, samples: int) -> int:
    """T of a network for clips of so many samples: 1024, 512 and 128 frames of fbank128 for 10, 5 and 1 s."""
    if frontend == "fbank128":
        return -(-(1 + (samples - KaldiFbank.length) // KaldiFbank.hop) // 128) * 128
    return samples // SlaneyDecibels.hop


# --- settings and files -----------------------------------------------------------------------------------------------


def clip_options(settings: Config) -> dict[str, Any]:
    """What a ClipNetwork is built with: the options of its row, and the settings. Raises UserError for wrong ones."""
    row = ENCODERS[settings.encoder]
    options: dict[str, Any] = read_options(settings.encoder, settings.encoder_options)
    if settings.sequence_head != "none":
        raise UserError(
            f"sequence_head = {settings.sequence_head} is not allowed: {row.title} has "
            f"{'no time axis' if row.frame_seconds is None else 'its own layers over time'}."
        )
    if settings.sample_rate != SAMPLE_RATE:
        raise UserError(f"sample_rate = {settings.sample_rate} is not allowed: {row.title} takes {SAMPLE_RATE} Hz.")
    for name, value in options.items():
        if name.endswith("dropout") and not 0 <= value < 1:
            raise UserError(f"encoder_options: {name} = {value} must be 0 or more, and below 1.")
    return {
        "num_classes": settings.classes_num,
        "clip_samples": settings.clip_samples,
        "softmax": settings.loss_type == "clip_ce",
        **options,
    }


def build_spectrum(settings: Config) -> Spectrum:
    """Network.log_mel alone, without the network."""
    return Spectrum(str(read_options(settings.encoder, settings.encoder_options)["frontend"]), settings.clip_samples)


def build_analysis(settings: Config) -> Analysis:
    """What the front-end measures, for pictures."""
    return build_spectrum(settings).analysis.analysis()


def described(
    weights: Mapping[str, Tensor], encoder: str, bands: int, frames: Optional[int] = None, **sizes: object
) -> Weights:
    """Published weights, with the settings that follow from their shapes.

    bands, frames: F and, where it is known, T; sizes: encoder_options. Raises KeyError for bands of no front-end.
    """
    frontend = {count: name for name, count in BANDS.items()}[bands]
    options = {"frontend": frontend, **{name: str(size) for name, size in sizes.items()}}
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": options}
    lengths = {frame_count(frontend, seconds * SAMPLE_RATE): seconds * SAMPLE_RATE for seconds in SECONDS}
    if frames in lengths:
        settings["clip_samples"] = lengths[frames]
    return Weights(ENCODERS[encoder].title, dict(weights), settings)


def count_blocks(weights: Mapping[str, Tensor], beginning: str) -> int:
    """How many numbers follow a beginning in the keys."""
    return len({found[1] for key in weights if (found := re.match(rf"{re.escape(beginning)}(\d+)\.", key))})
