"""Parts of benchmarks/data.py: how two ways are timed, FLAC stores, and the index of all of AudioSet."""

import contextlib
import io
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import h5py
import numpy as np

from commands import save_idc
from data.clip_store import Clip, ClipStoreWriter, Waveforms, open_store
from prepare.compress import compress_store

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 527
SAMPLE_RATE = 32_000
CLIP_SAMPLES = 10 * SAMPLE_RATE
PARTS = 41  # files of AudioSet's unbalanced training clips


@dataclass(frozen=True)
class Result:
    """One comparison: median seconds of either side, median ratio of the turns, the ratio that is asked for.

    Without a plain side, plain_seconds and ratio are None.
    """

    name: str
    plain_seconds: Optional[float]
    our_seconds: float
    ratio: Optional[float]
    target: Optional[float]


def seconds(work: Callable[[], Any], calls: int = 1) -> float:
    """How long a call takes: the median of some calls."""
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def compare(
    plain: Callable[[], Any], ours: Mapping[str, tuple[Callable[[], Any], Optional[float]]], turns: int
) -> list[Result]:
    """Time `plain` and each of `ours` ({name: (work, target)}), which are short and called thrice, in turn."""
    plain_seconds: list[float] = []
    our_seconds: dict[str, list[float]] = {name: [] for name in ours}
    for _ in range(turns):
        plain_seconds.append(seconds(plain))
        for name, (work, _target) in ours.items():
            our_seconds[name].append(seconds(work, calls=3))
    return [
        Result(
            name,
            statistics.median(plain_seconds),
            statistics.median(taken),
            statistics.median(p / o for p, o in zip(plain_seconds, taken, strict=True)),
            ours[name][1],
        )
        for name, taken in our_seconds.items()
    ]


def sparse_targets(rows: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, 527) bool with one or two classes a clip, the k-th one 1 / k as often as the first, as in AudioSet."""
    weights = 1 / np.arange(1, CLASSES + 1)
    targets = np.zeros((rows, CLASSES), dtype=bool)
    first = np.arange(min(rows, CLASSES))
    targets[first, first] = True  # no class without clips
    for _ in range(2):
        targets[np.arange(rows), rng.choice(CLASSES, rows, p=weights / weights.sum())] = True
    return targets


def clip_names(first: int, count: int) -> np.ndarray:
    """(count,) bytes, as long as AudioSet's."""
    return np.array([f"Y{number:011d}.wav".encode() for number in range(first, first + count)], dtype="S20")


# --- FLAC against int16 ---------------------------------------------------------------------------------------------


def synthesize(rng: np.random.Generator) -> np.ndarray:
    """(CLIP_SAMPLES,) int16: ten strokes of three decaying tones and a breath of noise, over a noise floor of -60 dB.

    Sound, for what a compressor makes of it: noise alone could not be made smaller.
    """
    floor = rng.normal(0, 1e-3, CLIP_SAMPLES)
    sound = floor.copy()
    for onset in rng.integers(0, CLIP_SAMPLES - SAMPLE_RATE, 10):
        t = np.arange(CLIP_SAMPLES - onset) / SAMPLE_RATE
        envelope = rng.uniform(0.05, 0.3) * np.exp(-t / rng.uniform(0.05, 1.0))
        tones = sum(np.sin(2 * np.pi * frequency * t) for frequency in rng.uniform(80, 4000, 3))
        sound[onset:] += envelope * (tones / 3 + 30 * floor[: len(t)])
    return np.asarray(np.clip(sound, -1, 1) * 32767, dtype=np.int16)


def read_clips(path: Path, rows: np.ndarray) -> None:
    """Read some rows of a store into memory that is used again, as the loader reads them."""
    waveform = np.zeros(CLIP_SAMPLES, dtype=np.int16)
    with open_store(path) as file:
        waveforms = Waveforms(file)
        for row in rows.tolist():
            waveforms.read_into(row, waveform)


def compare_flac(root: Path, clips: int, turns: int, rng: np.random.Generator) -> tuple[list[Result], dict[str, float]]:
    """All clips of a store in random order, as int16 and as FLAC; and the MiB of either."""
    int16, flac = root / "int16.h5", root / "flac.h5"
    with ClipStoreWriter(int16, clip_samples=CLIP_SAMPLES, sample_rate=SAMPLE_RATE, labels=["sound"]) as writer:
        for number in range(clips):
            writer.add(Clip(f"{number}.wav", synthesize(rng), [0]))
    shutil.copy(int16, flac)
    before, after = compress_store(flac)
    rows = rng.permutation(clips)
    for path in (int16, flac):  # both sides have been read before
        read_clips(path, rows)
    reading = {"store: FLAC (ours) against int16 (plain)": (lambda: read_clips(flac, rows), None)}
    results = compare(lambda: read_clips(int16, rows), reading, turns)
    return results, {"int16": before / 2**20, "FLAC": after / 2**20}


# --- the index of all of AudioSet -----------------------------------------------------------------------------------


def write_parts(root: Path, clips: int, rng: np.random.Generator) -> None:
    """`clips` training clips in 41 files of PANNs' format. Their sound is never written: HDF5 gives it no room."""
    for number, rows in enumerate(np.array_split(np.arange(clips), PARTS)):
        path = root / "hdf5s" / "waveforms" / "unbalanced_train" / f"unbalanced_train_part{number:02d}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["audio_name"] = clip_names(int(rows[0]), len(rows))
            file["target"] = sparse_targets(len(rows), rng)
            file.create_dataset("waveform", (len(rows), CLIP_SAMPLES), "int16")


def write_repeated(root: Path, *, clips: int, clip_samples: int, block: int = 64) -> None:
    """AudioSet's packed training clips: noise, the same `block` clips again and again, each with its own place."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-3000, 3000, (block, clip_samples), dtype=np.int16)
    path = root / "hdf5s" / "waveforms" / "full_train.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["audio_name"] = clip_names(0, clips)
        file["target"] = sparse_targets(clips, rng)
        waveform = file.create_dataset("waveform", (clips, clip_samples), "int16")
        for first in range(0, clips, block):
            waveform[first : first + block] = noise[: clips - first]


def run_save_idc(given: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        save_idc.run(given)


def time_full_index(root: Path, clips: int, turns: int, rng: np.random.Generator) -> list[Result]:
    """The indexes unbalanced_train and full_train (here of the same clips), and save_idc on the latter."""
    write_parts(root, clips, rng)
    # As a script: the processes that it starts import what started them, which here would be torch as well.
    script = [sys.executable, str(ROOT / "main.py"), "create_index", "--dataset_path", str(root)]
    given = {"dataset_type": "audioset", "dataset_path": str(root)}
    work: dict[str, Callable[[], Any]] = {
        f"create_indexes: {clips:,} clips in {PARTS} files": lambda: subprocess.run(
            script, check=True, capture_output=True
        ),
        f"save_idc: the command on {clips:,} clips": lambda: run_save_idc(given),
    }
    return [Result(name, None, seconds(call, turns), None, None) for name, call in work.items()]
