"""HTS-AT on one page: waveform -> log-mel -> folded image -> Swin stages -> token-semantic convolution.

Chen, Du, Zhu, Ma, Berg-Kirkpatrick, Dubnov: HTS-AT: A Hierarchical Token-Semantic Audio Transformer for Sound
Classification and Detection, ICASSP 2022, arXiv 2202.00874. Shapes: B clips, T frames, F mel bands, C channels,
K classes.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Optional

import torch
from einops import rearrange
from torch import Tensor, nn

from model import heads
from model.foreign import STATE_DICT, Weights
from model.frontend import Analysis, BandNorm, LogMel, Spectrogram, TracedLogMel, fold, stack, stretch
from model.layers.readout import Readout, repeat_in_time
from model.layers.swin import PatchEmbed, Stage, SwinBlock, TracedAttention
from model.network import Layer, Network, Outputs
from model.registry import read_options
from settings import Config, UserError


class Maps(NamedTuple):
    """What the Swin stages give. earlier: tokens of the stages before the last, from the readout stage on."""

    grid: Tensor  # (B, C, freq_bins, steps of the last stage), frequency up, time right
    attention: Optional[Tensor]  # (B, steps of the last stage), with attn_heatmap
    earlier: list[Tensor]  # (B, L, C) each, in the order in which they merge
    views: int  # stretches of each clip, one after another: B is views * clips


class HTSAT_Swin_Transformer(Network):
    """The published network, with its state-dict names and shapes.

    clip_samples: longest input, None: 10 s. spec_size: side of the folded image, a multiple of mel_bins. depths,
    num_heads: blocks and heads of each stage. loss_type: with clip_ce, clip probabilities sum to 1. Raises UserError
    for sizes that do not fit together. Not published, and off unless given: time_stride, of the patches along time
    (None: patch_stride); readout_stage, from 1, whose time axis the frame scores have (None: the last); sequence_head,
    sequence_layers and sequence_dim, of layers over the frames (model/heads.py). Weights of a network without them fit
    into one with them.
    """

    classifier = ("tscam_conv.", "head.")
    additions = ("readout.", "sequence_head.")
    frontend = ("spectrogram_extractor.", "logmel_extractor.")
    not_in_images = ("bn0.",)
    frontend_sizes = ("mel_bins",)
    computed = ("relative_position_index", "attn_mask")

    def __init__(
        self,
        *,
        num_classes: int = 527,
        sample_rate: int = 32000,
        clip_samples: Optional[int] = None,
        window_size: int = 1024,
        hop_size: int = 320,
        mel_bins: int = 64,
        fmin: float = 50.0,
        fmax: float = 14000.0,
        spec_size: int = 256,
        patch_size: int = 4,
        patch_stride: int = 4,
        time_stride: Optional[int] = None,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        attention_window: int = 8,
        drop_path: float = 0.1,
        loss_type: str = "clip_bce",
        enable_tscam: bool = True,
        attn_heatmap: bool = False,
        readout_stage: Optional[int] = None,
        sequence_head: Literal["none", "gru", "lstm", "attention", "transformer"] = "none",
        sequence_layers: int = 2,
        sequence_dim: int = 256,
        repeat_mode: bool = False,
    ) -> None:
        super().__init__()
        self.freq_ratio = spec_size // mel_bins  # stretches of time that are folded under one another
        strides = patch_stride, time_stride or patch_stride  # along frequency, along time
        readout_stage = len(depths) if readout_stage is None else readout_stage
        _check_network(embed_dim, depths, num_heads, readout_stage)
        maps = [(spec_size // strides[0] // 2**k, spec_size // strides[1] // 2**k) for k in range(len(depths))]
        _check_maps(spec_size, mel_bins, patch_size, strides, attention_window, maps)
        if attn_heatmap and max(maps[-1]) > attention_window:
            raise UserError(
                f"htsat_attn_heatmap needs a last stage of one window: {maps[-1][0]} x {maps[-1][1]} tokens are more "
                f"than htsat_window_size {attention_window}."
            )
        self.num_classes, self.softmax, self.enable_tscam = num_classes, loss_type == "clip_ce", enable_tscam
        self.attn_heatmap, self.repeat_mode = attn_heatmap, repeat_mode
        self.image_bands = spec_size // self.freq_ratio
        self.image_frames = spec_size * self.freq_ratio
        self.freq_bins = maps[-1][0] // self.freq_ratio  # of the unfolded map
        self.sample_rate, self.clip_samples = sample_rate, clip_samples or 10 * sample_rate
        self.frames = maps[readout_stage - 1][1] * self.freq_ratio  # of the frame scores, over image_frames
        self.frame_seconds = self.clip_samples / sample_rate / self.frames

        self.spectrogram_extractor = Spectrogram(window_size, hop_size)
        self.logmel_extractor = LogMel(sample_rate, window_size, mel_bins, fmin, fmax)
        self.bn0 = BandNorm(mel_bins)

        self.patch_embed = PatchEmbed(patch_size, strides, embed_dim)
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        stages = nn.ModuleList()
        channels = [embed_dim * 2**number for number in range(len(depths))]
        for number, depth in enumerate(depths):
            drops, merge = [next(rates) for _ in range(depth)], number < len(depths) - 1
            stages.append(Stage(channels[number], maps[number], num_heads[number], attention_window, drops, merge))
        self._modules["layers"] = stages  # their name in published files, which is also that of the contract's method
        self.stages: Sequence[Stage] = list(stages)  # type: ignore[arg-type]
        self.channels = channels[-1]
        self.norm = nn.LayerNorm(self.channels)
        if enable_tscam:
            self.tscam_conv = nn.Conv2d(self.channels, num_classes, (self.freq_bins, 3), padding=(0, 1))
        # Published token-semantic checkpoints carry a head that nothing uses; it keeps its place in the state dict.
        self.head = nn.Linear(num_classes if enable_tscam else self.channels, num_classes)
        self.apply(_init_linear)
        # What follows comes after that, as it begins with zeros and a published network does not have it.
        self.readout: Optional[Readout] = None
        if readout_stage < len(depths):
            read = slice(readout_stage - 1, -1)
            steps = [width * self.freq_ratio for _, width in maps[read]]
            self.readout = Readout(channels[read], steps, self.channels, self.freq_ratio)
        self.sequence_head: Optional[heads.SequenceHead] = None
        if sequence_head != "none":
            self.sequence_head = heads.SequenceHead(
                sequence_head, channels=self.channels, layers=sequence_layers, dim=sequence_dim, steps=self.frames
            )

    def layers(self) -> list[Layer]:
        """Front-end, bn0 and patch embedding; each Swin block, with the merging behind it; the classifier."""
        blocks: list[list[nn.Module]] = []
        for stage in self.stages:
            blocks += [[block] for block in stage.blocks]
            blocks[-1] += [] if stage.downsample is None else [stage.downsample]
        blocks[-1].append(self.norm)
        head = [self.readout, self.sequence_head, self.tscam_conv if self.enable_tscam else None, self.head]
        return [
            [self.spectrogram_extractor, self.logmel_extractor, self.bn0, self.patch_embed],
            *blocks,
            [part for part in head if part is not None],
        ]

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.blocks]

    def compiled_parts(self) -> list[nn.Module]:
        """The stages: torch.compile joins the change of a block's windows to its neighbours' arithmetic."""
        return list(self.stages)

    def unused_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters()) if self.enable_tscam else []

    def published_outputs(self, waveform: Tensor, infer_mode: bool = False) -> dict[str, Tensor]:
        """The outputs of the published code, by its names.

        waveform: (B, samples). infer_mode: fill a short clip by repetition, instead of stretching it in time. Returns
        clipwise_output (B, K), which are logits with clip_ce, framewise_output (B, image_frames, K), sigmoids with
        any loss, in which each frame is repeated (32 times with the published sizes), and latent_output (B, C).
        """
        features = self.features(waveform)
        if infer_mode:
            features = features.repeat(1, 1, self.image_frames // features.shape[2])
        clips, frames, _, embedding = self.forward_head(self.forward_features(features))
        return {
            "clipwise_output": clips if self.softmax else clips.sigmoid(),
            "framewise_output": frames.sigmoid().repeat_interleave(self.image_frames // self.frames, dim=1),
            "latent_output": embedding,
        }

    def log_mel(self, waveform: Tensor) -> Tensor:
        return self.logmel_extractor(self.spectrogram_extractor(waveform))

    def normalize(self, log_mel: Tensor) -> Tensor:
        return self.bn0(log_mel.transpose(1, 2).contiguous())

    def decibel(self) -> Tensor:
        assert self.bn0.running_var is not None
        return self.bn0.weight.detach() / (self.bn0.running_var + self.bn0.eps).sqrt()

    def forward_features(self, features: Tensor) -> Maps:
        """(B, F, T) -> the maps of the views that the network has of it, one after another: (views * B, ...)."""
        images = self.images(features)
        image = images[0] if len(images) == 1 else torch.cat(images)  # (views * B, 1, S, S)
        tokens, attention, earlier = self.patch_embed(image), None, []  # (B, L, C)
        last = len(self.stages) - 1
        first = last if self.readout is None else last - len(self.readout.steps)
        for number, stage in enumerate(self.stages):
            tokens, own, attention = stage(tokens, need_weights=self.attn_heatmap and number == last)
            if first <= number < last:
                earlier.append(own)
        tokens = self.norm(tokens)  # (B, h * w, C)
        place = {"r": self.freq_ratio, "f": self.freq_bins}
        grid = rearrange(tokens, "b (r f t) c -> b c f (r t)", **place)  # (B, C, freq_bins, steps)
        if attention is not None:
            attention = rearrange(attention, "b (r f t) -> b f (r t)", **place).mean(dim=1)  # (B, steps)
        return Maps(grid, attention, earlier, len(images))

    def images(self, features: Tensor) -> list[Tensor]:
        """(B, F, T) -> the views, (B, 1, spec_size, spec_size) each: one, or several whose outputs are averaged.

        Several of a clip longer than the image, as published; and with repeat_mode, whose training takes one at random.
        """
        stretched = [stretch(view, self.image_bands, self.image_frames) for view in self._views_in_time(features)]
        length = self.image_frames // self.freq_ratio
        if not self.repeat_mode:
            return [fold(view, self.freq_ratio) for view in stretched]
        random = [int(torch.randint(self.image_frames - length, ()))] if self.training else None
        starts = random or range(0, self.image_frames, length)
        return [stack(view, self.freq_ratio, start) for view in stretched for start in starts]

    def _views_in_time(self, features: Tensor) -> list[Tensor]:
        """(B, F, T) -> stretches of at most image_frames."""
        frames = features.shape[2]
        if frames <= self.image_frames:
            return [features]
        window, hop = (frames - 1) // 2, (frames - 1) // 4
        return [features[:, :, start : start + window] for start in range(0, frames - window - 1, hop)]

    def forward_head(self, maps: Maps) -> Outputs:
        """The maps of forward_features -> Outputs (paper, section 2.3)."""
        grid, attention, earlier, views = maps
        embedding = grid.mean(dim=(2, 3)).float()
        frames = repeat_in_time(grid.mean(dim=2), self.frames).transpose(1, 2).float()  # (B, T, C)
        if self.readout is not None:
            grid = self.readout(grid, earlier)
        if self.sequence_head is not None:
            grid = self.sequence_head(grid)
        if self.enable_tscam:
            frame_logits = self.tscam_conv(grid)[:, :, 0].transpose(1, 2).float()  # (B, T, K)
            clip_logits = frame_logits.mean(dim=1)
        else:
            frame_logits = self.head(grid.sum(dim=2).transpose(1, 2)).float()
            clip_logits = self.head(grid.mean(dim=(2, 3))).float()
        if attention is not None:
            high, low = attention.amax(dim=1, keepdim=True), attention.amin(dim=1, keepdim=True)
            heat = repeat_in_time((0.15 * attention + 0.85 * high - low) / (high - low), self.frames)  # (B, T)
            frame_logits = scale_probabilities(frame_logits, heat[:, :, None].float())
        outputs = Outputs(clip_logits, frame_logits, frames, embedding)
        return outputs if views == 1 else self._mean_over_views(outputs, views)

    def _mean_over_views(self, outputs: Outputs, views: int) -> Outputs:
        """The mean of the views' probabilities, as logits; with clip_ce of the clips' logits, as published."""
        clips, frames, tokens, embedding = (part.unflatten(0, (views, -1)) for part in outputs)
        if self.softmax:
            clip_logits, frame_logits = clips.mean(dim=0), frames.softmax(dim=-1).mean(dim=0).clamp(min=1e-7).log()
        else:
            clip_logits, frame_logits = (part.sigmoid().mean(dim=0).logit(eps=1e-7) for part in (clips, frames))
        return Outputs(clip_logits, frame_logits, tokens.mean(dim=0), embedding.mean(dim=0))

    def onnx_frontend(self, samples: int) -> nn.Module:
        window, bands = self.spectrogram_extractor.stft.window, self.logmel_extractor.melW
        return TracedLogMel(window, bands, self.spectrogram_extractor.hop_size, samples, pad=len(window) // 2)

    def misfit(self, state_dict: Mapping[str, Tensor], *, reshaped: bool, images: bool) -> str:
        ours, theirs = attention_heads(self.state_dict()), attention_heads(state_dict)
        own, found = ("-".join(str(stage[0]) for stage in stages) for stages in (ours, theirs))
        if theirs and found != own:
            return (
                f"Its stages have {found} attention heads, the network's {own}: a head's weights mean nothing "
                f"in a head of another size. "
                + (
                    "Of Microsoft's Swins, Swin-T/C24 with window 8 for 256 x 256 pictures fits the paper's network."
                    if images
                    else "Its network has other sizes: set htsat_dim, htsat_depth and htsat_num_head as it was trained."
                )
            )
        if reshaped:
            return "Its network has other sizes: set htsat_dim, htsat_depth and htsat_num_head as it was trained."
        return super().misfit(state_dict, reshaped=reshaped, images=images)

    def for_export(self, log_mel: Tensor) -> "HTSAT_Swin_Transformer":
        network = super().for_export(log_mel)
        assert isinstance(network, HTSAT_Swin_Transformer)
        network.stages = network._modules.pop("layers")  # type: ignore[assignment]  # a module's name, and no method's
        for block in network.blocks():
            assert isinstance(block, SwinBlock)
            block.attn = TracedAttention(block.attn, block.attn_mask)  # type: ignore[assignment]
        return network


def scale_probabilities(logits: Tensor, scale: Tensor) -> Tensor:
    """The logits whose probabilities are `scale` times those of `logits`; scale: above 0, at most 1."""
    probability = logits.sigmoid()
    return torch.log(scale * probability) - torch.log((1 - scale) * probability + (-logits).sigmoid())


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_network(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], readout_stage: int) -> None:
    """Raise UserError, by the names of config.py, where stages and heads do not go together."""
    if len(depths) != len(num_heads) or not depths or min(depths) < 1:
        raise UserError(f"htsat_depth {list(depths)} and htsat_num_head {list(num_heads)} need one number a stage.")
    for stage, each in enumerate(num_heads):
        if each < 1 or embed_dim * 2**stage % each:
            raise UserError(
                f"htsat_num_head: stage {stage} has {embed_dim * 2**stage} channels (htsat_dim x 2^stage), which "
                f"{each} heads do not divide."
            )
    if not 1 <= readout_stage <= len(depths):
        raise UserError(
            f"htsat_readout_stage {readout_stage} must be a stage from 1 to {len(depths)}, as htsat_depth "
            f"{list(depths)} has them."
        )


def _check_maps(
    spec_size: int,
    mel_bins: int,
    patch_size: int,
    strides: tuple[int, int],
    attention_window: int,
    maps: Sequence[tuple[int, int]],
) -> None:
    """Raise UserError, by the names of config.py, where the image cannot be cut into the stages' maps."""
    freq_ratio = spec_size // mel_bins
    if freq_ratio < 1 or spec_size % freq_ratio:
        raise UserError(f"mel_bins {mel_bins} must fit into htsat_spec_size {spec_size} a whole number of times.")
    for name, stride in zip(("htsat_stride", "htsat_time_stride"), strides, strict=True):
        if patch_size < stride or (patch_size - stride) % 2:
            raise UserError(f"htsat_patch_size {patch_size} must be {name} {stride} plus an even number.")
        if spec_size % (stride * 2 ** (len(maps) - 1)):
            raise UserError(
                f"htsat_spec_size {spec_size} must be a multiple of {name} {stride} x {2 ** (len(maps) - 1)}, for "
                f"{len(maps)} stages."
            )
    last = maps[-1][0]
    if last < freq_ratio or last % freq_ratio:
        raise UserError(
            f"htsat_spec_size {spec_size}, htsat_stride {strides[0]} and {len(maps)} stages leave {last} rows of "
            f"tokens, which cannot be unfolded into {freq_ratio} (htsat_spec_size / mel_bins) stretches."
        )
    for stage, (height, width) in enumerate(maps):
        window = min(height, width, attention_window)
        if height % window or width % window:
            raise UserError(
                f"htsat_window_size {attention_window} does not divide the {height} x {width} tokens of stage {stage} "
                f"into windows of {window} x {window}."
            )


