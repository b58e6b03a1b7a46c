"""Augmentation of waveforms and of their labels, on the device, before the front-end.

Random numbers are drawn on the CPU: a run is reproducible from its seed on any device, and no device has to wait.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from data.frame_targets import Events


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
    place = starts.to(waveform.device)[:, None] + torch.arange(length, device=waveform.device)
    return waveform.gather(1, place.remainder_(waveform.shape[1]))


def random_gain(waveform: Tensor, range_db: float, generator: Optional[torch.Generator] = None) -> Tensor:
    """Make each clip of (B, samples) louder or softer by up to range_db decibels.

    The gain is the same all through a clip. The samples may leave [-1, 1].
    """
    decibels = (2 * torch.rand(len(waveform), 1, generator=generator) - 1) * range_db
    return waveform * (10 ** (decibels / 20)).to(waveform.device)


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
