"""Time, memory and FLOP of training steps and inference on one device, for benchmark and plan."""

import ctypes
import gc
import itertools
import math
import platform
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.clip_store import STRONG
from data.frame_targets import Events
from data_generator import Batch, TrainLoader
from model import build_model
from model.layers.onednn import use_onednn
from sed_model import SEDWrapper, build_wrapper
from settings import FRAME_LOSSES, Config, UserError
from training.devices import device_count, on_gpu
from training.performance import choose, speed_up
from training.trainer import build_trainer
from utils import int16_to_float32

WARM_UP = 3  # steps before the first that counts: they compile, choose algorithms and fill the memory that is kept
COUNTED_CLIPS = 2  # clips whose arithmetic is counted: it grows in proportion with the batch
DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SMALLEST_PRODUCT, LARGEST_PRODUCT = 256, 8192  # sides of the matrices of which peak_flops times products
PRODUCTS, PRODUCT_SECONDS = 5, 0.02  # how many are timed, and how long one takes that is large enough


@dataclass(frozen=True)
class Timing:
    """Steps of training or inference.

    seconds: of all; waiting: of these, those between steps; first_step: seconds, with compilation; memory: peak bytes.
    """

    steps: int
    clips: int
    seconds: float
    waiting: float
    first_step: float
    memory: int

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps

    @property
    def waiting_share(self) -> float:
        return self.waiting / self.seconds


def one_device(settings: Config) -> Config:
    """Settings of one micro-batch on one device: batch_size over devices and accumulate_batches."""
    part = settings.batch_size // device_count(settings) // settings.accumulate_batches
    return settings.model_copy(update={"devices": 1, "accumulate_batches": 1, "batch_size": part, "max_epoch": 1})


def device_of(settings: Config) -> torch.device:
    return torch.device("cuda" if on_gpu(settings) else "cpu")


def synthetic_batch(settings: Config, clips: int) -> Batch:
    """Noise with one class a clip, as a loader hands it over: in pinned memory where there is a GPU."""
    generator = torch.Generator().manual_seed(settings.random_seed)
    waveform = torch.randint(-3000, 3000, (clips, settings.clip_samples), dtype=torch.int16, generator=generator)
    target = torch.zeros(clips, settings.classes_num)
    target[torch.arange(clips), torch.arange(clips) % settings.classes_num] = 1
    if on_gpu(settings):
        waveform, target = waveform.pin_memory(), target.pin_memory()
    batch: Batch = {
        "audio_name": [f"synthetic {number}" for number in range(clips)],
        "waveform": waveform,
        "sample_rate": settings.sample_rate,
        "target": target,
        "index": torch.arange(clips),
        "unreadable": 0,
    }
    if settings.loss_type in FRAME_LOSSES:  # each class sounds for a second
        label, onset = torch.arange(clips) % settings.classes_num, torch.ones(clips)
        batch["events"] = Events(torch.arange(clips), label, onset, onset + 1)
        batch["labelling"] = torch.full((clips,), STRONG, dtype=torch.int8)
    return batch


class Repeated:
    """One batch in memory: warm_up times, which do not count, then `count` times."""

    warm_up = WARM_UP

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.warm_up + self.count

    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(self.batch, len(self))


class WholeBatches:
    """Whole batches of a loader, epoch after epoch: warm_up, which do not count, then `count`.

    What the workers prefetch while the first step compiles does not count: no later step finds as many. The
    smaller batch at the end of an epoch is left out: compiled for its own size, it would be timed as compilation.
    """

    def __init__(self, loader: TrainLoader, count: int, *, seconds: float = math.inf) -> None:
        """seconds: after the warm-up, when to stop; one batch counts at least."""
        self.loader, self.count, self.seconds = loader, count, seconds
        self.warm_up = WARM_UP + loader.num_workers * (loader.prefetch_factor or 0)

    def __len__(self) -> int:
        return self.warm_up + self.count

    def __iter__(self) -> Iterator[Batch]:
        assert len(self.loader.sampler) >= (self.loader.batch_size or 1), "no epoch would have a whole batch"
        given, epoch, started = 0, 0, 0.0
        while True:
            self.loader.sampler.set_epoch(epoch)
            for batch in self.loader:
                if len(batch["waveform"]) == self.loader.batch_size:
                    if given == self.warm_up:
                        started = time.monotonic()
                    yield batch
                    given += 1
                late = given > self.warm_up and time.monotonic() - started > self.seconds
                if given == len(self) or late:
                    return
            epoch += 1


Batches = Repeated | WholeBatches


