"""Audio files as a stream: the same samples as a whole read gives, whatever the length, in bounded memory."""

import io
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from data.audio import BLOCK_VALUES, audio_seconds, mono_waveform, read_audio, stream_audio
from data.containers import View
from data.levels import Remark
from inference.windows import cut_windows
from settings import UserError


def sound(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels)).astype(np.float32)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 2), (22050, 8), (96000, 3), (44100, 1)])
def test_blocks_are_the_whole_file(rate: int, channels: int, tmp_path: Path) -> None:
    samples = sound(BLOCK_VALUES * 2.3 / rate / channels, rate, channels)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    assert audio_seconds(tmp_path / "a.wav") == len(samples) / rate
    blocks = list(stream_audio(tmp_path / "a.wav", 16000))
    assert len(blocks) > 2 or rate > 22050
    mono = samples.mean(axis=1)
    expected = mono if rate == 16000 else soxr.resample(mono, rate, 16000)
    for found in (np.concatenate(blocks), read_audio(tmp_path / "a.wav", 16000), mono_waveform(samples.T, rate, 16000)):
        np.testing.assert_array_equal(found, expected)


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
    refused: list[tuple[dict[str, Any], str]] = [({"start": 7}, "7 s"), ({"start": -1}, "start = -1")]
    for wrong, match in [*refused, ({"seconds": 0}, "seconds = 0")]:
        with pytest.raises(UserError, match=match):
            read_audio(path, 16000, **wrong)


def test_an_open_file_is_resampled_and_mixed_down() -> None:
    buffer, t = io.BytesIO(), np.arange(44100) / 44100
    samples = np.stack([np.sin(2 * np.pi * 440 * t), 0 * t], axis=1) * 0.8
    soundfile.write(buffer, samples, 44100, format="FLAC")
    buffer.seek(0)
    found = read_audio(buffer, 16000)
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=1e-3)


def test_a_long_file_is_never_held(tmp_path: Path) -> None:
    """Six minutes at 48 kHz, stereo: 130 MiB as float32; reader, resampling and windows hold a few MiB."""
    minute = np.random.default_rng(0).integers(-3000, 3000, (48000 * 60, 2)).astype(np.int16)
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
    with pytest.raises(UserError, match=r"a\.wav.* NaN"):
        read_audio(tmp_path / "a.wav", 16000)


def with_rate(path: Path, rate: int) -> None:
    """A WAV file whose header has this rate."""
    soundfile.write(path, sound(1, 8000), 8000)
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)


def test_other_files_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("no sound " * 1000)
    (tmp_path / "bare.raw").write_bytes(bytes(1000))
    rates = [1, 99, 2**31 - 1]
    for rate in rates:
        with_rate(tmp_path / f"{rate}.wav", rate)
    for name in ("empty.wav", "nothing.wav", "text.mp3", "bare.raw", "missing.wav", *(f"{rate}.wav" for rate in rates)):
        with pytest.raises(UserError, match=name):
            read_audio(tmp_path / name, 8000)
    for name in ("empty.wav", "text.mp3"):
        with pytest.raises(UserError, match=name):
            audio_seconds(tmp_path / name)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to("nowhere.wav")
    (tmp_path / "phone.m4a").write_bytes(b"\0\0\0\x18ftypM4A " + bytes(500))
    for name, word in (("pipe.wav", "pipe"), ("folder.wav", "folder"), ("link.wav", "nowhere.wav"), ("phone.m4a", "")):
        for read in (audio_seconds, lambda path: read_audio(path, 8000)):
            with pytest.raises(UserError, match=rf"{name}.*{word}"):
                read(tmp_path / name)


def test_nothing_of_a_decoder_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A page, noise, noise behind the first bytes of a frame, and an MP3 with damaged bytes, each named .mp3."""
    noise = np.random.default_rng(0).bytes(50_000)
    soundfile.write(tmp_path / "whole.mp3", sound(3, 16000)[:, 0], 16000)
    damaged = bytearray((tmp_path / "whole.mp3").read_bytes())
    damaged[4000:4400] = noise[:400]
    files = [b"<html>404</html>" * 99, noise, b"\xff\xfb\x90\x64" + noise, bytes(damaged)]
    for number, content in enumerate(files):
        path = tmp_path / f"{number}.mp3"
        path.write_bytes(content)
        if number < 3:
            with pytest.raises(UserError, match=rf"{number}\.mp3 is no audio") as refused:
                read_audio(path, 16000)
            assert "b'" not in str(refused.value)
        else:
            read_audio(path, 16000)
    assert capfd.readouterr() == ("", "")


def test_what_others_write_while_a_decoder_is_kept_quiet(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread writes to standard error in the middle of each read of an MP3: none of its lines is lost."""
    soundfile.write(tmp_path / "a.mp3", sound(3, 16000)[:, 0], 16000)
    read, lines = View.readinto, [0]

    def noted(view: View, buffer: Any) -> int:
        lines[0] += 1
        os.write(2, b"Note: Trying to resync...\n[src/libmpg123/parse.c:1] error: no\nerror: a line of ours\n")
        return read(view, buffer)

    monkeypatch.setattr(View, "readinto", noted)
    read_audio(tmp_path / "a.mp3", 16000)
    assert lines[0] > 0
    assert capfd.readouterr() == ("", "error: a line of ours\n" * lines[0])


LOUD = 12000 * np.sin(np.arange(8000) / 9)
SOUNDS: dict[str, tuple[np.ndarray, list[str]]] = {
    "ordinary": (LOUD / 32768, []),
    "too loud": (LOUD, ["too loud"]),
    "clipped": (np.clip(LOUD / 6000, -1, 1), ["clipped"]),
    "silent": (LOUD / 32768 / 500, ["silent"]),
    "constant": (np.full(8000, 0.3), ["constant"]),
    "cancelled": (np.stack([LOUD, -LOUD], axis=1) / 32768, ["cancelled"]),
    "one channel silent": (np.stack([LOUD, 0 * LOUD], axis=1) / 32768, []),
}


@pytest.mark.parametrize("which", list(SOUNDS))
def test_odd_samples_are_remarked(which: str, tmp_path: Path) -> None:
    samples, kinds = SOUNDS[which]
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    of_file: list[Remark] = []
    of_array: list[Remark] = []
    read_audio(tmp_path / "a.wav", 16000, remarks=of_file)
    mono_waveform(samples.T, 8000, 16000, remarks=of_array)
    assert [remark.kind for remark in of_file] == [remark.kind for remark in of_array] == kinds


@pytest.mark.parametrize("array", [np.zeros((65, 10)), np.zeros(5, int), np.zeros(0), np.zeros((1, 1, 5)), "sound"])
def test_arrays_of_other_kinds_are_refused(array: Any) -> None:
    with pytest.raises(UserError, match="finite samples"):
        mono_waveform(array, 8000, 8000)
