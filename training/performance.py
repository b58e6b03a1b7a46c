"""What performance = auto chooses for a device and a run: precision, compilation, TF32, keeping freed memory."""

import platform
import warnings
from dataclasses import dataclass, field
from typing import Literal, Optional

import torch
from torch import nn

from model import Network
from model.layers.onednn import use_onednn
from model.network import PROBABILITY_TOLERANCE, has_bf16, keep_freed_memory
from model.registry import ENCODERS
from settings import Config
from training.devices import on_gpu, process_count

# Of the full HTS-AT on an H100, batches of 128 in bfloat16: what torch.compile costs at the start of a training, with
# its validation, and what it then saves, by 1,856 clips/s eager and 2,953 compiled.
COMPILE_SECONDS = 70.0
SAVED_PER_CLIP = 1 / 1856 - 1 / 2953


@dataclass(frozen=True)
class Performance:
    """The choice of a run. compile_mode: of torch.compile, or None. reasons: of what auto has chosen."""

    precision: str
    compile_mode: Optional[str]
    tf32: bool
    keep_memory: bool
    onednn: bool
    reasons: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        said = [f"precision {self.precision}", f"compiled ({self.compile_mode})" if self.compile_mode else "eager"]
        said += ["TF32"] if self.tf32 else []
        said += ["freed memory kept"] if self.keep_memory else []
        said += ["layers by oneDNN"] if self.onednn else []
        return ", ".join(said) + (f" (auto: {'; '.join(self.reasons)})" if self.reasons else "")


def choose(settings: Config, *, training: bool, steps: Optional[int] = None) -> Performance:
    """The settings, with a choice for the device where they are auto.

    A test stays eager and in float32 unless they are set, so that its figures are exact. steps: training steps left;
    None: unknown, assumed many.
    """
    gpu, auto, reasons = on_gpu(settings), settings.performance == "auto", []
    precision, mode = settings.precision, settings.compile
    if precision == "auto":
        precision, reason = choose_precision(settings, gpu=gpu) if training else ("32", "a test is exact in float32")
        reasons.append(reason)
    if mode == "auto" and training:
        compiled, reason = choose_compilation(settings, steps, gpu=gpu)
        mode = "default" if compiled else "off"
        reasons.append(reason)
    compile_mode = None if mode in ("off", "auto") else mode
    return Performance(
        precision=precision,
        compile_mode=compile_mode,
        tf32=gpu and precision != "32",
        keep_memory=auto and not gpu and platform.libc_ver()[0] == "glibc",
        onednn=auto and training and not gpu and compile_mode is None,
        reasons=tuple(reasons),
    )


def choose_precision(settings: Config, *, gpu: bool) -> tuple[Literal["bf16-mixed", "32"], str]:
    """The precision of a training, and why. float16 may overflow, and needs the loss scaled: auto never takes it.

    bfloat16 is slower than float32 without instructions for it. On CPUs it is taken for encoders of whose probabilities
    its error has been measured.
    """
    device, difference = "GPU" if gpu else "CPU", ENCODERS[settings.encoder].bf16_difference
    if not has_bf16("cuda" if gpu else "cpu"):
        return "32", f"this {device} has no instructions for bfloat16"
    if gpu:
        return "bf16-mixed", "this GPU computes in bfloat16"
    if difference is None or difference > PROBABILITY_TOLERANCE:
        return "32", f"bfloat16's error is not measured for {settings.encoder}"
    return "bf16-mixed", f"this CPU computes in bfloat16, which changed probabilities by up to {difference:g}"


def choose_compilation(settings: Config, steps: Optional[int], *, gpu: bool) -> tuple[bool, str]:
    """Whether a training is compiled, and why: where the steps that are to come save more time than it costs."""
    if not gpu:
        return False, "on a CPU compiling takes minutes and gains nothing"
    if steps is None:
        return True, "compiled for a long training"
    clips = 0 if settings.debug else steps * settings.batch_size // process_count(settings)
    saved = clips * SAVED_PER_CLIP
    costs = f"compiling takes about {COMPILE_SECONDS:.0f} s and saves about {saved:,.0f} s of {steps:,} steps"
    return saved > COMPILE_SECONDS, costs


def settle(settings: Config, *, training: bool, steps: Optional[int] = None) -> tuple[Config, Performance]:
    """The settings with the choice in place of auto, and the choice, which is applied to this process."""
    chosen = choose(settings, training=training, steps=steps)
    # float32 means float32: by default torch lets cuDNN's convolutions use TF32.
    torch.backends.cudnn.allow_tf32 = chosen.tf32
    torch.backends.cuda.matmul.allow_tf32 = chosen.tf32
    if chosen.keep_memory:
        keep_freed_memory()
    update = {"precision": chosen.precision, "compile": chosen.compile_mode or "off"}
    return settings.model_copy(update=update), chosen


def speed_up(module: nn.Module, chosen: Performance) -> None:
    """Let a network, or all in a wrapper, compute as `choose` has chosen: layers by oneDNN, compilation."""
    for network in list(module.modules()):
        if isinstance(network, Network):
            if chosen.onednn:
                use_onednn(network)
            compile_network(network, chosen.compile_mode)


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
