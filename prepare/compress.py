"""Compress the sound of a clip store as FLAC: lossless, some milliseconds a clip to read."""

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import soundfile

from data.clip_store import PANNS_SAMPLE_RATE, Waveforms, open_store
from data.files import whole_hdf5
from settings import UserError


def compress_store(path: Path) -> tuple[int, int]:
    """Replace a store by one with FLAC sound; returns its size in bytes before and after.

    Each clip is decoded again and compared before the old file is replaced. A compressed store is left unchanged.
    Raises UserError where the file is no store or a decoded clip differs.
    """
    before = path.stat().st_size
    with open_store(path, "audio_name") as source:
        waveforms = Waveforms(source)
        if waveforms.rows is None:
            return before, before
        with whole_hdf5(path) as (target, check):
            for key in source:
                if key not in ("waveform", "real_len"):
                    source.copy(key, target)
            target.attrs.update(dict(source.attrs))
            rate = int(source.attrs.get("sample_rate", PANNS_SAMPLE_RATE))
            target["real_len"] = _encode_all(waveforms, target, rate, check)
    return before, path.stat().st_size


def _encode_all(waveforms: Waveforms, target: h5py.File, sample_rate: int, check: Callable[[], None]) -> np.ndarray:
    """Write waveform_flac; returns (N,) int32 lengths in samples. Raises UserError where a decoded clip differs."""
    flac = target.create_dataset("waveform_flac", (len(waveforms),), dtype=h5py.vlen_dtype(np.uint8))
    lengths = np.zeros(len(waveforms), dtype=np.int32)
    written = Waveforms(target)
    for row in range(len(waveforms)):
        sound = waveforms.read(row)
        buffer = io.BytesIO()
        soundfile.write(buffer, sound, sample_rate, format="FLAC", subtype="PCM_16")
        flac[row] = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
        check()
        if not np.array_equal(written.read(row), sound):
            raise UserError(f"Clip {row} differs after decoding: the store is left unchanged.")
        lengths[row] = len(sound)
    return lengths
