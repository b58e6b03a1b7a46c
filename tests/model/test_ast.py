"""AST: its golden numbers and front-ends; files of its authors, of transformers and of ImageNet's DeiT."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchaudio
from torch import Tensor
from torchaudio.compliance import kaldi

import main
from inference import Tagger
from model import build_model
from model.checkpoint import decided_settings, load_network, read_checkpoint
from model.clip_network import Spectrum
from model.encoders.ast import AST, ESC50, patch_grid, published_layout, rename, resize_positions, source_grid
from model.frontend import KaldiFbank, SlaneyDecibels
from model.opening import open_network
from settings import UserError, resolve
from tests.helpers import SIZES, assert_log_mel_close
from tests.model.test_golden import FOLDER, golden
from tests.networks import noise, save_network

TINY = {**SIZES["ast"], "clip_samples": 160000}  # 12 x 101 patches


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw = load_file(FOLDER / "draw_clip.py")
SHAPES: dict[str, list[int]] = json.loads((FOLDER / "state_dict_shapes_ast.json").read_text())


def waveforms(case: str) -> Tensor:
    return torch.from_numpy(golden.draw_waveforms(2, 10, 16000, draw.CASES[case][1]))


def tiny(**changes: Any) -> AST:
    torch.manual_seed(0)
    network = build_model(resolve({**TINY, **changes})).eval()
    assert isinstance(network, AST)
    return network


# --- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "grid", "parameters"), [("ast_a", (12, 101), 86_594_063), ("ast_b", (7, 49), 85_926_671)]
)
def test_a_published_file_gives_the_golden_numbers(
    case: str, grid: tuple[int, int], parameters: int, tmp_path: Path
) -> None:
    shapes = {**SHAPES, "v.pos_embed": [1, 2 + grid[0] * grid[1], 768]}
    drawn = {key: torch.from_numpy(value) for key, value in draw.draw_parameters(shapes).items()}
    torch.save({f"module.{key}": value for key, value in drawn.items()}, tmp_path / "ast.pth")
    del drawn
    tagger = Tagger.from_checkpoint(tmp_path / "ast.pth", device="cpu")
    network, expected = tagger.encoder(), np.load(FOLDER / f"clip_{case}.npz")
    assert isinstance(network, AST)
    assert (network.grid, network.num_classes, network.clip_samples) == (grid, 527, 160000)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert tagger.labels[0] == "Speech"
    assert tagger.report is not None
    assert (tagger.report.kind, tagger.report.share, tagger.report.unexpected) == ("AST", 1, [])

    logits = network(waveforms(case)).clip_logits
    np.testing.assert_allclose(logits.detach().numpy(), expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.sigmoid().detach().numpy(), expected["clipwise"], rtol=0, atol=2e-5)
    targets = torch.from_numpy(golden.draw_targets(2, 527, draw.CASES[case][1] + 1))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert loss.item() == pytest.approx(float(expected["bce_loss"]), abs=1e-5)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in network.named_parameters() if p.grad is not None}
    keys = expected["grad_norm_keys"].tolist()
    assert sorted(norms) == sorted(keys)
    deviation = np.abs(np.array([norms[key] for key in keys]) / expected["grad_norms"] - 1)
    assert deviation.max() < 0.01, keys[deviation.argmax()]
    assert np.median(deviation) < 0.001


def test_front_ends_give_the_golden_numbers() -> None:
    expected, sound = np.load(FOLDER / "clip_frontends.npz"), waveforms("frontends")
    found = {"a": Spectrum("fbank128", 160000)(sound), "b": Spectrum("logmel64", 160000)(sound)}
    assert (found["a"].shape, found["b"].shape) == ((2, 1024, 128), (2, 400, 64))
    np.testing.assert_allclose(found["a"][:, ::16], expected["a_every_16th"], rtol=0, atol=2e-3)
    assert_log_mel_close(found["b"][:, ::8], expected["b_every_8th"], axis=2, decibel=1)
    for letter, log_mel in found.items():
        np.testing.assert_allclose(log_mel.mean(dim=(1, 2)), expected[f"{letter}_mean"], rtol=1e-5)
        np.testing.assert_allclose(log_mel.std(dim=(1, 2)), expected[f"{letter}_std"], rtol=1e-4)
    short = Spectrum("fbank128", 80000)(sound[:1, :80000])
    np.testing.assert_allclose(short[0, ::16], expected["a_5s_512_every_16th"], rtol=0, atol=2e-3)


def test_positions_and_patches_of_images_are_the_golden_ones() -> None:
    expected = np.load(FOLDER / "clip_positions.npz")
    tables = {key: torch.from_numpy(value) for key, value in draw.draw_parameters(draw.POSITION_TABLES).items()}
    for name in expected.files:
        source, _, grid = name.rpartition("_to_")
        if not source:
            continue
        wanted = tuple(map(int, grid.split("x")))
        table, old = ("deit.pos_embed", (24, 24)) if source == "image" else ("ast.pos_embed", (12, 101))
        found = resize_positions(tables[table], old, wanted)[..., ::384]  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-6, err_msg=name)
    deit = {key.removeprefix("deit."): value for key, value in tables.items() if key.startswith("deit.")}
    weights = rename({**deit, "dist_token": torch.zeros(1, 1, 768)}).state_dict
    kernel = weights["v.patch_embed.proj.weight"][::96]
    np.testing.assert_allclose(kernel, expected["patch_weight_every_96th"], rtol=0, atol=1e-6)


# --- front-ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [400, 16000, 30001])
def test_fbank_is_kaldis(samples: int) -> None:
    sound = noise(2, samples)
    wanted = [
        kaldi.fbank(
            one[None], htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning",
            num_mel_bins=128, dither=0.0, frame_shift=10,
        )
        for one in sound
    ]  # fmt: skip
    torch.testing.assert_close(KaldiFbank(128)(sound), torch.stack(wanted), atol=1e-3, rtol=0)


def test_decibels_are_torchaudios() -> None:
    sound = noise(2, 30001)
    power = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=4096, win_length=1024, hop_length=400, center=True, pad_mode="constant", power=2, norm="slaney",
        mel_scale="slaney", n_mels=64,
    )(sound)  # fmt: skip
    wanted = 20 * torch.log10(power.clamp(min=1e-10)).transpose(1, 2)
    torch.testing.assert_close(SlaneyDecibels(64, 16000)(sound), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("samples", [16000, 30001])
@pytest.mark.parametrize("frontend", [KaldiFbank(128), SlaneyDecibels(64, 16000)], ids=["fbank128", "logmel64"])
def test_traced_front_ends_are_the_front_ends(frontend: KaldiFbank | SlaneyDecibels, samples: int) -> None:
    sound = noise(2, samples)
    torch.testing.assert_close(frontend.traced(samples)(sound), frontend(sound), atol=2e-3, rtol=0)


@pytest.mark.parametrize("frontend", ["fbank128", "logmel64"])
def test_a_short_clip_is_filled_up_with_zeros_and_has_no_mean(frontend: str) -> None:
    spectrum, sound = Spectrum(frontend, 32000), noise(1, 16000)
    found = spectrum(sound + 0.3)
    torch.testing.assert_close(found, spectrum(sound - sound.mean()), atol=2e-3, rtol=0)
    frames = spectrum.analysis(sound).shape[1]
    assert found[:, :frames].all()
    assert not found[:, frames:].any()
    assert found.shape[1] == spectrum.frames == {"fbank128": 256, "logmel64": 80}[frontend]


def test_waveforms_of_wrong_lengths_are_refused() -> None:
    network = tiny()
    with pytest.raises(UserError, match="160001 samples"):
        network(torch.zeros(1, 160001))
    with pytest.raises(UserError, match="399 samples"):
        network(torch.zeros(1, 399))


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        ({}, (12, 101)),
        ({"clip_samples": 80000}, (12, 50)),
        ({"clip_samples": 16000}, (12, 12)),
        ({"encoder_options": "dim=64,depth=1,heads=1,frequency_stride=16,time_stride=16"}, (8, 64)),
        ({"encoder_options": "dim=64,depth=1,heads=1,frontend=logmel64,frequency_stride=8,time_stride=8"}, (7, 49)),
        ({"encoder_options": "dim=64,depth=1,heads=1,frontend=logmel64,frequency_stride=4,time_stride=4"}, (13, 97)),
    ],
)
def test_grids_of_patches(changes: dict[str, Any], grid: tuple[int, int]) -> None:
    network = tiny(**changes)
    assert network.grid == grid
    with torch.inference_mode():
        outputs = network(noise(1, network.clip_samples // 2))
    assert outputs.clip_logits.shape == (1, 10)
    assert network.v.pos_embed.shape[1] == 2 + grid[0] * grid[1]


def test_the_number_of_patches_tells_a_published_layout() -> None:
    for frontend, strides in (("fbank128", (10, 12, 14, 16)), ("logmel64", (4, 8))):
        for samples in (160000, 80000, 16000) if frontend == "fbank128" else (160000,):
            for stride in strides:
                rows, columns = patch_grid(frontend, samples, stride, stride)
                assert published_layout(rows * columns) == (frontend, stride, samples)
    assert published_layout(7) is None
    with pytest.raises(UserError, match="7 positions"):
        source_grid(7, None)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"encoder_options": "dim=100,heads=3"}, "dim = 100 .* heads = 3"),
        ({"encoder_options": "heads=0"}, "heads"),
        ({"encoder_options": "depth=0"}, "depth"),
        ({"encoder_options": "dim=64,heads=1,time_stride=0"}, "strides"),
        ({"encoder_options": "dim=64,heads=1,frontend=logmel64", "clip_samples": 4000}, "clip_samples = 4000"),
        ({"sample_rate": 32000}, "sample_rate"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        tiny(**changes)


# --- files of others --------------------------------------------------------------------------------------------------


def test_statistics_of_a_published_file_of_esc50(tmp_path: Path) -> None:
    source = tiny(clip_samples=80000, classes_num=50)
    found = open_network(save_network(tmp_path / "esc50.pth", source, "module."), {"dataset_type": "esc-50"})
    assert isinstance(found.network, AST)
    assert (found.network.mean, found.network.deviation, found.network.clip_samples) == (*ESC50, 80000)
    assert (found.network.num_classes, found.settings.sample_rate) == (50, 16000)


OLD_NAMES = (  # of transformers up to its version 4
    (r"\.layers\.", ".encoder.layer."), (r"attention\.q_proj", "attention.attention.query"),
    (r"attention\.k_proj", "attention.attention.key"), (r"attention\.v_proj", "attention.attention.value"),
    (r"attention\.o_proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)  # fmt: skip


def old_name(key: str) -> str:
    for new, old in OLD_NAMES:
        key = re.sub(new, old, key)
    return key


@pytest.mark.parametrize("name", [str, old_name], ids=["version 5", "version 4"])
def test_a_file_of_transformers_gives_its_logits(name: Callable[[str], str], tmp_path: Path) -> None:
    from transformers import ASTConfig, ASTForAudioClassification  # here: it takes seconds

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    }
    sizes |= {"num_labels": 5, "layer_norm_eps": 1e-6}
    theirs = ASTForAudioClassification(ASTConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases, norms and tables, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {name(key): value for key, value in theirs.state_dict().items()}
    assert any(("layers.0" if name is str else "encoder.layer.0.attention.attention.query") in key for key in weights)
    torch.save(weights, tmp_path / "transformers.bin")
    tagger = Tagger.from_checkpoint(tmp_path / "transformers.bin", device="cpu")
    network = tagger.encoder()
    assert tagger.report is not None
    assert (tagger.report.kind, tagger.report.share) == ("AST of transformers", 1)
    with torch.inference_mode():
        features = network.features(waveforms("frontends"))
        wanted = theirs(features.transpose(1, 2)).logits
        found = network.forward_head(network.forward_features(features)).clip_logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)  # its LayerNorms have one eps, of body and head

    torch.save(
        {**weights, "audio_spectrogram_transformer.layers.0.adapter.weight": torch.zeros(1)}, tmp_path / "new.bin"
    )
    with pytest.raises(UserError, match="adapter"):
        read_checkpoint(tmp_path / "new.bin")


@pytest.fixture
def deit(tmp_path: Path) -> Path:
    """A file as ImageNet's DeiT of 224 x 224 is, of tiny sizes."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": 224}
    network: Any = timm.create_model("deit_base_distilled_patch16_384", **sizes)
    torch.save({"model": network.state_dict()}, tmp_path / "deit.pth")
    return tmp_path / "deit.pth"


