"""python main.py benchmark: what it reports, what it counts, and what it refuses."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from commands.benchmark import operations_of
from data_generator import load_training_data
from runs.measure import (
    WARM_UP,
    Laps,
    Repeated,
    WholeBatches,
    count_flops,
    one_device,
    peak_flops,
    peak_memory,
    release_and_reset_peak,
    synthetic_batch,
)
from sed_model import SEDWrapper
from settings import Config, resolve
from tests.helpers import SMALL, SMALL_FLAGS, call

CPU = torch.device("cpu")


@pytest.fixture
def settings(demo_workspace: Path) -> Config:
    return one_device(resolve({**SMALL, "workspace": str(demo_workspace / "workspace"), "precision": "32"}))


@pytest.mark.slow
def test_report_and_profile(
    demo_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_workspace)
    words = ["--steps", "2", "--precisions", "32,bf16-mixed", "--json", str(tmp_path / "b.json")]
    call("benchmark", *SMALL_FLAGS, *words, "--trace", tmp_path / "trace" / "steps.json")
    report = json.loads((tmp_path / "b.json").read_text())
    rows = report["rows"]
    kinds = [(row["precision"], row["work"], row["data"]) for row in rows]
    assert kinds == [
        (precision, work, data)
        for precision in ("32", "bf16-mixed")
        for work in ("training", "inference")
        for data in ("memory", "store")
    ]
    assert (report["batch_size"], report["steps"]) == (4, 2)
    for row in rows:
        assert row["clips_per_second"] == pytest.approx(4 / row["step_seconds"])
        assert 0 <= row["waiting"] < 1
        assert row["memory"] > 2**20
    flops = [row["flops_per_second"] / row["clips_per_second"] for row in rows]
    assert flops[0] == pytest.approx(flops[1])  # of one clip
    peaks = [row["flops_per_second"] / row["share_of_peak"] for row in rows]
    assert peaks[::2] == pytest.approx(peaks[1::2])  # one for the two sources of data
    assert 2 < flops[0] / flops[2] <= 3  # a training step: forwards, and twice as much backwards

    events = json.loads((tmp_path / "trace" / "steps.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step") for event in events) == 3
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["steps.json"]
    operations = report["operations"]
    assert not any(each["name"].startswith("Optimizer.step") for each in operations)  # a range, of what is counted
    assert sum(each["share"] for each in operations) == pytest.approx(1)
    assert {"aten::mm", "aten::_fused_adamw_"} <= {each["name"] for each in operations}
    shown = capsys.readouterr().out
    assert shown.count("aten::") >= 5
    assert not (demo_workspace / "workspace" / "runs" / "htsat_demo").exists()  # it leaves no run behind


def test_without_data_it_measures_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call("benchmark", *SMALL_FLAGS, "--steps", "1", "--json", "b.json")
    assert {row["data"] for row in json.loads(Path("b.json").read_text())["rows"]} == {"memory"}
    assert "Nothing is read from a store: There is no file" in capsys.readouterr().out


def test_batches_are_whole_and_as_many_as_asked(settings: Config) -> None:
    """14 clips make three whole batches of 4 an epoch; epochs differ."""
    loader = load_training_data(settings, ("train",)).train_dataloader()
    batches = list(WholeBatches(loader, 7 - WARM_UP))  # type: ignore[arg-type]
    assert [len(batch["waveform"]) for batch in batches] == [4] * 7
    epochs = [np.concatenate([batch["index"] for batch in batches[n : n + 3]]).tolist() for n in (0, 3)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_what_workers_prefetch_does_not_count(settings: Config) -> None:
    for workers, batches in ((0, 0), (2, 4)):
        data = load_training_data(settings.model_copy(update={"num_workers": workers}), ("train",))
        assert WholeBatches(data.train_dataloader(), 1).warm_up == WARM_UP + batches  # type: ignore[arg-type]


def test_the_clock_begins_after_the_warm_up(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 s, of 100 s before; 5 s have three of them."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    given = 0
    loader = load_training_data(settings, ("train",)).train_dataloader()
    for _ in WholeBatches(loader, 20, seconds=5.0):  # type: ignore[arg-type]
        now += 100.0 if given < WARM_UP else 2.0
        given += 1
    assert given == WARM_UP + 3


def test_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 s, pauses of 1 s before them; the warm-up takes 10 s a step and does not count."""
    laps, now = Laps(CPU), 0.0
    for step in range(WARM_UP + 4):
        now += 1.0
        laps.begins.append(now)
        now += 10.0 if step < WARM_UP else 2.0
        laps.ends.append(now)
        laps.clips.append(5)
    timing = laps.timing()
    assert (timing.steps, timing.clips, timing.seconds, timing.waiting, timing.first_step) == (4, 20, 12.0, 4.0, 10.0)
    assert timing.waiting_share == pytest.approx(1 / 3)
    assert timing.clips_per_second == pytest.approx(20 / 12)


