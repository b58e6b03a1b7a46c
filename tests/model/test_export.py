"""Exports: the same numbers as the network's, what a file says about itself, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import soundfile
import torch

import main
from commands import export
from evaluation.postprocess import PostProcessing
from inference import Tagger
from inference.onnx_runtime import load_onnx
from model.checkpoint import read_checkpoint
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.export import quantize
from prepare.demo import LABELS
from runs.members import Member
from settings import UserError, resolve
from tests.helpers import LEAN, flags
from tests.networks import awake, htsat, noise, save_network

PROCESSING = PostProcessing(tuple(LABELS), tuple(0.2 + 0.05 * k for k in range(len(LABELS))), (3,)).as_dict()


SIZES = {**LEAN, "htsat_depth": "1,1", "htsat_num_head": "1,2"}


def tiny_network() -> HTSAT_Swin_Transformer:
    """A network whose every part changes its output, with the classes clearly apart."""
    network = awake(htsat(SIZES))
    network.get_parameter("tscam_conv.bias").data.copy_(torch.linspace(-1, 1, network.num_classes))
    return network


def save_tiny(path: Path, **changes: Any) -> Path:
    settings = resolve({**SIZES, "dataset_path": str(path.parent / "data"), **changes}).model_dump()
    return save_network(path, tiny_network(), settings=settings, labels=LABELS, postprocessing=PROCESSING)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, demo_workspace: Path) -> Path:
    """A folder with every format of a tiny network, checked on the demo's test clips."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint = save_tiny(folder / "tiny.ckpt")
    data = str(demo_workspace / "workspace/data/demo")
    assert main.main(["export", "--resume_checkpoint", str(checkpoint), "--dataset_path", data]) == 0
    return folder / "export"


@pytest.mark.slow
def test_every_format_is_kept_with_report_and_card(exported: Path) -> None:
    names = {"model.safetensors", "model.onnx", "model-mel.onnx", "model-int8.onnx", "export.json", "README.md"}
    assert {path.name for path in exported.iterdir()} == names
    report = json.loads((exported / "export.json").read_text())
    assert report["checkpoint"] == "tiny.ckpt"
    assert report["clips"] == "3 of the 3 test clips of demo"
    found = {entry["format"]: entry for entry in report["exports"]}
    assert found["safetensors"]["clip_difference"] == found["safetensors"]["frame_difference"] == 0
    for name in ("onnx", "onnx-mel"):
        assert 0 < found[name]["frame_difference"] < 1e-4
        assert found[name]["top1_agreement"] == 1
    assert 1e-4 < found["onnx-int8"]["frame_difference"] < 0.1  # coarser, and quantized at all
    assert all(entry["kept"] and entry["size"] == (exported / entry["file"]).stat().st_size for entry in found.values())
    card = (exported / "README.md").read_text()
    assert 'Tagger.from_checkpoint("model.safetensors")' in card
    for entry in found.values():
        assert f"| {entry['file']} |" in card


@pytest.mark.slow
def test_files_say_what_they_are(exported: Path) -> None:
    for name in ("model.onnx", "model-mel.onnx", "model-int8.onnx"):
        loaded = load_onnx(exported / name)
        assert loaded.labels == LABELS
        assert loaded.settings.htsat_dim == 16
        assert loaded.settings.clip_samples == 320000
        assert loaded.postprocessing == PROCESSING
    checkpoint = read_checkpoint(exported / "model.safetensors")
    assert checkpoint.labels == LABELS
    assert checkpoint.postprocessing == PROCESSING
    assert checkpoint.settings is not None
    assert checkpoint.settings["random_seed"] == 970131


@pytest.mark.slow
def test_no_path_of_this_machine_gets_out(exported: Path) -> None:
    secrets = [str(exported.parent), str(Path(export.__file__).parents[1])]
    for path in exported.iterdir():
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path.name


