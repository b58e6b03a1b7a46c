"""python main.py listen: samples on standard input, the microphone, Ctrl-C, and what it shows and writes."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import main
from commands import listen
from inference import Tagger
from inference.streaming import Listener
from settings import UserError
from tests.helpers import refused
from tests.levels import (
    RATE,
    STEP,
    FramelessTagger,
    Row,
    events_of,
    levels,
    levels_tagger,
    rows,
    save_nano,
    stretches,
)  # fmt: skip

Listen = Callable[..., int]
Capture = pytest.CaptureFixture[str]


class Standard(io.BytesIO):
    """Standard input that gives odd numbers of bytes, and is interrupted after `until` of them."""

    def __init__(self, content: bytes, until: int | None = None) -> None:
        super().__init__(content)
        self.until = until

    def read1(self, size: int | None = -1, /) -> bytes:
        if self.until is not None and self.tell() >= self.until:
            raise KeyboardInterrupt
        return self.read(min(size or 999, 999))


@pytest.fixture
def listen_to(monkeypatch: pytest.MonkeyPatch) -> Listen:
    """The command on bytes of standard input, with a given Tagger (None: the checkpoint's)."""

    def run(content: Standard | bytes, *words: str, of: Tagger | None = None, pcm: str = "f32le") -> int:
        if of is not None:
            monkeypatch.setattr(listen, "load_tagger", lambda given, command: of)
        stream = content if isinstance(content, Standard) else Standard(content)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
        return main.main(["listen", "--pcm", pcm, *words])

    return run


def table_rows(path: Path) -> list[Row]:
    header, *lines = path.read_text().splitlines()
    assert header == "filename\tonset\toffset\tevent_label\tscore\tthreshold"
    parts = [line.split("\t") for line in lines]
    assert {name for name, *_ in parts} <= {"standard input"}
    assert all(float(score) > float(threshold) == 0.5 for *_, score, threshold in parts)
    return sorted((label, float(onset), float(offset)) for _, onset, offset, label, *_ in parts)


@pytest.mark.parametrize("kind", ["s16le", "f32le"])
@pytest.mark.parametrize("channels", [1, 3])
def test_raw_samples(kind: str, channels: int, listen_to: Listen, tmp_path: Path, capsys: Capture) -> None:
    sound = np.repeat(levels(26, rate=RATE), 2)  # 16 kHz
    samples = np.repeat(sound[:, None], channels, axis=1)
    raw = (samples * 32767).round().astype("<i2").tobytes() if kind == "s16le" else samples.astype("<f4").tobytes()
    words = ["--rate", "16000", "--channels", str(channels), "--events", str(tmp_path / "deep" / "e.tsv")]
    assert listen_to(raw + b"\x01", *words, of=levels_tagger(), pcm=kind) == 0
    expected = rows(events_of(Listener(levels_tagger(), sample_rate=16000), [sound]))
    assert len(expected) > 3
    found = table_rows(tmp_path / "deep" / "e.tsv")
    assert [row[0] for row in found] == [row[0] for row in expected]
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in expected], atol=1e-4)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["e.tsv"]
    printed = capsys.readouterr()
    assert sorted(line.split()[-1] for line in printed.out.splitlines()) == [row[0] for row in expected]
    assert "26.0 s" in printed.err


def test_an_interruption_is_an_end(listen_to: Listen, tmp_path: Path) -> None:
    content = Standard(stretches((2, 0), (30, 0.9)).tobytes(), until=4 * RATE * 20)
    assert listen_to(content, "--events", str(tmp_path / "e.tsv"), of=levels_tagger()) == 0
    ((label, onset, offset),) = table_rows(tmp_path / "e.tsv")
    assert (label, onset, offset) == ("up", pytest.approx(2, abs=STEP), pytest.approx(20, abs=0.2))


