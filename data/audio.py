"""Audio files -> mono waveforms at one rate, block by block or whole, by libsndfile, PyAV and soxr.

The one opener of audio. The length of a sound is what is decoded, never what a header states; what a
decoder leaves unread, and what is odd about the samples, becomes a remark (data/levels.py).
"""

import importlib
import os
import re
import stat
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
import soundfile
import soxr

from data.containers import Bytes, Part, View, find_parts, foreign_kind
from data.levels import Levels, Remark
from settings import UserError
from utils import INT16_SCALE, float32_to_int16

BLOCK_VALUES = 2**19  # samples of all channels that are read at once (2 MiB), and about the most a block resamples to
RATES = (100, 4_000_000)  # Hz: other rates are damaged headers; resampled from 1 Hz, a small file would fill a disk
MOST_CHANNELS = 64  # of an array of samples; with more, time and channels have changed places
RUN_UP = 20_000  # samples that are read before a stretch: an MP3 decoder needs some frames until it is right
UNREAD_BYTES = 2**16  # more at the end of a file is worth a remark: decoders stop within a block, or before padding
TOLERANCE = 4000  # samples of a delay that a decoder may leave out at the ends (MP3: 529 + 1152 and its padding)
STATED_SECONDS = 0.5  # by which the duration that a container states may be rounded
UNREADABLE = (soundfile.LibsndfileError, RuntimeError, OSError)
INSTALL = "pip install av"
NOTE = re.compile(rb"(Note|Warning): |.*libmpg123|\s*$")  # a line that libmpg123 writes
_STANDARD_ERROR = threading.RLock()


def stream_audio(
    source: str | Path | BinaryIO,
    sample_rate: int,
    *,
    start: float = 0.0,
    seconds: Optional[float] = None,
    remarks: Optional[list[Remark]] = None,
) -> Generator[np.ndarray, None, None]:
    """Blocks of (samples,) float32 mono at `sample_rate`, in order; together they are the file, resampled as a whole.

    source: a path, or an open binary file that can seek. start, seconds: only that stretch of it, as far as the file
    reaches. remarks: takes what is odd about the sound, known at the end. However long the file, some MiB are held at a
    time. Raises UserError, at the latest at the end, where the file is missing, empty, no audio, damaged, or holds NaN
    or infinite samples.
    """
    if start < 0 or (seconds is not None and seconds <= 0):
        raise UserError(f"start = {start} s must be 0 or more, and seconds = {seconds} more than 0.")
    name = str(source) if isinstance(source, (str, Path)) else "The sound that was given"
    levels, found, resampler = Levels(), list[Remark](), _Resampler(sample_rate)
    samples = 0
    with closing(_decoded(source, name, found, start, seconds)) as decoded:
        for rate, block in decoded:
            mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
            if not np.isfinite(mono).all():
                raise UserError(f"{name} holds NaN or infinite samples.")
            levels.add(block, mono)
            for ready in resampler.feed(rate, mono):
                samples += len(ready)
                yield ready
    ready = resampler.finish()
    if samples + len(ready) == 0:
        raise UserError(f"{name} holds no samples{f' from {start:g} s on' if start else ''}.")
    yield ready
    if remarks is not None:
        remarks += [*found, *levels.remarks()]


class _Resampler:
    """Blocks of any rate -> blocks at one rate. soxr's stream gives the samples that it gives for the whole at once."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.rate = wanted, wanted
        self.stream: Any = None

    def feed(self, rate: int, block: np.ndarray) -> Iterator[np.ndarray]:
        if rate != self.rate:  # the first block, or joined files of several rates
            yield self.finish()
            self.rate = rate
            if rate != self.wanted:
                self.stream = soxr.ResampleStream(rate, self.wanted, 1, dtype="float32")
        yield block if self.stream is None else self.stream.resample_chunk(block)

    def finish(self) -> np.ndarray:
        """What is left, after which another rate may begin."""
        stream, self.stream = self.stream, None
        return np.zeros(0, np.float32) if stream is None else stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _decoded(
    source: str | Path | BinaryIO, name: str, remarks: list[Remark], start: float, seconds: Optional[float]
) -> Generator[tuple[int, np.ndarray], None, None]:
    """(rate, (samples, channels) float32) of a stretch, at the file's own rate."""
    with _opened(source, name) as file:
        data = Bytes(file)
        if data.size == 0:
            raise UserError(f"{name} is empty: it is no audio that can be read.")
        stretch = _Stretch(start, seconds)
        parts = find_parts(data)
        if not parts:
            yield from stretch.cut(_by_av(file, name, foreign_kind(data), remarks))
            return
        for part in parts:
            yield from stretch.cut(_by_libsndfile(data, part, name, remarks, stretch))
            if stretch.over:
                return