def test_flops_of_a_network_that_can_be_counted_by_hand(settings: Config) -> None:
    """2 x multiply-adds of each product, with attention, mel bands and the stretch in time."""
    counted = count_flops(settings, training=False)
    patches = 16 * 16
    places = {0: patches, 1: patches // 4}  # tokens of each stage, of 16 and 32 channels
    layers = sum(2 * places[k] * 12 * (16 * 2**k) ** 2 for k in (0, 1))  # qkv 3, proj 1, MLP 8
    layers += 2 * places[1] * 64 * 32  # patch merging
    layers += 2 * patches * 16 * 16  # patch embedding
    attention = sum(2 * 2 * places[k] * 64 * 16 * 2**k for k in (0, 1))  # q k^T and its product with v
    frames = 8000 // 320 + 1
    mel = 2 * frames * 513 * 32
    head = 2 * 16 * 32 * 4 * 3 * 10  # 16 steps, 4 rows by 3 steps of 32 channels, 10 classes
    stretch = 2 * 32 * frames * 128  # in 32 bands, to 128 frames
    assert counted == layers + attention + mel + stretch + head
    assert count_flops(settings.model_copy(update={"gradient_checkpointing": True}), training=True) == count_flops(
        settings, training=True
    )


def test_peak_of_the_device_and_its_memory(settings: Config) -> None:
    assert peak_flops(settings) > 1e8
    release_and_reset_peak(CPU)
    before = peak_memory(CPU)
    block = torch.ones(2**24)  # 64 MiB
    assert peak_memory(CPU) - before >= 2**25
    del block


def test_synthetic_batches_are_a_loader_s(settings: Config) -> None:
    """The keys and types that training steps read, in a batch of the store's."""
    real = next(iter(load_training_data(settings, ("train",)).train_dataloader()))
    made = synthetic_batch(settings, 4)
    for name in ("waveform", "target", "index"):
        assert (made[name].shape, made[name].dtype) == (real[name].shape, real[name].dtype)
    assert len(list(Repeated(made, 3))) == len(Repeated(made, 3)) == WARM_UP + 3


def test_what_was_measured_stays_when_a_later_row_has_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two encoders, of which the second does not fit into memory in training."""
    monkeypatch.chdir(tmp_path)
    whole = SEDWrapper.training_loss

    def training_loss(self: SEDWrapper, batch: dict[str, Any]) -> torch.Tensor:
        if self.settings.encoder == "linear":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return whole(self, batch)

    monkeypatch.setattr(SEDWrapper, "training_loss", training_loss)
    words = ["--accelerator", "cpu", "--batch_size", "2", "--clip_samples", "16000", "--encoders", "fnet,linear"]
    call("benchmark", *words, "--steps", "1", "--json", "b.json")
    found = {(r["encoder"], r["work"]): r for r in json.loads(Path("b.json").read_text())["rows"]}
    assert set(found) == {(encoder, work) for encoder in ("fnet", "linear") for work in ("training", "inference")}
    assert [key for key, row in found.items() if row["clips_per_second"] is None] == [("linear", "training")]
    assert "out of memory" in capsys.readouterr().out


def test_a_gpu_s_profile_counts_its_kernels_alone() -> None:
    """Neither what the CPU does, nor ranges, which the profiler gives the GPU's time of what they cover."""

    def event(key: str, device: DeviceType, microseconds: float, *, marked: bool = False) -> SimpleNamespace:
        times = {"self_device_time_total": microseconds, "self_cpu_time_total": microseconds}
        return SimpleNamespace(key=key, device_type=device, count=3, is_user_annotation=marked, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 500.0),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 4000.0, marked=True),
        event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA, 1000.0),
        event("ampere_gemm", DeviceType.CUDA, 3000.0),
    ]
    found = operations_of(events, gpu=True)
    assert [(each.name, each.milliseconds, each.share) for each in found] == [
        ("ampere_gemm", 3.0, 0.75),
        ("Memcpy HtoD (Pinned -> Device)", 1.0, 0.25),
    ]
