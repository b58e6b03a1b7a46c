"""Which runtime and precision `predict` takes by itself, and what it takes when it is told to."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import main
from inference import Tagger, loading
from inference.loading import load_tagger
from inference.onnx_runtime import OnnxNetwork
from model import Network
from model.network import ONEDNN_LIMIT
from settings import UserError
from tests.helpers import save_network
from tests.model.test_export import save_tiny
from tests.networks import noise

Edit = Callable[..., None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.ckpt and what `export` makes of it, checked on made-up sounds."""
    folder = tmp_path_factory.mktemp("loading")
    words = ["export", "--resume_checkpoint", str(save_tiny(folder / "tiny.ckpt")), "--clips", "2"]
    assert main.main([*words, "--formats", "onnx,onnx-int8"]) == 0
    return folder


@pytest.fixture
def edit(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """A copy as the current folder. The function edits export.json, at first its speeds: they depend on a clock."""
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def change(**entries: dict[str, Any]) -> None:
        path = Path("export/export.json")
        content = json.loads(path.read_text())
        for entry in content["exports"]:
            entry |= entries.get(entry["format"].replace("-", "_"), {})
        path.write_text(json.dumps(content))

    change(onnx={"speed": 2.0}, onnx_int8={"speed": 3.0, "clip_difference": 0.02})
    return change


def load(runtime: str = "auto", **given: Any) -> Tagger:
    return load_tagger({"resume_checkpoint": "tiny.ckpt", "accelerator": "cpu", **given}, "predict", runtime)


def nodes(tagger: Tagger) -> str:
    """The runtime by its kind: torch, onnx or int8."""
    if isinstance(tagger.network, Network):
        return "torch"
    assert isinstance(tagger.network, OnnxNetwork)
    return "int8" if "int8" in tagger.network.session._model_path else "onnx"


def test_freed_memory_is_kept_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny.ckpt")
    kept: list[str] = []
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: kept.append("kept"))
    load("torch", performance="manual")
    assert kept == []
    load("torch")
    assert kept == ["kept"]


@pytest.mark.slow
def test_auto_takes_the_fastest_export_that_agrees(edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    found, wanted = load(), load("torch")
    assert (nodes(found), nodes(wanted)) == ("onnx", "torch")
    assert "model.onnx" in capsys.readouterr().err
    sound = noise(10)
    np.testing.assert_allclose(found.tag(sound).framewise, wanted.tag(sound).framewise, atol=1e-4)
    assert found.calibrated == wanted.calibrated is not None
    edit(onnx_int8={"clip_difference": 4e-3, "frame_difference": 4e-3})
    assert nodes(load()) == "int8"
    assert nodes(load(precision="32")) == "onnx"  # 8 bits are not float32
    assert nodes(load(precision="bf16-mixed")) == nodes(load(performance="manual")) == "torch"
    edit(onnx_int8={"kept": False}, onnx={"speed": 0.9})
    assert nodes(load()) == "torch"


@pytest.mark.slow
def test_a_runtime_that_is_asked_for(edit: Edit) -> None:
    assert [nodes(load(runtime)) for runtime in ("torch", "onnx", "int8")] == ["torch", "onnx", "int8"]
    assert nodes(load("onnx", resume_checkpoint="export/model-int8.onnx")) == "int8"  # the file that is named
    for runtime, path in (("warp9", "tiny.ckpt"), ("torch", "export/model.onnx")):
        with pytest.raises(UserError, match="runtime"):
            load(runtime, resume_checkpoint=path)
    Path("export/model-int8.onnx").unlink()
    with pytest.raises(UserError, match="int8"):
        load("int8")


@pytest.mark.slow
@pytest.mark.usefixtures("edit")
def test_exports_of_other_weights_are_not_taken() -> None:
    report = Path("export/export.json")
    content = json.loads(report.read_text())
    report.write_text(json.dumps({**content, "weights": "0" * 64}))
    assert nodes(load()) == "torch"
    with pytest.raises(UserError, match="tiny"):
        load("onnx")
    report.write_text(json.dumps({**content, "exports": [{"format": "onnx", "kept": True}]}))
    with pytest.raises(UserError, match=r"export\.json"):
        load()


@pytest.mark.slow
@pytest.mark.usefixtures("edit")
def test_without_onnxruntime_auto_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert nodes(load()) == "torch"
    with pytest.raises(UserError, match="onnxruntime"):
        load("onnx")


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that says it has instructions for bfloat16; without them torch computes the same numbers, slowly."""
    monkeypatch.delenv(ONEDNN_LIMIT)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.usefixtures("bf16")
def test_bfloat16_where_its_error_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("tiny.ckpt"))
    tagger, exact = load(), load(precision="32")
    assert (tagger.precision, exact.precision) == ("bf16-mixed", "32")
    sound = noise(10)
    difference = np.abs(tagger.tag(sound).framewise - exact.tag(sound).framewise).max()
    assert 0 < difference <= loading.PROBABILITY_TOLERANCE
    save_network(Path("mn10.ckpt"), encoder="mn10")
    assert load(resume_checkpoint="mn10.ckpt").precision == "32"  # whose error is not measured
    monkeypatch.setattr(loading, "PROBABILITY_TOLERANCE", difference / 100)
    assert load().precision == "32"


@pytest.mark.usefixtures("bf16")
def test_a_cpu_without_bfloat16_computes_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("tiny.ckpt"))
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_vnni": True})
    assert load().precision == "32"
