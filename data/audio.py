"""Audio files -> mono waveforms at one rate, block by block or whole, by libsndfile and soxr."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
import soundfile
import soxr

from settings import UserError
from utils import INT16_SCALE, float32_to_int16

BLOCK_VALUES = 2**19  # samples of all channels that are read at once (2 MiB), and about the most a block resamples to
RATES = (100, 4_000_000)  # Hz: other rates are damaged headers; resampled from 1 Hz, a small file would fill a disk
MOST_CHANNELS = 64  # of an array of samples; with more, time and channels have changed places
RUN_UP = 20_000  # samples that are read before a stretch: an MP3 decoder needs some frames until it is right
# Errors of libsndfile and its wrapper for files that are no audio, damaged, or of a kind without a header.
UNREADABLE = (soundfile.LibsndfileError, RuntimeError, TypeError, AssertionError, OSError)


def stream_audio(
    source: str | Path | BinaryIO, sample_rate: int, *, start: float = 0.0, seconds: Optional[float] = None
) -> Iterator[np.ndarray]:
    """Blocks of (samples,) float32 mono at `sample_rate`, in order; together they are the file, resampled as a whole.

    source: a path, or an open binary file that can seek. start, seconds: only that stretch of it, as far as the file
    reaches. However long the file, some MiB are held at a time. Raises UserError, at the latest at the end, where the
    file is missing, empty, no audio, or holds NaN or infinite samples.
    """
    name = str(source) if isinstance(source, (str, Path)) else "The sound that was given"
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise UserError(f"There is no file {source}.")
    if start < 0 or (seconds is not None and seconds <= 0):
        raise UserError(f"start = {start} s must be 0 or more, and seconds = {seconds} more than 0.")
    samples = 0
    try:
        with _Sequential(_as_libsndfile_takes_it(source)) as file:
            for block in _resampled(_mono(file, name, start, seconds), file.samplerate, sample_rate):
                samples += len(block)
                yield block
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be read as audio: {error}") from None
    if samples == 0:
        raise UserError(f"{name} holds no samples{f' from {start:g} s on' if start else ''}.")


def _as_libsndfile_takes_it(source: str | Path | BinaryIO) -> str | bytes | BinaryIO:
    """A path as bytes, where the system has them: they need not be UTF-8."""
    if not isinstance(source, (str, Path)):
        return source
    return os.fsencode(source) if os.name == "posix" else str(source)


class _Sequential(soundfile.SoundFile):
    """A file that is read sequentially.

    After each read of a seekable file, soundfile seeks to the current place. MP3 decoders restart there with a tenth to
    a third of a second of silence: read in blocks, an MP3 would have a hole in each.
    """

    def seekable(self) -> bool:
        return False


def _mono(file: _Sequential, name: str, start: float, seconds: Optional[float]) -> Iterator[np.ndarray]:
    """Blocks of (samples,) at the file's own rate: the mean of the channels."""
    rate, channels = file.samplerate, file.channels
    if not RATES[0] <= rate <= RATES[1] or channels < 1:
        raise UserError(f"{name} cannot be read as audio: its header says {rate} Hz and {channels} channels.")
    first = round(start * rate)
    if first:
        if first >= file.frames:
            return
        before = min(first, RUN_UP)
        file.seek(first - before)
        file.read(before, dtype="float32")
    left = None if seconds is None else max(1, round(seconds * rate))
    # A low rate makes a block longer when it is resampled: such files are read in smaller ones, of some seconds.
    size = max(1, min(BLOCK_VALUES // channels, 8 * rate))
    while left is None or left > 0:
        block = file.read(size if left is None else min(size, left), dtype="float32", always_2d=True)
        if len(block) == 0:
            return
        mono = block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise UserError(f"{name} holds NaN or infinite samples.")
        left = None if left is None else left - len(block)
        yield mono


def _resampled(blocks: Iterator[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    """The blocks at another rate. soxr's stream gives the samples that it gives for the whole in one piece."""
    if rate == sample_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def read_audio(
    path: str | Path | BinaryIO, sample_rate: int, *, start: float = 0.0, seconds: Optional[float] = None
) -> np.ndarray:
    """(samples,) float32 mono at `sample_rate`: channels averaged, resampled by soxr; see stream_audio.

    Raises UserError where the file is missing, empty, no audio, or holds NaN or infinite samples.
    """
    return np.concatenate(list(stream_audio(path, sample_rate, start=start, seconds=seconds)))


def audio_seconds(path: Path) -> float:
    """Duration in the header of a file. Raises UserError where it is no audio or has no samples."""
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as audio: {error}") from None
    if info.frames == 0:
        raise UserError(f"{path} holds no samples.")
    return info.frames / info.samplerate


def mono_waveform(waveform: Any, rate: int, sample_rate: int) -> np.ndarray:
    """(samples,) or (channels, samples) at `rate`, float in [-1, 1] or int16 -> (samples,) float32 at sample_rate.

    As a file with these samples is read. Raises UserError for another shape or kind, and for empty or non-finite ones.
    """
    array = np.asarray(waveform)
    shape, kind = array.shape, array.dtype
    if kind == np.int16:
        array = array / np.float32(INT16_SCALE)
    if array.ndim == 2 and 0 < len(array) <= MOST_CHANNELS:
        array = array.mean(axis=0)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(
            f"A waveform of finite samples, (samples,) or (channels, samples), float or int16, is needed: "
            f"{shape} of {kind} was given."
        )
    array = array.astype(np.float32)
    return array if rate == sample_rate else soxr.resample(array, rate, sample_rate)


def read_int16(path: Path, sample_rate: int) -> np.ndarray:
    """(samples,) int16 mono at `sample_rate`; see read_audio."""
    return float32_to_int16(read_audio(path, sample_rate))
