"""The encoders of PretrainedSED: golden numbers through files with the published keys, their heads, other files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.labels import read_labels
from inference import Tagger
from model import Network, build_model
from model.checkpoint import load_network, read_checkpoint
from model.encoders.atst_f import AtstDecibels
from model.encoders.beats import bucket
from model.frame_network import FrameNetwork
from model.frontend import KaldiFbank
from model.network import Layer
from model.opening import open_network
from settings import UserError, resolve
from tests.helpers import SIZES, assert_log_mel_close
from tests.model.test_ast import load_file
from tests.model.test_golden import FOLDER, golden
from tests.networks import noise, save_network

draw = load_file(FOLDER / "draw_frame.py")
SHAPES: dict[str, Any] = json.loads((FOLDER / "state_dict_shapes_frame.json").read_text())
GOLDEN, HEADS = np.load(FOLDER / "frame_encoders.npz"), np.load(FOLDER / "frame_heads.npz")
# Case: encoder, seed of the waveforms, and what stands in its files for the beginning of the keys in SHAPES.
CASES: dict[str, tuple[str, int, tuple[str, str]]] = {
    "ATST-F": ("atst-f", 20, ("model.", "model.")),
    "BEATs": ("beats", 21, ("model.beats.", "model.model.")),
    "fpasst": ("fpasst", 22, ("model.fpasst.", "model.")),
    "M2D": ("m2d", 23, ("model.m2d.", "model.")),
    "ASIT": ("asit", 24, ("model.asit.", "model.")),
    "frame_mn06": ("frame_mn06", 25, ("model.", "model.")),
    "frame_mn10": ("frame_mn10", 26, ("model.", "model.")),
    "ATST-F_rnn": ("atst-f", 30, ("model.", "model.")),
}
frame_encoders = pytest.mark.parametrize("name", sorted({encoder for encoder, _, _ in CASES.values()}))


def opened(case: str, path: Path) -> Tagger:
    """From a file as published, without a flag but ATST-F's floor of the whole batch."""
    _, _, (ours, theirs) = CASES[case]
    drawn = draw.draw_parameters(SHAPES[case])
    assert any(key.startswith(ours) for key in drawn)
    torch.save({key.replace(ours, theirs, 1): torch.from_numpy(value) for key, value in drawn.items()}, path)
    return Tagger.from_checkpoint(path, "cpu", given={"encoder_options": "floor=batch"} if "ATST" in case else None)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_golden_numbers(case: str, tmp_path: Path) -> None:
    encoder, seed, _ = CASES[case]
    tagger = opened(case, tmp_path / "strong_1.pt")
    network, report = tagger.network, tagger.report
    assert isinstance(network, Network)
    assert tagger.settings.encoder == encoder
    assert report is not None
    assert (report.share, report.reshaped) == (1, [])
    assert all(key.endswith("num_batches_tracked") for key in report.missing)  # not drawn
    assert set(report.unexpected) <= {"atst.mask_embed"}
    assert tagger.labels == read_labels("audioset_strong_labels.json")
    found = {name.partition("/")[2]: GOLDEN[name] for name in GOLDEN.files if name.startswith(f"{case}/")}
    waveforms = torch.from_numpy(golden.draw_waveforms(2, 10, 16000, seed))
    waveforms[1:] *= 0.1
    features = network.features(waveforms)
    tokens = network.requires_grad_(True).forward_features(features)
    outputs = network.forward_head(tokens)
    numbers = {
        "tokens_every_100th": tokens[:, ::100],
        "tokens_every_24th": tokens[:, ::24],
        "frame_logits_every_50th": outputs.frame_logits.transpose(1, 2)[..., ::50],
        "clip_logits": outputs.clip_logits,
    }
    if (expected := found.get("features_every_64th")) is not None:
        decibel = network.decibel().max().item()
        assert_log_mel_close(features[..., ::64].detach(), expected, axis=1, decibel=decibel)
    for name, value in numbers.items():
        if name in found:
            np.testing.assert_allclose(value.detach(), found[name], rtol=0, atol=1e-4, err_msg=name)
    if "losses" not in found:
        return
    strong, weak = map(torch.from_numpy, draw.draw_targets(2, 447, 250, seed + 100))
    losses = (
        F.binary_cross_entropy_with_logits(outputs.frame_logits.transpose(1, 2), strong),
        F.binary_cross_entropy_with_logits(outputs.clip_logits, weak),
    )
    np.testing.assert_allclose([loss.item() for loss in losses], found["losses"], rtol=0, atol=1e-6)
    sum(losses).backward()  # type: ignore[union-attr]
    norms = {key: p.grad.norm().item() for key, p in network.named_parameters() if p.grad is not None}
    wanted = dict(zip(found["gradient_keys"].tolist(), found["gradient_norms"], strict=True))
    wanted = {key.removeprefix("model."): norm for key, norm in wanted.items() if norm > 1e-7}  # else exactly 0
    assert len(wanted) > 100
    assert norms.keys() >= wanted.keys()
    for key, norm in wanted.items():
        assert norms[key] == pytest.approx(norm, rel=1e-3), key


