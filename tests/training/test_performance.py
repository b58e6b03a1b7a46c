"""What performance = auto takes, and that neither compiling nor cutting a batch into parts changes what is learned."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model import build_model
from model.network import ONEDNN_LIMIT
from settings import UserError, resolve
from tests.helpers import SMALL, SMALL_FLAGS, TINY, call, last_checkpoint
from training.devices import device_count
from training.performance import Performance, choose, compile_network, settle


def test_a_cpu_without_bfloat16_stays_in_float32() -> None:
    chosen = choose(resolve({"accelerator": "cpu"}), training=True)
    assert (chosen.precision, chosen.compile_mode, chosen.tf32) == ("32", None, False)
    assert choose(resolve({"accelerator": "cpu", "performance": "manual"}), training=True) == Performance(
        "32", None, False, False, False
    )
    given = {"accelerator": "cpu", "precision": "bf16-mixed", "compile": "default"}
    assert str(choose(resolve(given), training=True)).startswith("precision bf16-mixed, compiled (default)")


def test_a_cpu_with_bfloat16_trains_measured_encoders_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ONEDNN_LIMIT, "ALL")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    settings = resolve({"accelerator": "cpu"})
    assert choose(settings, training=True).precision == "bf16-mixed"
    assert choose(settings, training=False).precision == "32"
    assert choose(resolve({"accelerator": "cpu", "precision": "32"}), training=True).precision == "32"
    assert choose(resolve({"accelerator": "cpu", "encoder": "cnn14"}), training=True).precision == "32"
    monkeypatch.setenv(ONEDNN_LIMIT, "AVX512_CORE_VNNI")
    assert choose(settings, training=True).precision == "32"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU with bfloat16, as torch would show it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_bfloat16_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(resolve(), training=True) == Performance("bf16-mixed", "default", True, False, False)
    assert choose(resolve(), training=False) == Performance("32", None, False, False, False)
    assert choose(resolve({"precision": "32"}), training=True).tf32 is False
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose(resolve(), training=True).precision == "32"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("given", "steps", "mode"),
    [
        ({"batch_size": 128}, 60, None),
        ({"batch_size": 128}, 100 * 15_000, "default"),  # AudioSet
        ({"batch_size": 32}, 100 * 50, None),  # ESC-50
        ({"batch_size": 128}, 3_000, "default"),
        ({"batch_size": 32}, 3_000, None),
        ({"batch_size": 128, "debug": True}, 100 * 15_000, None),
        ({"batch_size": 128, "compile": "default"}, 60, "default"),
        ({"batch_size": 128, "compile": "off"}, 100 * 15_000, None),
    ],
)
def test_compiled_where_the_steps_pay_for_it(given: dict[str, Any], steps: int, mode: str | None) -> None:
    chosen = choose(resolve(given), training=True, steps=steps)
    assert chosen.compile_mode == mode
    assert any("compiling" in reason for reason in chosen.reasons) == ("compile" not in given)
    assert all(reason in str(chosen) for reason in chosen.reasons)


def test_a_run_records_what_was_taken() -> None:
    settings, _ = settle(resolve({"accelerator": "cpu", "performance": "manual"}), training=True)
    assert (settings.precision, settings.compile) == ("32", "off")


def test_parts_must_divide_the_batch() -> None:
    with pytest.raises(UserError, match="accumulate_batches = 3"):
        device_count(resolve({**TINY, "accumulate_batches": 3}))
    with pytest.raises(UserError, match="devices = 4"):
        device_count(resolve({**TINY, "accumulate_batches": 2, "devices": 4}))


@pytest.mark.slow
def test_compiled_stages_are_the_same_network() -> None:
    """Names of the weights, outputs and gradients; with a backend that traces as inductor's does, and compiles not."""
    settings = resolve({**SMALL, "htsat_drop_path": 0.0, "spec_augment": False})
    torch.manual_seed(0)
    eager, compiled = build_model(settings).train(), build_model(settings).train()
    compiled.load_state_dict(eager.state_dict())
    for part in compiled.compiled_parts():
        part.compile(backend="aot_eager", dynamic=False)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    waveform = torch.randn(2, 8000)
    for network in (eager, compiled):
        network(waveform).clip_logits.square().sum().backward()
    for (name, one), two in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(compiled.eval()(waveform), eager.eval()(waveform), rtol=1e-5, atol=1e-6)


def test_compile_network_leaves_an_eager_one_alone() -> None:
    network = build_model(resolve(TINY))
    compile_network(network, None)
    assert all(stage._compiled_call_impl is None for stage in network.compiled_parts())
    compile_network(network, "default")
    assert all(stage._compiled_call_impl is not None for stage in network.compiled_parts())


def test_a_batch_in_parts_is_the_batch(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 clips, in one step: the same step, but for bn0, which sees half as many clips at a time."""
    monkeypatch.chdir(demo_workspace)
    words = ["train", *SMALL_FLAGS, "--max_epoch", "1", "--spec_augment", "False", "--htsat_drop_path", "0"]
    words += ["--batch_size", "14", "--weight_averaging", "last_epochs", "--average_last_epochs", "1"]
    call(*words, "--exp_name", "whole")
    call(*words, "--exp_name", "parts", "--accumulate_batches", "2")
    whole, parts = last_checkpoint("whole"), last_checkpoint("parts")
    assert whole["global_step"] == parts["global_step"] == 1
    settings = resolve(SMALL)
    torch.manual_seed(settings.random_seed)
    start = build_model(settings).get_parameter("tscam_conv.weight")
    steps = [(last["state_dict"]["sed_model.tscam_conv.weight"] - start).flatten() for last in (whole, parts)]
    assert steps[0].abs().max() > 1e-4
    # The first step of AdamW is the sign of the gradient, which small differences turn where it is nearly 0.
    assert torch.cosine_similarity(steps[0], steps[1], dim=0) > 0.8
