"""Clips of a table as training examples, read in batches; with event times and a teacher's logits where asked for."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, Optional

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data.clip_store import STRONG, UNREADABLE, ClipTable, Waveforms, labelling, open_store
from data.frame_targets import Events
from data.pseudo_labels import TeacherLogits
from data.samplers import PARTS
from settings import UserError

Batch = dict[str, Any]

OF_BATCH = ("unreadable", "sample_rate", "events")  # entries of a batch that have no first axis of clips
PIECE = re.compile(rb"(.+)#t=([\d.]+),([\d.]+)")  # name of a clip that was cut from a recording, as `prepare` gives it
CROP_STEP = 0.04  # seconds: crops begin at whole ones, as the frames of PretrainedSED
MOST_TRIES = 10  # other clips of its class, and then any others, that are tried in place of one that cannot be read


class ClipDataset(Dataset):
    """Clips of a table as training examples, read in batches.

    An item: audio_name, waveform (clip_samples,) int16, sample_rate in Hz, target (K,) float32, real_len in samples and
    index (its place in the table). A clip that is shorter than clip_samples is padded with zeros or repeated (`fit`); a
    longer one is cut. Files are opened when first read, by each process for itself. A clip that cannot be read is
    replaced by another one, of its class if possible; without `replace`, for evaluation, it is silent and has the index
    UNREADABLE.
    """

    def __init__(
        self, table: ClipTable, *, clip_samples: int, fit: Literal["pad", "repeat"], replace: bool = True
    ) -> None:
        self.table, self.clip_samples, self.fit, self.replace = table, clip_samples, fit, replace
        self.sample_rate = table.waveform_rate
        self._open: dict[int, Waveforms] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([index])
        return {name: value if name in OF_BATCH else value[0] for name, value in batch.items()}

    def __getitems__(self, indexes: Sequence[int]) -> Batch:
        """A whole batch: the items of `__getitem__`, stacked; audio_name is a list, unreadable a count of clips.

        A clip that is replaced is so in all of its item.
        """
        batch = _BatchMemory(len(indexes), self.clip_samples)
        chosen = np.array(indexes)
        lengths, unreadable = [], 0
        silent: list[int] = []
        for place, index in enumerate(indexes):
            for candidate in self._candidates(index):
                try:
                    lengths.append(self._read_into(batch.row(place), candidate))
                except (OSError, UserError):
                    unreadable += 1
                    continue
                batch.keep(place)
                chosen[place] = candidate
                break
            else:
                if self.replace:
                    raise UserError(
                        f"{self.table.names[index].decode()} cannot be read, and neither could any other clip that was "
                        f"tried: `python main.py check` names the damaged stores."
                    )
                batch.row(place)[:] = 0
                batch.keep(place)
                lengths.append(0)
                silent.append(place)
        places = torch.from_numpy(chosen.copy())
        places[silent] = UNREADABLE
        return {
            "audio_name": [name.decode() for name in self.table.names[chosen]],
            "waveform": batch.waveforms,
            "sample_rate": self.sample_rate,
            "target": torch.from_numpy(self.table.targets[chosen].astype(np.float32)),
            "real_len": torch.tensor(lengths),
            "index": places,
            "unreadable": unreadable,
        }

    def _candidates(self, index: int) -> Iterator[int]:
        """A clip, then others of its class, then any, in an order that depends on the clip alone."""
        yield index
        if self.replace:
            rng = np.random.default_rng(index)
            same = np.asarray(self.table.targets[:, self.table.targets[index]].any(axis=1))
            same[index] = False
            yield from rng.permutation(np.flatnonzero(same))[:MOST_TRIES].tolist()
            yield from rng.integers(len(self), size=MOST_TRIES).tolist()

    def _read_into(self, waveform: np.ndarray, index: int) -> int:
        """Fill one row of the batch; returns the clip's own length in samples, at most clip_samples."""
        length = self._file(int(self.table.path_number[index])).read_into(int(self.table.row[index]), waveform)
        if length == 0:
            raise UserError("The clip is empty.")
        if length < self.clip_samples:
            repeated = self.fit == "repeat"
            waveform[length:] = np.resize(waveform[:length], self.clip_samples)[length:] if repeated else 0
        return length

    def _file(self, number: int) -> Waveforms:
        if self._process != os.getpid():  # a forked worker: handles of the parent are not its own
            self._open, self._process = {}, os.getpid()
        if number not in self._open:
            self._open[number] = Waveforms(open_store(self.table.paths[number]))
        return self._open[number]


