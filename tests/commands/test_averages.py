"""Averages of networks: of their weights, afterwards and while training, and of their scores."""

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import main
from commands import weight_average
from commands.weight_average import average_checkpoints, find_checkpoints
from evaluation.metrics import Metric
from model import build_model
from model.checkpoint import read_checkpoint
from runs.ledger import read_results
from runs.members import DEFAULT_TEST_FILE, Member
from sed_model import Ensemble_SEDWrapper
from settings import resolve, section
from tests.helpers import TINY, TINY_FLAGS

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
    assert [path.name for path in find_checkpoints(f"{tmp_path}/*/checkpoints/*.ckpt")] == names
    with pytest.raises(ValueError, match=r"has 3 checkpoints with a metric in their name, wa_top_k = 4"):
        find_checkpoints(str(folder), 4)
    with pytest.raises(ValueError, match="There are no"):
        find_checkpoints(f"{tmp_path}/*.ckpt")


def test_no_file_counts_twice_and_the_target_does_not_count(tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt", "average.ckpt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "same.ckpt").hardlink_to(tmp_path / "best.ckpt")
    found = find_checkpoints(str(tmp_path), target=tmp_path / ".." / tmp_path.name / "average.ckpt")
    assert [path.name for path in found] == ["best.ckpt", "last.ckpt"]
    with pytest.raises(ValueError, match="There are no"):
        find_checkpoints(f"{tmp_path}/av*.ckpt", target=tmp_path / "average.ckpt")


def test_average_of_a_run_is_tested_at_once(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    words = ["--exp_name", "average", "--wa_top_k", "2", "--wa_test", "True", "--wa_reestimate_bn", "True"]
    assert main.main(["weight_average", *words, "--accelerator", "cpu"]) == 0
    assert "the mean of 2 checkpoints" in capsys.readouterr().out
    summary = json.loads((RUN / "scores" / "weight_average.json").read_text())
    assert summary["checkpoints"] == [str(RUN / "weight_average.ckpt")]
    assert not (RUN / "scores" / "test.json").exists()  # which is for tests of the run's own checkpoints
    content = torch.load(RUN / "weight_average.ckpt", weights_only=True)
    chosen = find_checkpoints(str(RUN), 2)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in chosen]
    assert content["sources"] == [f"{path} sha256:{digest}" for path, digest in zip(chosen, hashes, strict=True)]
    key = "sed_model.tscam_conv.weight"
    mean = torch.stack([weights(path)[key] for path in chosen]).double().mean(dim=0).float()
    assert torch.equal(content["state_dict"][key], mean)
    card = (RUN / "weight_average.md").read_text()
    assert str(RUN / "weight_average.ckpt") not in card  # paths from its own folder
    recorded = json.loads((RUN / "provenance.json").read_text())[0]["data"]["train"]
    for said in (
        f"average/{chosen[0].name} ({hashes[0][:8]})",
        f"| mAP | {summary['metrics'][0]['value']:.4f} |",
        "Measured on the test clips of demo.",
        f"| train | {recorded['clips']} clips, fingerprint {recorded['fingerprint']} |",
        'license: "cc0-1.0"',
    ):
        assert said in card, said


