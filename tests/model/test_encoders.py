"""The contract of an encoder (model/network.py), for all of them: a new one is tested by its row and its tiny sizes."""

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from inference import Tagger
from inference.onnx_runtime import OnnxNetwork, open_session
from inference.pictures import sound_of_file
from model import Network, build_model
from model.checkpoint import load_network, read_checkpoint
from model.export import Probabilities, build_onnx, join, save_onnx
from model.foreign import WRAPPERS
from model.layers.onednn import OneDNNConv2d, OneDNNLinear, use_onednn
from model.opening import open_network
from model.registry import ENCODERS, encoder_module, read_options
from sed_model import at_rate_of, build_wrapper
from settings import UserError, all_settings, resolve
from tests.helpers import ROOT, SIZES
from tests.networks import SMALL, awake, noise, save_network

LOGMEL64 = "dim=64,depth=1,heads=1,frontend=logmel64,frequency_stride=8,time_stride=8"
FINE = {**SMALL, "htsat_time_stride": 2, "sequence_dim": 32}
CASES: dict[str, dict[str, Any]] = {  # settings: the tiny sizes of each encoder, and other forms of its network
    **{name: {"encoder": name, **sizes} for name, sizes in SIZES.items()},
    "htsat": SMALL,
    "htsat, attention map": {**SMALL, "htsat_attn_heatmap": True, "sequence_head": "attention", "sequence_dim": 32},
    "htsat, gru": {**FINE, "htsat_readout_stage": 1, "sequence_head": "gru"},
    "htsat, linear transformer": {**FINE, "enable_tscam": False, "sequence_head": "transformer"},
    "ast, logmel64": {"encoder": "ast", "encoder_options": LOGMEL64},
    "atst-f, gru": {**SIZES["atst-f"], "loss_type": "weak_strong_bce", "sequence_head": "gru", "sequence_dim": 16},
    "m2d, lstm": {**SIZES["m2d"], "loss_type": "frame_bce", "sequence_head": "lstm", "sequence_dim": 16},
    "asit, attention": {**SIZES["asit"], "sequence_head": "attention", "sequence_dim": 32},
    "frame_mn06, attention head": {**SIZES["frame_mn06"], "encoder_options": "width=0.1,head=attention"},
    "cnn14, decision_max": {**SIZES["cnn14"], "encoder_options": "width=0.0625,pooling=decision_max"},
    "psla, logmel64, one head": {
        **SIZES["psla"],
        "encoder_options": "variant=b0,width=0.25,heads=1,frontend=logmel64",
    },
    "psla, no attention": {**SIZES["psla"], "encoder_options": "variant=b0,width=0.25,heads=0"},
}
NOT_DETERMINISTIC = (  # on CUDA, by the documentation of torch.use_deterministic_algorithms
    "AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool3D", "FractionalMaxPool", "MaxPool3D", "MaxUnpool", "Upsample",
    "ReflectionPad", "ReplicationPad", "NllLoss2D", "CtcLoss", "GridSampler", "Cumsum", "EmbeddingBag", "PutBackward",
    "ResizeBackward", "Histc", "Bincount", "Kthvalue", "Median",
)  # fmt: skip
every_encoder = pytest.mark.parametrize("name", ENCODERS)
every_case = pytest.mark.parametrize("case", CASES)


def encoder_of(case: str) -> str:
    return case.partition(",")[0]


def tiny(case: str, **changes: Any) -> Network:
    """The network of a case in eval mode, each part of which changes its output."""
    torch.manual_seed(0)
    network = awake(build_model(resolve({**CASES[case], **changes})).eval())
    return settled(network)


