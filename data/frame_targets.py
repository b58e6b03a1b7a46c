"""Events with times -> what a network learns in each of its steps, and the steps of one grid on another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from utils import do_mixup

TICKS = 1 << 16  # parts of a step: whole numbers add up alike in any order and on any device


@dataclass(frozen=True)
class Events:
    """The events of a batch, in any order, all tensors on one device.

    clip: (E,) int64 place in the batch; label: (E,) int64 class; onset, offset: (E,) float seconds from the clip's
    beginning. What lies outside the clip counts for nothing, and neither does an event whose offset is its onset.
    """

    clip: Tensor
    label: Tensor
    onset: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        lengths = [len(self.clip), len(self.label), len(self.onset), len(self.offset)]
        if len(set(lengths)) != 1:
            raise ValueError(f"Events need a clip, a label, an onset and an offset each, not {lengths} of them.")

    def to(self, device: torch.device | str) -> "Events":
        """The same events on another device. The CPU does not wait for the copy to a GPU."""
        to_gpu = torch.device(device).type == "cuda"
        return self._each(lambda part: part.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "Events":
        """The same events in pinned memory, for a DataLoader."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Events":
        return Events(*map(change, (self.clip, self.label, self.onset, self.offset)))


def rasterize(
    events: Events,
    *,
    clips: int,
    classes: int,
    steps: int,
    seconds: float,
    fractional: bool = True,
    touched: bool = False,
) -> Tensor:
    """The share of each step that events of a class cover: (clips, steps, classes) float32 from 0 to 1.

    seconds: time that all steps cover together. Events of one class that overlap count once. fractional=False: 1 for
    steps of which at least half is covered, else 0. touched: 1 for all steps that an event touches, whatever
    `fractional`. Times are taken to 1/65536 of a step. Clips and labels must be below `clips` and `classes`.
    """
    line, onset, offset = _covered(events, classes, steps, seconds, touched=touched)
    edge = torch.arange(steps, device=line.device) * TICKS  # where each step begins
    covered = torch.minimum(offset[:, None], edge + TICKS) - torch.maximum(onset[:, None], edge)  # (E, steps)
    clip, label = line // classes, line % classes
    place = (clip[:, None] * steps + torch.arange(steps, device=line.device)) * classes + label[:, None]
    flat = torch.zeros(clips * steps * classes, dtype=torch.int32, device=line.device)
    flat.index_add_(0, place.flatten(), covered.clamp(min=0).flatten().int())
    shares = flat.view(clips, steps, classes)
    return shares.float() / TICKS if fractional else (2 * shares >= TICKS).float()


def touched_steps(events: Events, *, classes: int, steps: int, seconds: float) -> tuple[Tensor, Tensor, Tensor]:
    """As rasterize with `touched`, in few numbers: (E,) clip, class and how many steps, whose sum counts none twice."""
    line, onset, offset = _covered(events, classes, steps, seconds, touched=True)
    return line // classes, line % classes, (offset - onset) // TICKS