class Laps:
    """When each step began and ended, on the device's own clock.

    On a GPU the marks are events among its work, so that neither the CPU waits for them nor what it does meanwhile
    counts: between two steps lies only the time in which the GPU had no step to compute.
    """

    def __init__(self, device: torch.device, warm_up: int = WARM_UP) -> None:
        """warm_up: steps that do not count."""
        self.device, self.warm_up = device, warm_up
        self.begins: list[Any] = []
        self.ends: list[Any] = []
        self.clips: list[int] = []
        release_and_reset_peak(device)

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin)

    def begin(self) -> None:
        self.begins.append(self.mark())

    def end(self, clips: int) -> None:
        self.ends.append(self.mark())
        self.clips.append(clips)

    def timing(self) -> Timing:
        """Of the steps after the first warm_up, each with the pause before it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        pauses = [self.seconds(end, begin) for end, begin in zip(self.ends, self.begins[1:], strict=False)]
        return Timing(
            steps=len(self.ends) - self.warm_up,
            clips=sum(self.clips[self.warm_up :]),
            seconds=self.seconds(self.ends[self.warm_up - 1], self.ends[-1]),
            waiting=sum(pauses[self.warm_up - 1 :]),
            first_step=self.seconds(self.begins[0], self.ends[0]),
            memory=peak_memory(self.device),
        )


class LapCallback(pl.Callback):
    """Laps of the Trainer's training steps."""

    def __init__(self, laps: Laps) -> None:
        self.laps = laps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.laps.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.laps.end(len(batch["waveform"]))


def measured_module(settings: Config) -> SEDWrapper:
    """A new network in its training wrapper, as fast as the settings say; what was compiled before is forgotten."""
    torch._dynamo.reset()
    module = build_wrapper(build_model(settings), settings, [f"class {k}" for k in range(settings.classes_num)])
    speed_up(module, choose(settings, training=True))
    return module


def fit(settings: Config, batches: Batches, callback: pl.Callback, module: Optional[SEDWrapper] = None) -> None:
    """Train a network, a new one unless it is given, by the Trainer of a run, without its logs and checkpoints.

    Raises OutOfMemoryError where a GPU has not enough.
    """
    trainer = build_trainer(settings, steps_per_epoch=None)
    trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # Nothing is validated, and how many processes read is what is being measured.
        warnings.filterwarnings("ignore", message=r".*but have no `val_dataloader`.*")
        warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
        with memory_checked(settings):
            trainer.fit(module or measured_module(settings), batches)


class OutOfMemoryError(UserError):
    """A GPU has not enough memory for a batch."""


@contextmanager
def memory_checked(settings: Config) -> Iterator[None]:
    """Raise OutOfMemoryError, with what can be done about it, where a GPU has not enough for the work inside."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        first = str(error).partition(". ")[0]
        raise OutOfMemoryError(
            f"The GPU has not enough memory for {settings.batch_size} clips at once ({first}): lower batch_size, raise "
            f"accumulate_batches, or set gradient_checkpointing."
        ) from None


def time_training(settings: Config, batches: Batches, module: Optional[SEDWrapper] = None) -> Timing:
    """Training steps on the batches, of which the first warm_up do not count. settings: see one_device.

    module: in place of a new network. Raises OutOfMemoryError.
    """
    laps = Laps(device_of(settings), batches.warm_up)
    fit(settings, batches, LapCallback(laps), module)
    return laps.timing()


def time_bare_loop(settings: Config, batches: Batches, module: SEDWrapper) -> Timing:
    """The steps of time_training without a Trainer: loss, backward pass, clipping and AdamW, and no hooks or logs."""
    device = device_of(settings)
    laps = Laps(device, batches.warm_up)
    module = module.to(device).train()
    optimizer = module.configure_optimizers()["optimizer"]
    with memory_checked(settings):
        for batch in batches:
            moved = module.transfer_batch_to_device(batch, device, 0)
            laps.begin()
            optimizer.zero_grad()
            with autocast(settings):
                loss = module.training_loss(moved)
            loss.backward()
            module.configure_gradient_clipping(optimizer, settings.gradient_clip)
            optimizer.step()
            laps.end(len(batch["waveform"]))
    return laps.timing()


def time_inference(settings: Config, batches: Batches) -> Timing:
    """Clip and frame scores of the batches, once each, without tta_shifts; otherwise as time_training."""
    device = device_of(settings)
    laps = Laps(device, batches.warm_up)
    module = measured_module(settings).to(device).eval()
    with memory_checked(settings), torch.inference_mode(), autocast(settings):
        for batch in batches:
            waveform = module.transfer_batch_to_device(batch, device, 0)["waveform"]
            laps.begin()
            module.clip_and_frame_scores(int16_to_float32(waveform), settings.sample_rate)
            laps.end(len(waveform))
    return laps.timing()


def autocast(settings: Config) -> AbstractContextManager[None]:
    """The network's arithmetic as `precision` asks for it, for what runs without a Trainer."""
    mixed = settings.precision != "32"
    dtype = DTYPES[settings.precision] if mixed else None
    # Without a cache, as the Trainer: what torch.compile has made for one of them serves the other.
    return torch.autocast(device_of(settings).type, dtype, enabled=mixed, cache_enabled=False)


