"""Listening: the blocks do not matter, nothing grows, and what is heard is what Tagger finds in the whole."""

import io
import sys
import tracemalloc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import main
from commands import listen
from evaluation.postprocess import PostProcessing
from inference import Tagger
from model import build_model
from settings import resolve
from streaming import Event, Listener

RATE, STEPS = 8000, 32
STEP = 10 / STEPS  # seconds
EXACT: dict[str, Any] = {"hop_seconds": 5.0, "delay_seconds": 10.0, "release": 1.0}  # all of Tagger's windows count
LABELS = ("up", "down")
Row = tuple[str, float, float]


class Levels:
    """A network whose scores are known: class 0 is the mean of what is above zero in a step, class 1 below."""

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = waveform.unflatten(1, (STEPS, -1))
        frames = torch.stack([steps.clamp(min=0).mean(dim=2), (-steps).clamp(min=0).mean(dim=2)], dim=2)
        return frames.mean(dim=1), frames, frames.mean(dim=1)


def levels_tagger(rate: int = RATE, **given: Any) -> Tagger:
    return Tagger(Levels(), resolve({"sample_rate": rate, **given}), LABELS)


def levels(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Stretches of 0.2 to 3 s, each of another level between -1 and 1."""
    rng = np.random.default_rng(seed)
    sound = np.concatenate(
        [np.full(int(rng.integers(rate // 5, 3 * rate)), rng.uniform(-1, 1)) for _ in range(int(seconds * 5) + 2)]
    )
    return sound[: round(seconds * rate)].astype(np.float32)


def stretches(*parts: tuple[float, float]) -> np.ndarray:
    """(seconds, level), one behind the other."""
    return np.concatenate([np.full(round(seconds * RATE), level, np.float32) for seconds, level in parts])


def heard(listener: Listener, blocks: list[np.ndarray]) -> list[Event]:
    updates = [update for block in blocks for update in listener.feed(block)] + listener.finish()
    return [event for update in updates for event in update.events]


def rows(events: list[Event]) -> list[Row]:
    return sorted((event.label, round(event.onset, 6), round(event.offset, 6)) for event in events)


def taggers_rows(of: Tagger, sound: np.ndarray, processing: PostProcessing | None = None) -> list[Row]:
    table = of.tag(sound).events(processing)
    times = zip(table.event_label, table.onset, table.offset, strict=True)
    return sorted((str(label), round(float(a), 6), round(float(b), 6)) for label, a, b in times)


@pytest.mark.parametrize("rate", [8000, 11025, 48000])
def test_blocks_of_any_length_give_the_same_events(rate: int) -> None:
    sound, rng = levels(33.3, rate=rate), np.random.default_rng(1)
    found = []
    for longest in (rate // 50, rate, 7 * rate, 100 * rate):
        cuts = np.cumsum(rng.integers(0, longest + 1, size=20_000))
        found.append(heard(Listener(levels_tagger(), sample_rate=rate), np.split(sound, cuts[cuts < len(sound)])))
    assert len(found[0]) > 5
    assert all(events == found[0] for events in found[1:])


def test_single_samples_are_blocks_too() -> None:
    sound = levels(25, rate=640)
    make: Callable[[], Listener] = lambda: Listener(levels_tagger(640, window_size=64, hop_size=8))  # noqa: E731
    events = heard(make(), [sound])
    assert len(events) > 3
    assert heard(make(), np.split(sound, len(sound))) == events


@pytest.mark.parametrize("seconds", [0.01, 3.3, 9.99, 10, 10.01, 15, 20, 47.7])
@pytest.mark.parametrize("short_clips", ["pad", "repeat"])
def test_with_all_windows_the_events_are_taggers(seconds: float, short_clips: str) -> None:
    sound, of = levels(seconds, seed=3), levels_tagger(short_clips=short_clips)
    assert rows(heard(Listener(of, **EXACT), np.array_split(sound, 13))) == taggers_rows(of, sound)


@pytest.mark.parametrize("interpolation", [1, 4])
@pytest.mark.parametrize("seconds", [4.1, 10, 33.3, 61])
def test_smoothing_and_joining_are_taggers(seconds: float, interpolation: int) -> None:
    of, sound = levels_tagger(), levels(seconds, seed=8)
    sound += 0.3 * np.random.default_rng(0).standard_normal(len(sound)).astype(np.float32)
    processing = PostProcessing(
        LABELS, thresholds=(0.4, 0.2), median_filter=(3, 7), minimum_duration=(0.6, 0.0), maximum_gap=(0.0, 0.9),
        interpolation=interpolation,
    )  # fmt: skip
    expected = taggers_rows(of, sound, processing)
    assert expected
    assert rows(heard(Listener(of, postprocessing=processing, **EXACT), np.array_split(sound, 29))) == expected


@pytest.mark.parametrize("delay", [0.0, 2.5, None, 10.0])
@pytest.mark.parametrize("hop", [0.3, 1.0, 2.0, 10.0])
def test_events_lie_within_a_step_of_taggers(hop: float, delay: float | None) -> None:
    sound, of = (
        stretches((2, 0.1), (3, 0.9), (4.4, 0.0), (6.1, -0.8), (7, 0.2), (5.3, 0.7), (14.2, 0.0)),
        levels_tagger(),
    )
    found = rows(heard(Listener(of, hop_seconds=hop, delay_seconds=delay), np.array_split(sound, 50)))
    expected = taggers_rows(of, sound)
    assert [label for label, *_ in found] == [label for label, *_ in expected] == ["down", "up", "up"]
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in expected], atol=STEP + 1e-6)


def test_events_are_certain_once_their_delay_is_over() -> None:
    listener = Listener(levels_tagger(), hop_seconds=1, delay_seconds=3)
    assert listener.hop_seconds == 3 * STEP
    updates = [update for block in np.array_split(levels(60), 600) for update in listener.feed(block)]
    for update in updates:
        assert not update.events or update.heard >= 10
        for event in update.events:
            assert event.known_at - event.offset >= 3 - STEP
            assert event.known_at - event.offset <= max(3 + listener.hop_seconds + 2 * STEP, 10 - event.offset)
            assert event.known_at == update.heard
    assert len([event for update in updates for event in update.events]) > 5
    np.testing.assert_allclose(np.diff([update.heard for update in updates]), listener.hop_seconds, atol=1e-3)


def test_tags_come_before_the_first_window_is_full() -> None:
    listener = Listener(levels_tagger(short_clips="repeat"))
    first, *_ = listener.feed(stretches((3, 0.6)))
    assert first.heard == pytest.approx(10 % listener.hop_seconds, abs=1e-3)
    assert first.window.top(1) == [("up", pytest.approx(0.6))]
    assert first.events == []


def test_hysteresis_bridges_a_dip_that_stays_above_the_lower_threshold() -> None:
    sound = stretches((5, 0), (2.5, 0.7), (2.5, 0.45), (2.5, 0.7), (2.5, 0.3), (2.5, 0.45), (7.5, 0))
    assert rows(heard(Listener(levels_tagger(), **EXACT), [sound])) == [("up", 5, 7.5), ("up", 10, 12.5)]
    listener = Listener(levels_tagger(), **{**EXACT, "release": 0.8})
    (event,) = heard(listener, [sound])
    assert (event.label, event.onset, event.offset) == ("up", 5, 12.5)
    assert event.peak == pytest.approx(0.7)


def test_a_sound_that_goes_on_is_active_and_ends_with_the_end() -> None:
    listener = Listener(levels_tagger())
    updates = listener.feed(stretches((5, 0), (20, -0.9)))
    assert updates[-1].active == ["down"]
    assert rows([event for update in listener.finish() for event in update.events]) == [("down", 5, 25)]


def test_an_hour_takes_no_more_memory_than_a_minute() -> None:
    listener = Listener(levels_tagger(800, window_size=64, hop_size=8), hop_seconds=10)
    block = np.zeros(60 * 800, np.float32)
    listener.feed(block)
    listener.feed(block)
    tracemalloc.start()
    listener.feed(block)
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(57):
        listener.feed(block)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert listener.heard == 3600
    assert after - before < 20_000


def test_channels_are_averaged_and_int16_is_scaled() -> None:
    sound = levels(20)
    expected = rows(heard(Listener(levels_tagger(), **EXACT), [sound]))
    halves = np.stack([sound * 2, np.zeros_like(sound)])
    assert rows(heard(Listener(levels_tagger(), **EXACT), np.array_split(halves, 7, axis=1))) == expected
    integers = (sound * 32767).round().astype(np.int16)
    assert rows(heard(Listener(levels_tagger(), **EXACT), [integers])) == expected


def test_the_real_time_factor_is_computing_time_over_sound() -> None:
    ticks = iter(np.arange(0, 1000, 0.25))
    listener = Listener(levels_tagger(), hop_seconds=1.25, clock=lambda: float(next(ticks)))
    assert listener.real_time_factor == 0
    updates = listener.feed(levels(20))
    assert {update.seconds for update in updates} == {0.25}
    assert listener.real_time_factor == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hop_seconds": 0}, "at most 10"),
        ({"hop_seconds": 10.5}, "at most 10"),
        ({"delay_seconds": 11}, "between 0 and 10"),
        ({"delay_seconds": -1}, "between 0 and 10"),
        ({"release": 0}, "at most 1"),
        ({"release": 1.1}, "at most 1"),
        ({"hop_seconds": float("nan")}, "at most 10"),
        ({"sample_rate": 10}, "1000 to 768000"),
    ],
)
def test_values_that_are_not_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Listener(levels_tagger(), **given)


def test_samples_that_are_not_finite_and_the_end() -> None:
    listener = Listener(levels_tagger())
    with pytest.raises(ValueError, match="finite samples"):
        listener.feed(np.array([0, np.nan], np.float32))
    assert listener.feed(np.zeros(0, np.float32)) == []
    assert listener.finish() == []
    with pytest.raises(ValueError, match="finished"):
        listener.feed(np.zeros(10, np.float32))


# --- the command ----------------------------------------------------------------------------------------------------


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
