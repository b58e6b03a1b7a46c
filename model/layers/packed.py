"""Linear layers whose weights lie as oneDNN multiplies them, for inference in float32 on a CPU."""

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"none": "", "gelu": "none"}  # oneDNN's names, and what it approximates GELU by: nothing


class PackedLinear(nn.Linear):
    """A linear layer, and GELU where the one it stands for has it behind it: one pass over the output, not three.

    Parameters and their names are those of the layer. With gradients, in other arithmetic than float32 or on another
    device it computes as that one does. The packed weight is kept until the weight changes or moves.
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.training, self.activation = linear.weight, linear.bias, linear.training, activation
        self._kept: Optional[tuple[Any, Tensor]] = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu" or self._other_arithmetic():
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if self.activation == "gelu" else y
        return torch.ops.mkldnn._linear_pointwise(
            x, self._packed(), self.bias, self.activation, [], ACTIVATIONS[self.activation]
        )

    def _other_arithmetic(self) -> bool:
        return torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing()

    def _packed(self) -> Tensor:
        weight = self.weight
        source = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._kept is None or self._kept[0] != source:
            self._kept = source, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return self._kept[1]


def pack_linear_layers(network: nn.Module) -> None:
    """Put a PackedLinear in the place of each linear layer, where that gains: on CPUs with AVX-512.

    With AVX2 it gains nothing (benchmarks/RESULTS.md). The operators are those that torch.compile calls on a CPU; torch
    has no public name for them, so a build without them keeps its layers.
    """
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not (capable and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear:
                continue
            act = getattr(module, "act", None)
            fused = name == "fc1" and isinstance(act, nn.GELU) and act.approximate == "none"
            setattr(module, name, PackedLinear(child, "gelu" if fused else "none"))
            if fused:
                module.act = nn.Identity()
