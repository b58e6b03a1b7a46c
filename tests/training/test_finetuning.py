"""Fine-tuning: what learns, how fast, and what stays as it was; and the average over shifts in a test."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model import build_model
from sed_model import SEDWrapper
from settings import resolve
from tests.helpers import SMALL, SMALL_FLAGS, TINY, call, last_checkpoint, save_network
from training.schedule import parameter_groups
from utils import int16_to_float32


def test_layers_are_numbered_from_below() -> None:
    network = build_model(resolve({"htsat_dim": 16, "htsat_num_head": "1,2,4,8"}))
    numbers = {id(parameter): number for number, parameter in network.parameters_by_layer()}
    found = {name: numbers[id(parameter)] for name, parameter in network.named_parameters()}
    assert found["bn0.weight"] == found["patch_embed.proj.weight"] == 0
    assert found["layers.0.blocks.0.mlp.fc1.weight"] == 1
    assert found["layers.0.blocks.1.mlp.fc1.weight"] == found["layers.0.downsample.reduction.weight"] == 2
    assert found["layers.1.blocks.0.mlp.fc1.weight"] == 3
    assert found["layers.3.blocks.1.attn.qkv.weight"] == 12
    assert found["norm.weight"] == 12
    assert found["tscam_conv.weight"] == found["head.weight"] == 13


def test_layers_learn_slower_from_above() -> None:
    network = build_model(resolve(TINY))
    (group,) = parameter_groups(network, 1e-3, 1.0, 0.05)
    assert group["lr"] == 1e-3
    groups = parameter_groups(network, 1e-3, 0.5, 0.05)
    assert [g["lr"] for g in groups] == [1e-3 * 0.5**k for k in range(6)]
    assert any(p is network.get_parameter("tscam_conv.weight") for p in groups[0]["params"])
    assert any(p is network.get_parameter("bn0.weight") for p in groups[-1]["params"])
    groups = parameter_groups(network, 1e-3, 0.5, 0.05, matrices_only=True)
    assert [len(groups), {(p.ndim < 2, g["weight_decay"]) for g in groups for p in g["params"]}] == [
        12, {(True, 0.0), (False, 0.05)},
    ]  # fmt: skip
    together = [id(p) for g in groups for p in g["params"]]
    assert sorted(together) == sorted(id(p) for p in network.parameters() if p.requires_grad)


def test_only_the_classifier_learns(demo_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_workspace)
    start = save_network(tmp_path / "start.ckpt", seed=3, **SMALL)
    words = ("--max_epoch", "1", "--exp_name", "probe", "--linear_probe", "True", "--resume_checkpoint", start)
    call("train", *SMALL_FLAGS, *words)
    before, after = torch.load(start, weights_only=True)["state_dict"], last_checkpoint("probe")["state_dict"]
    changed = {k for k, v in after.items() if k not in before or not torch.equal(v, before[k])}
    assert changed == {"sed_model.head.weight", "sed_model.head.bias"}
    assert "sed_model.tscam_conv.weight" not in after


def test_a_training_begins_with_the_sizes_of_its_file(
    demo_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a reduced network, without a flag; and of a published file by its known name."""
    monkeypatch.chdir(demo_workspace)
    monkeypatch.setenv("HTSAT_CHECKPOINTS", str(tmp_path))
    sizes: dict[str, Any] = {**SMALL}
    start = save_network(tmp_path / "small.ckpt", **sizes)
    save_network(tmp_path / "HTSAT_AudioSet_Saved_1.ckpt", **sizes)
    words = ["train", "--accelerator", "cpu", "--max_epoch", "1", "--debug", "True", "--batch_size", "4"]
    for name, path in (("sizes", start), ("known", "htsat-audioset")):
        call(*words, "--exp_name", name, "--resume_checkpoint", path)
        found = last_checkpoint(name)["settings"]
        assert (found["htsat_depth"], found["htsat_spec_size"], found["clip_samples"]) == ([1, 1], 64, 8000)


@pytest.mark.parametrize("batch_size", [4, 32])
def test_shifts_as_one_batch(batch_size: int) -> None:
    """The paper's ten shifts: the mean of ten single passes, in one piece (32) and in several (4)."""
    settings = resolve({**TINY, "dataset_type": "audioset", "classes_num": 10, "batch_size": batch_size})
    torch.manual_seed(0)
    wrapper = SEDWrapper(build_model(settings), settings, []).eval()
    waveform = torch.randint(-20000, 20000, (3, 320000), dtype=torch.int16)
    with torch.no_grad():
        clipwise, framewise = wrapper.mean_over_shifts(waveform, 32000)
        singles = [
            wrapper.clip_and_frame_scores(int16_to_float32(waveform.roll(s, dims=1)), 32000)
            for s in settings.tta_shifts
        ]
    assert len(singles) == 10
    expected = torch.stack([clip for clip, _ in singles]).mean(dim=0)
    torch.testing.assert_close(clipwise, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(framewise, singles[0][1], rtol=0, atol=1e-5)


def test_a_waveform_travels_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step gets each waveform once, as int16; the ten copies are made from it where it lies."""
    settings = resolve({**TINY, "dataset_type": "audioset", "classes_num": 10, "batch_size": 32})
    wrapper = SEDWrapper(build_model(settings), settings, []).eval()
    seen: list[torch.Tensor] = []

    def scores(waveform: torch.Tensor, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(waveform)
        return waveform[:, :10], waveform[:, None, :10]

    monkeypatch.setattr(wrapper, "clip_and_frame_scores", scores)
    batch = {
        "waveform": torch.empty(2, 320000, dtype=torch.int16, device="meta"),
        "index": torch.arange(2),
        "target": torch.zeros(2, 10),
    }
    wrapper.test_step(batch, 0)
    (rows,) = seen
    assert rows.shape == (20, 320000)
    assert rows.device.type == "meta"  # nothing left the device, and nothing was brought there
