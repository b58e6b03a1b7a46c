"""normalize: what it measures on the demo clips, and that train takes it for these clips alone."""

import json
from pathlib import Path

import pytest
import torch

from data.facts import NORMALIZATION
from data_generator import load_training_data
from model import build_model
from model.network import resample
from settings import resolve
from tests.helpers import call, flags, last_checkpoint, refused
from utils import int16_to_float32

AST = {
    "encoder": "ast", "encoder_options": "dim=128,depth=1,heads=2", "clip_samples": "16000", "batch_size": "4",
    "accelerator": "cpu", "max_epoch": "1",
}  # fmt: skip


def options(name: str) -> dict[str, str]:
    found: dict[str, str] = last_checkpoint(name)["settings"]["encoder_options"]
    return found


@pytest.mark.slow
def test_measured_and_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call("prepare", "--clips", "10")
    call("normalize", *flags(AST))
    (entry,) = json.loads(Path("workspace/data/demo", NORMALIZATION).read_text())

    settings = resolve({**AST, "sample_rate": "16000"})
    data, network = load_training_data(settings, ("train",)), build_model(settings)
    rate = data.tables["train"].waveform_rate
    sounds = [resample(int16_to_float32(batch["waveform"]), rate, 16000) for batch in data.train_dataloader()]
    cells = network.log_mel(torch.cat(sounds)).double()
    assert entry["mean"] == pytest.approx(float(cells.mean()), abs=1e-4)
    assert entry["deviation"] == pytest.approx(float(cells.std(correction=0)), abs=1e-4)

    call("train", *flags(AST), "--exp_name", "a")
    assert float(options("a")["mean"]) == pytest.approx(entry["mean"])
    call("train", "--resume", "auto", "--exp_name", "a", *flags({**AST, "max_epoch": 2}))
    assert float(options("a")["deviation"]) == pytest.approx(entry["deviation"])
    call("train", *flags({**AST, "encoder_options": AST["encoder_options"] + ",mean=-4"}), "--exp_name", "b")
    assert options("b")["mean"] == "-4"
    assert "deviation" not in options("b")
    call("train", *flags({**AST, "clip_samples": "8000"}), "--exp_name", "c")
    assert "mean" not in options("c")  # measured on longer clips

    call("normalize", *flags(AST), "--augmented", "--gain_range", "20")
    (louder,) = json.loads(Path("workspace/data/demo", NORMALIZATION).read_text())
    assert louder["augmented"]
    assert louder["mean"] != entry["mean"]
    assert "ast" in refused(capsys, "normalize", "--encoder", "htsat")
    Path("workspace/data/demo", NORMALIZATION).write_text(json.dumps([{**entry, "deviation": 0.0}]))
    assert NORMALIZATION in refused(capsys, "train", *flags(AST), "--exp_name", "d")