class Head(FrameNetwork):
    """The heads alone: the tokens are given."""

    mean, scale = 0.0, 1.0

    def encode(self, features: Tensor) -> Tensor:
        return features

    def encoder_layers(self) -> list[Layer]:
        return [[]]


@pytest.mark.parametrize("case", SHAPES["heads"])
def test_golden_heads(case: str) -> None:
    number, (kind, _, length) = list(SHAPES["heads"]).index(case), case.partition("_")
    tokens = torch.from_numpy(draw.draw_sequence(2, int(length or 250), 96, 220 + number))
    sequence = {"bigru": ("gru", 64), "bilstm": ("lstm", 32)}.get(kind, ("none", 1))
    network = Head(
        KaldiFbank(64),
        96,
        num_classes=13,
        head="attention" if kind == "attention" else "both",
        sequence_head=sequence[0],
        sequence_dim=sequence[1],
    ).eval()
    drawn = {k: torch.from_numpy(v) for k, v in draw.draw_parameters(SHAPES["heads"][case], case).items()}
    if kind != "none":
        assert network.weak_head is not None
        network.weak_head = torch.nn.Linear(network.channels, len(drawn["weak_head.bias"]))
        network.load_state_dict(drawn)
    with torch.no_grad():
        outputs = network.forward_head(tokens)
    if kind == "none":
        np.testing.assert_allclose(outputs.frames[:, ::10], HEADS[f"{case}.sequence"], rtol=0, atol=1e-5)
        return
    clips, frames = outputs.clip_logits, outputs.frame_logits.transpose(1, 2)[..., ::5]
    if kind == "attention":  # published as probabilities
        clips, frames = clips.sigmoid(), frames.sigmoid()
    np.testing.assert_allclose(frames, HEADS[f"{case}.strong"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(clips, HEADS[f"{case}.weak"], rtol=0, atol=1e-5)


# --- files ------------------------------------------------------------------------------------------------------------


def tiny(name: str, **changes: Any) -> FrameNetwork:
    torch.manual_seed(0)
    sizes = {**SIZES[name], "clip_samples": 160000, **changes}
    network = build_model(resolve(sizes)).eval()
    assert isinstance(network, FrameNetwork)
    return network


@frame_encoders
def test_strong_weak_and_self_supervised_files(name: str, tmp_path: Path) -> None:
    """A file is read by the heads that it has; one without heads is for fine-tuning alone."""
    source = tiny(name, loss_type="weak_strong_bce", classes_num=447)
    weights = dict(source.state_dict())
    sound = noise(1, 160000)
    with torch.no_grad():
        frames, embedding = source(sound).frames, source(sound).embedding

    def outputs(file: str, *left_out: str) -> Any:
        kept = {k: v for k, v in weights.items() if not k.startswith(left_out or ("nothing",))}
        torch.save({f"model.{key}": value for key, value in kept.items()}, tmp_path / file)
        with torch.no_grad():
            return open_network(tmp_path / file).network.eval()(sound)

    strong, weak = source.strong_head, source.weak_head
    assert strong is not None
    assert weak is not None
    with torch.no_grad():
        both, alone, tags = outputs("both"), outputs("strong", "weak_head"), outputs("weak", "strong_head")
        torch.testing.assert_close(both.frame_logits, strong(frames))
        torch.testing.assert_close(both.clip_logits, weak(embedding))
        torch.testing.assert_close(alone.frame_logits, strong(frames))
        torch.testing.assert_close(alone.clip_logits, strong(frames).amax(dim=1))
        torch.testing.assert_close(tags.frame_logits, weak(frames))
        torch.testing.assert_close(tags.clip_logits, weak(embedding))
        weights["weak_head.weight"], weights["weak_head.bias"] = torch.zeros(527, source.channels), torch.zeros(527)
        torch.testing.assert_close(outputs("of 527 tags").clip_logits, alone.clip_logits)
    with pytest.raises(UserError):
        outputs("ssl", "strong_head", "weak_head")
    network = tiny(name, loss_type="frame_bce", classes_num=3)
    report = load_network(network, read_checkpoint(tmp_path / "ssl"), new_classifier=True)
    assert (report.share, report.missing) == (1, ["strong_head.weight", "strong_head.bias"])


def test_a_sequence_model_comes_with_its_file(tmp_path: Path) -> None:
    source = tiny("frame_mn06", sequence_head="lstm", sequence_dim=8, sequence_layers=3)
    path = save_network(tmp_path / "a.pt", source, "")
    found = open_network(path).network
    assert isinstance(found, FrameNetwork)
    assert found.channels == 16
    with pytest.raises(UserError, match="sequence_head"):
        open_network(path, {"sequence_head": "none"})
    network = tiny("frame_mn06", classes_num=3, sequence_head="gru", sequence_dim=8)
    report = load_network(network, read_checkpoint(path), new_classifier=True)
    assert all(key.startswith("seq_model.") for key in report.fresh)
    assert report.fresh


@pytest.mark.parametrize("name", ["atst-f", "beats", "fpasst", "m2d", "asit"])
def test_blocks_left_out_at_the_top(name: str, tmp_path: Path) -> None:
    path = save_network(tmp_path / "a.pt", tiny(name, encoder_options="dim=64,depth=3,heads=1"), "")
    checkpoint = read_checkpoint(path)
    assert checkpoint.settings is not None
    options = {**checkpoint.settings["encoder_options"], "drop_layers": "2"}
    network = tiny(name, encoder_options=options, classes_num=3)
    report = load_network(network, checkpoint, new_classifier=True)
    assert report.share == 1
    assert len(network.blocks()) <= 3
    assert report.unexpected
    assert all(".1." in key or ".2." in key for key in report.unexpected if "head" not in key)


def test_older_and_other_files_of_beats(tmp_path: Path) -> None:
    """Microsoft's: `model` beside `cfg`; the convolution's older names; the table of positions in each layer."""
    source = tiny("beats")
    weights = {key.removeprefix("beats."): v for key, v in source.state_dict().items() if key.startswith("beats.")}
    table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    for number, letter in enumerate("gv"):
        weights[f"encoder.pos_conv.0.weight_{letter}"] = weights.pop(
            f"encoder.pos_conv.0.parametrizations.weight.original{number}"
        )
    weights[table.format(1)] = weights[table.format(0)]
    network = tiny("beats", classes_num=3)
    for path, predictor in ((tmp_path / "a.pt", {}), (tmp_path / "b.pt", {"predictor.bias": torch.zeros(527)})):
        torch.save({"cfg": {"encoder_layers": 2}, "model": {**weights, **predictor}}, path)
        report = load_network(network, read_checkpoint(path), new_classifier=True)
        assert (report.share, report.missing) == (1, ["weak_head.weight", "weak_head.bias"])
    weights[table.format(1)] = weights[table.format(0)] + 1
    torch.save(weights, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"layers\.1"):
        read_checkpoint(tmp_path / "c.pt")


def test_frame_passt_begins_from_deit(tmp_path: Path) -> None:
    """Where it is wanted: the same file is AST's otherwise."""
    import timm

    deit: Any = timm.create_model(
        "deit_base_distilled_patch16_384", img_size=64, embed_dim=256, depth=2, num_heads=4, num_classes=10
    )
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    assert read_checkpoint(tmp_path / "deit.pth").encoder == "ast"
    checkpoint = read_checkpoint(tmp_path / "deit.pth", "fpasst")
    assert (checkpoint.encoder, checkpoint.images) == ("fpasst", True)
    network = tiny("fpasst", classes_num=3, encoder_options="dim=256,depth=2,heads=4")
    report = load_network(network, checkpoint, new_classifier=True)
    assert all("conv_in" in key or "head" in key for key in report.missing)
    assert not report.unexpected
    weights = network.state_dict()
    kernel = weights["fpasst.patch_embed.proj.weight"].reshape(256, 16, 16, 16)
    torch.testing.assert_close(kernel[:, 4], deit.patch_embed.proj.weight[:, 1] * 3 / 16)  # channel 4 is green
    assert torch.equal(weights["fpasst.new_pos_embed"], deit.pos_embed[:, :2])
    with pytest.raises(UserError):
        open_network(tmp_path / "deit.pth", {"encoder": "fpasst"})


# --- parts ------------------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_t5() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-900, 901)
    wanted = T5Attention._relative_position_bucket(distance, True, 320, 800)
    assert torch.equal(bucket(distance), wanted)


def test_the_floor_of_a_clip_does_not_depend_on_its_batch() -> None:
    clips = noise(2, 16000) * torch.tensor([[30.0], [1e-3]])
    clips[:, 8000:] = 0
    clip, batch = AtstDecibels("clip"), AtstDecibels("batch")
    torch.testing.assert_close(clip(clips)[1:], clip(clips[1:]))
    torch.testing.assert_close(batch(clips)[:1], clip(clips[:1]))
    assert (batch(clips)[1] - clip(clips)[1]).max() > 10


@frame_encoders
def test_a_short_clip_is_filled_with_zeros(name: str) -> None:
    network = tiny(name)
    sound = noise(1, 48000)
    filled = F.pad(sound, (0, 112000))
    with torch.no_grad():
        assert torch.equal(network(sound).frame_logits, network(filled).frame_logits)
    for samples in (16001, 10 * 16000 + 640):
        with pytest.raises(UserError, match="clip_samples"):
            tiny(name, clip_samples=samples)
