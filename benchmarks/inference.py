"""Tagging clips of 10 s on the CPU: the network, compiled and exported, against the published forward pass.

    python benchmarks/inference.py [--quick] [--compile] [--keep_memory] [--batch CLIPS] [--json FILE]
    python benchmarks/inference.py --first_tag [--quick] [--json FILE]     # how long `predict` takes to its first tag
    python benchmarks/inference.py --encoder NAMES|all [--quick] [--json FILE]    # other encoders, without a plain side

The full network with 527 classes and random weights. All sides take turns, so that a busy machine slows all. A ratio is
the median of the turns' ratios. The plain side is benchmarks/plain.py, once as it is and once with subnormal numbers
flushed to zero (in a process of its own: threads that exist already would not follow).

--first_tag starts `python main.py predict` on a file of 10 s, with the full network from a checkpoint, until its first
line of tags, and `python -c "import torch"`, in turn.

--encoder measures encoders of full size, each in a process of its own: the time to load a file of weights, clips/s,
peak memory, how much one clip gains by oneDNN's layers, and the share of the arithmetic: multiply-adds of the clips
against the fastest matrix product, measured in the same turn.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import soundfile
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.plain import PlainHTSAT
from data.labels import published_labels
from inference.onnx_runtime import load_onnx
from model import Network, build_model
from model.export import build_onnx, join, quantize, save_onnx
from model.layers.onednn import use_onednn
from model.network import has_bf16, keep_freed_memory
from model.opening import open_network
from model.registry import ENCODERS
from runs.measure import count_flops, peak_flops, peak_memory, release_and_reset_peak
from settings import Config, resolve, section

ROOT = Path(__file__).resolve().parents[1]
FIRST_TAG_TARGET = 1.0  # seconds over importing torch
PAUSE = 0.05  # seconds before each measurement, in which the threads of the side before come to rest
LATENCY, THROUGHPUT = "latency of one clip", "throughput"
TARGETS = {
    LATENCY: {"eager": 2.0, "onnx": 2.4, "onnx int8": 2.8},
    THROUGHPUT: {"eager": 2.0, "onnx": 2.2, "onnx int8": 2.5},
}
SHARE_TARGET = 0.75  # of eager: the time of its products at the measured peak / its own
COARSE = ("bf16", "onnx int8")  # sides in other arithmetic than float32
Listen = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Result:
    """Median seconds of a side and of the plain ones, and the medians of the turns' ratios."""

    what: str
    name: str
    seconds: float
    plain_seconds: float
    ratio: float
    flushed_seconds: float
    flushed_ratio: float
    target: Optional[float]
    share: Optional[float]  # of a float32 side: time of the products at the measured peak / its own
    blas_share: Optional[float]  # the same by the BLAS library alone, without oneDNN


def make_clips(count: int) -> Tensor:
    """(count, 320000): noise."""
    return 0.1 * torch.randn(count, 320000, generator=torch.Generator().manual_seed(0))


def make_networks() -> tuple[Config, Network, PlainHTSAT]:
    """The settings, and both networks with the same random weights."""
    torch.manual_seed(0)
    settings = resolve({"dataset_type": "audioset", "precision": "32", "compile": "off"})
    network, plain = build_model(settings).eval(), PlainHTSAT().eval()
    plain.load_state_dict(network.state_dict())
    return settings, network, plain