def test_an_error_leaves_the_events_so_far(listen_to: Listen, tmp_path: Path) -> None:
    sound = np.concatenate([stretches((2, 0), (5, 0.9), (20, 0)), [np.nan]]).astype(np.float32)
    assert listen_to(sound.tobytes(), "--events", str(tmp_path / "e.tsv"), of=levels_tagger()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["e.tsv.partial"]
    assert table_rows(tmp_path / "e.tsv.partial") == [("up", pytest.approx(2, abs=STEP), pytest.approx(7, abs=STEP))]


@pytest.mark.parametrize(("of", "end"), [(Tagger, "0.90 up  on: up"), (FramelessTagger, "0.90 up  on: -")])
def test_the_live_line(
    of: type[Tagger], end: str, listen_to: Listen, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert listen_to(stretches((24.5, 0.9)).tobytes(), "--top_k", "1", of=levels_tagger(kind=of)) == 0
    lines = [line for line in capsys.readouterr().err.split("\r\x1b[K") if "  on: " in line]
    assert len(lines) > 20
    assert lines[-2].strip().startswith("24.")
    assert end in lines[-2]
    assert "down" not in lines[-2]


@pytest.mark.parametrize(
    ("words", "said", "of"),
    [
        ("", "standard input", Tagger),
        ("--channels 0", "--channels 0", Tagger),
        ("--hop_seconds 20", "hop_seconds = 20", Tagger),
        ("--events a.tsv", "--events", FramelessTagger),
    ],
)
def test_mistakes(words: str, said: str, of: type[Tagger], listen_to: Listen, capsys: Capture) -> None:
    assert listen_to(b"", *words.split(), of=levels_tagger(kind=of)) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_listens(listen_to: Listen, tmp_path: Path, capsys: Capture) -> None:
    path = save_nano(tmp_path / "nano.ckpt", ["dog", "cat", "bird"], (0.0, 0.99, 0.99))
    words = ["--hop_seconds", "0.3", "--resume_checkpoint", str(path), "--accelerator", "cpu"]
    assert listen_to(levels(3).tobytes(), *words) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[:2] + line.split()[3:] == ["0.00", "3.00", "dog"]


# --- the microphone -------------------------------------------------------------------------------------------------


class PortAudioError(Exception):
    pass


class FakeStream:
    """An input that calls back `blocks` times as soon as it is opened."""

    def __init__(self, blocks: int, **given: Any) -> None:
        self.blocks, self.given = blocks, given

    def __enter__(self) -> "FakeStream":
        for number in range(self.blocks):
            block = np.full((self.given["blocksize"], 1), number / 1000, np.float32)
            self.given["callback"](block, len(block), None, None)
            block[:] = 9  # PortAudio uses its memory again
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def microphone(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Puts in a sounddevice whose microphone gives so many blocks; None: there is none."""

    def put(blocks: int | None) -> None:
        def query(device: object, kind: str) -> dict[str, float]:
            if blocks is None:
                raise PortAudioError("Error querying device -1")
            return {"default_samplerate": 44100.0}

        def open_stream(**given: Any) -> FakeStream:
            return FakeStream(blocks or 0, **given)

        fake = SimpleNamespace(query_devices=query, InputStream=open_stream, PortAudioError=PortAudioError)
        monkeypatch.setitem(sys.modules, "sounddevice", fake)
        monkeypatch.setattr(listen, "load_tagger", lambda given, command: levels_tagger())

    return put


def test_the_microphones_blocks_arrive(microphone: Callable[[int], None]) -> None:
    microphone(3)
    with listen.open_microphone("1") as (rate, blocks):
        arrived = [next(blocks) for _ in range(3)]
    assert rate == 44100
    assert [block.shape for block in arrived] == [(1, 4410)] * 3
    assert [block[0, 0] for block in arrived] == pytest.approx([0, 0.001, 0.002])


def test_a_machine_that_falls_behind(microphone: Callable[[int], None]) -> None:
    microphone(601)
    with listen.open_microphone(None) as (_, blocks), pytest.raises(UserError, match="--hop_seconds"):
        next(blocks)


def test_listening_to_the_microphone(
    microphone: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(waiting: Any, behind: list[bool]) -> Iterator[np.ndarray]:
        while not waiting.empty():
            yield waiting.get()
        raise KeyboardInterrupt

    microphone(150)
    monkeypatch.setattr(listen, "_until_behind", interrupted)
    assert main.main(["listen", "--events", str(tmp_path / "e.tsv")]) == 0
    printed = capsys.readouterr().err
    assert "44100 Hz" in printed
    assert "15.0 s" in printed


@pytest.mark.parametrize(("installed", "said"), [(False, "pip install sounddevice"), (True, "python -m sounddevice")])
def test_no_microphone(
    installed: bool, said: str, microphone: Callable[[None], None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    microphone(None)
    if not installed:
        monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert said in refused(capsys, "listen")
