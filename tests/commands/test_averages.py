"""Averages of networks: of their weights, afterwards and while training, and of their scores."""

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from commands import weight_average
from commands.weight_average import average_checkpoints, average_path, estimate_statistics
from data_generator import load_training_data
from evaluation.metrics import Metric
from model import build_model
from model.checkpoint import read_checkpoint
from runs.ledger import read_results
from runs.members import Member, find_checkpoints, member_paths
from sed_model import Ensemble_SEDWrapper
from settings import UserError, resolve, section
from tests.helpers import LEAN_FLAGS, call, last_checkpoint, refused, save_network, tiny
from utils import int16_to_float32

RUN = Path("workspace/runs/htsat_demo")
KEY = "sed_model.tscam_conv.weight"

pytestmark = pytest.mark.usefixtures("trained")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def epochs(exp_name: str) -> list[dict[str, torch.Tensor]]:
    return [weights(path) for path in find_checkpoints(f"workspace/runs/{exp_name}")]


def first_epoch() -> Path:
    return find_checkpoints(str(RUN))[0]


def names(where: str | Path, top_k: int = 0, target: Path | None = None) -> list[str]:
    return [path.name for path in find_checkpoints(str(where), top_k, target=target)]


def test_what_names_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    made = [f"epoch_00{k}-mAP_0.{metric}.ckpt" for k, metric in enumerate((4312, 5100, 4999))]
    for name in (*made, "best.ckpt", "last.ckpt"):
        (folder / name).touch()
    assert names(tmp_path / "run") == names(folder) == names(f"{tmp_path}/run/checkpoints/*.ckpt") == made
    assert names(folder, 2) == made[1:]
    assert names(f"{tmp_path}/run/checkpoints/*t.ckpt") == ["best.ckpt", "last.ckpt"]
    assert [path.name for path in find_checkpoints(str(folder), epochs=[2, 3])] == made[1:]
    assert find_checkpoints(str(folder / made[0])) == [folder / made[0]]
    for wrong in ([3, 2], [2], [2, 4]):
        with pytest.raises(UserError, match="wa_epochs"):
            find_checkpoints(str(folder), epochs=wrong)
    with pytest.raises(UserError, match="wa_top_k = 4"):
        find_checkpoints(str(folder), 4)
    with pytest.raises(UserError, match="--wa_folder"):
        find_checkpoints(f"{tmp_path}/*.ckpt")


def test_no_file_counts_twice_and_the_target_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "loose"
    folder.mkdir()
    for name in ("best.ckpt", "last.ckpt", "average.ckpt"):
        (folder / name).write_text(name)
    (folder / "same.ckpt").hardlink_to(folder / "best.ckpt")
    assert names(folder, target=folder / ".." / "loose" / "average.ckpt") == ["best.ckpt", "last.ckpt"]
    with pytest.raises(UserError, match="--wa_folder"):
        find_checkpoints(f"{folder}/av*.ckpt", target=folder / "average.ckpt")


def test_brackets_in_the_name_of_a_folder(tmp_path: Path) -> None:
    """A folder that is there is no pattern; its average goes into it, unless wa_model_path is given."""
    run = tmp_path / "night[1]"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_000.ckpt").touch()
    assert names(run) == ["epoch_000.ckpt"]
    for folder in (run, run / "checkpoints"):
        assert average_path(resolve({"wa_folder": str(folder)})) == run / "weight_average.ckpt"
    assert average_path(resolve({"wa_folder": str(run), "wa_model_path": "a.ckpt"})) == Path("a.ckpt")
    assert average_path(resolve({"wa_folder": "a*.ckpt"})) == Path("workspace/runs/htsat_demo/weight_average.ckpt")


def test_average_of_a_run_is_tested_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--wa_top_k", "2", "--wa_test", "True", "--wa_reestimate_bn", "True", "--accelerator", "cpu")
    call("weight_average", *flags)
    summary = json.loads((RUN / "scores" / "weight_average.json").read_text())
    assert summary["checkpoints"] == [str(RUN / "weight_average.ckpt")]
    assert not (RUN / "scores" / "test.json").exists()  # which is for tests of the run's own checkpoints
    content = torch.load(RUN / "weight_average.ckpt", weights_only=True)
    chosen = find_checkpoints(str(RUN), 2)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in chosen]
    assert content["sources"] == [f"{path} sha256:{digest}" for path, digest in zip(chosen, hashes, strict=True)]
    for key, value in content["state_dict"].items():
        values = torch.stack([weights(path)[key] for path in chosen])
        mean = values.double().mean(dim=0).float() if value.is_floating_point() else values[0]
        assert torch.equal(value, mean) or ".bn0.running_" in key, key  # estimated on the training clips
    card = (RUN / "weight_average.md").read_text()
    assert str(RUN / "weight_average.ckpt") not in card  # paths from its own folder
    recorded = json.loads((RUN / "provenance.json").read_text())[0]["data"]["train"]
    for said in (
        f"htsat_demo/{chosen[0].name} ({hashes[0][:8]})",
        f"| mAP | {summary['metrics'][0]['value']:.4f} |",
        "test clips of demo",
        f"| train | {recorded['clips']} clips, fingerprint {recorded['fingerprint']} |",
        'license: "cc0-1.0"',
    ):
        assert said in card, said
    where = ("--wa_folder", RUN)
    assert "a.safetensors" in refused(capsys, "weight_average", *where, "--wa_model_path", "a.safetensors")
    assert not Path("a.safetensors").exists()


