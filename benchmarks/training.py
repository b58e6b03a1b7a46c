"""A training step of the full network: this repository against the plain implementation of benchmarks/plain.py.

    python benchmarks/training.py [--quick] [--json FILE]
    python benchmarks/training.py --trainer [--batch CLIPS] [--precision bf16-mixed] [--compile default] [--tiny]

Batch 4, float32, on the CPU or, where there is one, the GPU: forwards, backwards, clipping and AdamW, without drop path
and SpecAugment, which are random; on a CPU our side without oneDNN's layers and in bfloat16 as well. All sides begin
with the same weights and take turns, so that a busy machine slows all. A ratio is the median of the turns' ratios.
Memory is measured in a process of each side's own.

--trainer measures what the Trainer costs: the steps of `python main.py train` against the same loss, backward pass,
clipping and optimizer in a bare loop, with the same network, in turns; and the plain implementation in float32, of
which a turn is fewer steps. --tiny: a network of some milliseconds a step, so that a CPU shows the difference.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain import PlainHTSAT
from model import Outputs
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.layers.onednn import use_onednn
from model.network import has_bf16, keep_freed_memory
from runs.measure import (
    Repeated,
    count_flops,
    measured_module,
    one_device,
    peak_flops,
    peak_memory,
    release_and_reset_peak,
    synthetic_batch,
    time_bare_loop,
    time_training,
)
from settings import Config, UserError, resolve
from training.performance import settle
from training.trainer import build_trainer

BATCH_SIZE, CLIP_SAMPLES, CLASSES = 4, 320_000, 527
TINY: dict[str, Any] = {  # clips of a quarter of a second, and some milliseconds a step
    "htsat_dim": 16, "htsat_depth": [1, 1], "htsat_num_head": [1, 2], "htsat_spec_size": 64, "mel_bins": 32,
    "clip_samples": 8000,
}  # fmt: skip
TARGETS = {"ours": 1.3, "ours, bf16": 2.0}
TURNS, QUICK_TURNS = 9, 2
WARM_UP = 5  # the first steps get their memory from the system
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Side:
    """One implementation with its optimizer."""

    def __init__(self, network: nn.Module, *, fused: bool, bf16: bool = False) -> None:
        self.network, self.bf16 = network.to(DEVICE).train(), bf16
        network.head.requires_grad_(False)  # no output depends on it
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.05, fused=fused)

    def gradients(self, waveform: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.network(waveform)
        logits = outputs.clip_logits if isinstance(outputs, Outputs) else outputs["clipwise_logits"]
        F.binary_cross_entropy_with_logits(logits, targets).backward()

    def step(self, waveform: Tensor, targets: Tensor) -> float:
        """Seconds of one training step."""
        wait_for_device()
        started = time.perf_counter()
        self.gradients(waveform, targets)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        wait_for_device()
        return time.perf_counter() - started


def wait_for_device() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def our_side(*, bf16: bool = False, onednn: bool = DEVICE.type == "cpu") -> Side:
    """As `python main.py train` runs it, with what performance = auto takes in float32 and bfloat16."""
    network = HTSAT_Swin_Transformer(drop_path=0.0)
    if onednn:
        use_onednn(network)
    return Side(network, fused=True, bf16=bf16)


def plain_side() -> Side:
    """With the weights of a network of ours: its own constructor leaves the front-end empty."""
    network = PlainHTSAT(drop_path=0.0)
    network.load_state_dict(HTSAT_Swin_Transformer().state_dict())
    return Side(network, fused=False)


SIDES: dict[str, Callable[[], Side]] = {"plain": plain_side, "ours": our_side}
if DEVICE.type == "cpu":
    SIDES["torch's layers"] = partial(our_side, onednn=False)
if DEVICE.type == "cpu" and has_bf16("cpu"):
    SIDES["ours, bf16"] = partial(our_side, bf16=True)


def batch(clips: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
    """Noise (clips, 320,000) and targets (clips, 527) of which about a hundredth is 1."""
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(clips, CLIP_SAMPLES, generator=generator)
    targets = (torch.rand(clips, CLASSES, generator=generator) < 0.01).float()
    return waveform.to(DEVICE), targets.to(DEVICE)


def gradient_difference(plain: Side, ours: Side) -> tuple[float, str]:
    """Largest norm of a difference of gradients, as a share of the gradient's norm, and whose it is."""
    for side in (plain, ours):
        side.gradients(*batch())
    others = dict(plain.network.named_parameters())
    found = []
    for name, parameter in ours.network.named_parameters():
        if parameter.grad is None:
            continue
        one, other = parameter.grad, others[name].grad
        assert other is not None, name
        found.append((((one - other).norm() / other.norm()).item(), name))
    return max(found)