def count_flops(settings: Config, *, training: bool) -> float:
    """FLOP of one clip: matrix products, convolutions and attention, forwards and in training backwards as well.

    Counted while two clips are computed. What gradient_checkpointing computes again does not count: it is no progress.
    """
    device = device_of(settings)
    # Without what the counter does not know: compiled blocks, oneDNN's linear layers.
    update = {"compile": "off", "performance": "manual", "gradient_checkpointing": False}
    plain = settings.model_copy(update=update)
    module = measured_module(plain).to(device).train(training)
    waveform = int16_to_float32(synthetic_batch(settings, COUNTED_CLIPS)["waveform"].to(device))
    written_out = sdpa_kernel(SDPBackend.MATH)  # as two products: the counter does not know a CPU's attention kernel
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training), autocast(settings), written_out:
        logits = module(waveform).clip_logits
        if training:
            logits.sum().backward()
    return counter.get_total_flops() / COUNTED_CLIPS


def saved_for_backward(settings: Config, module: SEDWrapper) -> float:
    """Bytes of activations that a clip's backward pass needs, counted while two clips go forwards on the CPU.

    Tensors that share memory count once, weights and what is made of them alone not at all. module: uncompiled.
    """
    kept: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in [*module.parameters(), *module.buffers()]}
    storages = []  # held, so that no address is given twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages.append(storage)
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    waveform = int16_to_float32(synthetic_batch(settings, COUNTED_CLIPS)["waveform"])
    mixed = settings.precision != "32"
    module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16 if mixed else None, enabled=mixed):
            module(waveform)
    return sum(kept.values()) / COUNTED_CLIPS


def peak_flops(settings: Config, *, onednn: bool = True) -> float:
    """FLOP/s of the device: the fastest of some large matrix products in the precision of the settings and in float32.

    A CPU without instructions for bfloat16 multiplies it slower than float32, in which a part of the network stays.
    onednn: whether a CPU multiplies by oneDNN too, or by the BLAS library alone.
    """
    device, dtypes = device_of(settings), {DTYPES[settings.precision], torch.float32}
    return max(_product_flops(device, dtype, onednn) for dtype in dtypes)


def _product_flops(device: torch.device, dtype: torch.dtype, onednn: bool) -> float:
    size, seconds = SMALLEST_PRODUCT, _product_seconds(SMALLEST_PRODUCT, device, dtype, onednn)
    while seconds < PRODUCT_SECONDS and size < LARGEST_PRODUCT:  # slow arithmetic has its peak with small matrices
        size *= 2
        seconds = _product_seconds(size, device, dtype, onednn)
    return 2 * size**3 / seconds


@torch.inference_mode()
def _product_seconds(size: int, device: torch.device, dtype: torch.dtype, onednn: bool) -> float:
    """Seconds of the fastest of some products of (size, size) matrices."""
    rows = torch.randn(size, size, device=device).to(dtype)
    product = nn.Sequential(nn.Linear(size, size, bias=False, device=device, dtype=dtype))
    seconds = _least_seconds(product, rows)
    if onednn and device.type == "cpu":
        use_onednn(product)
        seconds = min(seconds, _least_seconds(product, rows))
    return seconds


def _least_seconds(product: nn.Module, rows: torch.Tensor) -> float:
    laps = Laps(rows.device)
    for _ in range(1 + PRODUCTS):
        laps.begin()
        product(rows)
        laps.end(0)
    if rows.device.type == "cuda":
        torch.cuda.synchronize()
    return min(laps.seconds(begin, end) for begin, end in zip(laps.begins[1:], laps.ends[1:], strict=True))


def release_and_reset_peak(device: torch.device) -> None:
    """Give back memory that is free but kept, and begin to measure the peak anew."""
    gc.collect()  # the Trainer and the network of the steps before refer to one another
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak resident set size


def resident_memory() -> int:
    """Bytes that the process has resident now; on systems other than Linux the most so far."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors took, on a CPU the most that the whole process had resident.

    Since release_and_reset_peak; on systems other than Linux since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
