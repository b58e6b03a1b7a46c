"""What performance = auto chooses for a device: precision, compilation, TF32, keeping freed memory."""

import ctypes
import platform
import warnings
from dataclasses import dataclass
from typing import Optional

import torch

from model import Network
from settings import Config
from training.devices import on_gpu

# Of glibc's mallopt: how many blocks may be mapped on their own, and how much free memory is given back.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Performance:
    """The choice of a run. compile_mode: of torch.compile, or None."""

    precision: str
    compile_mode: Optional[str]
    tf32: bool
    keep_memory: bool

    def __str__(self) -> str:
        said = [f"precision {self.precision}", f"compiled ({self.compile_mode})" if self.compile_mode else "eager"]
        said += ["TF32"] if self.tf32 else []
        said += ["freed memory kept"] if self.keep_memory else []
        return ", ".join(said)


def choose(settings: Config, *, training: bool) -> Performance:
    """The settings, with a choice for the device where they are auto.

    A test stays in float32 unless precision is set, so that its figures are exact. bfloat16 is slower than float32 on
    CPUs without instructions for it, and float16 may overflow, so auto takes bfloat16 on GPUs that have it.
    """
    gpu, auto = on_gpu(settings), settings.performance == "auto"
    precision = settings.precision
    if precision == "auto":
        precision = "bf16-mixed" if training and gpu and torch.cuda.is_bf16_supported() else "32"
    mode: Optional[str] = settings.compile
    if mode == "auto":
        mode = "default" if training and gpu else None  # on a CPU it takes minutes to compile, and gains nothing
    return Performance(
        precision=precision,
        compile_mode=None if mode == "off" else mode,
        tf32=gpu and precision != "32",
        keep_memory=auto and not gpu and platform.libc_ver()[0] == "glibc",
    )


def settle(settings: Config, *, training: bool) -> tuple[Config, Performance]:
    """The settings with the choice in place of auto, and the choice, which is applied to this process."""
    chosen = choose(settings, training=training)
    # float32 means float32: by default torch lets cuDNN's convolutions use TF32.
    torch.backends.cudnn.allow_tf32 = chosen.tf32
    torch.backends.cuda.matmul.allow_tf32 = chosen.tf32
    if chosen.keep_memory:
        keep_freed_memory()
    update = {"precision": chosen.precision, "compile": chosen.compile_mode or "off"}
    return settings.model_copy(update=update), chosen


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: each step asks for the same large blocks again, whose pages need not fault anew."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compile_network(network: Network, mode: Optional[str]) -> None:
    """Compile the blocks of a network, each by itself, for batches of fixed size; None: leave it eager.

    The front-end stays eager (torch.compile has no complex numbers), so does the head. Names in the state dict stay.
    """
    if mode is None:
        return
    # Blocks differ in size, and each is compiled for training and validation, for whole batches and the last one.
    torch._dynamo.config.recompile_limit = 64
    warnings.filterwarnings("ignore", message=r"TensorFloat32 tensor cores .* available but not enabled")
    for part in network.compiled_parts():
        part.compile(mode=mode, dynamic=False)