def compare(turns: int) -> dict[str, Any]:
    """Median seconds of a step of each side, the medians of the ratios, and the largest difference of a gradient."""
    torch.manual_seed(0)
    sides = {name: make() for name, make in SIDES.items()}
    for side in sides.values():
        side.network.load_state_dict(sides["plain"].network.state_dict())
    difference, where = gradient_difference(sides["plain"], sides["ours"])
    given = batch()
    turn = [{name: side.step(*given) for name, side in sides.items()} for _ in range(WARM_UP + turns)][WARM_UP:]
    return {
        "seconds": {name: statistics.median(t[name] for t in turn) for name in sides},
        "ratio": {name: statistics.median(t["plain"] / t[name] for t in turn) for name in sides},
        "targets": TARGETS,
        "gradient_difference": difference,
        "gradient_parameter": where,
    }


def trainer_settings(arguments: argparse.Namespace) -> Config:
    """AudioSet's, with what performance = auto takes where the flags do not say it."""
    given: dict[str, Any] = {"dataset_type": "audioset", "batch_size": arguments.batch, "devices": 1}
    given |= {name: value for name in ("precision", "compile") if (value := getattr(arguments, name))}
    return one_device(settle(resolve(given | (TINY if arguments.tiny else {})), training=True)[0])


def compare_trainer(settings: Config, turns: int, steps: int, plain_clips: int) -> dict[str, Any]:
    """Clips/s of the bare loop, through the Trainer, and of the plain implementation in float32 (0 clips: left out).

    One network serves the first two. overhead: how much longer a step takes through the Trainer; the median over turns.
    """
    build_trainer(settings, steps_per_epoch=None)  # its switches hold for the process, and so for all sides and turns
    module = measured_module(settings)
    batches = Repeated(synthetic_batch(settings, settings.batch_size), steps)
    bare, through, plain_seconds = [], [], []
    plain, given = (plain_side(), batch(plain_clips)) if plain_clips else (None, None)
    for _ in range(turns):
        bare.append(time_bare_loop(settings, batches, module))
        through.append(time_training(settings, batches, module))
        if plain and given:
            plain_seconds.append(exact_step(plain, *given))
    found: dict[str, Any] = {
        "bare_loop": statistics.median(timing.clips_per_second for timing in bare),
        "trainer": statistics.median(timing.clips_per_second for timing in through),
        "overhead": statistics.median(
            t.step_seconds / b.step_seconds - 1 for b, t in zip(bare, through, strict=True)
        ),
        "memory": through[-1].memory,
        "batch_size": settings.batch_size, "precision": settings.precision, "compile": settings.compile,
    }  # fmt: skip
    if plain:
        found["plain"] = plain_clips / statistics.median(plain_seconds)
        found["plain_batch_size"] = plain_clips
        found["ratio_to_plain"] = found["trainer"] / found["plain"]
    return found