def timed(listen: Listen, clips: Tensor, batch: int) -> float:
    """Seconds for all clips, `batch` at a time."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    with torch.inference_mode():
        for part in clips.split(batch):
            listen(part)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Floor:
    """What no float32 runtime gets below: the matrix products, at the rate of the fastest that is measured now.

    onednn: whether its products count; without, a CPU's are those of the BLAS library.
    """

    settings: Config
    flops_of_a_clip: float
    onednn: bool = True

    def seconds(self, clips: int) -> float:
        time.sleep(PAUSE)
        return clips * self.flops_of_a_clip / peak_flops(self.settings, onednn=self.onednn)


class FlushedPlain:
    """The plain network in a process whose threads flush subnormal numbers to zero."""

    def __init__(self, keep_memory: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_flushed, args=(other, keep_memory), daemon=True)
        self.process.start()

    def timed(self, clips: int, batch: int) -> float:
        self.connection.send((clips, batch))
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def _flushed(connection: Connection, keep_memory: bool) -> None:
    if not torch.set_flush_denormal(True):
        raise RuntimeError("This CPU cannot flush subnormal numbers.")
    if keep_memory:
        keep_freed_memory()
    plain = make_networks()[2]
    while (order := connection.recv()) is not None:
        connection.send(timed(plain, make_clips(order[0]), order[1]))


def exported(settings: Config, network: Network, folder: Path) -> tuple[dict[str, Listen], dict]:
    """onnxruntime with the float32 and the int8 file, on as many threads as torch; and the files' sizes in bytes."""
    frontend, body = build_onnx(network, settings.clip_samples)
    described = {name: getattr(settings, name) for name in section("front-end")}
    labels = published_labels("audioset", settings.classes_num)
    about = {"settings": settings.model_dump(), "labels": labels, "frontend": described}
    sides: dict[str, Listen] = {}
    for name, model in (("onnx", body), ("onnx int8", quantize(body))):
        path = folder / f"{name}.onnx"
        save_onnx(join(frontend, model), path, about)
        sides[name] = load_onnx(path, threads=torch.get_num_threads()).network.probabilities
    return sides, {path.stem: path.stat().st_size for path in folder.iterdir()}


def check(plain: PlainHTSAT, sides: dict[str, Listen]) -> dict[str, float]:
    """Largest difference of each side's clip probabilities from the plain network's; float32 sides must be close."""
    clips = make_clips(2)
    with torch.inference_mode():
        wanted = plain(clips)["clipwise_output"]
        found = {name: float((listen(clips)[0] - wanted).abs().max()) for name, listen in sides.items()}
    for name, difference in found.items():
        assert difference < 1e-4 or name in COARSE, f"{name} differs from the plain network by {difference}"
    return found


def compare(
    plain: PlainHTSAT,
    flushed: FlushedPlain,
    sides: dict[str, Listen],
    clips: int,
    batch: int,
    turns: int,
    floors: dict[str, Floor],
) -> list[Result]:
    """Time all sides and the floors in turn on so many clips; the first turn warms up and does not count."""
    what = LATENCY if clips == 1 else THROUGHPUT
    sounds = make_clips(clips)
    taken: dict[str, list[float]] = {name: [] for name in ("plain", "flushed", *sides, *floors)}
    for turn in range(turns + 1):
        now = {"plain": timed(plain, sounds, batch), "flushed": flushed.timed(clips, batch)}
        now |= {name: timed(listen, sounds, batch) for name, listen in sides.items()}
        now |= {name: floor.seconds(clips) for name, floor in floors.items()}
        for name, value in now.items():
            taken[name] += [value] if turn else []
    middle = {name: statistics.median(values) for name, values in taken.items()}

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(taken[other], taken[name], strict=True))

    return [
        Result(
            what, name, middle[name], middle["plain"], ratio(name, "plain"), middle["flushed"], ratio(name, "flushed"),
            TARGETS[what].get(name), *(None if name in COARSE else ratio(name, floor) for floor in floors),
        )
        for name in sides
    ]  # fmt: skip


