"""Augmentation of waveforms and their labels, and of features (B, F, T): normalized log-mel spectrograms.

Shapes: B clips, F bands, T frames, K classes. Random numbers are drawn on the CPU: a run is reproducible from its seed
on any device, and neither waits for the other (to_device). A strength of 0 changes nothing. of_batch: the form of
PretrainedSED (Schmid et al., ICASSP 2025, arXiv 2409.09546), which draws more for the whole batch and less for each
clip.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from data.frame_targets import Events, step_shares
from settings import UserError
from training.devices import to_device
from utils import do_mixup, get_mix_lambda

NARROWEST_BAND = 6  # of filter_augment, in mel bands: as in the FilterAugment paper's code
STYLE_FLOOR = 1e-6  # of the variance, before the square root: as in MixStyle
SHORTEST_MASK = 0.05  # of mask_stretch, as a share of the clip: as in PretrainedSED


class Mixing(NamedTuple):
    """Of each of B clips: its partner, and its own weight."""

    partner: Tensor  # (B,) int64
    weight: Tensor  # (B,) float32


def draw_mixing(clips: int, alpha: float, *, larger: bool) -> Mixing:
    """Random partners, and weights from Beta(alpha, alpha); larger: of which a clip itself has at least a half."""
    weight = get_mix_lambda(alpha, clips)
    return Mixing(torch.randperm(clips), torch.maximum(weight, 1 - weight) if larger else weight)


def happens(probability: float, count: int = 1) -> Tensor:
    """(count,) bool: True with this probability."""
    return torch.rand(count) < probability


def shift_in_time(waveform: Tensor, shift_max: int) -> tuple[Tensor, Tensor]:
    """Roll each clip of (B, samples) by a random number of samples below shift_max, and say by how many: (B,)."""
    shifts = torch.randint(shift_max, (len(waveform),))
    return _stretches(waveform, -shifts, waveform.shape[1]), shifts


def shift_events(events: Events, shifts: Tensor, seconds: float) -> Events:
    """The events of clips that were rolled by (B,) seconds, with clips of `seconds`: 2 E events.

    An event that goes beyond the end is also at the beginning. The second half of the list is for those parts: where
    there is none, its event has no duration. (Picking out the others would make the CPU wait for the device.)
    """
    onset, offset = events.onset.clamp(0, seconds), events.offset.clamp(0, seconds)
    moved = (onset + shifts.to(onset)[events.clip]).remainder(seconds)
    end = moved + (offset - onset)
    return Events(
        clip=events.clip.repeat(2),
        label=events.label.repeat(2),
        onset=torch.cat([moved, torch.zeros_like(moved)]),
        offset=torch.cat([end.clamp(max=seconds), (end - seconds).clamp(min=0)]),
    )


def crop(waveform: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A random stretch of each clip and the sample where it begins: (B, samples) -> (B, length), (B,).

    Shorter clips stay whole.
    """
    clips, samples = waveform.shape
    if length >= samples:
        return waveform, torch.zeros(clips, dtype=torch.long)
    starts = torch.randint(samples - length + 1, (clips,))
    return _stretches(waveform, starts, length), starts


def crop_events(events: Events, begin: Tensor, seconds: float) -> Events:
    """The events of clips that were cut out from (B,) seconds on, `seconds` long. What lies outside has no duration."""
    at = begin.to(events.onset)[events.clip]
    onset, offset = (events.onset - at).clamp(0, seconds), (events.offset - at).clamp(0, seconds)
    return Events(events.clip, events.label, onset, offset)


