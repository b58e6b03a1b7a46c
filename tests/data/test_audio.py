"""Audio files as a stream: the same samples as a whole read gives, whatever the length, in bounded memory."""

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from data.audio import BLOCK_VALUES, mono_waveform, read_audio, stream_audio
from inference.windows import cut_windows


def sound(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels)).astype(np.float32)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (22050, 8), (96000, 3), (44100, 1)])
def test_blocks_are_the_whole_file(rate: int, channels: int, tmp_path: Path) -> None:
    samples = sound(BLOCK_VALUES * 2.3 / rate / channels, rate, channels)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    blocks = list(stream_audio(tmp_path / "a.wav", 16000))
    assert len(blocks) > 2 or rate > 22050
    mono = samples.mean(axis=1)
    expected = mono if rate == 16000 else soxr.resample(mono, rate, 16000)
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 16000), expected)
    np.testing.assert_array_equal(mono_waveform(samples.T, rate, 16000), expected)


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "opus", "aiff"])
def test_blocks_of_compressed_files_have_no_holes(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    kind = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
    soundfile.write(path, np.sin(np.arange(BLOCK_VALUES * 2) / 50) * 0.5, 48000, **kind)
    whole, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(np.concatenate(list(stream_audio(path, 48000))), whole, atol=1e-6)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_stretch_of_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.sin(np.arange(16000 * 6) / 50) * 0.5, 16000)
    whole = read_audio(path, 16000)
    stretch = read_audio(path, 16000, start=2.5, seconds=1.25)
    assert stretch.shape == (20000,)
    np.testing.assert_allclose(stretch, whole[40000:60000], atol=1e-4)
    assert read_audio(path, 16000, start=5.0, seconds=10).shape == (len(whole) - 80000,)
    assert read_audio(path, 8000, start=5.5).shape == ((len(whole) - 88000) // 2,)
    with pytest.raises(ValueError, match=r"no samples from 7 s on"):
        read_audio(path, 16000, start=7)
    for wrong in ({"start": -1}, {"seconds": 0}):
        with pytest.raises(ValueError, match="must be"):
            read_audio(path, 16000, **wrong)


def test_an_open_file_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(1, 8000), 8000, format="FLAC")
    buffer.seek(0)
    assert read_audio(buffer, 8000).shape == (8000,)


def test_a_long_file_is_never_held(tmp_path: Path) -> None:
    """Six minutes at 48 kHz, stereo: 130 MiB as float32; reader, resampling and windows hold a few MiB."""
    rng = np.random.default_rng(0)
    minute = rng.integers(-3000, 3000, (48000 * 60, 2)).astype(np.int16)
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 48000, 2, "PCM_16") as file:
        for _ in range(6):
            file.write(minute)
    del minute
    tracemalloc.start()
    blocks = stream_audio(tmp_path / "a.wav", 8000)
    count = sum(1 for _ in cut_windows(blocks, window=80000, overlap=0.5, short_clips="pad"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 71
    assert peak < 16 * 2**20


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 60000, -1])
def test_samples_that_are_no_numbers(value: float, place: int, tmp_path: Path) -> None:
    samples = sound(8, 8000, 2)
    samples[place, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a.wav holds NaN or infinite samples"):
        read_audio(tmp_path / "a.wav", 16000)


def test_what_is_no_audio_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("no sound " * 1000)
    (tmp_path / "bare.raw").write_bytes(bytes(1000))
    for name, said in {
        "empty.wav": "holds no samples",
        "nothing.wav": "cannot be read",
        "text.mp3": "cannot be read",
        "bare.raw": "cannot be read",
        "missing.wav": "There is no file",
    }.items():
        with pytest.raises(ValueError, match=said) as raised:
            read_audio(tmp_path / name, 8000)
        assert name in str(raised.value)


@pytest.mark.parametrize("rate", [1, 99, 2**31 - 1])
def test_a_header_with_an_impossible_rate(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sound(1, 8000), 8000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as audio"):
        read_audio(tmp_path / "a.wav", 32000)


def test_arrays_of_other_kinds_are_refused() -> None:
    wrong: list[Any] = [np.zeros((65, 10)), np.zeros(5, np.int32), np.zeros(0), np.zeros((1, 1, 5)), "sound"]
    for array in wrong:
        with pytest.raises(ValueError, match="finite samples"):
            mono_waveform(array, 8000, 8000)
