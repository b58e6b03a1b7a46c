"""Averages of networks: of their weights, afterwards and while training, and of their scores."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import main
from commands.weight_average import find_checkpoints
from sed_model import Ensemble_SEDWrapper
from tests.helpers import TINY_FLAGS

RUN = Path("workspace/runs/average")


@pytest.fixture(scope="module")
def trained(demo_workspace: Path) -> Path:
    """A run of three epochs, each of which left a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(demo_workspace)
        assert main.main(["train", *TINY_FLAGS, "--max_epoch", "3", "--exp_name", "average"]) == 0
    return demo_workspace


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def epochs(name: str) -> list[dict[str, torch.Tensor]]:
    return [weights(path) for path in sorted(Path("workspace/runs", name, "checkpoints").glob("epoch_*.ckpt"))]


def test_what_names_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    names = [f"epoch_00{k}-mAP_0.{metric}.ckpt" for k, metric in enumerate((4312, 5100, 4999))]
    for name in (*names, "best.ckpt", "last.ckpt"):
        (folder / name).touch()
    assert [path.name for path in find_checkpoints(str(tmp_path / "run"))] == names
    assert [path.name for path in find_checkpoints(str(folder))] == names
    assert [path.name for path in find_checkpoints(str(folder), 2)] == names[1:]
    assert [path.name for path in find_checkpoints(f"{tmp_path}/*/checkpoints/*t.ckpt")] == ["best.ckpt", "last.ckpt"]
    with pytest.raises(ValueError, match=r"has 3 checkpoints with a metric in their name, wa_top_k = 4"):
        find_checkpoints(str(folder), 4)
    with pytest.raises(ValueError, match="There are no"):
        find_checkpoints(f"{tmp_path}/*.ckpt")


def test_average_of_a_run_is_tested_at_once(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    words = ["--exp_name", "average", "--wa_top_k", "2", "--wa_test", "True", "--wa_reestimate_bn", "True"]
    assert main.main(["weight_average", *words, "--accelerator", "cpu"]) == 0
    assert "the mean of 2 checkpoints" in capsys.readouterr().out
    assert json.loads((RUN / "scores" / "test.json").read_text())["checkpoints"] == [str(RUN / "weight_average.ckpt")]
    content = torch.load(RUN / "weight_average.ckpt", weights_only=True)
    chosen = find_checkpoints(str(RUN), 2)
    assert content["sources"] == [path.name for path in chosen]
    key = "sed_model.tscam_conv.weight"
    mean = torch.stack([weights(path)[key] for path in chosen]).double().mean(dim=0).float()
    assert torch.equal(content["state_dict"][key], mean)
    assert str(RUN / "weight_average.ckpt") not in (RUN / "weight_average.md").read_text()  # paths from its own folder


def test_statistics_are_those_of_the_training_clips(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all clips in one batch, the mean of each mel band over clips and time."""
    from commands.weight_average import estimate_statistics
    from data_generator import SEDDataModule
    from model import build_model
    from settings import resolve
    from utils import int16_to_float32

    monkeypatch.chdir(trained)
    path = find_checkpoints(str(RUN))[0]
    found = estimate_statistics(path, {"batch_size": 14, "accelerator": "cpu"})
    settings = resolve({"batch_size": 14}, checkpoint=torch.load(path, weights_only=True)["settings"])
    (batch,) = SEDDataModule(settings, ("train",)).train_dataloader()
    network = build_model(settings)
    logmel = network.logmel_extractor(network.spectrogram_extractor(int16_to_float32(batch["waveform"])))
    torch.testing.assert_close(found["sed_model.bn0.running_mean"], logmel.mean(dim=(0, 1)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["sed_model.bn0.running_var"], logmel.var(dim=(0, 1)), rtol=1e-3, atol=1e-3)
    assert len(found) == 2


def test_members_one_after_another_give_the_same(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    members = ",".join(str(path) for path in find_checkpoints(str(RUN)))
    words = ["esm_test", "--esm_model_pathes", members, "--accelerator", "cpu", "--fl_local", "True"]
    for name, together in (("together", "True"), ("apart", "False")):
        assert main.main([*words, "--test_file", name, "--esm_together", together]) == 0
    with h5py.File(RUN / "scores/together.h5") as a, h5py.File(RUN / "scores/apart.h5") as b:
        for name in ("clipwise", "framewise"):
            np.testing.assert_array_equal(a[name][:], b[name][:])


def test_members_apart_are_not_brought_to_the_device_together() -> None:
    from model import build_model
    from settings import resolve

    settings = resolve({"htsat_dim": 16, "htsat_num_head": "1,2,4,8", "accelerator": "cpu"})
    networks = [build_model(settings) for _ in range(2)]
    assert not list(Ensemble_SEDWrapper(networks, settings, [], together=False).parameters())
    assert len(list(Ensemble_SEDWrapper(networks, settings, []).sed_models)) == 2


def train(name: str, *words: str, epochs: int = 3) -> dict[str, Any]:
    """Train; returns the last checkpoint."""
    flags = ["train", *TINY_FLAGS, "--max_epoch", str(epochs), "--exp_name", name, *words]
    assert main.main(flags) == 0
    return torch.load(Path("workspace/runs", name, "checkpoints/last.ckpt"), weights_only=True)


def test_last_epochs_are_averaged(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three: before them the checkpoints hold the plain weights, at the end the mean of the plain run's."""
    monkeypatch.chdir(trained)
    last = train("last_epochs", "--weight_averaging", "last_epochs", "--average_last_epochs", "2")
    plain, averaged = epochs("average"), epochs("last_epochs")
    assert torch.equal(averaged[2]["sed_model.bn0.running_mean"], plain[2]["sed_model.bn0.running_mean"])
    for key in ("sed_model.tscam_conv.weight", "sed_model.norm.bias"):
        assert torch.equal(averaged[0][key], plain[0][key])
        assert torch.equal(averaged[1][key], plain[1][key])
        torch.testing.assert_close(averaged[2][key], (plain[1][key] + plain[2][key]) / 2, rtol=1e-6, atol=1e-8)
        assert torch.equal(last["state_dict"][key], averaged[2][key])


def test_moving_average_of_the_weights(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decay of 0 is the plain run; another one lags behind."""
    monkeypatch.chdir(trained)
    follows = train("ema_0", "--weight_averaging", "ema", "--ema_decay", "0.0", epochs=1)
    lags = train("ema_9", "--weight_averaging", "ema", "--ema_decay", "0.9", epochs=1)
    key = "sed_model.tscam_conv.weight"
    torch.testing.assert_close(follows["state_dict"][key], epochs("average")[0][key], rtol=1e-6, atol=1e-8)
    assert torch.equal(lags["current_model_state"][key], epochs("average")[0][key])
    assert not torch.allclose(lags["state_dict"][key], epochs("average")[0][key], rtol=1e-4)
    for name, value in lags["state_dict"].items():  # indexes must not be averaged
        assert value.is_floating_point() or torch.equal(value, epochs("average")[0][name]), name
