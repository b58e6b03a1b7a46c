"""The Triton kernels of window attention against attention written out.

On a CPU Triton's interpreter computes them, in a process of its own: TRITON_INTERPRET must be there before the import.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from model import build_model
from model.layers.swin import relative_position_index, shifted_window_mask
from settings import resolve
from tests.helpers import ROOT, SMALL

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_on_a_cpu_by_the_interpreter")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")]
DEVICES: list[tuple[str, Any]] = [("cpu", [interpreted]), ("cuda", gpu)]
on_each_device = pytest.mark.parametrize("device", [pytest.param(device, marks=marks) for device, marks in DEVICES])
# height and width of the map, side of a window, shift; heads and channels of a head
CASES = [
    *[pytest.param(device, (8, 16, 8, 4), 1, 24, marks=marks) for device, marks in DEVICES],
    *[pytest.param(device, (8, 8, 4, 2), 2, 32, marks=marks) for device, marks in DEVICES],
    *[pytest.param(device, (4, 8, 4, 0), 3, 16, marks=marks) for device, marks in DEVICES],
    *[pytest.param(device, (6, 6, 3, 1), 1, 12, marks=marks) for device, marks in DEVICES],
    pytest.param("cuda", (64, 64, 8, 4), 4, 24, marks=gpu),
    pytest.param("cuda", (16, 16, 8, 0), 16, 24, marks=gpu),
]


def written_out(qkv: Tensor, table: Tensor, heads: int, cut: tuple[int, int, int, int]) -> Tensor:
    """In float64."""
    height, width, side, shift = cut
    windows = height // side * (width // side)
    parts = rearrange(qkv.double(), "b (w n) (three h d) -> three b w h n d", w=windows, three=3, h=heads)
    query, key, value = parts.unbind(0)
    index = relative_position_index(side).to(table.device)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + table.double()[index].permute(2, 0, 1)
    if shift:
        mask = shifted_window_mask((height, width), side, shift).to(table.device)
        scores = scores.masked_fill(mask[:, None] < 0, float("-inf"))
    return rearrange(scores.softmax(dim=-1) @ value, "b w h n d -> b (w n) (h d)")


def example(device: str, dtype: torch.dtype, cut: tuple[int, int, int, int], heads: int, size: int) -> tuple[Any, ...]:
    """Projections and bias table, which need gradients, and the gradient of the result; three clips."""
    generator = torch.Generator().manual_seed(0)
    tokens, channels = cut[0] * cut[1], heads * size
    qkv = torch.randn(3, tokens, 3 * channels, generator=generator).to(device, dtype).requires_grad_()
    table = torch.randn((2 * cut[2] - 1) ** 2, heads, generator=generator).to(device).requires_grad_()
    return qkv, table, torch.randn(3, tokens, channels, generator=generator).to(device, dtype)


@pytest.mark.parametrize(("device", "cut", "heads", "size"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients(
    device: str, cut: tuple[int, int, int, int], heads: int, size: int, dtype: torch.dtype, tolerance: float
) -> None:
    from model.layers.window_attention import Windows, attend_windows

    if device == "cuda" and dtype == torch.float32 and cut[2] == 8:
        pytest.skip("they do not fit")
    qkv, table, gradient = example(device, dtype, cut, heads, size)
    found = attend_windows(qkv, table, heads, Windows(*cut))
    wanted = written_out(qkv, table, heads, cut)
    pairs = zip(
        (found, *torch.autograd.grad(found, (qkv, table), gradient)),
        (wanted, *torch.autograd.grad(wanted, (qkv, table), gradient.double())),
        strict=True,
    )
    for one, other in pairs:
        assert (one.double() - other).norm() < tolerance * other.norm()


@on_each_device
def test_many_windows_share_a_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 windows in groups of 4 and 8, of which the last is not full."""
    from model.layers import window_attention

    cut = (4, 4, 2, 1)
    qkv, table, gradient = example(device, torch.float32, cut, 1, 16)
    wanted = torch.autograd.grad(written_out(qkv, table, 1, cut), (qkv, table), gradient.double())
    for programs in (3, 2):
        monkeypatch.setattr(window_attention, "PROGRAMS", programs)
        out = window_attention.attend_windows(qkv, table, 1, window_attention.Windows(*cut))
        for one, other in zip(torch.autograd.grad(out, (qkv, table), gradient), wanted, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


@on_each_device
def test_the_operator_is_one_that_torch_can_compile(device: str) -> None:
    """Its shapes without data, and its gradient in a traced graph."""
    from model.layers import window_attention

    cut = window_attention.Windows(4, 4, 2, 1)
    qkv, table, _ = example(device, torch.float32, cut, 1, 16)
    torch.library.opcheck(torch.ops.htsat.window_attention.default, (qkv, table, 1, *cut))
    traced = torch.compile(window_attention.attend_windows, backend="aot_eager", fullgraph=True)
    out, same = (
        torch.autograd.grad(f(qkv, table, 1, cut).sum(), qkv)[0] for f in (window_attention.attend_windows, traced)
    )
    assert torch.equal(out, same)


@on_each_device
def test_the_network_is_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.layers import swin, window_attention

    for name in ("Windows", "attend_windows", "fits"):  # imported there where the switch is on
        monkeypatch.setattr(swin, name, getattr(window_attention, name), raising=False)
    settings = resolve(
        {**SMALL, "htsat_drop_path": 0.0, "htsat_window_size": 4, "htsat_depth": [2, 1], "classes_num": 3}
    )
    torch.manual_seed(0)
    network = build_model(settings).to(device).train()
    waveform = torch.randn(1, 8000, device=device)
    gradients = []
    for switch in (True, False):
        monkeypatch.setattr(swin, "TRITON_ATTENTION", switch)
        network.zero_grad()
        network(waveform).clip_logits.sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_what_does_not_fit_is_refused() -> None:
    from model.layers.window_attention import Windows, attend_windows, fits

    qkv, table, _ = example("cpu", torch.float32, (4, 4, 2, 0), 1, 16)
    assert fits(qkv, 1, Windows(4, 4, 2, 0)) == INTERPRETED
    assert not fits(qkv, 1, Windows(16, 16, 16, 0))
    with pytest.raises(ValueError, match="do not fit"):
        attend_windows(qkv, table, 1, Windows(8, 4, 2, 0))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it is what runs")
def test_on_a_cpu_by_the_interpreter() -> None:
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    switches = {"TRITON_INTERPRET": "1", "HTSAT_TRITON_ATTENTION": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **switches}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