def _stretches(waveform: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, samples), (B,) -> (B, length): of each clip, the samples from its start on, round the end."""
    place = to_device(starts, waveform.device)[:, None] + torch.arange(length, device=waveform.device)
    return waveform.gather(1, place.remainder_(waveform.shape[1]))


def random_gain(waveform: Tensor, range_db: float, generator: Optional[torch.Generator] = None) -> Tensor:
    """Make each clip of (B, samples) louder or softer by up to range_db decibels.

    The gain is the same all through a clip. The samples may leave [-1, 1].
    """
    decibels = (2 * torch.rand(len(waveform), 1, generator=generator) - 1) * range_db
    return waveform * to_device(10 ** (decibels / 20), waveform.device)


def mix_waveforms(waveform: Tensor, mixing: Mixing) -> Tensor:
    """Mix clips of (B, samples) with their partners, each without its mean; those of weight 1 stay as they are."""
    centred = waveform - waveform.mean(dim=1, keepdim=True)
    mixed = do_mixup(centred, mixing.weight, mixing.partner)
    return torch.where(mixing.weight[:, None] == 1, waveform, mixed - mixed.mean(dim=1, keepdim=True))


def enhance_labels(targets: Tensor, ancestors: Tensor, children: Sequence[Sequence[int]]) -> Tensor:
    """In half of the clips, add all ancestors of each class, and one random child of each.

    targets: (B, K) of 0 and 1; ancestors: (K, K) bool, [k, a] where a is an ancestor of k; children: of each class.
    """
    enhanced = torch.maximum(targets, (targets @ ancestors.to(targets.dtype)).clamp(max=1))
    for clip, label in targets.nonzero().tolist():
        if children[label]:
            enhanced[clip, children[label][int(torch.randint(len(children[label]), ()))]] = 1
    chosen = torch.rand(len(targets), 1) < 0.5
    return torch.where(to_device(chosen, targets.device), enhanced, targets)


def replace_stretch(waveform: Tensor, targets: Tensor, steps: int, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Replace a random stretch of each clip by the same stretch of its partner in the reversed batch.

    waveform: (B, samples); targets: (B, K); shares: shortest and longest stretch as a share of the clip. Returns the
    clips and (B, steps, K) targets: the partner's in those steps whose middle lies in the stretch.
    """
    clips, samples = waveform.shape
    share = shares[0] + (shares[1] - shares[0]) * torch.rand(clips, 1)
    length = (share * samples).long()
    start = (torch.rand(clips, 1) * (samples - length + 1)).long()
    position = torch.arange(samples)
    inside = to_device((position >= start) & (position < start + length), waveform.device)
    middle = (torch.arange(steps) + 0.5) * samples / steps
    steps_inside = to_device((middle >= start) & (middle < start + length), waveform.device)
    mixed = torch.where(inside, waveform.flip(0), waveform)
    return mixed, torch.where(steps_inside[:, :, None], targets.flip(0)[:, None], targets[:, None])


# --- features --------------------------------------------------------------------------------------------------------


def draw_shifts(clips: int, frames: int, share: float) -> Tensor:
    """(clips,) int64 frames: normal, with a standard deviation of this share of the frames, towards zero."""
    return (torch.randn(clips) * int(share * frames)).long()


def shift_on(shifts: Tensor, frames: int, steps: int) -> list[int]:
    """Shifts by (B,) of so many frames, in steps of another time axis: half a step goes to the even one."""
    return (shifts * steps / frames).round().int().tolist()


def warp_frequency(logmel: Tensor, largest: float, *, of_batch: bool = False) -> Tensor:
    """Stretch each clip's mel axis about a random band by a random factor from 1 - largest to 1 + largest.

    Linear interpolation; beyond its edges the spectrum repeats its first and last band. of_batch: one stretch of at
    least 1 - largest of the bands is stretched to all of them, see zoom. Time, and so the labels, stay. Raises
    UserError unless 0 <= largest < 1.
    """
    if not 0 <= largest < 1:
        raise UserError(f"frequency_warp = {largest} is not allowed: give a share from 0 (none) to below 1.")
    if largest == 0:
        return logmel
    clips, bands, _ = logmel.shape
    if of_batch:
        height = max(1, int((1 - largest * float(torch.rand(()))) * bands))
        return zoom(logmel, height, int(torch.randint(bands - height + 1, ())))
    factor = 1 + largest * (2 * torch.rand(clips, 1) - 1)
    pivot = torch.rand(clips, 1) * (bands - 1)
    source = (pivot + (torch.arange(bands) - pivot) / factor).clamp(0, bands - 1)  # (B, F): where a band comes from
    # As a matrix, of which each row has at most two weights: deterministic on CUDA, which gather's gradient is not.
    return _blend((1 - (source[:, :, None] - torch.arange(bands)).abs()).clamp(min=0), logmel)


def zoom(logmel: Tensor, height: int, offset: int) -> Tensor:
    """The bands from `offset` on, `height` of them, stretched to all F: bicubic, first and last band on the edges."""
    bands = logmel.shape[1]
    weights = F.interpolate(torch.eye(height)[None, None], (bands, height), mode="bicubic", align_corners=True)
    return _blend(weights[0, 0], logmel[:, offset : offset + height])


def _blend(weights: Tensor, logmel: Tensor) -> Tensor:
    """(F', F) or (B, F', F), (B, F, T) -> (B, F', T), in float32."""
    with torch.autocast(logmel.device.type, enabled=False):
        return to_device(weights, logmel.device) @ logmel.float()


