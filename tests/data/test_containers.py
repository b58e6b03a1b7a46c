"""Headers that say another length than the file has, joined files, and what a decoder would leave unread."""

import io
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from data.audio import audio_seconds, read_audio
from data.containers import looks_like_audio
from data.levels import Remark
from settings import UserError

RATE = 16000
SECONDS = 3.0
Change = Callable[[bytes], bytes]


def encoded(form: str, rate: int = RATE, seconds: float = SECONDS, channels: int = 1, **more: Any) -> bytes:
    """Three seconds, of which the first half is so quiet that a variable bit rate is low."""
    rng, samples = np.random.default_rng(0), round(seconds * rate)
    level = np.where(np.arange(samples) < samples / 2, 1e-3, 0.1)
    file = io.BytesIO()
    sound = (rng.standard_normal((samples, channels)).clip(-4, 4) * level[:, None])[:, : channels or 1]
    soundfile.write(file, sound, rate, format=form, **more)
    return file.getvalue()


def put(place: int, value: bytes) -> Change:
    return lambda content: content[:place] + value + content[place + len(value) :]


def behind(word: bytes, offset: int, value: bytes) -> Change:
    """Bytes that are replaced behind a word, counted from its beginning."""
    return lambda content: put(content.index(word) + offset, value)(content)


def then(*changes: Change) -> Change:
    def changed(content: bytes) -> bytes:
        for change in changes:
            content = change(content)
        return content

    return changed


def without_xing(content: bytes) -> bytes:
    """An MP3 file as it is written to a pipe: without the frame that says how long it is."""
    assert b"Xing" in content[:100] or b"Info" in content[:100]
    place = 100
    while not (content[place] == 0xFF and content[place : place + 2] == content[:2]):
        place += 1
    return content[place:]


ID3 = b"ID3\4\0\0\0\0\1\x0a" + bytes(138)
TAG = b"TAG" + bytes(125)
MP3: dict[str, Any] = {"compression_level": 0.5, "bitrate_mode": "VARIABLE"}
FORMATS: dict[str, dict[str, Any]] = {"WAV": {}, "AIFF": {}, "FLAC": {}, "OGG": {}, "MP3": MP3}
ZERO, MOST = bytes(4), b"\xff" * 4
Case = tuple[bytes, float, list[str]]  # content, seconds, kinds of remarks