def test_only_the_first_process_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    target = tmp_path / "averages" / "mean.ckpt"
    target.parent.mkdir()
    words = ("weight_average", "--wa_model_path", target, "--accelerator", "cpu")
    call(*words)
    assert list(target.parent.iterdir()) == []
    torch.save(torch.load(first_epoch(), weights_only=True), target)
    before = target.read_bytes()
    tested: list[Path] = []

    def test_member(member: Member) -> list[Metric]:
        tested.append(member.checkpoint.path)
        return []

    monkeypatch.setattr(weight_average, "test_member", test_member)
    call(*words, "--wa_test", "True")
    assert tested == [target]
    assert target.read_bytes() == before
    assert list(target.parent.iterdir()) == [target]
    assert capsys.readouterr().out == ""


def changed(name: str, **settings: Any) -> Path:
    """A copy of the first epoch's checkpoint with other settings, or with none at all."""
    content = torch.load(first_epoch(), weights_only=True)
    content["settings"] = {**content["settings"], **settings} if settings else None
    content["frontend"] = {k: content["settings"][k] for k in section("front-end")} if settings else None
    torch.save(content, name)
    return Path(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("esc_fold", 2),
        ("protocol", "paper"),
        ("task", "single_label"),
        ("short_clips", "repeat"),
        ("clip_samples", 160000),
        ("dataset_type", "folder"),
        ("fmax", 8000.0),
    ],
)
def test_what_may_not_be_averaged(name: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Across folds or protocols, one member knows clips that test the other; across front-ends, no mean makes sense."""
    other = changed("other.ckpt", **{name: value})
    with pytest.raises(UserError, match=f"{name} {value} against"):
        average_checkpoints([first_epoch(), other])
    if name != "fmax":  # networks with other front-ends can be an ensemble
        members = f"{first_epoch()},{other}"
        said = refused(capsys, "esm_test", "--esm_model_pathes", members, "--accelerator", "cpu")
        assert name in said


def test_front_ends_without_settings_are_compared() -> None:
    bare, other = changed("bare.ckpt"), changed("bare_other.ckpt")
    with pytest.raises(UserError, match=r"bare\.ckpt"):
        average_checkpoints([first_epoch(), bare])
    assert average_checkpoints([bare, other])["settings"] is None
    content = torch.load(other, weights_only=True)
    content["state_dict"]["sed_model.logmel_extractor.melW"] *= 0.5
    torch.save(content, other)
    with pytest.raises(UserError, match=r"logmel_extractor\.melW"):
        average_checkpoints([bare, other])


def test_other_labels_are_no_average() -> None:
    content = torch.load(first_epoch(), weights_only=True)
    torch.save({**content, "labels": content["labels"][::-1]}, "other.ckpt")
    with pytest.raises(UserError, match="labels"):
        average_checkpoints([first_epoch(), Path("other.ckpt")])


def test_average_of_bare_weights_stays_bare() -> None:
    """With the prefix of Lightning's keys it would pass for a published checkpoint, and for its protocol."""
    torch.save({key.removeprefix("sed_model."): value for key, value in weights(first_epoch()).items()}, "a.ckpt")
    torch.save(average_checkpoints([Path("a.ckpt")]), "mean.ckpt")
    assert read_checkpoint("mean.ckpt").kind == "state dict"


def test_statistics_are_those_of_the_training_clips() -> None:
    """With all clips in one batch, the mean of each mel band over clips and time."""
    path = first_epoch()
    found = estimate_statistics(path, weights(path), {"batch_size": 14, "accelerator": "cpu"})
    settings = resolve({"batch_size": 14}, checkpoint=torch.load(first_epoch(), weights_only=True)["settings"])
    (batch,) = load_training_data(settings, ("train",)).train_dataloader()
    network = build_model(settings)
    logmel = network.log_mel(int16_to_float32(batch["waveform"]))
    torch.testing.assert_close(found["sed_model.bn0.running_mean"], logmel.mean(dim=(0, 1)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["sed_model.bn0.running_var"], logmel.var(dim=(0, 1)), rtol=1e-3, atol=1e-3)
    assert len(found) == 2


def test_ensembles(capsys: pytest.CaptureFixture[str]) -> None:
    """All members on the device or one after another: the same. Their files are named after them, in any order."""
    members = [str(path) for path in find_checkpoints(str(RUN))]
    words = ("--accelerator", "cpu", "--heatmap_dir", "ensembles", "--fl_local", "True")
    call("test", "--resume_checkpoint", members[0], *words)
    call("esm_test", "--esm_model_pathes", ",".join(members), *words)
    made = sorted(path.name for path in Path("ensembles").iterdir())
    digests = sorted(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in members)
    name = f"ensemble_{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:8]}"
    assert made == [f"{stem}{end}" for stem in (name, "test") for end in (".h5", ".json", "_classes.tsv")]
    with h5py.File(f"ensembles/{name}.h5") as file:
        together = {column: file[column][:] for column in ("clipwise", "framewise")}
    assert member_paths([str(RUN), members[0]]) == [*members, members[0]]  # a run's folder: its epochs
    call("esm_test", "--esm_model_pathes", ",".join(members[::-1]), *words, "--esm_together", "False")
    assert sorted(path.name for path in Path("ensembles").iterdir()) == made
    with h5py.File(f"ensembles/{name}.h5") as file:
        for column, values in together.items():
            np.testing.assert_allclose(file[column][:], values, rtol=1e-6)
    found, _ = read_results(Path("workspace/results.jsonl"))
    assert found[-1].tested() == found[-2].tested()
    assert resolve().test_file == resolve().test_split


def test_members_with_another_number_of_frames() -> None:
    """Their mean is on the finest time axis."""
    other = save_network(Path("three_stages.ckpt"), htsat_depth="1,1,1", htsat_num_head="1,2,4")
    words = ("--fl_local", "True", "--heatmap_dir", "ensembles", "--accelerator", "cpu", "--test_file", "mixed")
    call("esm_test", "--esm_model_pathes", f"{first_epoch()},{other}", *words)
    with h5py.File("ensembles/mixed.h5") as file:
        assert file["framewise"].shape[1] == 64


def test_members_apart_are_not_brought_to_the_device_together() -> None:
    networks = [build_model(tiny()) for _ in range(2)]
    assert not list(Ensemble_SEDWrapper(networks, tiny(), [], together=False).parameters())
    assert len(list(Ensemble_SEDWrapper(networks, tiny(), []).sed_models)) == 2


def train(exp_name: str, *words: str) -> dict[str, Any]:
    """Train; returns the last checkpoint."""
    call("train", *LEAN_FLAGS, "--exp_name", exp_name, *words)
    return last_checkpoint(exp_name)


def test_last_epochs_are_averaged() -> None:
    """Two of three: before them the checkpoints hold the plain weights, at the end the mean of the plain run's."""
    words = ("--max_epoch", "3", "--weight_averaging", "last_epochs", "--average_last_epochs", "2")
    last = train("last_epochs", *words)
    plain, averaged = [*epochs("htsat_demo"), last["current_model_state"]], epochs("last_epochs")
    assert torch.equal(averaged[2]["sed_model.bn0.running_mean"], plain[2]["sed_model.bn0.running_mean"])
    for key in (KEY, "sed_model.norm.bias"):
        assert torch.equal(averaged[0][key], plain[0][key])
        assert torch.equal(averaged[1][key], plain[1][key])
        torch.testing.assert_close(averaged[2][key], (plain[1][key] + plain[2][key]) / 2, rtol=1e-6, atol=1e-8)
        assert torch.equal(last["state_dict"][key], averaged[2][key])


def test_moving_average_of_the_weights() -> None:
    """A decay of 0 is the plain run; another one lags behind."""
    words = ("--max_epoch", "1", "--weight_averaging", "ema")
    follows, lags = train("ema_0", *words, "--ema_decay", "0.0"), train("ema_9", *words, "--ema_decay", "0.9")
    plain = epochs("htsat_demo")[0]
    torch.testing.assert_close(follows["state_dict"][KEY], plain[KEY], rtol=1e-6, atol=1e-8)
    assert torch.equal(lags["current_model_state"][KEY], plain[KEY])
    assert not torch.allclose(lags["state_dict"][KEY], plain[KEY], rtol=1e-4)
    for name, value in lags["state_dict"].items():  # indexes must not be averaged
        assert value.is_floating_point() or torch.equal(value, plain[name]), name