def test_only_the_first_process_averages(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("LOCAL_RANK", "1")
    target = tmp_path / "mean.ckpt"
    words = ["weight_average", "--wa_folder", str(RUN), "--wa_model_path", str(target), "--accelerator", "cpu"]
    assert main.main(words) == 0
    assert list(tmp_path.iterdir()) == []
    content = torch.load(find_checkpoints(str(RUN))[0], weights_only=True)
    torch.save(content, target)
    before = target.read_bytes()
    tested: list[Path] = []

    def test_member(member: Member) -> list[Metric]:
        tested.append(member.checkpoint.path)
        return []

    monkeypatch.setattr(weight_average, "test_member", test_member)
    assert main.main([*words, "--wa_test", "True"]) == 0
    assert tested == [target]
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
    assert capsys.readouterr().out == ""


def changed(path: Path, name: str, **settings: Any) -> str:
    """A copy of a checkpoint with other settings, or with none at all."""
    content = torch.load(path, weights_only=True)
    content["settings"] = {**content["settings"], **settings} if settings else None
    content["frontend"] = None if not settings else {k: content["settings"][k] for k in section("front-end")}
    torch.save(content, name)
    return name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"esc_fold": 2}, "esc_fold 2 against 1"),
        ({"protocol": "paper"}, "protocol paper against held_out"),
        ({"task": "single_label"}, "task single_label against multilabel"),
        ({"short_clips": "repeat"}, "short_clips repeat against pad"),
        ({"clip_samples": 160000}, "clip_samples 160000 against 320000"),
        ({"dataset_type": "folder"}, "dataset_type folder against demo"),
        ({"fmax": 8000.0}, "fmax 8000.0 against 14000.0"),
        ({}, "does not say how it was trained"),
    ],
)
def test_what_may_not_be_averaged(
    settings: dict[str, Any], said: str, trained: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Over folds or protocols, the average would know clips that test it; over front-ends, it would hear neither."""
    monkeypatch.chdir(trained)
    first = find_checkpoints(str(RUN))[0]
    other = changed(first, "other.ckpt", **settings)
    with pytest.raises(ValueError, match="averaged") as error:
        average_checkpoints([first, Path(other)])
    assert said in str(error.value)
    if settings and "fmax" not in settings:
        words = ["esm_test", "--esm_model_pathes", f"{first},{other}", "--accelerator", "cpu"]
        assert main.main(words) == 2
        assert said in capsys.readouterr().err


def test_front_ends_without_settings_are_compared(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    first = find_checkpoints(str(RUN))[0]
    bare, other = changed(first, "bare.ckpt"), changed(first, "bare_other.ckpt")
    assert average_checkpoints([Path(bare), Path(other)])["settings"] is None
    content = torch.load(other, weights_only=True)
    content["state_dict"]["sed_model.logmel_extractor.melW"] *= 0.5
    torch.save(content, other)
    with pytest.raises(ValueError, match=r"different front-ends \(logmel_extractor.melW\)"):
        average_checkpoints([Path(bare), Path(other)])


def test_average_of_bare_weights_stays_bare(trained: Path, tmp_path: Path) -> None:
    """With the prefix of Lightning's keys it would pass for a published checkpoint, and for its protocol."""
    first = find_checkpoints(str(trained / RUN))[0]
    bare = {key.removeprefix("sed_model."): value for key, value in weights(first).items()}
    torch.save(bare, tmp_path / "a.ckpt")
    torch.save(average_checkpoints([tmp_path / "a.ckpt"]), tmp_path / "mean.ckpt")
    assert read_checkpoint(tmp_path / "mean.ckpt").kind == "state dict"


def test_an_average_is_no_safetensors_file(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    assert main.main(["weight_average", "--wa_folder", str(RUN), "--wa_model_path", "a.safetensors"]) == 2
    assert "wa_model_path = a.safetensors is not allowed" in capsys.readouterr().err
    assert not Path("a.safetensors").exists()


def test_statistics_are_those_of_the_training_clips(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all clips in one batch, the mean of each mel band over clips and time."""
    from commands.weight_average import estimate_statistics
    from data_generator import load_training_data
    from utils import int16_to_float32

    monkeypatch.chdir(trained)
    path = find_checkpoints(str(RUN))[0]
    found = estimate_statistics(path, {"batch_size": 14, "accelerator": "cpu"})
    settings = resolve({"batch_size": 14}, checkpoint=torch.load(path, weights_only=True)["settings"])
    (batch,) = load_training_data(settings, ("train",)).train_dataloader()
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


def test_ensembles_leave_other_scores_alone(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their files are named after the members, whose order does not matter."""
    monkeypatch.chdir(trained)
    members = [str(path) for path in find_checkpoints(str(RUN))[:2]]
    words = ["--accelerator", "cpu", "--heatmap_dir", "ensembles"]
    assert main.main(["test", "--resume_checkpoint", members[0], *words]) == 0
    assert main.main(["esm_test", "--esm_model_pathes", ",".join(members), *words]) == 0
    names = sorted(path.name for path in Path("ensembles").iterdir())
    digests = sorted(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in members)
    name = f"ensemble_{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:8]}"
    assert names == [f"{name}.h5", f"{name}.json", "test.h5", "test.json"]
    assert main.main(["esm_test", "--esm_model_pathes", ",".join(members[::-1]), *words]) == 0
    assert sorted(path.name for path in Path("ensembles").iterdir()) == names
    found, _ = read_results(Path("workspace/results.jsonl"))
    assert found[-1].tested() == found[-2].tested()
    assert resolve().test_file == DEFAULT_TEST_FILE
    capsys.readouterr()


def test_members_with_another_number_of_steps(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    first = find_checkpoints(str(RUN))[0]
    small = {**{k: v for k, v in TINY.items() if k != "batch_size"}, "htsat_depth": "1,1,1", "htsat_num_head": "1,2,4"}
    settings = resolve({**small, "classes_num": 10})
    network = {f"sed_model.{key}": value for key, value in build_model(settings).state_dict().items()}
    labels = torch.load(first, weights_only=True)["labels"]
    torch.save({"state_dict": network, "settings": settings.model_dump(), "labels": labels}, "three_stages.ckpt")
    words = ["--esm_model_pathes", f"{first},three_stages.ckpt", "--accelerator", "cpu"]
    assert main.main(["esm_test", *words]) == 2
    assert f"three_stages.ckpt gives 64 steps for a clip, {first} 32" in capsys.readouterr().err


def test_members_apart_are_not_brought_to_the_device_together() -> None:
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