def _covered(
    events: Events, classes: int, steps: int, seconds: float, *, touched: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (clip * classes + class), onset and offset in ticks of the events of each line, without overlap."""
    _check_grid(steps, seconds)
    onset, offset = _ticks(events.onset, steps, seconds), _ticks(events.offset, steps, seconds)
    if touched:
        # Times that are meant to lie on an edge are float32: less than its spacing at the clip's end touches nothing.
        slack = steps * TICKS // 2**23 + 1
        first, last = (onset + slack) // TICKS, -((slack - offset) // TICKS)
        onset, offset = first * TICKS, torch.where(offset > onset, last, first) * TICKS
    return _without_overlap(events.clip * classes + events.label, onset, offset, steps * TICKS)


def resample_steps(
    values: Tensor, steps: int, seconds: float, *, shift: Tensor, length: Optional[float] = None
) -> Tensor:
    """Values of one grid of steps on another: the mean over each new step, (B, T, K) -> (B, steps, K) float32.

    values: constant within each of T steps, which cover `seconds` together. shift: (B,) seconds by which a clip's
    values are moved later first; what goes beyond the end comes in at the beginning. length: seconds from the beginning
    that the new steps cover together, None: all. (So a crop that begins at s has the shift -s and the crop's length.)
    """
    _check_grid(steps, seconds)
    if length is not None and not 0 < length <= seconds:
        raise ValueError(f"length = {length} s is not allowed: give more than 0 and at most the {seconds} s there are.")
    frames = values.shape[1]
    width = frames * ((length or seconds) / seconds) / steps
    start = -shift.to(values.device).float() * (frames / seconds)
    with torch.autocast(values.device.type, enabled=False):
        return step_shares(start, width, frames=frames, steps=steps) @ values.float()


def step_shares(start: Tensor, width: float, *, frames: int, steps: int) -> Tensor:
    """What part of each new step lies in each of `frames` old ones, round the end: (B, steps, frames), rows sum to 1.

    start: (B,) where the first new step begins, and width: how long it is, at most `frames`, both in old steps.
    """
    begin = start[:, None] + torch.arange(steps, device=start.device) * width  # (B, steps)
    after = (begin[:, :, None] - torch.arange(frames, device=start.device)).remainder(frames)
    end = after + width  # the new step is [after, end): an old one is [0, 1), and [frames, frames + 1) once round
    overlap = (end.clamp(max=1) - after).clamp(min=0) + (end.clamp(max=frames + 1) - frames).clamp(min=0)
    return overlap / width


def _check_grid(steps: int, seconds: float) -> None:
    if steps < 1 or not seconds > 0:
        raise ValueError(f"{steps} steps of {seconds} s together are no grid: give at least 1 step and more than 0 s.")


def _ticks(times: Tensor, steps: int, seconds: float) -> Tensor:
    """(E,) seconds -> int64 ticks from the clip's beginning, within the clip."""
    return (times.float() * (steps * TICKS / seconds)).round().clamp(0, steps * TICKS).long()


def _without_overlap(line: Tensor, onset: Tensor, offset: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Events of each line (clip and class) cut so that they cover the same time, and none of it twice.

    In order of their onsets, an event begins no earlier than the furthest offset before it. The lines lie one after
    another on a single axis, each `length` ticks long, so that one running maximum serves them all.
    """
    begin, order = torch.sort(line * length + onset)
    line = line[order]
    end = line * length + torch.maximum(offset, onset)[order]
    reached = torch.cummax(end, dim=0).values if len(end) else end
    begin = torch.cat([begin[:1], torch.maximum(begin[1:], reached[:-1])])
    return line, begin - line * length, torch.maximum(begin, end) - line * length


@dataclass(frozen=True)
class Targets:
    """Targets of B clips, T frames of the network's time axis, K classes.

    clips: (B, K). frames: (B, T, K), where the loss is on frames. labelling: (B,) as data.clip_store has it, where
    clips differ. teacher: (B, T, K) probabilities of a teacher, and has_teacher (B,).
    """

    clips: Tensor
    frames: Optional[Tensor] = None
    labelling: Optional[Tensor] = None
    teacher: Optional[Tensor] = None
    has_teacher: Optional[Tensor] = None

    def mixed(self, weight: Tensor, partner: Optional[Tensor] = None) -> "Targets":
        """Those of clips that are mixed, as do_mixup: weight (B,) of each clip itself, its partner (B,)."""
        mixed = self._with_frames(lambda part: do_mixup(part, weight, partner))
        return replace(mixed, clips=do_mixup(self.clips, weight, partner))

    def masked(self, left: Tensor) -> "Targets":
        """Those of clips of whose frames shares are left, (B, T) or (1, T): the rest is silent."""
        return self._with_frames(lambda part: part * left[:, :, None])

    def rolled(self, shifts: Sequence[int]) -> "Targets":
        """Those of clips that are rolled by so many frames: what goes beyond the end comes in at the beginning."""
        return self._with_frames(lambda part: roll(part, shifts, dim=0))

    def _with_frames(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        """The targets of frames and the teacher's, where there are any, changed alike."""
        frames, teacher = (None if part is None else change(part) for part in (self.frames, self.teacher))
        return replace(self, frames=frames, teacher=teacher)

    def mixable(self, partner: Optional[Tensor] = None) -> Optional[Tensor]:
        """(B,) bool: whether a clip and its partner, as in do_mixup, have the same kind of labels; None: all."""
        alike = None
        for kind in (self.labelling, self.has_teacher):
            if kind is not None:
                same = kind == (kind.flip(0) if partner is None else kind[partner])
                alike = same if alike is None else alike & same
        return alike


def roll(values: Tensor, shifts: Sequence[int], dim: int) -> Tensor:
    """(B, ...) with each item rolled by its own shift along a dimension of the item; without gather's gradient."""
    return torch.stack([item.roll(shift, dim) for item, shift in zip(values, shifts, strict=True)])
