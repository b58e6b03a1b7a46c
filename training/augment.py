"""What training does to a batch of clips and their targets, on the device, before the network (spec: Variants).

What is random is drawn on the CPU: a run is reproducible from its seed on any device, and none has to wait.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from data.frame_targets import Events
from utils import do_mixup, int16_to_float32


def shift_in_time(waveform: Tensor, shift_max: int) -> Tensor:
    """Roll each clip of (B, samples) by a random number of samples below shift_max."""
    return shift_in_time_with(waveform, torch.randint(shift_max, (len(waveform),)))


def shift_in_time_with(waveform: Tensor, shifts: Tensor) -> Tensor:
    """Roll each clip of (B, samples), int16 or float, by its own of (B,) numbers of samples, later if positive."""
    return _stretches(waveform, -shifts, waveform.shape[1])


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


def crop(waveform: Tensor, length: int) -> Tensor:
    """A random stretch of `length` samples of each clip: (B, samples) -> (B, length); shorter clips stay whole."""
    return _crop(waveform, length)[0]


def crop_with_events(waveform: Tensor, events: Events, length: int, rate: int) -> tuple[Tensor, Events, Tensor]:
    """`crop` of clips at `rate` samples per second, their events from the crop's beginning, and where that was.

    Returns (B, length), the events cut at the crop's ends (what lies outside has no duration), and (B,) the seconds at
    which the crops begin: a teacher's steps follow by resample_steps with shift = -beginnings and the crop's length.
    """
    cropped, starts = _crop(waveform, length)
    begin = (starts / rate).to(events.onset)
    seconds, at = cropped.shape[1] / rate, begin[events.clip]
    onset, offset = (events.onset - at).clamp(0, seconds), (events.offset - at).clamp(0, seconds)
    return cropped, Events(events.clip, events.label, onset, offset), begin


def _crop(waveform: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The crops, and the (B,) samples at which they begin, on the CPU."""
    clips, samples = waveform.shape
    if length >= samples:
        return waveform, torch.zeros(clips, dtype=torch.long)
    starts = torch.randint(samples - length + 1, (clips,))
    return _stretches(waveform, starts, length), starts


def _stretches(waveform: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, samples), (B,) -> (B, length): of each clip, the samples from its start on, round the end."""
    place = starts.to(waveform.device)[:, None] + torch.arange(length, device=waveform.device)
    return waveform.gather(1, place.remainder_(waveform.shape[1]))


def random_gain(waveform: Tensor, range_db: float, generator: Optional[torch.Generator] = None) -> Tensor:
    """Make each clip of (B, samples), int16 or float, louder or softer by up to range_db decibels: float32.

    The gain is the same all through a clip. The float samples may leave [-1, 1].
    """
    decibels = (2 * torch.rand(len(waveform), 1, generator=generator) - 1) * range_db
    return int16_to_float32(waveform) * (10 ** (decibels / 20)).to(waveform.device)


def mix_waveforms(waveform: Tensor, mixup_lambda: Tensor) -> Tensor:
    """Mixup of the sounds themselves: (B, samples), int16 or float, with the reversed batch -> float32.

    mixup_lambda: (B,) weight of a clip's own samples. The targets follow by do_mixup with the same weights.
    """
    return do_mixup(int16_to_float32(waveform), mixup_lambda.to(waveform.device))


def enhance_labels(targets: Tensor, ancestors: Tensor, children: Sequence[Sequence[int]]) -> Tensor:
    """In half of the clips, add all ancestors of each class, and one random child of each.

    targets: (B, K) of 0 and 1; ancestors: (K, K) bool, [k, a] where a is an ancestor of k; children: of each class.
    """
    enhanced = torch.maximum(targets, (targets @ ancestors.to(targets.dtype)).clamp(max=1))
    for clip, label in targets.nonzero().tolist():
        if children[label]:
            enhanced[clip, children[label][int(torch.randint(len(children[label]), ()))]] = 1
    chosen = torch.rand(len(targets), 1) < 0.5
    return torch.where(chosen.to(targets.device), enhanced, targets)


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
    inside = ((position >= start) & (position < start + length)).to(waveform.device)
    middle = (torch.arange(steps) + 0.5) * samples / steps
    steps_inside = ((middle >= start) & (middle < start + length)).to(waveform.device)
    mixed = torch.where(inside, waveform.flip(0), waveform)
    return mixed, torch.where(steps_inside[:, :, None], targets.flip(0)[:, None], targets[:, None])