class FrameClipDataset(ClipDataset):
    """Clips with the annotation of their events, for training on frames.

    An item also has events (frame_targets.Events of the batch, in seconds of the clip as it is read),
    labelling (int8: STRONG, WEAK or UNLABELLED), and with `teacher` its logits (K, T) float16 and has_teacher. With
    `crops`, indexes are those of an EpochSampler with crops: a strong clip that the next clip of its recording follows
    (forest.wav#t=0,10, forest.wav#t=10,20) begins so far within it, at a whole CROP_STEP, and ends in the next one. The
    target stays that of the clip by itself.
    """

    def __init__(self, *words: Any, teacher: Optional[TeacherLogits] = None, crops: bool = False, **more: Any) -> None:
        """As ClipDataset. Raises UserError where names of clips and of the teacher's file match ambiguously."""
        super().__init__(*words, **more)
        self.teacher = teacher
        self.following = _following(self.table.names) if crops else np.full(len(self), -1)
        self.labelling = labelling(self.table)
        if teacher is not None:
            self.teacher_rows = teacher.rows([name.decode() for name in self.table.names])

    def __getitems__(self, indexes: Sequence[int]) -> Batch:
        parts = [index // len(self) for index in indexes]
        batch = super().__getitems__([index % len(self) for index in indexes])
        # The clips that were handed over, which may stand in for others; an unreadable one of a test is silent.
        readable = batch["index"] != UNREADABLE
        chosen = torch.where(readable, batch["index"], 0).tolist()
        lengths = batch["real_len"].tolist()
        batch["labelling"] = torch.from_numpy(self.labelling[chosen])
        starts = [int(part * self.clip_samples / PARTS) for part in parts]
        batch["events"] = self._events(self._crop(batch["waveform"], chosen, lengths, starts))
        if self.teacher is not None:
            rows = self.teacher_rows[chosen]
            shape = self.teacher.classes, self.teacher.steps
            logits = np.zeros((len(rows), *shape), dtype=np.float16)
            for place in np.flatnonzero(rows >= 0):
                logits[place] = self.teacher.read(int(rows[place]))
            batch["teacher"], batch["has_teacher"] = torch.from_numpy(logits), torch.from_numpy(rows >= 0)
        return batch

    def _crop(
        self, waveform: torch.Tensor, chosen: Sequence[int], lengths: Sequence[int], starts: Sequence[int]
    ) -> list[tuple[int, int, int, int]]:
        """Let clips of (B, samples) begin at sample `starts` where they are followed; returns what _events takes."""
        step, found = max(1, round(CROP_STEP * self.sample_rate)), []
        after = np.empty(self.clip_samples, dtype=np.int16)
        for place, (index, length, start) in enumerate(zip(chosen, lengths, starts, strict=True)):
            if not length or self.labelling[index] != STRONG:
                continue
            following, begin, more = int(self.following[index]), start // step * step, 0
            if begin and following >= 0 and length == self.clip_samples and self.labelling[following] == STRONG:
                with suppress(OSError, UserError):  # what cannot be read is left out: the clip stays as it is
                    more = self._read_into(after, following)
            begin = begin if more else 0
            found.append((place, index, length, -begin))
            if begin:
                found.append((place, following, more, length - begin))
                waveform[place] = torch.cat([waveform[place, begin:], torch.from_numpy(after[:begin])])
        return found

    def _events(self, clips: list[tuple[int, int, int, int]]) -> Events:
        """The events of clips (place in the batch, number, own length and beginning in samples), repeated as sounds."""
        columns: list[list[np.ndarray]] = [[], [], [], []]
        end = self.clip_samples / self.sample_rate
        for place, index, length, begin in clips:
            seconds = length / self.sample_rate
            copies = -(-self.clip_samples // length) if self.fit == "repeat" else 1
            later = np.arange(copies)[:, None] * seconds + begin / self.sample_rate  # (copies, 1)
            table = self.table.events[self.table.path_number[index]]
            part = table.of(self.table.row[index])
            onset = np.maximum(np.minimum(table.onset[part], seconds) + later, 0).ravel()
            offset = np.minimum(np.minimum(table.offset[part], seconds) + later, end).ravel()
            label, inside = np.tile(table.label[part], copies), onset < offset
            found = (np.full(inside.sum(), place), label[inside], onset[inside], offset[inside])
            for column, values in zip(columns, found, strict=True):
                column.append(values)
        types = (np.int64, np.int64, np.float32, np.float32)
        parts = [np.concatenate([np.zeros(0), *column]).astype(t) for column, t in zip(columns, types, strict=True)]
        return Events(*map(torch.from_numpy, parts))


def _following(names: np.ndarray) -> np.ndarray:
    """(N,) the clip that begins where a clip ends in the same recording, by names as `prepare` gives them; -1: none."""
    matches = [PIECE.fullmatch(name) for name in names.tolist()]
    places = {(match[1], match[2]): number for number, match in enumerate(matches) if match}
    return np.array([places.get((match[1], match[3]), -1) if match else -1 for match in matches], dtype=np.int64)


class _BatchMemory:
    """(clips, samples) int16 that is filled row by row: `row` is written to, then `keep` puts it in its place.

    In a worker the batch lies in memory that the training process shares, as torch's default_collate does it. It is
    filled there as a file is written: through its mapped pages each new page would cost a fault and be zeroed first,
    which takes longer than reading the clips.
    """

    def __init__(self, clips: int, samples: int) -> None:
        self._file: Optional[int] = None
        if get_worker_info() is None:
            # NumPy asks for huge pages, torch does not.
            self.waveforms = torch.from_numpy(np.empty((clips, samples), dtype=np.int16))
        else:
            storage = torch.UntypedStorage._new_shared(2 * clips * samples)
            if torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
                self._file, self._row = storage._share_fd_cpu_()[0], np.empty(samples, dtype=np.int16)
            self.waveforms = torch.empty(0, dtype=torch.int16).set_(storage).reshape(clips, samples)
        self._rows = self.waveforms.numpy()

    def row(self, place: int) -> np.ndarray:
        """(samples,) int16 to write a clip into; its content before is undefined."""
        return self._rows[place] if self._file is None else self._row

    def keep(self, place: int) -> None:
        """Put what was written into `row(place)` in its place. Raises UserError where shared memory is full."""
        if self._file is None:
            return
        remaining, offset = self._row.data.cast("B"), place * self._row.nbytes
        try:
            while remaining:
                written = os.pwrite(self._file, remaining, offset)
                remaining, offset = remaining[written:], offset + written
        except OSError as error:
            raise UserError(
                f"A worker has no shared memory for a batch ({error}): enlarge /dev/shm (in a container --shm-size), "
                f"or lower num_workers or batch_size."
            ) from None
