"""Audio files -> int16 waveforms at one rate, by libsndfile and soxr."""

from pathlib import Path

import numpy as np
import soundfile
import soxr

from utils import float32_to_int16

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64")


def read_audio(path: Path, sample_rate: int) -> np.ndarray:
    """(samples,) float32 mono at `sample_rate`: channels averaged, resampled by soxr.

    Raises ValueError where the file is missing, empty, no audio, or holds NaN or infinite samples.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as audio: {error}") from None
    if len(waveform) == 0:
        raise ValueError(f"{path} holds no samples.")
    mono = waveform.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ValueError(f"{path} holds NaN or infinite samples.")
    return mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate)


def read_int16(path: Path, sample_rate: int) -> np.ndarray:
    """(samples,) int16 mono at `sample_rate`; see read_audio."""
    return float32_to_int16(read_audio(path, sample_rate))