def filter_augment(
    logmel: Tensor, range_db: float, scale: Tensor, bands: tuple[int, int] = (3, 6), *, of_batch: bool = False
) -> Tensor:
    """Filter each clip by a random curve over the mel bands, piecewise linear in dB.

    FilterAugment, linear type (Nam, Kim, Park 2022, arXiv 2110.03282): from bands[0] to bands[1] pieces between random
    edges, at each a gain between -range_db and range_db. scale: (F,) what one decibel is in the features. Labels stay.
    of_batch: all clips have the same edges, of less than bands[1] pieces, and the curve multiplies the features, though
    they are logarithms: their contrast changes more than their loudness. Raises UserError for too few mel bands.
    """
    if range_db == 0:
        return logmel
    if of_batch:
        pieces = int(torch.randint(*bands, ()))
        spare = logmel.shape[1] - pieces * NARROWEST_BAND
        if spare < 0:
            raise UserError(
                f"filter_augment with augment_by = batches needs {(bands[1] - 1) * NARROWEST_BAND} mel bands, and the "
                f"features have {logmel.shape[1]}. Set filter_augment 0."
            )
        inner = torch.randint(spare + 1, (pieces - 1,))
        curve = joined_bands(inner, torch.rand(len(logmel), pieces + 1) * 2 - 1, logmel.shape[1])
        return logmel * to_device(10 ** (curve * range_db / 20), logmel.device)[:, :, None]
    if not 1 <= bands[0] <= bands[1] < logmel.shape[1]:
        raise UserError(
            f"filter_augment cuts the mel bands in {bands[0]} to {bands[1]} pieces: {logmel.shape[1]} bands are too "
            f"few. Give more mel_bins, or filter_augment 0."
        )
    curve = _random_curves(logmel.shape[0], logmel.shape[1], bands) * range_db
    return logmel + (to_device(curve, logmel.device) * scale)[:, :, None]


def _random_curves(clips: int, width: int, bands: tuple[int, int]) -> Tensor:
    """(clips, width) piecewise linear curves from -1 to 1, of bands[0] to bands[1] pieces each."""
    fewest, most = bands
    pieces = torch.randint(fewest, most + 1, (clips, 1))
    narrowest = min(NARROWEST_BAND, (width - 1) // most)
    spare = width - 1 - pieces * narrowest  # what the pieces share beyond their least width
    number = torch.arange(1, most)
    inner = torch.where(number < pieces, torch.rand(clips, most - 1), 1.0).sort(dim=1).values
    # Edges that a clip does not need lie at its last band.
    inner = torch.where(number < pieces, inner * spare + number * narrowest, width - 1.0)
    edge = torch.cat([torch.zeros(clips, 1), inner, torch.full((clips, 1), width - 1.0)], dim=1)  # (B, most + 1)
    return _through(edge, 2 * torch.rand(clips, most + 1) - 1, width)


def joined_bands(inner: Tensor, gain: Tensor, width: int) -> Tensor:
    """(B, width) curves of n pieces, within which a gain changes linearly from that of its left to its right border.

    gain: (B, n + 1). inner: (n - 1,) integers from 0 to width - 6 n, from which the borders between the pieces follow.
    """
    border = inner.sort().values + NARROWEST_BAND * torch.arange(1, gain.shape[1] - 1)
    # The last band of a piece and the first of the next one have the gain of the border between them.
    edge = torch.cat([torch.tensor([0]), torch.stack([border - 1, border], 1).flatten(), torch.tensor([width - 1])])
    gain = torch.cat([gain[:, :1], gain[:, 1:-1].repeat_interleave(2, dim=1), gain[:, -1:]], dim=1)
    return _through(edge.float().expand(len(gain), -1).contiguous(), gain, width)


def _through(edge: Tensor, gain: Tensor, width: int) -> Tensor:
    """(B, width) straight lines through the gains (B, n + 1) at the edges (B, n + 1), from 0 to width - 1."""
    place = torch.arange(width, dtype=torch.float32).expand(len(edge), -1).contiguous()
    after = torch.searchsorted(edge, place).clamp(min=1)  # the first edge at or above a band
    low, high = edge.gather(1, after - 1), edge.gather(1, after)
    share = (place - low) / (high - low)
    return torch.lerp(gain.gather(1, after - 1), gain.gather(1, after), share)


def mix_style(logmel: Tensor, probability: float, alpha: float = 0.1, *, of_batch: bool = False) -> Tensor:
    """Mix the mean and deviation over time of each mel band with those of another clip of the batch.

    MixStyle (Zhou et al. 2021, arXiv 2104.02008) by frequency (Kim et al. 2022, arXiv 2206.12513), each clip with this
    probability and a weight of its own statistics from Beta(alpha, alpha). of_batch: all clips or none with this
    probability, and a weight of at least a half. No gradient flows through the statistics. Labels stay.
    """
    if probability == 0:
        return logmel
    clips = len(logmel)
    partner, weight = draw_mixing(clips, alpha, larger=of_batch)
    chosen = happens(probability, 1 if of_batch else clips)
    mixing = Mixing(partner, torch.where(chosen, weight, 1.0))
    return with_style(logmel, mixing, unbiased=of_batch) if chosen.any() else logmel


def with_style(logmel: Tensor, mixing: Mixing, *, unbiased: bool) -> Tensor:
    """As mix_style, with given partners and weights. unbiased: of the variance."""
    partner, weight = (to_device(part, logmel.device) for part in mixing)
    weight = weight[:, None, None]
    values = logmel.detach()
    mean = values.mean(dim=2, keepdim=True)
    deviation = (values.var(dim=2, keepdim=True, unbiased=unbiased) + STYLE_FLOOR).sqrt()
    mixed_mean = torch.lerp(mean[partner], mean, weight)
    mixed_deviation = torch.lerp(deviation[partner], deviation, weight)
    mixed = (logmel - mean) / deviation * mixed_deviation + mixed_mean
    return torch.where(weight == 1, logmel, mixed)


def add_noise(features: Tensor, largest: float) -> Tensor:
    """Add noise from U(0, 1) to each cell, times a strength of each clip from U(0, largest). Gong et al. 2021, AST."""
    generator = torch.Generator(device=features.device)
    generator.manual_seed(int(torch.randint(2**62, ())))  # of the device: a batch's features are too many for the CPU
    noise = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype)
    return features + noise * to_device(largest * torch.rand(len(features), 1, 1), features.device)