class _Stretch:
    """The stretch of a file that is wanted: what lies before and behind is left out. Seconds."""

    def __init__(self, start: float, seconds: Optional[float]) -> None:
        self.start, self.seconds = start, seconds  # what is still to leave out, and to take

    @property
    def over(self) -> bool:
        return self.seconds is not None and self.seconds <= 0

    def cut(self, decoded: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        for rate, block in decoded:
            skipped = min(len(block), round(self.start * rate))
            self.start = max(0.0, self.start - skipped / rate) if skipped < round(self.start * rate) else 0.0
            block = block[skipped:]
            if self.seconds is not None:
                block = block[: max(1, round(self.seconds * rate))]
                self.seconds = self.seconds - len(block) / rate
                if round(self.seconds * rate) < 1:
                    self.seconds = 0.0
            if len(block):
                yield rate, block
            if self.over:
                return


@contextmanager
def _opened(source: str | Path | BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The bytes of a source. Raises UserError, with the reason, where there are none to read at random."""
    if not isinstance(source, (str, Path)):
        yield source
        return
    path = Path(source)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise UserError(f"{name} is a folder: give a file of audio.")
        if not stat.S_ISREG(kind):
            raise UserError(f"{name} is a pipe or a device, which can be read only once: copy it into a file.")
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    except (FileNotFoundError, NotADirectoryError):
        target = f": it is a link to {os.readlink(path)}" if path.is_symlink() else ""
        raise UserError(f"There is no file {name}{target}.") from None
    except OSError as error:
        raise UserError(f"{name} cannot be opened: {os.strerror(error.errno or 0)}.") from None
    with file:
        yield file


class _Sequential(soundfile.SoundFile):
    """A file that is read sequentially.

    After each read of a seekable file, soundfile seeks to the current place. MP3 decoders restart there with a tenth to
    a third of a second of silence: read in blocks, an MP3 would have a hole in each.
    """

    def seekable(self) -> bool:
        return False


def _by_libsndfile(
    data: Bytes, part: Part, name: str, remarks: list[Remark], stretch: _Stretch
) -> Iterator[tuple[int, np.ndarray]]:
    """A part of a file. What its decoder leaves unread is remarked where the whole is read."""
    view, count = View(data, part), 0
    with ExitStack() as stack:
        try:
            with _quiet(part):
                file = stack.enter_context(_Sequential(view))
        except UNREADABLE as error:
            raise UserError(f"{name} is no audio that can be read{_reason(error, view)}.") from None
        rate, channels = file.samplerate, file.channels
        if not RATES[0] <= rate <= RATES[1] or channels < 1:
            raise UserError(f"{name} cannot be read as audio: its header states {rate} Hz and {channels} channels.")
        from_start = stretch.start == 0
        count += _seek(file, part, stretch, rate)
        # A low rate makes a block longer when it is resampled: such files are read in smaller ones, of some seconds.
        size = max(1, min(BLOCK_VALUES // channels, 8 * rate))
        while True:
            try:
                with _quiet(part):
                    block = file.read(size, dtype="float32", always_2d=True)
            except UNREADABLE as error:
                for block in _before_damage(data, part, count):
                    count += len(block)
                    yield rate, block
                if not part.samples or count < part.samples:
                    reason = _reason(error, view)
                    raise UserError(f"{name} is damaged after {count / rate:.2f} s{reason}.") from None
                remarks.append(Remark("not read whole", "what follows its last sample is not read: it is no sound"))
                return
            if view.error is not None:
                raise UserError(f"{name} cannot be read: {os.strerror(view.error.errno or 0)}.")
            if len(block) == 0:
                break
            count += len(block)
            yield rate, block
    if from_start:  # and to the end, or the loop above would not have ended
        text = part.remark or _unread(part, view, count, rate)
        if text:
            remarks.append(Remark("not read whole", text))


def _before_damage(data: Bytes, part: Part, count: int) -> Iterator[np.ndarray]:
    """Blocks of FLAC behind the first `count` samples: libsndfile drops the block in which it meets an error."""
    if part.noisy or not part.head or not part.samples:
        return
    whole, place = Part(part.begin - len(part.head), part.end), 0
    with suppress(*UNREADABLE), _Sequential(View(data, whole)) as file:
        while place < part.samples:
            wanted = min(BLOCK_VALUES // file.channels, count - place) if place < count else 1024
            block = file.read(min(wanted, part.samples - place), dtype="float32", always_2d=True)
            if len(block) == 0:
                return
            if place >= count:
                yield block
            place += len(block)


def _seek(file: _Sequential, part: Part, stretch: _Stretch, rate: int) -> int:
    """Go near the beginning of a stretch, where that is possible; returns the samples that are left out."""
    first = round(stretch.start * rate)
    if not 2 * RUN_UP < first < file.frames:
        return 0
    with _quiet(part), suppress(*UNREADABLE):
        left_out = file.seek(first - RUN_UP)
        stretch.start -= left_out / rate
        return left_out
    return 0


def _unread(part: Part, view: View, count: int, rate: int) -> str:
    """What a decoder left of a part that it read to its end; "" for nothing."""
    if part.samples and count < part.samples - TOLERANCE:
        return f"{count / rate:.2f} of its {part.samples / rate:.2f} s could be decoded"
    unread = view.size - view.reached
    return f"{unread} bytes at its end are not read" if unread > UNREAD_BYTES else ""


def _reason(error: BaseException, view: View) -> str:
    """libsndfile's reason, without the name of the file, which is not its own."""
    if view.error is not None:
        return f": {os.strerror(view.error.errno or 0)}"
    text = getattr(error, "error_string", "").removeprefix("Error : ").strip().rstrip(".")
    return f" ({text})" if text and "not exist" not in text and "System error" not in text else ""


@contextmanager
def _quiet(part: Part) -> Iterator[None]:
    """Without the notes that libmpg123 writes to standard error, which libsndfile has no switch for.

    What other threads write there meanwhile comes out at the end.
    """
    if not part.noisy:
        yield
        return
    with _STANDARD_ERROR:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        with _scratch_file() as written:
            os.dup2(written.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                written.seek(0)
                others = [line for line in written if not NOTE.match(line)]
                with suppress(OSError):
                    os.write(2, b"".join(others))


def _scratch_file() -> BinaryIO:
    """An empty file without a name, in memory where the operating system has such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("notes"), "w+b")
    return tempfile.TemporaryFile()


def _by_av(file: BinaryIO, name: str, kind: str, remarks: list[Remark]) -> Iterator[tuple[int, np.ndarray]]:
    """A file in a container that libsndfile does not read, through PyAV (FFmpeg), where that is installed."""
    if not kind:
        raise UserError(f"{name} is no audio that can be read.")
    try:
        av = importlib.import_module("av")
    except ModuleNotFoundError:
        raise UserError(
            f"{name} is {kind}, which is read through PyAV alone: {INSTALL}, or convert it to WAV or FLAC."
        ) from None
    file.seek(0)
    try:
        with av.open(file, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise UserError(f"{name} is {kind} without a sound.")
            resampler, rate = av.AudioResampler(format="fltp"), container.streams.audio[0].rate
            stated = (container.duration or 0) / av.time_base
            held, size, count = list[np.ndarray](), 0, 0
            for frame in container.decode(audio=0):
                for part in resampler.resample(frame):
                    held.append(part.to_ndarray().T)
                    size += held[-1].size
                    count += len(held[-1])
                if size >= BLOCK_VALUES // 4:
                    yield rate, np.concatenate(held)
                    held, size = [], 0
            if held:
                yield rate, np.concatenate(held)
            if count / rate < stated - STATED_SECONDS:
                text = f"{count / rate:.2f} of the {stated:.2f} s that its header states could be decoded"
                remarks.append(Remark("not read whole", text))
    except av.error.FFmpegError as error:
        raise UserError(f"{name} is {kind} that cannot be read: {error.strerror}.") from None


def read_audio(
    source: str | Path | BinaryIO,
    sample_rate: int,
    *,
    start: float = 0.0,
    seconds: Optional[float] = None,
    remarks: Optional[list[Remark]] = None,
) -> np.ndarray:
    """(samples,) float32 mono at `sample_rate`: channels averaged, resampled by soxr; see stream_audio.

    Raises UserError where the file is missing, empty, no audio, damaged, or holds NaN or infinite samples.
    """
    return np.concatenate(list(stream_audio(source, sample_rate, start=start, seconds=seconds, remarks=remarks)))


def cut_pieces(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Blocks of any lengths as pieces of `size` samples; the last one may be shorter."""
    held = np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held.astype(block.dtype), block])
        whole = len(held) // size * size
        for start in range(0, whole, size):
            yield held[start : start + size]
        held = held[whole:]
    if len(held):
        yield held


def stream_int16(
    path: Path | BinaryIO, sample_rate: int, size: Optional[int] = None, remarks: Optional[list[Remark]] = None
) -> Iterator[np.ndarray]:
    """(samples,) int16 mono at `sample_rate`, in pieces of `size` samples; None: in one. See stream_audio."""
    blocks = (float32_to_int16(block) for block in stream_audio(path, sample_rate, remarks=remarks))
    if size is None:
        yield np.concatenate(list(blocks))
    else:
        yield from cut_pieces(blocks, size)


def read_int16(path: Path | BinaryIO, sample_rate: int, remarks: Optional[list[Remark]] = None) -> np.ndarray:
    """(samples,) int16 mono at `sample_rate`; see read_audio."""
    return next(stream_int16(path, sample_rate, remarks=remarks))


def audio_seconds(path: Path) -> float:
    """Duration of a file. It is decoded, unless its length follows from its bytes (WAV, AIFF).

    Raises UserError where it is no audio or has no samples.
    """
    name, seconds = str(path), 0.0
    with _opened(path, name) as file:
        data = Bytes(file)
        parts = find_parts(data)
        for part in parts:
            if not part.exact:
                break
            try:
                with soundfile.SoundFile(View(data, part)) as sound:
                    seconds += sound.frames / sound.samplerate
            except UNREADABLE as error:
                raise UserError(f"{name} is no audio that can be read{_reason(error, View(data, part))}.") from None
    if not parts or not all(part.exact for part in parts):
        seconds = sum(len(block) / rate for rate, block in _decoded(path, name, [], 0.0, None))
    if seconds == 0:
        raise UserError(f"{name} holds no samples.")
    return seconds


def mono_waveform(waveform: Any, rate: int, sample_rate: int, remarks: Optional[list[Remark]] = None) -> np.ndarray:
    """(samples,) or (channels, samples) at `rate`, float in [-1, 1] or int16 -> (samples,) float32 at sample_rate.

    As a file with these samples is read; remarks: see stream_audio. Raises UserError for another shape or kind, and for
    empty or non-finite ones.
    """
    array = np.asarray(waveform)
    shape, kind = array.shape, array.dtype
    if kind == np.int16:
        array = array / np.float32(INT16_SCALE)
    channels = array
    if array.ndim == 2 and 0 < len(array) <= MOST_CHANNELS:
        array = array.mean(axis=0)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(
            f"A waveform of finite samples, (samples,) or (channels, samples), float or int16, is needed: "
            f"{shape} of {kind} was given."
        )
    if remarks is not None:
        levels = Levels()
        levels.add(channels, array)
        remarks += levels.remarks()
    array = array.astype(np.float32)
    return array if rate == sample_rate else soxr.resample(array, rate, sample_rate)
