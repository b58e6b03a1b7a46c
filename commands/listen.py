"""python main.py listen: tags and events while they sound, from the microphone or raw samples on standard input."""

import contextlib
import importlib
import queue
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Optional, TextIO

import numpy as np

from data.files import whole_file
from data.names import shown
from inference.loading import event_processing, load_tagger
from inference.outputs import EVENT_HEADER, EventRow, event_lines, plain_score, tab_separated
from inference.streaming import Event, Listener, Update
from settings import UserError

PCM = {"s16le": "<i2", "f32le": "<f4"}
BLOCK_SECONDS = 0.1
MOST_WAITING_SECONDS = 60  # of the microphone's sound, on a machine that does not keep up
MOST_CHANNELS = 64
INSTALL = "pip install sounddevice (on Debian and Ubuntu also: apt install libportaudio2)"


def run(
    given: dict[str, Any],
    pcm: Optional[str],
    rate: Optional[int],
    channels: int,
    microphone: Optional[str],
    events: Optional[str],
    top_k: int,
    **options: Any,
) -> int:
    """Listen until the sound ends or Ctrl-C: finished events go to standard output, the live line to the terminal.

    pcm: samples on standard input, as s16le or f32le of `rate` Hz and interleaved `channels`; None: the microphone.
    events: TSV to write; options: hop_seconds, delay_seconds and release of streaming.Listener. Raises UserError for
    a mistake in what was given, and where there is no microphone.
    """
    if not 1 <= channels <= MOST_CHANNELS:
        raise UserError(f"--channels {channels} is not allowed: 1 to {MOST_CHANNELS} are.")
    if pcm is None and (rate is not None or channels != 1):
        raise UserError("--rate and --channels describe the samples on standard input: give --pcm s16le or f32le too.")
    tagger = load_tagger(given, "listen")
    if events is not None and not tagger.has_frames:
        raise UserError("--events cannot be written: the encoder of the checkpoint has no time axis. It gives tags.")
    with contextlib.ExitStack() as stack:
        if pcm is None:
            name, source = "microphone", stack.enter_context(open_microphone(microphone))
            rate, blocks = source
        else:
            name, rate = "standard input", tagger.settings.sample_rate if rate is None else rate
            blocks = pcm_blocks(sys.stdin.buffer, pcm, channels, round(rate * BLOCK_SECONDS))
        listener = Listener(tagger, sample_rate=rate, postprocessing=event_processing(tagger), **options)
        screen = stack.enter_context(Screen.of(events, name, top_k))
        certain = f"an event is certain {listener.delay_seconds:.2f} s after its end"
        print(
            f"Listening to {name} at {rate} Hz: tags every {listener.hop_seconds:.2f} s, "
            f"{certain if listener.frames else 'no events (the encoder has no time axis)'}. Ctrl-C ends.",
            file=sys.stderr,
        )
        follow(listener, blocks, screen)
        screen.finish(listener)
    if listener.samples == 0:
        raise UserError(f"There was no sound from {name}.")
    return 0


def follow(listener: Listener, blocks: Iterator[np.ndarray], screen: "Screen") -> None:
    """Feed the listener until the blocks end or Ctrl-C, then finish it; show all updates."""
    with contextlib.suppress(KeyboardInterrupt):
        for block in blocks:
            for update in listener.feed(block):
                screen.show(update, listener)
    for update in listener.finish():
        screen.show(update, listener)


def pcm_blocks(stream: BinaryIO, kind: str, channels: int, frames: int) -> Iterator[np.ndarray]:
    """(channels, samples) int16 or float32 from raw little-endian samples, as soon as they come; at most `frames`.

    kind: s16le or f32le. An incomplete sample at the end is dropped.
    """
    dtype = np.dtype(PCM[kind])
    size, rest = dtype.itemsize * channels, b""
    read = getattr(stream, "read1", stream.read)  # the bytes that have arrived, without waiting for a whole block
    while content := read(frames * size):
        rest += content
        whole = len(rest) // size * size
        if whole:
            yield np.frombuffer(rest[:whole], dtype).reshape(-1, channels).T.astype(dtype.newbyteorder("="))
        rest = rest[whole:]


