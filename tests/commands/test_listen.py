"""python main.py listen: samples on standard input, the microphone, Ctrl-C, and what it shows and writes."""

import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main
from commands import listen
from evaluation.postprocess import PostProcessing
from inference import Tagger
from inference.streaming import Listener
from model import build_model
from settings import resolve
from tests.levels import RATE, STEP, Row, heard, levels, levels_tagger, rows, stretches


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
def fake_tagger(monkeypatch: pytest.MonkeyPatch) -> Tagger:
    tagger = levels_tagger()
    monkeypatch.setattr(listen, "load_tagger", lambda given, command: tagger)
    return tagger


def listen_to(content: Standard, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=content))
    return main.main(["listen", *words])


def table_rows(path: Path) -> list[Row]:
    header, *lines = path.read_text().splitlines()
    assert header == "filename\tonset\toffset\tevent_label"
    parts = [line.split("\t") for line in lines]
    assert {name for name, *_ in parts} <= {"standard input"}
    return sorted((label, float(onset), float(offset)) for _, onset, offset, label in parts)


@pytest.mark.parametrize("kind", ["s16le", "f32le"])
@pytest.mark.parametrize("channels", [1, 3])
def test_raw_samples_on_standard_input(
    kind: str,
    channels: int,
    fake_tagger: Tagger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound = np.repeat(levels(26, rate=RATE), 2)  # 16 kHz
    samples = np.repeat(sound[:, None], channels, axis=1)
    raw = (samples * 32767).round().astype("<i2").tobytes() if kind == "s16le" else samples.astype("<f4").tobytes()
    words = [
        "--pcm",
        kind,
        "--rate",
        "16000",
        "--channels",
        str(channels),
        "--events",
        str(tmp_path / "deep" / "e.tsv"),
    ]
    assert listen_to(Standard(raw + b"\x01"), monkeypatch, *words) == 0
    expected = rows(heard(Listener(fake_tagger, sample_rate=16000), [sound]))
    assert len(expected) > 3
    found = table_rows(tmp_path / "deep" / "e.tsv")
    assert [row[0] for row in found] == [row[0] for row in expected]
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in expected], atol=1e-4)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["e.tsv"]
    printed = capsys.readouterr()
    assert sorted(line.split()[-1] for line in printed.out.splitlines()) == [row[0] for row in expected]
    assert "Heard 26.0 s" in printed.err
    assert "real-time factor" in printed.err


def test_an_interruption_is_an_end(
    fake_tagger: Tagger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = Standard(stretches((2, 0), (30, 0.9)).tobytes(), until=4 * RATE * 20)
    assert listen_to(content, monkeypatch, "--pcm", "f32le", "--events", str(tmp_path / "e.tsv")) == 0
    ((label, onset, offset),) = table_rows(tmp_path / "e.tsv")
    assert (label, onset) == ("up", pytest.approx(2, abs=STEP))
    assert offset == pytest.approx(20, abs=0.2)
    assert "Events: 1, certain" in capsys.readouterr().err


def test_the_live_line(
    fake_tagger: Tagger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert listen_to(Standard(stretches((24.5, 0.9)).tobytes()), monkeypatch, "--pcm", "f32le", "--top_k", "1") == 0
    lines = [line for line in capsys.readouterr().err.split("\r\x1b[K") if " s  " in line]
    assert len(lines) > 20
    assert lines[-2].strip().startswith("24.")
    assert "0.90 up  on: up" in lines[-2]
    assert "down" not in lines[-2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pcm", "s16le"], "no sound from standard input"),
        (["--pcm", "s16le", "--channels", "0"], "1 to 64"),
        (["--rate", "16000"], "give --pcm"),
        (["--pcm", "s16le", "--hop_seconds", "20"], "hop_seconds = 20"),
        (["--pcm", "mp3"], "invalid choice"),
    ],
)
def test_mistakes_are_told(
    words: list[str],
    message: str,
    fake_tagger: Tagger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status: Any = listen_to(Standard(b""), monkeypatch, *words)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert listen_to(Standard(b""), monkeypatch, "--pcm", "s16le") == 2
    assert "listen needs a checkpoint" in capsys.readouterr().err


def test_a_checkpoint_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = resolve(
        {
            "sample_rate": 8000, "clip_samples": 5040, "htsat_spec_size": 64, "htsat_dim": 16, "classes_num": 3,
            "htsat_depth": [1, 1, 1, 1], "htsat_num_head": [1, 2, 4, 8],
        }
    )  # fmt: skip
    torch.manual_seed(0)
    weights = {f"sed_model.{key}": value for key, value in build_model(settings).state_dict().items()}
    labels = ["dog", "cat", "bird"]
    calibrated = PostProcessing(tuple(labels), thresholds=(0.0, 0.99, 0.99), source="calibrated").as_dict()
    path = tmp_path / "nano.ckpt"
    content = {"state_dict": weights, "settings": settings.model_dump(), "labels": labels}
    torch.save({**content, "postprocessing": calibrated}, path)
    words = ["--pcm", "f32le", "--hop_seconds", "0.3", "--resume_checkpoint", str(path), "--accelerator", "cpu"]
    assert listen_to(Standard(levels(3).tobytes()), monkeypatch, *words) == 0
    assert [line.split()[:2] + line.split()[3:] for line in capsys.readouterr().out.splitlines()] == [
        ["0.00", "3.00", "dog"]
    ]


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


def fake_sounddevice(blocks: int = 0, missing: bool = False) -> types.SimpleNamespace:
    def query(device: object, kind: str) -> dict[str, float]:
        if missing:
            raise PortAudioError("Error querying device -1")
        return {"default_samplerate": 44100.0}

    make = lambda **given: FakeStream(blocks, **given)  # noqa: E731
    return types.SimpleNamespace(query_devices=query, InputStream=make, PortAudioError=PortAudioError)


def test_the_microphones_blocks_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice(blocks=3))
    with listen.open_microphone("1") as (rate, blocks):
        arrived = [next(blocks) for _ in range(3)]
    assert rate == 44100
    assert [block.shape for block in arrived] == [(1, 4410)] * 3
    assert [block[0, 0] for block in arrived] == pytest.approx([0, 0.001, 0.002])


def test_a_machine_that_falls_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice(blocks=601))
    with listen.open_microphone(None) as (_, blocks), pytest.raises(ValueError, match="raise --hop_seconds"):
        next(blocks)


def test_listening_to_the_microphone(
    fake_tagger: Tagger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(waiting: Any, behind: list[bool]) -> Iterator[np.ndarray]:
        while not waiting.empty():
            yield waiting.get()
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "sounddevice", fake_sounddevice(blocks=150))
    monkeypatch.setattr(listen, "_until_behind", interrupted)
    assert main.main(["listen", "--events", str(tmp_path / "e.tsv")]) == 0
    printed = capsys.readouterr().err
    assert "Listening to microphone at 44100 Hz" in printed
    assert "Heard 15.0 s" in printed


@pytest.mark.parametrize(
    ("module", "message"),
    [(None, "pip install sounddevice"), (fake_sounddevice(missing=True), "There is no microphone on this machine")],
)
def test_no_microphone(
    module: Any,
    message: str,
    fake_tagger: Tagger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert main.main(["listen"]) == 2
    assert message in capsys.readouterr().err