def exact_step(plain: Side, waveform: Tensor, targets: Tensor) -> float:
    """Seconds of a step in float32, without TF32, the second of two. Its bicubic stretch is not deterministic."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(False)
    plain.step(waveform, targets)
    seconds = plain.step(waveform, targets)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    torch.use_deterministic_algorithms(True)
    return seconds


def print_memory(side: str) -> None:
    """Peak of three steps, in bytes: of a CPU's process with all libraries, of a GPU's tensors."""
    one, given = SIDES[side](), batch()
    release_and_reset_peak(DEVICE)
    for _ in range(3):
        one.step(*given)
    print(peak_memory(DEVICE))


def memory_of(side: str) -> int:
    """print_memory in a process of its own."""
    words = [sys.executable, __file__, "--memory_of", side]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_results(results: dict[str, Any]) -> None:
    instructions = torch.backends.cpu.get_cpu_capability() if DEVICE.type == "cpu" else torch.cuda.get_device_name()
    table = Table(title=f"Training step, batch {BATCH_SIZE}, {DEVICE.type}, {instructions}", title_justify="left")
    for column in ("", "seconds", "ratio to plain", "target", "peak memory, MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in results["seconds"].items():
        ratio, memory = results["ratio"][name], results["memory"][name] / 2**20
        table.add_row(name, f"{seconds:.3f}", f"{ratio:.2f}", str(TARGETS.get(name, "")), f"{memory:,.0f}")
    Console(width=120).print(table)
    floor = results["floor_seconds"]
    highest = results["seconds"]["plain"] / floor
    print(f"Floor of float32: the step's products at the measured peak take {floor:.3f} s, a ratio of {highest:.2f}")
    print(
        f"Largest relative difference of a parameter's gradient: {results['gradient_difference']:.1e} "
        f"({results['gradient_parameter']}); allowed 1e-4"
    )


def print_trainer(found: dict[str, Any]) -> None:
    print(f"{found['precision']}, compile {found['compile']}, {found['batch_size']} clips a step, {DEVICE.type}")
    print(f"bare loop {found['bare_loop']:,.1f} clips/s, through the Trainer {found['trainer']:,.1f}")
    print(f"A step takes {found['overhead']:+.1%} through the Trainer (target: at most +3 %)")
    if "plain" in found:
        print(f"plain, float32, {found['plain_batch_size']} clips: {found['plain']:,.1f} clips/s; the Trainer", end=" ")
        print(f"is {found['ratio_to_plain']:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two turns: to see whether it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    parser.add_argument("--trainer", action="store_true", help="measure what the Trainer costs instead")
    parser.add_argument("--batch", type=int, default=BATCH_SIZE, help="clips a step, of --trainer")
    parser.add_argument("--precision", help="of --trainer; without it what performance = auto takes")
    parser.add_argument("--compile", help="of --trainer; without it what performance = auto takes")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn, of --trainer")
    parser.add_argument("--plain_batch", type=int, default=0, help="clips a step of the plain side of --trainer")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, of --trainer")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # float32 on both sides
    if arguments.memory_of:
        print_memory(arguments.memory_of)
        return
    turns = QUICK_TURNS if arguments.quick else TURNS
    if arguments.trainer:
        try:
            settings = trainer_settings(arguments)
        except UserError as error:
            parser.error(str(error))
        found = compare_trainer(settings, turns, arguments.steps, arguments.plain_batch)
        print_trainer(found)
        write(arguments.json, found)
        return
    memory = {name: memory_of(name) for name in SIDES}
    keep_freed_memory()  # on all sides, which share a process here
    results = {**compare(turns), "memory": memory}
    settings = resolve({"dataset_type": "audioset", "precision": "32", "compile": "off"})
    results["floor_seconds"] = BATCH_SIZE * count_flops(settings, training=True) / peak_flops(settings)
    print_results(results)
    write(arguments.json, results)


def write(path: Optional[Path], results: dict[str, Any]) -> None:
    if path is None:
        return
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor()
    machine = {"device": name, "cores": os.cpu_count(), "python": platform.python_version()}
    content = {"machine": {**machine, "torch": torch.__version__}, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