def settled(network: Network) -> Network:
    """The network with the statistics of sound and silence in each BatchNorm2d: else little passes."""
    norms = {module: module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)}
    if norms:
        gains = torch.randn(8, 10, 1, generator=torch.Generator().manual_seed(0)).exp()
        gains[:, 7:] = 0
        varied = (gains * noise(8, network.clip_samples).unflatten(1, (10, -1))).flatten(1)
        for norm in norms:
            norm.train().momentum = 1.0
        with torch.no_grad():
            network(varied)
        for norm, momentum in norms.items():
            norm.eval().momentum = momentum
            assert norm.running_var is not None
            norm.running_var.clamp_(min=0.1 * norm.running_var.mean().item())  # of a silent channel, too
    return network


def sound(network: Network, clips: int = 2) -> Tensor:
    """Each clip is louder than the one before."""
    return noise(clips, network.clip_samples) * torch.linspace(1, 3, clips)[:, None]


def still(network: Network) -> Network:
    """The network without dropout and stochastic depth."""
    for module in network.modules():
        for rate in ("rate", "p", "drop_prob", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return network


def layer_of(network: Network) -> dict[str, int]:
    """The layer of each parameter; each has one."""
    numbers = {id(parameter): number for number, parameter in network.parameters_by_layer()}
    assert len(numbers) == len(list(network.parameters_by_layer())) == len(list(network.parameters()))
    return {name: numbers[id(parameter)] for name, parameter in network.named_parameters()}


@every_encoder
def test_registry_settings_files_and_sizes_name_the_same(name: str) -> None:
    files = {path.stem for path in (ROOT / "model/encoders").glob("*.py")} - {"__init__"}
    assert ENCODERS.keys() == set(get_args(all_settings()["encoder"].type)) == SIZES.keys()
    assert {row.module for row in ENCODERS.values()} == files


@every_encoder
def test_full_sizes_are_those_of_the_registry(name: str) -> None:
    row, settings = ENCODERS[name], resolve({"encoder": name, "dataset_type": "audioset"})
    with torch.device("meta"):  # without the weights
        network = build_model(settings)
    assert isinstance(network, encoder_module(name).NETWORK)
    assert sum(parameter.numel() for parameter in network.parameters()) == row.parameters
    assert row.sample_rate == settings.sample_rate == network.sample_rate
    assert (network.frame_seconds or None) == row.frame_seconds
    assert (network.num_classes, network.clip_samples) == (527, 10 * row.sample_rate)
    assert not any(key.startswith(WRAPPERS) for key in network.state_dict()), "a name that is taken for a wrapper"


@every_case
def test_outputs_and_time_axis(case: str) -> None:
    network = tiny(case)
    with torch.inference_mode():
        features = network.features(sound(network))
        outputs = network(sound(network))
        again = network.forward_head(network.forward_features(features))
        clipwise, framewise, embedding = network.probabilities(sound(network))
    frames, classes, channels = network.frames, network.num_classes, network.channels
    assert features.ndim == 3
    shapes = [(2, classes), (2, frames, classes), (2, frames, channels), (2, channels)]
    assert [part.shape for part in outputs] == shapes
    for part, same in zip(outputs, again, strict=True):
        assert part.dtype == torch.float32
        assert part.isfinite().all()
        assert torch.equal(part, same)
    assert torch.equal(embedding, outputs.embedding)
    assert torch.equal(clipwise, outputs.clip_logits.sigmoid())
    assert torch.equal(framewise, outputs.frame_logits.sigmoid())
    assert (outputs.clip_logits[0] - outputs.clip_logits[1]).abs().max() > 1e-4
    seconds = network.clip_samples / network.sample_rate
    assert frames * network.frame_seconds == pytest.approx(seconds if frames else 0)
    if frames:
        torch.testing.assert_close(outputs.frames.mean(dim=1), outputs.embedding)


@every_encoder
def test_one_class_a_clip(name: str) -> None:
    network = tiny(name, task="single_label")
    assert network.softmax
    with torch.inference_mode():
        found, outputs = network.probabilities(sound(network)), network(sound(network))
    assert torch.equal(found[0], outputs.clip_logits.softmax(dim=1))
    assert torch.equal(found[1], outputs.frame_logits.softmax(dim=2))


@every_case
def test_half_precision(case: str) -> None:
    """The front-end stays in float32, and so do the logits."""
    network = tiny(case)
    with torch.inference_mode():
        wanted, plain = network.features(sound(network)), network(sound(network))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features, mixed = network.features(sound(network)), network(sound(network))
    assert torch.equal(features, wanted)
    assert {part.dtype for part in mixed} == {torch.float32}
    most = {"resnet50": 0.2}.get(case, 0.05)  # 16 branches of random weights, as strong as what they are added to
    assert (plain.clip_logits.sigmoid() - mixed.clip_logits.sigmoid()).abs().max() < most


@every_case
def test_a_decibel_in_the_features(case: str) -> None:
    network = tiny(case)
    with torch.inference_mode():
        loud = 100 * sound(network)  # far above what is added to the power
        added = network.features(10 ** (1 / 20) * loud) - network.features(loud)
    heard = added.abs().amax(dim=(0, 2)) > 1e-6  # no empty bands
    wanted = network.decibel().expand(added.shape[1])[:, None].expand_as(added)
    assert heard.float().mean() > 0.7
    torch.testing.assert_close(added.median(dim=2).values[:, heard], wanted[:, heard, 0], rtol=1e-3, atol=1e-4)


@every_case
def test_every_parameter_learns(case: str) -> None:
    """In the second step: in the first, what stands before zeros has no gradient yet."""
    network = still(build_model(resolve(CASES[case])).train())
    unused = {id(parameter) for parameter in network.unused_parameters()}
    trained = {key: p for key, p in network.named_parameters() if p.requires_grad and id(p) not in unused}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = network(sound(network))
        wanted = torch.eye(*outputs.clip_logits.shape)
        loss = nn.functional.binary_cross_entropy_with_logits(outputs.clip_logits, wanted)
        (loss + outputs.frame_logits.sum() / max(1, outputs.frame_logits.numel())).backward()
        optimizer.step()
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@every_case
def test_training_is_deterministic_on_a_gpu(case: str) -> None:
    """No operator whose backward pass torch.use_deterministic_algorithms refuses on CUDA: the Trainer asks for it."""
    network = tiny(case).train()
    outputs = network(sound(network))
    found, waiting = set(), [outputs.clip_logits.grad_fn, outputs.frame_logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    names = {node.name() for node in found}
    assert len(names) > 5, names
    assert not {name for name in names if name.startswith(NOT_DETERMINISTIC)}


@every_case
def test_layers_go_from_the_input_to_the_classifier(case: str) -> None:
    network = tiny(case)
    found, last = layer_of(network), len(network.layers()) - 1
    assert {key for key, number in found.items() if number == last} == {
        key for key in found if key.startswith((*network.classifier, *network.additions))
    }
    assert set(found.values()) == set(range(last + 1))
    between = {id(part) for layer in network.layers()[1:-1] for part in layer}
    assert {id(block) for block in network.blocks()} <= between
    order: list[int] = []
    for number, layer in enumerate(network.layers()):
        for part in layer:
            if isinstance(part, nn.Module):
                part.register_forward_hook(lambda *_, number=number: order.append(number))
    with torch.inference_mode():
        network(sound(network))
    assert order == sorted(order)
    assert set(order) == set(range(last + 1))


@every_case
@pytest.mark.parametrize("prefix", ["sed_model.", "module.", ""])
def test_a_published_file_tells_its_encoder(case: str, prefix: str, tmp_path: Path) -> None:
    """By its keys. What its shapes do not tell must be given."""
    network = tiny(case)
    path = save_network(tmp_path / "a.ckpt", network, prefix)
    told = read_checkpoint(path).settings or {}
    opened = open_network(path, {key: v for key, v in CASES[case].items() if key != "encoder" and key not in told})
    assert (opened.settings.encoder, opened.report.share) == (encoder_of(case), 1)
    assert not opened.report.missing + opened.report.unexpected + opened.report.reshaped + opened.report.fresh
    for key, value in opened.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


@every_case
def test_a_checkpoint_brings_its_encoder(case: str, tmp_path: Path) -> None:
    network, settings = tiny(case), resolve(CASES[case])
    opened = open_network(save_network(tmp_path / "a.ckpt", network, settings=settings.model_dump()))
    assert opened.settings.encoder == opened.checkpoint.encoder == encoder_of(case)
    with torch.inference_mode():
        for ours, theirs in zip(opened.network.eval()(sound(network)), network(sound(network)), strict=True):
            assert torch.equal(ours, theirs)


@every_encoder
def test_a_file_of_another_encoder_is_refused(name: str, tmp_path: Path) -> None:
    network = tiny(name)
    for other in ENCODERS.keys() - {name}:
        with pytest.raises(UserError, match="encoder"):
            load_network(network, read_checkpoint(save_network(tmp_path / other, tiny(other))), new_classifier=True)


@every_case
def test_fine_tuning_begins_with_a_new_classifier(case: str, tmp_path: Path) -> None:
    source, network = tiny(case), tiny(case, classes_num=3)
    own = {key: value.clone() for key, value in network.state_dict().items()}
    checkpoint = read_checkpoint(save_network(tmp_path / "a.ckpt", source))
    with pytest.raises(UserError, match="classes_num"):
        load_network(network, checkpoint)
    report = load_network(network, checkpoint, new_classifier=True)
    assert (report.share, report.missing, report.unexpected) == (1, [], [])
    for key, value in network.state_dict().items():
        expected = own if key.startswith(network.classifier) else source.state_dict()
        assert torch.equal(value, expected[key]), key


@every_case
def test_a_frozen_backbone_stays_as_it_is(case: str) -> None:
    network = tiny(case)
    network.freeze_backbone()
    network.train()
    found, last = layer_of(network), len(network.layers()) - 1
    learns = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert learns == {key for key, number in found.items() if number == last}
    assert network.training
    for number, layer in enumerate(network.layers()):
        for part in layer:
            assert isinstance(part, nn.Parameter) or part.training is (number == last)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        first, second = (network.forward_features(network.features(sound(network))) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert not isinstance(one, Tensor) or torch.equal(one, two)
    network(sound(network)).clip_logits.sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())  # no running mean


@every_case
def test_recomputing_blocks_changes_no_gradient(case: str) -> None:
    plain = still(tiny(case)).train()
    saving = copy.deepcopy(plain)
    saving.set_gradient_checkpointing()
    copied = copy.deepcopy(saving)  # a copy recomputes with its own weights
    for network in (plain, saving, copied):
        network(sound(network)).clip_logits.square().sum().backward()
    for other in (saving, copied):
        for (key, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), key
            if one.grad is not None:
                torch.testing.assert_close(two.grad, one.grad, msg=key)
    assert all("forward" in vars(block) for block in saving.blocks())
    saving.set_gradient_checkpointing(False)
    assert not any("forward" in vars(block) for block in saving.blocks())


@every_case
def test_training_augments_nothing_in_the_network(case: str) -> None:
    network = still(tiny(case)).train()
    with torch.no_grad():
        for one, two in zip(network(sound(network)), network(sound(network)), strict=True):
            assert torch.equal(one, two)


@every_encoder
@pytest.mark.slow
def test_eight_clips_are_learned_by_heart(name: str) -> None:
    settings = resolve({**CASES[name], "encoder": name, "classes_num": 8, "mixup_alpha": 0.0, "spec_augment": False})
    torch.manual_seed(0)
    wrapper = build_wrapper(still(build_model(settings)), settings, [str(k) for k in range(8)]).train()
    wrapper.log = lambda *_, **__: None  # type: ignore[method-assign]
    time = torch.arange(settings.clip_samples) / settings.sample_rate
    tones = torch.stack([torch.sin(2 * torch.pi * 200 * 1.5**k * time) for k in range(8)])
    batch = {"waveform": (10000 * tones).short(), "target": torch.eye(8), "unreadable": 0}
    rate = {"ast": 1e-3}.get(name, 3e-3)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(100):
        loss = wrapper.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.02


@every_case
def test_onednn_computes_the_same(case: str) -> None:
    """Scores, and after other weights were loaded; gradients; bfloat16, as far from float32 as torch's own; a copy."""
    network = tiny(case)
    packed, waveform = copy.deepcopy(network), sound(network)
    use_onednn(packed)
    packed = copy.deepcopy(packed)
    replaced = [module for module in packed.modules() if isinstance(module, (OneDNNLinear, OneDNNConv2d))]
    assert replaced
    assert list(packed.state_dict()) == list(network.state_dict())
    for factor in (1.0, 0.9):
        weights = {key: factor * value if "weight" in key else value for key, value in network.state_dict().items()}
        for module in (packed, network):
            module.load_state_dict(weights)
        with torch.inference_mode():
            exact = network.probabilities(waveform)
            for ours, wanted in zip(packed.probabilities(waveform), exact, strict=True):
                assert (ours - wanted).norm() <= 1e-4 * wanted.norm()  # a single one rounds more
    with torch.inference_mode():
        assert any(module._kept for module in replaced) or not any(getattr(m, "packs", True) for m in replaced)
        copy.deepcopy(packed)  # the packed weights stay behind
        with torch.autocast("cpu", torch.bfloat16):
            half, halves = packed.probabilities(waveform), network.probabilities(waveform)
    for ours, theirs, value in zip(half, halves, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - value).norm() <= 2 * (theirs - value).norm() + 1e-3 * value.norm()
    for module in (packed, network):
        module(waveform).clip_logits.sum().backward()
    assert not any(module._kept for module in replaced)
    gradients = {name: parameter.grad for name, parameter in packed.named_parameters()}
    expected = {name: parameter.grad for name, parameter in network.named_parameters()}
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


@every_case
def test_the_graph_to_export_and_its_front_end(case: str) -> None:
    network = tiny(case)
    before, log_mel = network.state_dict().keys(), network.log_mel(sound(network))
    with torch.no_grad():
        traced = network.onnx_frontend(network.clip_samples)(sound(network))
        alone = encoder_module(encoder_of(case)).build_frontend(resolve(CASES[case]))(sound(network))
        wanted, found = network.probabilities(sound(network)), Probabilities(network, log_mel)(log_mel)
    torch.testing.assert_close(traced, log_mel, atol=2e-3, rtol=1e-5)
    assert torch.equal(alone, log_mel)
    expected = wanted if network.frames else (wanted[0], wanted[2])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert network.state_dict().keys() == before  # the network itself stays as it is


@every_case
@pytest.mark.slow
def test_onnx_is_the_network_for_any_number_of_clips(case: str, tmp_path: Path) -> None:
    network, settings = tiny(case), resolve(CASES[case])
    start, body = build_onnx(network, network.clip_samples)
    for file, model in (("waveform", join(start, body)), ("logmel", body)):
        save_onnx(model, tmp_path / file, {})
        exported = OnnxNetwork(open_session(tmp_path / file), settings)
        assert (exported.source, exported.frames) == (file, network.frames)
        for clips in (1, 3):
            with torch.inference_mode():
                wanted = network.probabilities(sound(network, clips))
            for ours, theirs in zip(exported.probabilities(sound(network, clips)), wanted, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@every_case
def test_tagger_tags_any_length(case: str) -> None:
    network = tiny(case)
    labels = [f"class {k}" for k in range(network.num_classes)]
    tagger = Tagger(network, resolve(CASES[case]), labels)
    assert tagger.has_frames == (network.frames > 0)
    for windows in (0.3, 1.0, 2.7):
        samples = round(windows * network.clip_samples)
        tagged = tagger.tag(noise(1, samples)[0], frame_embeddings=network.frames > 0)
        assert tagged.duration == samples / network.sample_rate
        assert tagged.clipwise.shape == (network.num_classes,)
        assert ((tagged.clipwise > 0) & (tagged.clipwise < 1)).all()
        assert tagged.embedding.shape == (network.channels,)
        best = tagged.top(3)
        assert [label for label, _ in best] == [labels[k] for k in np.argsort(-tagged.clipwise)[:3]]
        if network.frames:
            steps = max(1, int(tagged.duration / network.frame_seconds + 0.5 + 1e-9))
            assert len(tagged.times()) == len(tagged.framewise) == steps
        else:
            assert tagged.framewise.shape == (0, network.num_classes)
            with pytest.raises(UserError, match="time axis"):
                tagged.events()


@every_encoder
def test_a_waveform_of_another_rate_is_resampled(name: str) -> None:
    network = tiny(name)
    rate = 2 * network.sample_rate
    seconds = network.clip_samples / network.sample_rate
    times = [torch.arange(round(seconds * each)) / each for each in (rate, network.sample_rate)]
    high, wanted = (torch.sin(2 * torch.pi * 440 * time)[None] for time in times)
    found = at_rate_of(network, high, rate)
    assert found.shape == wanted.shape
    inside = slice(500, -500)
    torch.testing.assert_close(found[:, inside], wanted[:, inside], atol=2e-3, rtol=0)
    assert torch.equal(at_rate_of(network, torch.cat([wanted, wanted], dim=1), network.sample_rate), wanted)


@every_encoder
def test_wrong_options_are_named(name: str) -> None:
    wrong = {"nonsense": "1"}
    for key, option in ENCODERS[name].options.items():
        assert option.default is None or isinstance(option.default, option.kind)
        if option.choices or option.kind is not str:
            wrong[key] = "?"
    for key, value in wrong.items():
        with pytest.raises(UserError, match=key):
            read_options(name, {key: value})
        with pytest.raises(UserError, match=key):
            build_model(resolve({**SIZES[name], "encoder": name, "encoder_options": f"{key}={value}"}))


@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if "norm_momentum" in row.options])
def test_momentum_of_the_norms(name: str) -> None:
    case = {**CASES[name], "encoder_options": {**resolve(CASES[name]).encoder_options, "norm_momentum": "0.2"}}
    norms = [module for module in build_model(resolve(case)).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 20
    assert {norm.momentum for norm in norms} == {0.2}
    with pytest.raises(UserError, match="norm_momentum"):
        build_model(resolve({**case, "encoder_options": "norm_momentum=0"}))


@every_encoder
def test_settings_of_other_encoders_are_refused_by_name(name: str) -> None:
    theirs = {other: resolve({"encoder": other}) for other in ENCODERS}
    for setting in all_settings().values():
        if setting.encoder not in ("", name):
            with pytest.raises(UserError, match=setting.name):
                resolve({"encoder": name, setting.name: getattr(theirs[setting.encoder], setting.name)})


@every_encoder
def test_a_sample_rate_that_the_encoder_does_not_take(name: str) -> None:
    """HTS-AT takes any; the front-end of others belongs to their weights."""
    settings = resolve({**SIZES[name], "encoder": name, "sample_rate": 22050})
    if name == "htsat":
        assert build_model(settings).sample_rate == 22050
        return
    with pytest.raises(UserError, match="sample_rate"):
        build_model(settings)


@every_encoder
def test_pictures_show_the_encoders_bands(name: str, tmp_path: Path) -> None:
    """A tone of 1 kHz lies in the band whose centre is 1 kHz, over the whole time, in a picture of any length."""
    settings = resolve(CASES[name])
    times = np.arange(3 * settings.sample_rate) / settings.sample_rate
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2000 * np.pi * times), settings.sample_rate)
    sound = sound_of_file(tmp_path / "tone.wav", settings, 3.0)
    assert sound.logmel.shape[1] == encoder_module(name).build_analysis(settings).bands.shape[1] == len(sound.band_hz)
    loudest = sound.band_hz[sound.logmel[2:-4].argmax(axis=1)]
    np.testing.assert_allclose(loudest, 1000, atol=60)