def mask_time(logmel: Tensor, count: int = 2, longest: int = 64) -> tuple[Tensor, Tensor]:
    """SpecAugment's masks over time (Park et al. 2019): each of `count` sets 0 to longest - 1 frames of a clip to 0.

    Returns the features and (B, T) bool, the frames that are left.
    """
    keep = to_device(_keep(logmel.shape[0], logmel.shape[2], longest, count), logmel.device)
    return logmel * keep[:, None, :], keep


def draw_stretch(steps: int, largest: float) -> tuple[int, int]:
    """First step and number of steps of a stretch, from 1/20 to below `largest` of all."""
    shortest = int(SHORTEST_MASK * steps)
    width = int(torch.randint(shortest, max(int(largest * steps), shortest + 1), ()))
    return int(torch.randint(max(1, steps - width), ())), width


def mask_stretch(logmel: Tensor, first: int, width: int, steps: int) -> tuple[Tensor, Tensor]:
    """A mask for all clips, over `width` of `steps` steps from `first` on: features, (1, steps) bool what is left."""
    scale = logmel.shape[2] / steps
    features, left = logmel.clone(), torch.ones(1, steps, dtype=torch.bool)
    features[:, :, round(first * scale) : round((first + width) * scale)] = 0
    left[:, first : first + width] = False
    return features, to_device(left, logmel.device)


def left_of_steps(keep: Tensor, steps: int) -> Tensor:
    """(B, T) bool -> (B, steps): what share of each step of another time axis is left."""
    frames = keep.shape[1]
    shares = step_shares(torch.zeros(1, device=keep.device), frames / steps, frames=frames, steps=steps)[0]
    with torch.autocast(keep.device.type, enabled=False):
        return (1 - (~keep).float() @ shares.T).clamp(min=0)  # 1, and no rounding less, without a mask


def mask_bands(logmel: Tensor, count: int = 2, widest: int = 8) -> Tensor:
    """SpecAugment's masks over frequency: each of `count` sets 0 to widest - 1 mel bands of a clip to 0."""
    return logmel * to_device(_keep(logmel.shape[0], logmel.shape[1], widest, count), logmel.device)[:, :, None]


def _keep(clips: int, length: int, longest: int, count: int) -> Tensor:
    """(clips, length) bool: False under any of the masks."""
    size = torch.randint(0, max(1, min(longest, length)), (clips, count, 1))
    start = (torch.rand(clips, count, 1) * (length - size)).long()
    place = torch.arange(length)
    return ~((place >= start) & (place < start + size)).any(dim=1)