def test_a_training_starts_from_imagenets_deit(deit: Path) -> None:
    checkpoint = read_checkpoint(deit)
    assert (checkpoint.kind, checkpoint.images, checkpoint.encoder) == ("ImageNet DeiT", True, "ast")
    settings = resolve({"clip_samples": 80000}, checkpoint=decided_settings(checkpoint, "auto", fine_tuning=True))
    network = build_model(settings)
    assert isinstance(network, AST)
    classifier = network.state_dict()["mlp_head.1.weight"].clone()
    report = load_network(network, checkpoint, new_classifier=True)
    assert (report.share, report.reshaped, report.unexpected) == (1, [], [])
    assert torch.equal(network.state_dict()["mlp_head.1.weight"], classifier)
    theirs = torch.load(deit, weights_only=True)["model"]
    torch.testing.assert_close(network.v.patch_embed.proj.weight[:, 0], theirs["patch_embed.proj.weight"].sum(dim=1))
    assert torch.equal(network.v.pos_embed, resize_positions(theirs["pos_embed"], (14, 14), network.grid))
    assert torch.equal(network.v.blocks[1].attn.qkv.weight, theirs["blocks.1.attn.qkv.weight"])
    with pytest.raises(UserError, match="ImageNet DeiT"):
        load_network(network, checkpoint)