def seconds_to_first_line(command: list[str], folder: Path) -> float:
    """Seconds from the start of a process to its first line on standard output, or to its end where it has none."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit status {process.returncode}.")
    return seconds


def first_tag(turns: int) -> dict[str, Any]:
    """Median seconds of predict to its first tag, of importing torch, and of the turns' differences.

    One turn more comes first and does not count: it brings the files into the system's cache.
    """
    settings, network, _ = make_networks()
    taken: dict[str, list[float]] = {"predict": [], "import torch": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {f"sed_model.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": weights, "settings": settings.model_dump()}, folder / "full.ckpt")
        soundfile.write(folder / "a.wav", make_clips(1)[0].numpy(), settings.sample_rate)
        predict = [
            str(ROOT / "main.py"),
            "predict",
            "a.wav",
            "--resume_checkpoint",
            "full.ckpt",
            "--accelerator",
            "cpu",
        ]
        commands = {"predict": predict, "import torch": ["-c", "import torch"]}
        for turn in range(turns + 1):
            for side, words in commands.items():
                seconds = seconds_to_first_line([sys.executable, *words], folder)
                taken[side] += [seconds] if turn else []
    more = [a - b for a, b in zip(taken["predict"], taken["import torch"], strict=True)]
    return {side: statistics.median(values) for side, values in taken.items()} | {
        "difference": statistics.median(more), "target": FIRST_TAG_TARGET, "turns": turns,
    }  # fmt: skip


def print_results(results: list[Result], clips: int, batch: int) -> None:
    table = Table(
        title=f"full network, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; "
        f"throughput: {clips} clips, {batch} at a time",
        title_justify="left",
    )
    seconds = ("plain (s)", "flushed (s)", "ours (s)")
    for column in ("", *seconds, "ratio to plain", "to flushed", "target", "floor / ours", "BLAS / ours"):
        table.add_column(column, justify="right" if column else "left")
    for r in results:
        times = (f"{value:.3f}" for value in (r.plain_seconds, r.flushed_seconds, r.seconds))
        target = f"{r.target:g}" if r.target else ""
        shares = (f"{share:.0%}" if share else "" for share in (r.share, r.blas_share))
        table.add_row(f"{r.what}: {r.name}", *times, f"{r.ratio:.2f}", f"{r.flushed_ratio:.2f}", target, *shares)
    Console(width=130).print(table)


@dataclass(frozen=True)
class Figures:
    """Of an encoder: medians over the turns.

    gain: of one clip by oneDNN's layers, torch's are 1; share: of the fastest matrix product, in batches.
    """

    encoder: str
    parameters: int
    multiply_adds: float  # of a clip
    load_seconds: float
    latency_seconds: float
    gain: float
    clips_per_second: float
    share: float
    peak_bytes: int


def measure_encoder(name: str, clips: int, batch: int, turns: int) -> Figures:
    """Called in a process of its own: the peak of memory is the encoder's."""
    settings = resolve({"encoder": name, "dataset_type": "audioset", "precision": "32", "compile": "off"})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.ckpt"
        weights = {f"sed_model.{key}": value for key, value in build_model(settings).state_dict().items()}
        torch.save({"state_dict": weights, "settings": settings.model_dump()}, path)
        del weights
        start = time.perf_counter()
        network = open_network(path).network.eval()
        use_onednn(network)
        load_seconds = time.perf_counter() - start
    work, samples = count_flops(settings, training=False), settings.clip_samples
    sounds = 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    release_and_reset_peak(device)
    taken: list[tuple[float, float, float]] = []
    for _ in range(turns + 1):  # the first turn warms up and does not count
        latency, whole = timed(network.probabilities, sounds[:1], 1), timed(network.probabilities, sounds, batch)
        taken.append((latency, clips / whole, work * clips / whole / peak_flops(settings)))
    latency, rate, share = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    parameters, peak = sum(parameter.numel() for parameter in network.parameters()), peak_memory(device)
    slower = build_model(settings).eval()
    sides = slower.probabilities, network.probabilities
    pairs = [[timed(side, sounds[:1], 1) for side in sides] for _ in range(2 * turns + 1)][1:]
    gain = statistics.median(theirs / ours for theirs, ours in pairs)
    return Figures(name, parameters, work / 2, load_seconds, latency, gain, rate, share, peak)


def measure_encoders(names: list[str], clips: int, batch: int, turns: int) -> list[Figures]:
    found = []
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(measure_encoder, name, clips, batch, turns).result())
    return found