def cases() -> dict[str, Case]:
    wav, aiff, flac, ogg, mp3 = (encoded(form, **more) for form, more in FORMATS.items())
    rf64, au, caf, w64 = (encoded(form) for form in ("RF64", "AU", "CAF", "W64"))
    unread, half = ["not read whole"], len(wav) // 2
    unknown_flac = then(put(21, bytes([flac[21] & 0xF0])), put(22, ZERO))(flac)
    return {
        "wav, whole": (wav, 3, []),
        "wav, never closed": (then(put(4, ZERO), behind(b"data", 4, ZERO))(wav), 3, []),
        "wav, from a pipe": (then(put(4, MOST), behind(b"data", 4, MOST))(wav), 3, []),
        "wav, size of the sound 0": (behind(b"data", 4, ZERO)(wav), 3, []),
        "wav, cut off": (wav[:half], 1.5, unread),
        "wav, joined": (wav + encoded("WAV", 8000, 2.0), 5, []),
        "wav, sound after the end": (behind(b"data", 4, struct.pack("<I", RATE * 2))(wav), 1, unread),
        "wav, other chunks": (wav + b"LIST" + struct.pack("<I", 4) + b"INFO" + TAG, 3, []),
        "rf64, never closed": (then(behind(b"ds64", 8, bytes(16)), behind(b"data", 4, ZERO))(rf64), 3, []),
        "aiff, never closed": (
            then(put(4, ZERO), behind(b"COMM", 10, ZERO), behind(b"SSND", 4, ZERO))(aiff), 3, [],
        ),
        "aiff, cut off": (aiff[:half], 1.5, unread),
        "au, from a pipe": (put(8, MOST)(au), 3, []),
        "au, never closed": (put(8, ZERO)(au), 3, []),
        "caf, from a pipe": (behind(b"data", 4, b"\xff" * 8)(caf), 3, []),
        "w64, never closed": (behind(b"data", 16, bytes(8))(w64), 3, []),
        "flac, unknown": (unknown_flac, 3, []),
        "flac, header says 1 s": (put(22, struct.pack(">I", RATE))(flac), 3, []),
        "flac, header says 30 h": (put(22, struct.pack(">I", RATE * 108000))(flac), 3, unread),
        "flac, joined": (flac + unknown_flac, 6, []),
        "flac, tags": (ID3 + flac + TAG, 3, []),
        "flac, garbage behind": (flac + b"\1\2\3" * 300, 3, unread),
        "ogg, chained": (ogg + encoded("OGG", 8000, 2.0), 5, []),
        "opus, chained": (2 * encoded("OGG", 48000, 2.0, subtype="OPUS"), 4, []),
        "mp3, variable": (mp3, 3, []),
        "mp3, without length": (without_xing(mp3), 3, []),
        "mp3, joined": (mp3 + ID3 + mp3 + TAG, 6, []),
        "mp3, joined, without length": (2 * without_xing(mp3), 6, []),
        "mp3, joined, other rate and channels": (mp3 + encoded("MP3", 44100, 2.0, 2), 5, []),
        "mp3, cut off": (mp3[: len(mp3) * 3 // 4], 2.2, unread),
        "mp3, another file behind": (mp3 + wav, 3, unread),
        "ogg, another file behind": (ogg + wav, 3, unread),
        "ogg, cut off": (ogg[: len(ogg) * 3 // 4], 2.0, unread),
        "mp3, garbage inside": (without_xing(mp3)[:3000] + bytes(5000) + without_xing(mp3)[3000:], 3, []),
    }  # fmt: skip


CASES = cases()


@pytest.mark.parametrize("which", list(CASES))
def test_the_length_is_what_is_decoded(which: str, tmp_path: Path) -> None:
    content, seconds, kinds = CASES[which]
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    remarks: list[Remark] = []
    found = read_audio(path, RATE, remarks=remarks)
    assert len(found) / RATE == pytest.approx(seconds, abs=0.25)
    assert audio_seconds(path) == pytest.approx(len(found) / RATE, abs=1e-3)
    assert [remark.kind for remark in remarks] == kinds
    assert looks_like_audio(io.BytesIO(content))


def test_joined_files_are_one_behind_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(CASES["mp3, variable"][0])
    (tmp_path / "b.mp3").write_bytes(CASES["mp3, joined"][0])
    once, twice = read_audio(tmp_path / "a.mp3", RATE), read_audio(tmp_path / "b.mp3", RATE)
    np.testing.assert_allclose(twice, np.tile(once, 2), atol=1e-6)
    for start in (1.0, 2.9, 3.5):
        stretch = read_audio(tmp_path / "b.mp3", RATE, start=start, seconds=1.0)
        first = round(start * RATE)
        np.testing.assert_allclose(stretch, twice[first : first + RATE], atol=1e-4)


@pytest.mark.parametrize("which", ["flac, unknown", "flac, tags", "flac, joined"])
def test_a_stream_that_breaks_off_is_damaged(which: str, tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(CASES[which][0][:30000])
    with pytest.raises(UserError, match=r"a\.flac is damaged after"):
        read_audio(tmp_path / "a.flac", RATE)


def test_memory_does_not_follow_the_header(tmp_path: Path) -> None:
    """Of a FLAC file whose header states 30 hours, and of one of 30 minutes of silence, a stretch."""
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(RATE * 1800, np.int16), RATE, format="FLAC")
    (tmp_path / "a.flac").write_bytes(CASES["flac, header says 30 h"][0])
    (tmp_path / "b.flac").write_bytes(silence.getvalue())
    tracemalloc.start()
    for name in ("a.flac", "b.flac"):
        assert len(read_audio(tmp_path / name, RATE, seconds=10)) <= RATE * 10
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


def test_other_containers_are_read_through_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for PyAV; the next test has the real one, where it is installed."""
    path = tmp_path / "a.m4a"
    path.write_bytes(b"\0\0\0\x18ftypM4A " + bytes(500))
    frames = [SimpleNamespace(to_ndarray=lambda: np.full((2, 1024), 0.25, np.float32)) for _ in range(20)]

    class Container:
        duration = 20 * 1024 / RATE * 1e6
        streams = SimpleNamespace(audio=[SimpleNamespace(rate=RATE)])

        def __enter__(self) -> "Container":
            return self

        def __exit__(self, *_: object) -> None: ...

        def decode(self, audio: int) -> list[Any]:
            return frames

    module: Any = ModuleType("av")
    module.open = lambda file, **_: Container()
    module.AudioResampler = lambda format: SimpleNamespace(resample=lambda frame: [frame])
    module.time_base = 1_000_000
    module.error = SimpleNamespace(FFmpegError=OSError)
    monkeypatch.setitem(sys.modules, "av", module)
    np.testing.assert_array_equal(read_audio(path, RATE), np.full(20 * 1024, 0.25, np.float32))
    assert audio_seconds(path) == 20 * 1024 / RATE
    monkeypatch.setitem(sys.modules, "av", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"a\.m4a.* pip install"):
        read_audio(path, RATE)


@pytest.mark.parametrize(("form", "codec"), [("ipod", "aac"), ("webm", "libopus"), ("amr", "libopencore_amrnb")])
def test_pyav(form: str, codec: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    rate, path = 8000 if form == "amr" else 48000, tmp_path / f"a.{form}"
    sound = 0.5 * np.sin(np.arange(2 * rate) * 2 * np.pi * 440 / rate).astype(np.float32)[None]
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
        frame.sample_rate = rate
        context = stream.codec_context
        to_codec = av.AudioResampler(context.format, "mono", rate, frame_size=context.frame_size or 1024)
        for part in [*to_codec.resample(frame), *to_codec.resample(None), None]:
            file.mux(stream.encode(part))
    found = read_audio(path, RATE)
    assert len(found) / RATE == pytest.approx(2, abs=0.1)
    assert np.abs(np.fft.rfft(found)).argmax() * RATE / len(found) == pytest.approx(440, abs=2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    remarks: list[Remark] = []
    if form != "webm":
        with pytest.raises(UserError, match=path.name):
            read_audio(path, RATE)
    else:
        assert len(read_audio(path, RATE, remarks=remarks)) < len(found)
        assert [remark.kind for remark in remarks] == ["not read whole"]
