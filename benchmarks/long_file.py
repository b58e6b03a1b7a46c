"""Memory and time of a very long recording: write a synthetic one, tag it, and show how much memory is in use.

    python benchmarks/long_file.py --hours 10 --network tiny       # every window, a small network
    python benchmarks/long_file.py --hours 0.25 --network full     # the full network, as far as patience reaches

Prints the resident memory at every tenth of the file, its peak, and the real-time factor. The file is removed.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from inference import Tagged, Tagger
from model import build_model
from model.network import keep_freed_memory
from settings import resolve

RATE = 16000
TINY = {"htsat_dim": 16, "htsat_depth": [1, 1, 1, 1], "htsat_num_head": [1, 2, 4, 8]}


def resident_mib() -> float:
    """Resident memory of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def write_recording(path: Path, hours: float) -> None:
    """Noise whose loudness changes from minute to minute, 16 kHz int16, a minute at a time."""
    rng = np.random.default_rng(0)
    left = round(hours * 3600 * RATE)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        while left > 0:
            count = min(left, 60 * RATE)
            file.write((rng.standard_normal(count) * rng.uniform(0.001, 0.2)).astype(np.float32))
            left -= count


class Watch:
    """Prints the memory in use at every tenth of the recording."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.done_seconds, self.next_tenth = seconds, 0.0, 1
        self.begun = time.perf_counter()

    def __call__(self, seconds: float) -> None:
        self.done_seconds += seconds
        while self.done_seconds >= self.seconds * self.next_tenth / 10 - 1e-6 and self.next_tenth <= 10:
            print(
                f"{self.done_seconds / 3600:6.2f} h of sound: {resident_mib():7.0f} MiB resident, "
                f"{time.perf_counter() - self.begun:7.1f} s",
                flush=True,
            )
            self.next_tenth += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=10.0)
    parser.add_argument("--network", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--format", choices=["wav", "flac"], default="flac")
    parser.add_argument("--window_overlap", type=float, default=0.5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size = TINY if arguments.network == "tiny" else {}
    settings = resolve({"dataset_type": "audioset", "window_overlap": arguments.window_overlap, **size})
    labels = [f"class {k}" for k in range(settings.classes_num)]
    tagger = Tagger(build_model(settings), settings, labels).to("auto")
    if tagger.device.type == "cpu":
        keep_freed_memory()  # as load_tagger does
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"long.{arguments.format}"
        write_recording(path, arguments.hours)
        print(
            f"{arguments.hours:g} h, {path.stat().st_size / 2**20:.0f} MiB of {arguments.format}, {arguments.network} "
            f"network, overlap {arguments.window_overlap:g}; {resident_mib():.0f} MiB before the first window",
            flush=True,
        )
        watch = Watch(arguments.hours * 3600)
        ((_, found),) = tagger.tag_files([path], progress=watch)
        seconds = time.perf_counter() - watch.begun
    if not isinstance(found, Tagged):
        raise found
    print(
        f"scores {found.framewise.shape}, {found.framewise.nbytes / 2**20:.0f} MiB; peak {peak_mib():.0f} MiB; "
        f"{seconds:.0f} s, {arguments.hours * 3600 / seconds:.0f} times real time"
    )


if __name__ == "__main__":
    main()