def print_encoders(found: list[Figures], clips: int, batch: int) -> None:
    """As rows of a table in Markdown."""
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    print(f"{threads} threads, {instructions}; {clips} clips of 10 s, {batch} at a time")
    print("| encoder | parameters | multiply-adds a clip | load s | one clip s | oneDNN | clips/s | share | peak MiB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for f in found:
        print(
            f"| {f.encoder} | {f.parameters / 1e6:.1f} M | {f.multiply_adds / 1e9:.1f} G | {f.load_seconds:.2f} | "
            f"{f.latency_seconds:.3f} | {f.gain:.2f} | {f.clips_per_second:.2f} | {f.share:.0%} | "
            f"{f.peak_bytes / 2**20:.0f} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few clips and turns: to see whether it runs")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: one to two minutes more")
    parser.add_argument("--keep_memory", action="store_true", help="keep freed memory, on all sides (glibc's mallopt)")
    parser.add_argument("--first_tag", action="store_true", help="measure that instead: predict from its start")
    parser.add_argument("--encoder", metavar="NAMES", help="measure these encoders instead, or all")
    parser.add_argument("--batch", type=int, default=4, metavar="CLIPS", help="throughput: clips at a time [4]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if arguments.first_tag:
        found = first_tag(2 if arguments.quick else 5)
        print(
            f"First tag of predict: {found['predict']:.2f} s; import torch: {found['import torch']:.2f} s; difference "
            f"{found['difference']:.2f} s, target {FIRST_TAG_TARGET:g} s (medians of {found['turns']} turns)"
        )
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine, "first_tag": found}, indent=2) + "\n")
        return
    if arguments.encoder:
        names = list(ENCODERS) if arguments.encoder == "all" else arguments.encoder.split(",")
        if wrong := [name for name in names if name not in ENCODERS]:
            sys.exit(f"--encoder {', '.join(wrong)}: give all, or some of {', '.join(ENCODERS)}")
        clips, turns = (8, 2) if arguments.quick else (16, 5)
        rows = measure_encoders(names, clips, arguments.batch, turns)
        print_encoders(rows, clips, arguments.batch)
        if arguments.json:
            content = {"machine": machine, "clips": clips, "batch": arguments.batch, "turns": turns}
            arguments.json.write_text(json.dumps(content | {"encoders": [asdict(r) for r in rows]}, indent=2) + "\n")
        return
    if arguments.keep_memory:
        keep_freed_memory()
    clips, turns = (8, 2) if arguments.quick else (64, 5)
    settings, network, plain = make_networks()
    onednn = copy.deepcopy(network)  # as a Tagger has it on a CPU
    use_onednn(onednn)
    sides: dict[str, Listen] = {"eager": onednn.probabilities, "torch's layers": network.probabilities}
    if has_bf16("cpu"):
        half = copy.deepcopy(onednn)
        sides["bf16"] = torch.autocast("cpu", torch.bfloat16)(half.probabilities)
    if arguments.compile:
        torch._inductor.config.freezing = True
        sides["compiled"] = torch.compile(network.probabilities)
    with tempfile.TemporaryDirectory() as folder:
        more, sizes = exported(settings, network, Path(folder))
    sides |= more
    differences = check(plain, sides)
    flushed = FlushedPlain(arguments.keep_memory)
    floor = Floor(settings, count_flops(settings, training=False))
    floors = {"floor": floor, "BLAS": replace(floor, onednn=False)}
    results = compare(plain, flushed, sides, 1, 1, 4 * turns, floors)
    results += compare(plain, flushed, sides, clips, arguments.batch, turns, floors)
    flushed.close()
    print_results(results, clips, arguments.batch)
    print(
        f"floor / ours: {floor.flops_of_a_clip / 1e9:.1f} GFLOP a clip at the rate of the fastest float32 product, "
        f"BLAS / ours: at that of the BLAS library's; both measured in each turn; target {SHARE_TARGET:.0%} (eager)"
    )
    print("MiB: " + ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items()))
    print("Largest difference of a clip's probability: " + ", ".join(f"{k} {v:.1e}" for k, v in differences.items()))
    if arguments.json:
        content = {"clips": clips, "batch": arguments.batch, "turns": turns, "keep_memory": arguments.keep_memory}
        content |= {"machine": machine, "results": [asdict(r) for r in results], "bytes": sizes}
        content |= {"flops_of_a_clip": floor.flops_of_a_clip, "share_target": SHARE_TARGET}
        arguments.json.write_text(json.dumps(content | {"differences": differences}, indent=2) + "\n")


if __name__ == "__main__":
    main()
