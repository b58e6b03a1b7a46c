"""Linear layers and convolutions by oneDNN on a CPU, in float32 and bfloat16.

torch gives linear layers in float32 to a BLAS library. In each call it brings the weight of a convolution into oneDNN's
order, and under autocast every weight into bfloat16.
The operators are those that torch.compile calls on a CPU; torch has no public name for them, so a build without them
keeps its layers.
"""

from collections.abc import Callable
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Layer = TypeVar("Layer", bound="_Packing")
ACTIVATIONS = {"none": "", "gelu": "none"}  # oneDNN's names, and what it approximates GELU by: nothing


def _product(x: Tensor, weight: Tensor, bias: Optional[Tensor], activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], ACTIVATIONS[activation])


class _Linear(torch.autograd.Function):
    """F.linear by oneDNN, and the gradient of its input; that of the weight is faster by the BLAS library."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = _product(rows, weight.t(), None).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0)
        return of_input, of_weight, of_bias


class _Packing(nn.Module):
    """A layer that keeps its weight as oneDNN multiplies it, without gradients alone; in bfloat16 under autocast.

    It is kept until the weight changes or moves, the layer changes its mode, or the arithmetic is another one.
    """

    weight: Tensor
    _kept: Optional[tuple[Any, Tensor, Optional[Tensor]]] = None

    def train(self: Layer, mode: bool = True) -> Layer:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}  # torch cannot copy it

    def _arithmetic(self, x: Tensor) -> Optional[torch.dtype]:
        """In which oneDNN computes. None: torch's layer does, on a GPU, in float16, where it is compiled or traced."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        wanted = {torch.float32: (torch.float32,), torch.bfloat16: (torch.float32, torch.bfloat16)}
        return dtype if x.dtype in wanted.get(dtype, ()) else None

    def _packed(
        self,
        dtype: torch.dtype,
        bias: Optional[Tensor],
        pack: Callable[[Tensor], Tensor],
        shape: Optional[torch.Size] = None,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The packed weight, and the layer's bias; shape: of the input, where it matters."""
        parts = [part for part in (self.weight, bias) if part is not None]
        source = dtype, shape, *((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts)
        if self._kept is None or self._kept[0] != source:
            packed = pack(self.weight.detach().to(dtype))
            self._kept = source, packed, None if bias is None else bias.detach().to(dtype)
        return self._kept[1:]


class OneDNNLinear(_Packing, nn.Linear):
    """A linear layer, and GELU where the one it stands for has it behind it: one pass over the output, not three.

    Parameters and their names are those of the layer. Where oneDNN cannot compute as that one does, the layer itself
    does. A float32 weight is packed on CPUs with AVX-512; with AVX2 that gains nothing (benchmarks/RESULTS.md).
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.training, self.activation = linear.weight, linear.bias, linear.training, activation
        self.packs = torch.backends.cpu.get_cpu_capability().startswith("AVX512")

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._arithmetic(x)
        if dtype is not None and not torch.is_grad_enabled():
            if dtype == torch.float32 and not self.packs:
                return _product(x, self.weight, self.bias, self.activation)
            return _product(x.to(dtype), *self._packed(dtype, self.bias, _pack_matrix), self.activation)
        y = _Linear.apply(x, self.weight, self.bias) if dtype == torch.float32 else super().forward(x)
        return F.gelu(y) if self.activation == "gelu" else y


def _pack_matrix(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


class OneDNNConv2d(_Packing, nn.Conv2d):
    """A convolution with its weight packed for inference; otherwise it computes as the layer it stands for."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
            layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
        self.weight, self.bias, self.training = layer.weight, layer.bias, layer.training

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._arithmetic(x)
        if dtype is None or torch.is_grad_enabled():
            return super().forward(x)
        sizes = self.padding, self.stride, self.dilation, self.groups
        weight, bias = self._packed(
            dtype,
            self.bias,
            lambda weight: torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, x.shape),
            x.shape,
        )
        return torch.ops.mkldnn._convolution_pointwise(x.to(dtype), weight, bias, *sizes, "none", [], "")


def use_onednn(network: nn.Module) -> None:
    """Put a OneDNNLinear in the place of each linear layer, a OneDNNConv2d in that of each convolution with zeros."""
    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                act = getattr(module, "act", None)
                fused = name == "fc1" and isinstance(act, nn.GELU) and act.approximate == "none"
                setattr(module, name, OneDNNLinear(child, "gelu" if fused else "none"))
                if fused:
                    module.act = nn.Identity()
            elif type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
                setattr(module, name, OneDNNConv2d(child))
