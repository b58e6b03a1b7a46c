"""HTS-AT on one page: waveform -> log-mel -> folded image -> Swin stages -> token-semantic convolution.

Chen, Du, Zhu, Ma, Berg-Kirkpatrick, Dubnov: HTS-AT: A Hierarchical Token-Semantic Audio Transformer for Sound
Classification and Detection, ICASSP 2022, arXiv 2202.00874. Shapes: B clips, T frames, F mel bands, C channels,
K classes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Optional

import torch
from einops import rearrange
from torch import Tensor, nn

from model import heads
from model.frontend import BandNorm, LogMel, SpecAugment, Spectrogram, fold, stack, stretch
from model.layers.readout import Readout, repeat_in_time
from model.layers.swin import PatchEmbed, Stage
from settings import UserError
from utils import do_mixup

Outputs = dict[str, Tensor]


class HTSAT_Swin_Transformer(nn.Module):
    """The published network, with its state-dict names and shapes.

    spec_size: side of the folded image, a multiple of mel_bins. depths, num_heads: blocks and heads of each stage.
    loss_type: with clip_ce, clipwise_output holds logits instead of probabilities. Raises UserError for sizes that
    do not fit together.
    Not published, and off unless given: time_stride, of the patches along time (None: patch_stride); readout_stage,
    from 1, whose steps the frame scores have (None: the last); sequence_head, sequence_layers and sequence_dim, of
    layers over the steps (model/heads.py). Weights of a network without them fit into one with them.
    """

    def __init__(
        self,
        *,
        num_classes: int = 527,
        sample_rate: int = 32000,
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
        sequence_head: Literal["none", "gru", "attention", "transformer"] = "none",
        sequence_layers: int = 2,
        sequence_dim: int = 256,
        repeat_mode: bool = False,
        spec_augment: bool = True,
        gradient_checkpointing: bool = False,
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
        self.frozen: list[nn.Module] = []  # what stays as in evaluation
        self.num_classes, self.loss_type, self.enable_tscam = num_classes, loss_type, enable_tscam
        self.attn_heatmap, self.repeat_mode, self.augments = attn_heatmap, repeat_mode, spec_augment
        self.image_bands = spec_size // self.freq_ratio
        self.image_frames = spec_size * self.freq_ratio
        self.freq_bins = maps[-1][0] // self.freq_ratio  # of the unfolded map
        self.steps = maps[readout_stage - 1][1] * self.freq_ratio  # of the frame scores, over image_frames
        self.frames_per_step = self.image_frames // self.steps

        self.spectrogram_extractor = Spectrogram(window_size, hop_size)
        self.logmel_extractor = LogMel(sample_rate, window_size, mel_bins, fmin, fmax)
        self.bn0 = BandNorm(mel_bins)
        self.spec_augmenter = SpecAugment()

        self.patch_embed = PatchEmbed(patch_size, strides, embed_dim)
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.layers = nn.ModuleList()
        channels = [embed_dim * 2**number for number in range(len(depths))]
        for number, depth in enumerate(depths):
            drops, merge = [next(rates) for _ in range(depth)], number < len(depths) - 1
            self.layers.append(Stage(channels[number], maps[number], num_heads[number], attention_window, drops, merge))
        self.num_features = channels[-1]
        self.norm = nn.LayerNorm(self.num_features)
        if enable_tscam:
            self.tscam_conv = nn.Conv2d(self.num_features, num_classes, (self.freq_bins, 3), padding=(0, 1))
        # Published token-semantic checkpoints carry a head that nothing uses; it keeps its place in the state dict.
        self.head = nn.Linear(num_classes if enable_tscam else self.num_features, num_classes)
        self.apply(_init_linear)
        # What follows comes after that, as it begins with zeros and a published network does not have it.
        self.readout: Optional[Readout] = None
        if readout_stage < len(depths):
            read = slice(readout_stage - 1, -1)
            steps = [width * self.freq_ratio for _, width in maps[read]]
            self.readout = Readout(channels[read], steps, self.num_features, self.freq_ratio)
        self.sequence_head: Optional[heads.SequenceHead] = None
        if sequence_head != "none":
            self.sequence_head = heads.SequenceHead(
                sequence_head, channels=self.num_features, layers=sequence_layers, dim=sequence_dim, steps=self.steps
            )
        self.set_gradient_checkpointing(gradient_checkpointing)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each Swin block in the backward pass instead of keeping its activations."""
        for stage in self.layers:
            assert isinstance(stage, Stage)
            stage.gradient_checkpointing = enabled

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that no output depends on."""
        return list(self.head.parameters()) if self.enable_tscam else []

    def parameters_by_layer(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Each parameter with its layer, from below: 0 bn0 and patch embedding, then the blocks, last the classifier.

        Patch merging belongs to the block before it, the last LayerNorm, readout and sequence head to the classifier.
        """
        blocks = [len(stage.blocks) for stage in self.layers]  # type: ignore[arg-type]
        first = [1 + sum(blocks[:stage]) for stage in range(len(blocks) + 1)]  # number of a stage's first block
        for name, parameter in self.named_parameters():
            words = name.split(".")
            if words[0] == "layers":
                stage = int(words[1])
                yield (first[stage] + int(words[3]) if words[2] == "blocks" else first[stage + 1] - 1), parameter
            else:
                yield (0 if words[0] in ("bn0", "patch_embed") else first[-1]), parameter

    def freeze_backbone(self, with_bn0: bool = True) -> None:
        """Train nothing but the classifier, with readout and sequence head.

        Below them, nothing is random or follows the batch.
        with_bn0: also the normalization of the mel bands, which follows the data where no file has brought it.
        """
        self.frozen = [self.patch_embed, self.layers, self.norm, *([self.bn0] if with_bn0 else [])]
        for module in self.frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "HTSAT_Swin_Transformer":
        """As every module's; a frozen backbone stays as in evaluation."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, waveform: Tensor, mixup_lambda: Optional[Tensor] = None, infer_mode: bool = False) -> Outputs:
        """waveform: (B, samples) float in [-1, 1]; mixup_lambda: (B,), used in training only.

        infer_mode: fill a clip shorter than the image by repetition, instead of stretching it in time.
        Returns clipwise_output (B, K), clipwise_logits (B, K), framewise_output (B, frames, K),
        framewise_logits (B, steps, K) without the repeats, and latent_output (B, num_features).
        """
        logmel = self.forward_frontend(waveform)  # (B, F, T)
        if self.training:
            if self.augments:
                logmel = self.spec_augmenter(logmel)
            if mixup_lambda is not None:
                logmel = do_mixup(logmel, mixup_lambda)
        return self.forward_logmel(logmel, infer_mode)

    def forward_logmel(self, logmel: Tensor, infer_mode: bool = False) -> Outputs:
        """The rest of `forward`, without augmentation: (B, F, T) as forward_frontend gives it -> the outputs."""
        outputs = [self.forward_head(*self.forward_features(image)) for image in self.images(logmel, infer_mode)]
        if len(outputs) == 1:
            return outputs[0]
        return {name: torch.stack([output[name] for output in outputs]).mean(dim=0) for name in outputs[0]}

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, samples) -> (B, K) of the clips, (B, steps, K) of the frames without their repeats; embeddings (B, C).

        Clip probabilities sum to 1 where the network was trained with cross entropy (clip_ce).
        """
        outputs = self(waveform)
        logits = outputs["clipwise_logits"]
        clipwise = logits.softmax(dim=1) if self.loss_type == "clip_ce" else logits.sigmoid()
        return clipwise, outputs["framewise_output"][:, :: self.frames_per_step], outputs["latent_output"]

    def forward_frontend(self, waveform: Tensor) -> Tensor:
        """(B, samples) -> (B, F, T) log-mel, normalized over each band. float32, whatever autocast says."""
        with torch.autocast(waveform.device.type, enabled=False):
            logmel = self.logmel_extractor(self.spectrogram_extractor(waveform.float()))  # (B, T, F)
            return self.bn0(logmel.transpose(1, 2).contiguous())

    def images(self, logmel: Tensor, infer_mode: bool = False) -> Iterator[Tensor]:
        """(B, F, T) -> one or several (B, 1, spec_size, spec_size) whose outputs are averaged."""
        for frames in self._views_in_time(logmel, infer_mode):
            stretched = stretch(frames, self.image_bands, self.image_frames)
            length = self.image_frames // self.freq_ratio
            if not self.repeat_mode:
                yield fold(stretched, self.freq_ratio)
            elif self.training:
                start = int(torch.randint(self.image_frames - length, ()))
                yield stack(stretched, self.freq_ratio, start)
            else:
                for start in range(0, self.image_frames, length):
                    yield stack(stretched, self.freq_ratio, start)

    def _views_in_time(self, logmel: Tensor, infer_mode: bool) -> Iterator[Tensor]:
        """What the network looks at, of clips of any length: (B, F, at most image_frames)."""
        frames = logmel.shape[2]
        if frames <= self.image_frames:
            yield logmel.repeat(1, 1, self.image_frames // frames) if infer_mode else logmel
        elif self.training:
            start = int(torch.randint(frames - self.image_frames + 1, ()))
            yield logmel[:, :, start : start + self.image_frames]
        else:  # as published; inference.Tagger has the better way, on absolute time
            window, hop = (frames - 1) // 2, (frames - 1) // 4
            for start in range(0, frames - window - 1, hop):
                yield logmel[:, :, start : start + window]

    def forward_features(self, image: Tensor) -> tuple[Any, ...]:
        """(B, 1, spec_size, spec_size) -> what forward_head takes: the last stage's grid, its attention, earlier maps.

        The grid is (B, C, freq_bins, steps of that stage), frequency up, time right. The attention is (B, steps) with
        attn_heatmap, else None. Only with a readout_stage before the last: the tokens of each stage from that one on,
        as model.layers.swin.Stage has them before they merge.
        """
        tokens, attention, earlier = self.patch_embed(image), None, []  # (B, L, C)
        last = len(self.layers) - 1
        first = last if self.readout is None else last - len(self.readout.steps)
        for number, stage in enumerate(self.layers):
            tokens, own, attention = stage(tokens, need_weights=self.attn_heatmap and number == last)
            if first <= number < last:
                earlier.append(own)
        tokens = self.norm(tokens)  # (B, h * w, C)
        place = {"r": self.freq_ratio, "f": self.freq_bins}
        grid = rearrange(tokens, "b (r f t) c -> b c f (r t)", **place)  # (B, C, freq_bins, steps)
        if attention is not None:
            attention = rearrange(attention, "b (r f t) -> b f (r t)", **place).mean(dim=1)  # (B, steps)
        return grid, attention, *earlier

    def forward_head(self, grid: Tensor, attention: Optional[Tensor] = None, *earlier: Tensor) -> Outputs:
        """What forward_features gives -> the outputs of `forward` (paper, section 2.3)."""
        latent = grid.mean(dim=(2, 3)).float()
        if self.readout is not None:
            grid = self.readout(grid, earlier)
        if self.sequence_head is not None:
            grid = self.sequence_head(grid)
        if self.enable_tscam:
            frame_logits = self.tscam_conv(grid)[:, :, 0].transpose(1, 2).float()  # (B, steps, K)
            logits = frame_logits.mean(dim=1)
        else:
            frame_logits = self.head(grid.sum(dim=2).transpose(1, 2)).float()
            logits = self.head(grid.mean(dim=(2, 3))).float()
        frames = frame_logits.sigmoid()
        if attention is not None:
            high, low = attention.amax(dim=1, keepdim=True), attention.amin(dim=1, keepdim=True)
            scale = repeat_in_time((0.15 * attention + 0.85 * high - low) / (high - low), self.steps)
            frames = frames * scale.unsqueeze(2).to(frames.dtype)
        return {
            "clipwise_output": logits if self.loss_type == "clip_ce" else logits.sigmoid(),
            "clipwise_logits": logits,
            "framewise_logits": frame_logits,
            "framewise_output": frames.repeat_interleave(self.frames_per_step, dim=1),
            "latent_output": latent,
        }


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
