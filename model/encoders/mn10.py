"""mn10 of EfficientAT: MobileNetV3-large on 128 mel bands, distilled from transformers. It has no time axis.

Schmid, Koutini, Widmer: Efficient Large-Scale Audio Tagging via Transformer-to-CNN Knowledge Distillation, ICASSP 2023,
arXiv 2211.04772; Howard et al.: Searching for MobileNetV3, arXiv 1905.02244. Shapes: B clips, F bands, T frames, C and
D channels, K classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.foreign import Weights
from model.frame_network import Padded
from model.frontend import Analysis, CentredLogMel, kaldi_filterbank
from model.layers.cnn import NORM_MOMENTUM
from model.layers.mobilenet import LAST, Shape, build_features, divisible
from model.network import Layer, Network, Outputs
from model.registry import ENCODERS, read_options
from settings import Config, UserError

SAMPLE_RATE = 32000
BANDS, FFT, HOP = 128, 1024, 320
HIDDEN = 1280  # channels of the classifier's hidden layer at width 1
MEAN, SCALE = -4.5, 5.0  # of the log-mel spectrogram
R, H = nn.ReLU, nn.Hardswish
BLOCKS = (
    Shape(3, (1, 1), 16, 16, False, R),
    Shape(3, (2, 2), 64, 24, False, R),
    Shape(3, (1, 1), 72, 24, False, R),
    Shape(5, (2, 2), 72, 40, True, R),
    Shape(5, (1, 1), 120, 40, True, R),
    Shape(5, (1, 1), 120, 40, True, R),
    Shape(3, (2, 2), 240, 80, False, H),
    Shape(3, (1, 1), 200, 80, False, H),
    Shape(3, (1, 1), 184, 80, False, H),
    Shape(3, (1, 1), 184, 80, False, H),
    Shape(3, (1, 1), 480, 112, True, H),
    Shape(3, (1, 1), 672, 112, True, H),
    Shape(5, (2, 2), 672, 160, True, H),
    Shape(5, (1, 1), 960, 160, True, H),
    Shape(5, (1, 1), 960, 160, True, H),
)


class MobileNetV3(Network):
    """The published network; its state-dict names stand behind `mn.`.

    clip_samples: longest input; shorter ones are filled up with zeros. width: factor of the channels, 0.4 to 4 of the
    published mn04 to mn40. Raises UserError for sizes that are not allowed.
    """

    classifier = ("mn.classifier.5.",)

    def __init__(
        self,
        *,
        num_classes: int = 527,
        clip_samples: int = 10 * SAMPLE_RATE,
        width: float = 1.0,
        norm_momentum: float = NORM_MOMENTUM,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        _check(clip_samples, width)
        self.sample_rate, self.clip_samples, self.num_classes = SAMPLE_RATE, clip_samples, num_classes
        self.softmax, self.frames, self.frame_seconds = softmax, 0, 0.0
        self.channels = LAST * divisible(width * BLOCKS[-1].out)
        self.spectrum = Padded(build_bank(), clip_samples)
        hidden = divisible(width * HIDDEN)
        layers = nn.Linear(self.channels, hidden), nn.Linear(hidden, num_classes)
        classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers[0], nn.Hardswish(), nn.Dropout(0.2), layers[1]
        )
        self.mn = nn.ModuleDict({"features": build_features(width, BLOCKS, norm_momentum), "classifier": classifier})
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def log_mel(self, waveform: Tensor) -> Tensor:
        return self.spectrum(waveform)

    def normalize(self, log_mel: Tensor) -> Tensor:
        return ((log_mel - MEAN) / SCALE).transpose(1, 2)

    def decibel(self) -> Tensor:
        analysis = self.spectrum.analysis
        return analysis.get_buffer("bands").new_full((1,), analysis.decibel / SCALE)

    def forward_features(self, features: Tensor) -> Tensor:
        """(B, F, T) -> (B, D, F / 32, T / 32)."""
        return self.mn["features"](features[:, None].contiguous(memory_format=torch.channels_last))

    def forward_head(self, maps: Tensor) -> Outputs:
        """(B, D, F', T') -> Outputs without frames."""
        pool, flatten, hidden, activation, dropout, last = self.mn["classifier"].children()
        embedding = flatten(pool(maps))
        return self.outputs_of_clip(embedding, last(dropout(activation(hidden(embedding)))))

    def layers(self) -> list[Layer]:
        first, *blocks = self.mn["features"].children()
        _, _, hidden, activation, dropout, last = self.mn["classifier"].children()
        return [[self.spectrum, first], *([block] for block in blocks), [hidden, activation, dropout], [last]]

    def blocks(self) -> list[nn.Module]:
        return list(self.mn["features"].children())[1:]

    def onnx_frontend(self, samples: int) -> nn.Module:
        return self.spectrum.analysis.traced(samples)


def build_bank() -> CentredLogMel:
    """Symmetric window of 25 ms, Kaldi's triangles up to 15 kHz."""
    window, bands = torch.hann_window(800, periodic=False), kaldi_filterbank(BANDS, 0.0, 15000.0, FFT, SAMPLE_RATE)
    return CentredLogMel(window, bands, fft=FFT, hop=HOP, offset=1e-5, preemphasis=0.97)


def _check(clip_samples: int, width: float) -> None:
    if not 0 < width <= 10:
        raise UserError(f"encoder_options: width = {width} must be above 0, up to 10.")
    if clip_samples < FFT:
        raise UserError(f"clip_samples = {clip_samples} is not allowed: give {FFT}, a window of the STFT, or more.")


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of EfficientAT's files under this network's names; the number of channels tells the width."""
    found = {key if key.startswith("mn.") else f"mn.{key}": value for key, value in weights.items()}
    width = len(found["mn.features.16.0.weight"]) / LAST / BLOCKS[-1].out
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE, "encoder_options": {"width": f"{width:g}"}}
    if "mn.classifier.5.weight" in found:
        settings["classes_num"] = len(found["mn.classifier.5.weight"])
    return Weights("mn10", found, settings)


NETWORK = MobileNetV3


def build(settings: Config) -> MobileNetV3:
    """The network that the settings describe. Raises UserError for options that it does not have."""
    options: Any = read_options("mn10", settings.encoder_options)
    if settings.sequence_head != "none":
        raise UserError(f"sequence_head = {settings.sequence_head} needs frames, and encoder = mn10 has no time axis.")
    if settings.sample_rate != SAMPLE_RATE:
        title = ENCODERS["mn10"].title
        raise UserError(f"sample_rate = {settings.sample_rate} is not allowed: {title} takes {SAMPLE_RATE} Hz.")
    return MobileNetV3(
        num_classes=settings.classes_num,
        clip_samples=settings.clip_samples,
        softmax=settings.loss_type == "clip_ce",
        **options,
    )


def build_frontend(settings: Config) -> Padded:
    """Network.log_mel alone, without the network."""
    return Padded(build_bank(), settings.clip_samples)


def build_analysis(settings: Config) -> Analysis:
    """What the front-end measures, for pictures."""
    return build_bank().analysis()