# --- files of others --------------------------------------------------------------------------------------------------

AUDIO_BRANCH = "audio_branch."  # of the audio network's keys in a CLAP checkpoint
AUDIO_ENCODER = re.compile(r"^(audio_model\.)?audio_encoder\.")  # of transformers' ClapModel, and its ClapAudioModel
FUSION = (
    "mel_conv1d",
    "mel_conv2d",
    "fusion_model",
)  # layers of the CLAP variant that takes several stretches of a clip
PATCHES = "patch_embed.proj.weight"
BIAS_TABLE = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table$")
# Wu et al. 2023, Large-Scale Contrastive Language-Audio Pretraining: audio of 10 s at 48 kHz, padded by repetition.
CLAP_SETTINGS = {
    "sample_rate": 48000, "window_size": 1024, "hop_size": 480, "mel_bins": 64, "fmin": 50.0, "fmax": 14000.0,
    "clip_samples": 480000, "short_clips": "repeat", "loss_type": "clip_bce", "task": "multilabel",
}  # fmt: skip
CLAP_IMAGE = {"htsat_spec_size": 256, "htsat_stride": 4}  # sizes that no weight has
QUERY, PARTS = ".attention.self.query.", ("query", "key", "value")  # one matrix each in transformers
TRANSFORMERS_NAMES = (  # parts of its keys, and the parts of ours
    ("batch_norm.", "bn0."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.self.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def rename(weights: Mapping[str, Tensor]) -> Weights:
    """The weights of the paper's, LAION-CLAP's and ImageNet's Swin files under this network's names.

    Of LAION-CLAP the audio branch alone, in its own layout or in that of transformers. Raises UserError for a CLAP
    whose audio network is another one.
    """
    if any(key.startswith(AUDIO_BRANCH) for key in weights):
        return _clap({key.removeprefix(AUDIO_BRANCH): weights[key] for key in weights if key.startswith(AUDIO_BRANCH)})
    if any(AUDIO_ENCODER.match(key) for key in weights):
        encoder = {AUDIO_ENCODER.sub("", key): weights[key] for key in weights if AUDIO_ENCODER.match(key)}
        return _clap(_from_transformers(encoder))
    if _is_swin(weights):
        return Weights("ImageNet Swin", _swin(weights), images=True)
    return Weights(STATE_DICT, dict(weights))


def _is_swin(weights: Mapping[str, Tensor]) -> bool:
    """A Swin for pictures takes three channels: red, green and blue."""
    patches = weights.get(PATCHES)
    return (
        patches is not None
        and patches.ndim == 4
        and patches.shape[1] == 3
        and "layers.0.blocks.0.norm1.weight" in weights
    )


def _swin(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Microsoft's names are this network's; the patch kernel is averaged over its colours, the class head left out."""
    kept = {key: value for key, value in weights.items() if not key.startswith("head.")}
    return {**kept, PATCHES: weights[PATCHES].mean(dim=1, keepdim=True)}


def _from_transformers(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names of a ClapAudioEncoder -> this network's, with queries, keys and values in one matrix."""
    joined = {}
    for key, value in encoder.items():
        if QUERY in key:
            joined[key.replace(".query.", ".qkv.")] = torch.cat([encoder[key.replace("query", part)] for part in PARTS])
        elif not any(f".attention.self.{part}." in key for part in PARTS):
            joined[key] = value
    renamed = {}
    for key, value in joined.items():
        for theirs, ours in TRANSFORMERS_NAMES:
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed


def _clap(branch: dict[str, Tensor]) -> Weights:
    """The audio branch, whose front-end is another one than the paper's. Transformers keeps no classifier of it."""
    fused = [key for key in branch if any(part in key for part in FUSION)]
    if fused:
        raise UserError(
            f"it is a LAION-CLAP with feature fusion ({fused[0]}), whose audio network looks at a whole recording and "
            f"three stretches of it at once; this network takes one stretch. Use a CLAP checkpoint without fusion"
        )
    found = attention_heads(branch)
    if PATCHES not in branch or not found:
        raise UserError("it is a LAION-CLAP whose audio branch is no HTS-AT. Use a CLAP checkpoint with HTSAT-tiny")
    classes = branch.get("tscam_conv.weight")
    rows = len(branch["layers.0.blocks.0.attn.relative_position_bias_table"])
    sizes = {
        **({} if classes is None else {"classes_num": len(classes)}),
        "enable_tscam": True,
        "mel_bins": len(branch["bn0.weight"]),
        "htsat_window_size": (math.isqrt(rows) + 1) // 2,
        "htsat_patch_size": branch[PATCHES].shape[-1],
        "htsat_dim": len(branch[PATCHES]),
        "htsat_depth": [len(stage) for stage in found],
        "htsat_num_head": [stage[0] for stage in found],
    }
    return Weights("LAION-CLAP", branch, {**CLAP_SETTINGS, **CLAP_IMAGE, **sizes})


def attention_heads(state_dict: Mapping[str, Tensor]) -> list[list[int]]:
    """Attention heads of each block of each stage, from the columns of the relative position bias tables."""
    stages: dict[int, dict[int, int]] = {}
    for key, value in state_dict.items():
        place = BIAS_TABLE.match(key)
        if place and value.ndim == 2:
            stages.setdefault(int(place[1]), {})[int(place[2])] = value.shape[1]
    return [[blocks[number] for number in sorted(blocks)] for _, blocks in sorted(stages.items())]


NETWORK = HTSAT_Swin_Transformer


def build(settings: Config) -> HTSAT_Swin_Transformer:
    """The network that the settings describe. Raises UserError for sizes that do not fit together."""
    if settings.fmin >= settings.fmax:
        raise UserError(f"fmin = {settings.fmin} Hz must lie below fmax = {settings.fmax} Hz.")
    if settings.fmax > settings.sample_rate / 2:
        warnings.warn(
            f"fmax = {settings.fmax} Hz lies above half the sample rate ({settings.sample_rate / 2} Hz): the mel bands "
            f"up there stay empty.",
            stacklevel=3,
        )
    frames, most = settings.clip_samples // settings.hop_size + 1, settings.htsat_spec_size**2 // settings.mel_bins
    if frames > most:
        raise UserError(
            f"clip_samples = {settings.clip_samples} makes {frames} frames, the network takes {most}: lower "
            f"clip_samples (longer recordings are cut into windows) or raise hop_size."
        )
    read_options("htsat", settings.encoder_options)  # it has none: its sizes are settings
    return HTSAT_Swin_Transformer(
        num_classes=settings.classes_num,
        sample_rate=settings.sample_rate,
        clip_samples=settings.clip_samples,
        window_size=settings.window_size,
        hop_size=settings.hop_size,
        mel_bins=settings.mel_bins,
        fmin=settings.fmin,
        fmax=settings.fmax,
        spec_size=settings.htsat_spec_size,
        patch_size=settings.htsat_patch_size,
        patch_stride=settings.htsat_stride,
        time_stride=settings.htsat_time_stride,
        embed_dim=settings.htsat_dim,
        depths=settings.htsat_depth,
        num_heads=settings.htsat_num_head,
        attention_window=settings.htsat_window_size,
        drop_path=settings.htsat_drop_path,
        loss_type=settings.loss_type,
        enable_tscam=settings.enable_tscam,
        attn_heatmap=settings.htsat_attn_heatmap,
        readout_stage=settings.htsat_readout_stage,
        sequence_head=settings.sequence_head,
        sequence_layers=settings.sequence_layers,
        sequence_dim=settings.sequence_dim,
        repeat_mode=settings.enable_repeat_mode,
    )


def build_frontend(settings: Config) -> nn.Module:
    """Network.log_mel alone, without the network."""
    return nn.Sequential(
        Spectrogram(settings.window_size, settings.hop_size),
        LogMel(settings.sample_rate, settings.window_size, settings.mel_bins, settings.fmin, settings.fmax),
    )


def build_analysis(settings: Config) -> Analysis:
    """What the front-end measures, for pictures."""
    mel = LogMel(settings.sample_rate, settings.window_size, settings.mel_bins, settings.fmin, settings.fmax)
    power = Spectrogram(settings.window_size, settings.hop_size)
    return Analysis(power, mel.melW, settings.hop_size, settings.window_size)