def test_fine_tuning_on_another_grid(tmp_path: Path) -> None:
    """The grid of the old positions follows from the file's own settings, or from their number."""
    source = tiny()
    known: dict[str, Any] = {"settings": resolve(TINY).model_dump()}
    for about in (known, {}):
        checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", source, **about))
        network = tiny(clip_samples=48000)
        load_network(network, checkpoint, new_classifier=True)
        wanted = resize_positions(source.v.pos_embed, (12, 101), network.grid)
        assert torch.equal(network.v.pos_embed, wanted)
    narrow = tiny(encoder_options="dim=64,depth=2,heads=1")
    with pytest.raises(UserError, match="encoder_options"):
        load_network(narrow, checkpoint, new_classifier=True)


@pytest.mark.slow
def test_the_command_starts_from_imagenets_deit(
    deit: Path, demo_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo_workspace)
    words = [word for name, value in SIZES["ast"].items() for word in (f"--{name}", value)]
    words += ["--max_epoch", "1", "--debug", "True", "--exp_name", "deit"]
    assert main.main(["train", *words, "--swin_pretrain_path", str(deit)]) == 0
    record = json.loads(Path("workspace/runs/deit/provenance.json").read_text())
    assert "(ImageNet DeiT)" in record[0]["fine-tuned_from"]
    assert main.main(["test", *words, "--resume_checkpoint", str(deit)]) == 2