@pytest.mark.slow
def test_onnx_of_the_standard_alone_and_quantized_blocks(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [value.name for value in model.graph.output] == ["clipwise", "framewise", "embedding"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    quantized = [node.op_type for node in onnx.load(exported / "model-int8.onnx").graph.node]
    assert quantized.count("MatMulInteger") == 2 * 4 + 1  # qkv, proj, fc1, fc2 of two blocks; one merging


@pytest.mark.slow
def test_tagger_listens_with_an_exported_network(exported: Path) -> None:
    """A recording longer than a window, cut and joined the same way."""
    loaded = load_onnx(exported / "model.onnx")
    sound = noise(1, 13 * 32000)[0].numpy()
    found = Tagger(loaded.network, loaded.settings, loaded.labels, postprocessing=loaded.postprocessing).tag(sound)
    wanted = Tagger.from_checkpoint(exported.parent / "tiny.ckpt", device="cpu").tag(sound)
    np.testing.assert_allclose(found.clipwise, wanted.clipwise, atol=1e-5)
    np.testing.assert_allclose(found.framewise, wanted.framewise, atol=1e-5)
    np.testing.assert_allclose(found.embedding, wanted.embedding, atol=1e-4)


@pytest.mark.slow
def test_predict_finds_the_same_events_with_every_file(exported: Path, tmp_path: Path) -> None:
    """What was calibrated goes with the weights."""
    soundfile.write(tmp_path / "a.wav", noise(1, 13 * 32000)[0].numpy(), 32000)
    found = []
    for path in (exported.parent / "tiny.ckpt", exported / "model.safetensors", exported / "model.onnx"):
        table = tmp_path / f"{path.name}.tsv"
        words = ["predict", str(tmp_path / "a.wav"), "--resume_checkpoint", str(path), "--events", str(table)]
        assert main.main([*words, "--accelerator", "cpu", "--precision", "32"]) == 0
        found.append(pd.read_csv(table, sep="\t"))
    assert len(found[0]) > 1
    for other in found[1:]:
        pd.testing.assert_frame_equal(other, found[0], rtol=1e-5)
    assert main.main([*words, "--accelerator", "cpu", "--fl_threshold", "0.5", "--fl_median_filter", "1"]) == 0
    times = ["onset", "offset", "event_label"]
    assert not pd.read_csv(table, sep="\t")[times].equals(other[times]), "what was calibrated makes a difference here"


def test_a_foreign_file_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What config.py says of runs is not the file's: its export belongs to no run, and its protocol is not known."""
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_network().state_dict(), "foreign.pth")
    save_network(Path("published.ckpt"), tiny_network())
    expected: dict[str, dict[str, Any]] = {"foreign.pth": {}, "published.ckpt": {"protocol": "paper"}}
    for name, known in expected.items():
        words = ["export", "--resume_checkpoint", name, "--formats", "safetensors", "--clips", "1", "--output", "out"]
        assert main.main([*words, *flags(SIZES)]) == 0
        settings = read_checkpoint("out/model.safetensors").settings
        assert settings is not None
        assert {key: settings[key] for key in ("exp_name", "esc_fold", "protocol") if key in settings} == known
        assert settings["htsat_dim"] == 16
        member = Member.read("out/model.safetensors", {})
        assert member.protocol == known.get("protocol", "unknown") or name == "foreign.pth"
        assert member.settings.heatmap_dir == "workspace/runs/model/scores"


def test_lists_of_paths_stay_here(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "tiny.ckpt", esm_model_pathes=[str(tmp_path / "a.ckpt"), "b.ckpt"])
    about = export.describe(Member.read(str(checkpoint), {}))
    assert str(tmp_path) not in json.dumps(about)
    assert about["settings"]["lr_rate"] == resolve().lr_rate


@pytest.mark.parametrize(
    ("rate", "window", "hop", "samples"),
    [
        (32000, 1024, 320, 320000),
        (16000, 1024, 160, 16000),
        (44100, 1000, 441, 44100),  # blocks of one sample; no power of two
        (32000, 2048, 320, 100001),
        (16000, 509, 160, 16000),  # a prime number: one step
    ],
)
def test_frontend_in_two_steps_is_the_front_end(rate: int, window: int, hop: int, samples: int) -> None:
    network = HTSAT_Swin_Transformer(
        num_classes=2, sample_rate=rate, window_size=window, hop_size=hop, fmax=rate / 2,
        embed_dim=8, depths=(1,), num_heads=(1,),
    )  # fmt: skip
    network.spectrogram_extractor.stft.conv_real.weight[0, 0] *= torch.linspace(0.5, 1, window)  # a file's own window
    waveform = noise(2, samples)
    found = network.onnx_frontend(samples)(waveform)
    torch.testing.assert_close(found, network.log_mel(waveform), atol=1e-4, rtol=1e-5)


def test_what_differs_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # where no data set is prepared
    checkpoint = save_tiny(tmp_path / "tiny.ckpt")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_text("an earlier one")
    read = export.load_safetensors

    def other(path: Path) -> export.Probabilities:
        probabilities = read(path)

        def changed(waveform: torch.Tensor) -> export.Outputs:
            clip, frame, embedding = probabilities(waveform)
            return clip, frame + 2e-4, embedding

        return changed

    monkeypatch.setattr(export, "load_safetensors", other)
    words = ["export", "--resume_checkpoint", str(checkpoint), "--formats", "safetensors", "--clips", "2"]
    assert main.main(words) == 1
    assert "model.safetensors was not kept: it needs differences of at most 0.0001." in capsys.readouterr().out
    assert (tmp_path / "export" / "model.safetensors").read_text() == "an earlier one"
    report = json.loads((tmp_path / "export" / "export.json").read_text())
    assert not report["exports"][0]["kept"]
    assert report["clips"].startswith("2 made-up sounds")
    assert not list(tmp_path.glob("export/*.partial"))


def test_made_up_sounds_differ_and_stay_in_range() -> None:
    sounds = export.made_up_sounds(4, 32000, 16000)
    assert sounds.shape == (4, 32000)
    assert torch.isfinite(sounds).all()
    assert sounds.abs().max() < 1
    assert len({round(float(sound.std()), 4) for sound in sounds}) == 4


@pytest.mark.slow
def test_missing_packages_are_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        load_onnx(exported / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="onnxscript, which is not installed: pip install onnx onnxscript"):
        export.build_onnx(tiny_network(), 320000)


@pytest.mark.slow
def test_files_that_are_no_export(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        load_onnx(tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(UserError, match="cannot be read by onnxruntime"):
        load_onnx(tmp_path / "text.onnx")
    model = onnx.load(exported / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(UserError, match="no export of this project: its metadata has no settings, labels, frontend"):
        load_onnx(tmp_path / "bare.onnx")
    entries = {"labels": ["[" * 10**5, '["a"]'], "settings": ["3"]}
    for name, text in ((name, text) for name, texts in entries.items() for text in texts):
        model = onnx.load(exported / "model.onnx")
        onnx.helper.set_model_props(model, {**{p.key: p.value for p in model.metadata_props}, name: text})
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(UserError, match=rf"changed\.onnx.*{name}"):
            load_onnx(tmp_path / "changed.onnx")
    for number, name in enumerate(("clipwise", "framewise", "embedding")):
        model = onnx.load(exported / "model.onnx")
        del model.graph.output[number]
        onnx.save(model, tmp_path / "fewer.onnx")
        if name == "framewise":  # as of an encoder without a time axis
            assert load_onnx(tmp_path / "fewer.onnx").network.frames == 0
            continue
        with pytest.raises(UserError, match=rf"fewer\.onnx.*{name}"):
            load_onnx(tmp_path / "fewer.onnx")
    with pytest.raises(UserError, match="takes waveform of shape"):
        load_onnx(exported / "model.onnx").network.probabilities(noise(1, 16000))


def test_weights_of_8_bits_are_for_transformers() -> None:
    nothing = onnx.helper.make_model(onnx.helper.make_graph([], "convolutions alone", [], []))
    with pytest.raises(UserError, match="onnx-int8"):
        quantize(nothing)
