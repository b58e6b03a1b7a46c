"""Many short files: the seconds of predict beside those of its network alone, memory and open files.

    python benchmarks/bulk.py                                   # 2,000 files of 5 s, a small network
    python benchmarks/bulk.py --network full --files 200        # the full network

At each tenth of the files: all that predict does with them (reading, tagging, printing to nowhere, events, JSON Lines,
a table of events), then the network alone on the same windows in the same batches. Prints both times, their ratio, the
resident memory and the open files. The files are removed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.long_file import TINY, peak_mib, resident_mib
from commands.predict import tag_sources
from data.audio import stream_audio
from evaluation.postprocess import PostProcessing
from inference import Tagger
from inference.outputs import Outputs, Source, Wanted
from inference.tagger import WINDOWS_AT_ONCE
from inference.windows import cut_windows
from model import build_model
from model.network import keep_freed_memory
from settings import resolve

RATE = 44100
EVENTS = 3  # classes that have an event in each file, as many as a trained network finds


def write_files(folder: Path, count: int, seconds: float, ending: str) -> list[Source]:
    """Noise of different loudness, 16 bit, mono."""
    rng = np.random.default_rng(0)
    sources = []
    for number in range(count):
        path = folder / f"{number:05d}.{ending}"
        soundfile.write(path, rng.standard_normal(round(seconds * RATE)) * rng.uniform(0.001, 0.2), RATE)
        sources.append(Source(path, str(path), path.name))
    return sources


def seconds_of_predict(tagger: Tagger, sources: list[Source], outputs: Outputs) -> float:
    begun = time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        failed = tag_sources(tagger, sources, outputs, Counter())
    assert failed == 0
    return time.perf_counter() - begun


def seconds_of_network(tagger: Tagger, sources: list[Source], size: int) -> float:
    """The network alone, in batches of `size` windows, which are read before the clock runs."""
    settings, seconds = tagger.settings, 0.0
    windows = (
        window.samples
        for source in sources
        for window in cut_windows(
            stream_audio(source.path, settings.sample_rate), window=settings.clip_samples,
            overlap=settings.window_overlap, short_clips=settings.short_clips,
        )
    )  # fmt: skip
    while batch := list(islice(windows, size)):
        waveform = torch.from_numpy(np.stack(batch))
        begun = time.perf_counter()
        with torch.inference_mode():
            for scores in tagger.probabilities(waveform.to(tagger.device)):
                scores.float().cpu()
        seconds += time.perf_counter() - begun
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--network", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--format", choices=["wav", "flac", "mp3", "ogg"], default="wav")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.files < 10:
        parser.error(f"--files {arguments.files}: give 10 or more, a tenth is timed at a time")
    torch.manual_seed(0)
    settings = resolve({"dataset_type": "audioset", **(TINY if arguments.network == "tiny" else {})})
    labels = [f"class {k}" for k in range(settings.classes_num)]
    thresholds = (0.0,) * EVENTS + (1.0,) * (len(labels) - EVENTS)
    tagger = Tagger(build_model(settings), settings, labels).to(arguments.device)
    size = WINDOWS_AT_ONCE[tagger.device.type]
    if tagger.device.type == "cpu":
        keep_freed_memory()  # as load_tagger does
    print(
        f"{arguments.files} files of {arguments.seconds:g} s, {arguments.format}, {arguments.network} network on "
        f"{tagger.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = write_files(Path(folder), arguments.files, arguments.seconds, arguments.format)
        checkpoint = Path(folder, "checkpoint")  # of which an output's identity is made
        checkpoint.touch()
        wanted = Wanted(jsonl=f"{folder}/tags.jsonl", events=f"{folder}/events.tsv")
        post = PostProcessing(tuple(labels), thresholds=thresholds)
        with Outputs(wanted, labels=labels, settings=settings, postprocessing=post, checkpoint=checkpoint) as outputs:
            seconds_of_network(tagger, sources[:size], size)
            for tenth in range(10):
                share = sources[tenth * len(sources) // 10 : (tenth + 1) * len(sources) // 10]
                predict, network = seconds_of_predict(tagger, share, outputs), seconds_of_network(tagger, share, size)
                rows.append(
                    {
                        "predict_seconds": predict,
                        "network_seconds": network,
                        "resident_mib": resident_mib(),
                        "open_files": len(os.listdir("/proc/self/fd")),
                    }
                )
                print(
                    f"{(tenth + 1) * 10:3d} %: predict {predict:7.2f} s, network {network:7.2f} s, ratio "
                    f"{predict / network:.3f}; {rows[-1]['resident_mib']:.0f} MiB, {rows[-1]['open_files']} files open",
                    flush=True,
                )
            begun = time.perf_counter()
        ending = time.perf_counter() - begun
    total = {name: sum(row[f"{name}_seconds"] for row in rows) for name in ("predict", "network")}
    total["predict"] += ending  # the outputs, of the journal
    peak = peak_mib()
    print(
        f"predict {total['predict']:.1f} s ({arguments.files / total['predict']:.0f} files/s), network "
        f"{total['network']:.1f} s: ratio {total['predict'] / total['network']:.3f}; peak {peak:.0f} MiB"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({**total, "peak_mib": peak, "tenths": rows}, indent=2))


if __name__ == "__main__":
    main()
