"""Linear layers and convolutions by oneDNN on a CPU, in float32 and bfloat16.

torch gives linear layers in float32 to a BLAS library. In each call it brings the weight of a convolution into oneDNN's
order, and under autocast every weight into bfloat16.
The operators are those that torch.compile calls on a CPU; torch has no public name for them, so a build without them
keeps its layers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Optional, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Layer = TypeVar("Layer", bound="_Packing")
OPERATORS = (
    "_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_reorder_convolution_weight",
    "_is_mkldnn_bf16_supported",
)  # fmt: skip
ACTIVATIONS = {"none": "", "gelu": "none"}  # activation -> its algorithm: GELU without approximation
NARROWS = 4  # inputs to outputs of a layer whose weight's gradient is faster by oneDNN: the second one of an MLP


def _product(x: Tensor, weight: Tensor, bias: Optional[Tensor], activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], ACTIVATIONS[activation])


class _Linear(torch.autograd.Function):
    """F.linear and the gradient of its input by oneDNN.

    The gradient of the weight is faster by the BLAS library, except where outputs are few: oneDNN first copies the
    transposed gradient of the output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        kept = x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(*kept)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = _product(rows, weight.t(), None).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])
            narrows = len(x) > 0 and x.shape[1] >= NARROWS * rows.shape[1]
            of_weight = _product(rows.t(), x.t(), None) if narrows else rows.t() @ x
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0)
        return of_input, of_weight, of_bias


class _Packing(nn.Module):
    """A layer that in evaluation keeps its weight in oneDNN's packed layout; in bfloat16 under autocast.

    It is packed anew when the weight, the mode or the dtype changes, and dropped where gradients are enabled: an
    optimizer may change weights without a trace.
    """

    weight: Tensor
    bias: Any  # Tensor or None
    _kept: Optional[tuple[Any, Tensor, Optional[Tensor], Any]] = None

    def train(self: Layer, mode: bool = True) -> Layer:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}  # torch cannot copy it

    def _arithmetic(self, x: Tensor) -> Optional[torch.dtype]:
        """In which oneDNN computes. None: the layer itself does, as on a GPU, in float16, compiled or traced."""
        if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if torch.is_autocast_enabled("cpu"):
            half = torch.get_autocast_dtype("cpu") == torch.bfloat16 and _bf16_supported()
            known = x.dtype in (torch.float32, torch.bfloat16) and self.weight.dtype == torch.float32
            return torch.bfloat16 if half and known else None
        return torch.float32 if x.dtype == self.weight.dtype == torch.float32 else None

    def _keeps(self) -> bool:
        """Whether the weight may be kept now. If not, none is."""
        keeps = not (self.training or torch.is_grad_enabled())
        if not keeps:
            self._kept = None
        return keeps

    def _packed(
        self, dtype: torch.dtype, pack: Callable[[Tensor], Tensor], shape: Optional[torch.Size] = None
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The packed weight, and the bias; shape: of the input, where it matters."""
        weight, bias = self.weight, self.bias
        source = dtype, shape, _version(weight), None if bias is None else _version(bias)
        if self._kept is None or self._kept[0] != source:
            # Both are kept as well, so that their addresses are not given away.
            parts = weight.detach(), None if bias is None else bias.detach()
            self._kept = source, pack(parts[0].to(dtype)), None if parts[1] is None else parts[1].to(dtype), parts
        return self._kept[1], self._kept[2]


def _version(parameter: Tensor) -> tuple[int, int]:
    """Where it lies, and how often it has been changed."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


@cache
def _bf16_supported() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
        dtype = self._arithmetic(x) if x.shape[-1:] == (self.in_features,) else None
        if dtype is not None and self._keeps():
            if dtype == torch.float32 and not self.packs:
                return _product(x, self.weight, self.bias, self.activation)
            return _product(x.to(dtype), *self._packed(dtype, _pack_matrix), self.activation)
        y = _Linear.apply(x, self.weight, self.bias) if dtype == torch.float32 else super().forward(x)
        return F.gelu(y) if self.activation == "gelu" else y


def _pack_matrix(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


class OneDNNConv2d(_Packing, nn.Conv2d):
    """A convolution with its weight packed for evaluation; in training one product, where its patches do not overlap.

    (B, C, H, W) as there, but what comes may lie in memory with the channels last.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
            layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
        self.weight, self.bias, self.training = layer.weight, layer.bias, layer.training
        form = self.kernel_size, self.padding, self.dilation, self.groups
        self.patches = self.kernel_size != (1, 1) and form == (self.stride, (0, 0), (1, 1), 1)  # that do not overlap

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._arithmetic(x) if x.dim() == 4 and x.shape[1] == self.in_channels else None
        if dtype is None:
            return super().forward(x)
        if not self._keeps():
            large = x.shape[2] >= self.kernel_size[0] and x.shape[3] >= self.kernel_size[1]
            return self._product_of_patches(x) if self.patches and large else super().forward(x)
        sizes = self.padding, self.stride, self.dilation, self.groups
        weight, bias = self._packed(
            dtype, lambda weight: torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, x.shape), x.shape
        )
        return torch.ops.mkldnn._convolution_pointwise(x.to(dtype), weight, bias, *sizes, "none", [], "")

    def _product_of_patches(self, x: Tensor) -> Tensor:
        """As the layer; backwards the product is several times as fast as the convolution."""
        down, right = self.kernel_size
        height, width = x.shape[2] // down, x.shape[3] // right
        patches = x[:, :, : height * down, : width * right].unflatten(2, (height, down)).unflatten(4, (width, right))
        patches = rearrange(patches, "b c h i w j -> b (h w) (c i j)")
        return F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (height, width))


def use_onednn(network: nn.Module) -> None:
    """Put a OneDNNLinear in the place of each linear layer, a OneDNNConv2d in that of each convolution with zeros.

    A layer with hooks, or with a forward pass of its own (recomputed, with gradient_checkpointing), stays.
    """
    if not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__:
                continue
            if type(child) is nn.Linear:
                act = getattr(module, "act", None)
                fused = name == "fc1" and isinstance(act, nn.GELU) and act.approximate == "none"
                setattr(module, name, OneDNNLinear(child, "gelu" if fused else "none"))
                if fused:
                    module.act = nn.Identity()
            elif type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
                setattr(module, name, OneDNNConv2d(child))