@contextmanager
def open_microphone(which: Optional[str]) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """The sample rate of a microphone, and its (1, samples) float32 blocks, which never end.

    which: its number, or a part of its name; None: the system's. Raises UserError where sounddevice is not installed,
    where there is no such microphone, and where the machine falls behind by MOST_WAITING_SECONDS.
    """
    try:
        sounddevice = importlib.import_module("sounddevice")
    except (ModuleNotFoundError, OSError) as error:  # OSError: PortAudio itself is missing
        raise UserError(
            f"The microphone needs the sounddevice package ({error}): {INSTALL}. Or pipe samples in: --pcm s16le."
        ) from None
    device = int(which) if which is not None and which.isdigit() else which
    waiting: queue.Queue[np.ndarray] = queue.Queue(round(MOST_WAITING_SECONDS / BLOCK_SECONDS))
    behind = []

    def arrived(block: np.ndarray, *_: Any) -> None:  # in a thread of PortAudio's, which must not wait
        try:
            waiting.put_nowait(block.T.copy())
        except queue.Full:
            behind.append(True)

    try:
        rate = int(sounddevice.query_devices(device, "input")["default_samplerate"])
        stream = sounddevice.InputStream(
            samplerate=rate, blocksize=round(rate * BLOCK_SECONDS), device=device, channels=1, dtype="float32",
            callback=arrived,
        )  # fmt: skip
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(
            f"There is no microphone {which or 'on this machine'} to listen to ({error}). `python -m sounddevice` "
            f"lists the devices; --microphone takes a number or a part of a name."
        ) from None
    with stream:
        yield rate, _until_behind(waiting, behind)


def _until_behind(waiting: "queue.Queue[np.ndarray]", behind: list[bool]) -> Iterator[np.ndarray]:
    while not behind:
        # With a limit, since a wait without one cannot be interrupted on Windows.
        with contextlib.suppress(queue.Empty):
            yield waiting.get(timeout=0.5)
    raise UserError(
        f"This machine is {MOST_WAITING_SECONDS} s behind the sound: raise --hop_seconds, or take a smaller network."
    )


class Screen:
    """The output of listen: a live line on a terminal, events on standard output and in a table."""

    def __init__(self, table: Optional[TextIO], name: str, top_k: int) -> None:
        self.table, self.name, self.top_k = table, name, top_k
        self.live = sys.stderr.isatty()
        self.events, self.late_seconds = 0, 0.0

    @classmethod
    @contextmanager
    def of(cls, path: Optional[str], name: str, top_k: int) -> "Iterator[Screen]":
        """path: TSV of events; it grows line by line as PATH.partial, which stays after an error."""
        if path is None:
            yield cls(None, name, top_k)
            return
        with whole_file(path, keep=True) as partial, partial.open("w", encoding="utf-8", buffering=1) as table:
            table.write(tab_separated([EVENT_HEADER]))
            yield cls(table, name, top_k)

    def show(self, update: Update, listener: Listener) -> None:
        """Finished events, and below them the live line."""
        if self.live and update.events:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        for event in sorted(update.events, key=lambda event: (event.onset, event.offset)):
            self._write(event)
        if self.live:
            tags = "  ".join(f"{score:.2f} {shown(label)}" for label, score in update.window.top(self.top_k))
            line = f"{update.sound_seconds:8.1f} s  {tags}  on: {', '.join(map(shown, update.active)) or '-'}"
            line += f"  [{update.seconds:.2f} s, x{listener.real_time_factor:.2f}]"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)

    def _write(self, event: Event) -> None:
        print(f"{event.onset:9.2f} {event.offset:9.2f}  {event.peak:.2f}  {shown(event.label)}", flush=True)
        if self.table is not None:
            row = EventRow(event.onset, event.offset, event.label, plain_score(event.peak), event.threshold)
            self.table.write(event_lines(self.name, [row]))
        self.events += 1
        self.late_seconds += event.known_at - event.offset

    def finish(self, listener: Listener) -> None:
        """Print the duration, the latency of events, and whether the machine kept up."""
        if not listener.evaluations:
            return
        if self.live:
            print(file=sys.stderr)
        late = f", certain {self.late_seconds / self.events:.1f} s after their end (mean)" if self.events else ""
        mean = listener.busy_seconds / listener.evaluations
        print(
            f"Sound: {listener.sound_seconds:.1f} s. Events: {self.events}{late}. Computing: {mean:.3f} s for each "
            f"{listener.hop_seconds:.2f} s of sound (at most {listener.slowest_seconds:.3f} s), real-time factor "
            f"{listener.real_time_factor:.3f}.",
            file=sys.stderr,
        )
        if listener.real_time_factor > 1:
            print("This machine is slower than the sound: raise --hop_seconds.", file=sys.stderr)
