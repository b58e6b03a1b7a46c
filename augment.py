"""What training does to a batch of clips and their targets, on the device, before the network (spec: Variants)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shift_in_time(waveform: Tensor, shift_max: int) -> Tensor:
    """Roll each clip of (B, samples) by a random number of samples below shift_max."""
    shifts = torch.randint(shift_max, (len(waveform),)).tolist()
    return torch.stack([clip.roll(shift) for clip, shift in zip(waveform, shifts, strict=True)])


def crop(waveform: Tensor, length: int) -> Tensor:
    """A random stretch of `length` samples of each clip: (B, samples) -> (B, length); shorter clips stay whole."""
    samples = waveform.shape[1]
    if length >= samples:
        return waveform
    starts = torch.randint(samples - length + 1, (len(waveform),)).tolist()
    return torch.stack([clip[at : at + length] for clip, at in zip(waveform, starts, strict=True)])


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
