"""Cnn14 of PANNs: six blocks of 3 x 3 convolutions on HTS-AT's log-mel spectrogram.

Kong, Cao, Iqbal, Wang, Wang, Plumbley: PANNs: Large-Scale Pretrained Audio Neural Networks for Audio Pattern
Recognition, TASLP 2020, arXiv 1912.10211. Shapes: B clips, F bands, T frames, S steps of 320 ms, C and D channels, K
classes.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.foreign import Weights
from model.frontend import Analysis, BandNorm, FillUp, LogMel, Spectrogram, TracedLogMel
from model.layers.readout import frame_samples
from model.network import Layer, Network, Outputs
from model.registry import ENCODERS, read_options
from settings import Config, UserError

SAMPLE_RATE = 32000
WINDOW, HOP, BANDS = 1024, 320, 64  # samples, samples, mel bands
FMIN, FMAX = 50.0, 14000.0  # Hz
CHANNELS, BLOCKS = 64, 6  # of the first block, doubled by each further one
STEP = 2 ** (BLOCKS - 1)  # spectrogram frames, halved behind each block but the last


class Cnn14(Network):
    """The published network, with its state-dict names and shapes.

    pooling: max_mean, Cnn14: the clip's features are the sum of the maximum and the mean over time, and there are no
    frame scores; decision_max, Cnn14_DecisionLevelMax: each step has scores, which last for its frames, and the clip
    has the largest. clip_samples: longest input; shorter ones are filled up with zeros. width: factor of the channels.
    Raises UserError for sizes that do not fit together.
    """

    classifier = ("fc_audioset.",)
    frontend = ("spectrogram_extractor.", "logmel_extractor.")

    def __init__(
        self,
        *,
        num_classes: int = 527,
        clip_samples: int = 10 * SAMPLE_RATE,
        pooling: str = "max_mean",
        width: float = 1.0,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        _check(clip_samples, width)
        channels = [max(1, round(width * CHANNELS)) * 2**number for number in range(BLOCKS)]
        self.sample_rate, self.clip_samples, self.num_classes = SAMPLE_RATE, clip_samples, num_classes
        self.softmax, self.pooling, self.channels = softmax, pooling, channels[-1]
        self.frames, self.frame_seconds = 0, 0.0
        if pooling == "decision_max":
            steps = (clip_samples // HOP + 1) // STEP
            frame = frame_samples(STEP * HOP, steps, clip_samples)
            self.frames, self.frame_seconds = clip_samples // frame, frame / SAMPLE_RATE
            step_of_frame = (torch.arange(self.frames) * frame // (STEP * HOP)).clamp(max=steps - 1)
            self.register_buffer("step_of_frame", step_of_frame, persistent=False)
        self.fill = FillUp(clip_samples)
        self.spectrogram_extractor = Spectrogram(WINDOW, HOP)
        self.logmel_extractor = LogMel(SAMPLE_RATE, WINDOW, BANDS, FMIN, FMAX)
        self.bn0 = BandNorm(BANDS)
        for number, (before, out) in enumerate(pairwise([1, *channels]), start=1):
            self.add_module(f"conv_block{number}", ConvBlock(before, out, pool=1 if number == BLOCKS else 2))
        self.fc1 = DroppedLinear(self.channels, self.channels)
        self.fc_audioset = DroppedLinear(self.channels, num_classes)
        self.apply(_init)

    @property
    def conv_blocks(self) -> list[nn.Module]:
        return [self.get_submodule(f"conv_block{number}") for number in range(1, BLOCKS + 1)]

    def log_mel(self, waveform: Tensor) -> Tensor:
        return self.logmel_extractor(self.spectrogram_extractor(self.fill(waveform)))

    def normalize(self, log_mel: Tensor) -> Tensor:
        return self.bn0(log_mel.transpose(1, 2).contiguous())

    def decibel(self) -> Tensor:
        assert self.bn0.running_var is not None
        return self.bn0.weight.detach() / (self.bn0.running_var + self.bn0.eps).sqrt()

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, C, S), the mean over frequency of the last block's map."""
        x = features.transpose(1, 2)[:, None]  # (B, 1, T, F)
        for block in self.conv_blocks:
            x = block(x)
        return x.mean(dim=3)

    def forward_head(self, maps: Tensor) -> Outputs:
        if self.pooling == "decision_max":
            return self._score_steps(maps)
        embedding = self.fc1(maps.amax(dim=2) + maps.mean(dim=2)).relu()
        return self.outputs_of_clip(embedding, self.fc_audioset(embedding))

    def _score_steps(self, maps: Tensor) -> Outputs:
        """(B, C, S) -> Outputs of scores of each step, with the features of its neighbours."""
        near = F.max_pool1d(maps, 3, 1, 1) + F.avg_pool1d(maps, 3, 1, 1)  # the mean counts the zeros beyond the ends
        steps = self.fc1(near.transpose(1, 2)).relu()  # (B, S, D)
        logits = self.fc_audioset(steps).float()
        of_frame = self.get_buffer("step_of_frame")
        frames = steps[:, of_frame].float()
        return Outputs(logits.amax(dim=1), logits[:, of_frame], frames, frames.mean(dim=1))

    def layers(self) -> list[Layer]:
        *blocks, last = self.conv_blocks
        below: list[Layer] = [[self.spectrogram_extractor, self.logmel_extractor, self.bn0]]
        return [*below, *([block] for block in blocks), [last, self.fc1], [self.fc_audioset]]

    def onnx_frontend(self, samples: int) -> nn.Module:
        window, bands = self.spectrogram_extractor.stft.window, self.logmel_extractor.melW
        return TracedLogMel(window, bands, HOP, samples, pad=WINDOW // 2)


class ConvBlock(nn.Module):
    """(B, C, T, F) -> (B, C', T / pool, F / pool): two convolutions, the mean over pool x pool cells, dropout."""

    def __init__(self, channels: int, out: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.pool, self.dropout = pool, nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.dropout(x if self.pool == 1 else F.avg_pool2d(x, self.pool))


class DroppedLinear(nn.Linear):
    """A linear layer behind a dropout."""

    rate = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.rate, self.training))


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check(clip_samples: int, width: float) -> None:
    """Raise UserError for sizes that are not allowed."""
    if not 0 < width <= 10:
        raise UserError(f"encoder_options: width = {width} must be above 0, up to 10.")
    if clip_samples < STEP * HOP:
        raise UserError(f"clip_samples = {clip_samples} is not allowed: give a step of {STEP * HOP} or more.")


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of PANNs' files, whose names are the network's. Which pooling they are for, no weight tells."""
    width = len(weights["conv_block1.conv1.weight"]) / CHANNELS
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": {"width": f"{width:g}"}}
    if "fc_audioset.weight" in weights:
        settings["classes_num"] = len(weights["fc_audioset.weight"])
    return Weights("Cnn14", dict(weights), settings)


NETWORK = Cnn14


def build(settings: Config) -> Cnn14:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    options: Any = read_options("cnn14", settings.encoder_options)
    if settings.sequence_head != "none":
        raise UserError(f"sequence_head = {settings.sequence_head} is not allowed: encoder = cnn14 has none.")
    if settings.sample_rate != SAMPLE_RATE:
        title = ENCODERS["cnn14"].title
        raise UserError(f"sample_rate = {settings.sample_rate} is not allowed: {title} takes {SAMPLE_RATE} Hz.")
    return Cnn14(
        num_classes=settings.classes_num,
        clip_samples=settings.clip_samples,
        softmax=settings.loss_type == "clip_ce",
        **options,
    )


def build_frontend(settings: Config) -> nn.Sequential:
    """Network.log_mel alone, without the network."""
    log_mel = LogMel(SAMPLE_RATE, WINDOW, BANDS, FMIN, FMAX)
    return nn.Sequential(FillUp(settings.clip_samples), Spectrogram(WINDOW, HOP), log_mel)


def build_analysis(settings: Config) -> Analysis:
    """What the front-end measures, for pictures."""
    bands = LogMel(SAMPLE_RATE, WINDOW, BANDS, FMIN, FMAX).melW
    return Analysis(Spectrogram(WINDOW, HOP), bands, HOP, WINDOW)
