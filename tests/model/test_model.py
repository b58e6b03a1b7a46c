"""The network's parts against plain references, and its published variants."""

import copy

import pytest
import torch
import torchlibrosa
from torch.nn import functional as F

from model import build_model
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.frontend import BandNorm, LogMel, SpecAugment, Spectrogram, bicubic_matrix, fold, stack
from model.layers.swin import (
    MASK_SCALE,
    DropPath,
    SwinBlock,
    WindowAttention,
    change_of_order,
    gather,
    merging_order,
    shifted_window_mask,
    window_order,
)
from settings import resolve

SMALL = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "num_classes": 5}


def small(**changes: object) -> HTSAT_Swin_Transformer:
    torch.manual_seed(0)
    return HTSAT_Swin_Transformer(**{**SMALL, **changes}).eval()  # type: ignore[arg-type]


def noise(clips: int, seconds: float, rate: int = 32000) -> torch.Tensor:
    return 0.1 * torch.randn(clips, int(seconds * rate), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("rate", "hop"), [(32000, 320), (16000, 160)])
def test_frontend_is_torchlibrosas(rate: int, hop: int) -> None:
    waveform = noise(2, 1.5, rate)
    spectrogram = torchlibrosa.Spectrogram(n_fft=1024, hop_length=hop, freeze_parameters=True)
    logmel = torchlibrosa.LogmelFilterBank(
        sr=rate, n_fft=1024, n_mels=64, fmin=50, fmax=rate // 2, ref=1.0, amin=1e-10, top_db=None
    )
    own_spectrogram, own_logmel = Spectrogram(1024, hop), LogMel(rate, 1024, 64, 50, rate // 2)
    torch.testing.assert_close(
        own_spectrogram.stft.conv_real.weight, spectrogram.stft.conv_real.weight, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        own_spectrogram.stft.conv_imag.weight, spectrogram.stft.conv_imag.weight, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(own_logmel.melW, logmel.melW, atol=1e-6, rtol=1e-5)
    expected = logmel(spectrogram(waveform))[:, 0]
    torch.testing.assert_close(own_logmel(own_spectrogram(waveform)), expected, atol=5e-3, rtol=0)


def test_too_short_a_waveform_is_refused() -> None:
    with pytest.raises(ValueError, match="needs more than 512"):
        Spectrogram(1024, 320)(torch.zeros(1, 512))


@pytest.mark.parametrize("frames", [1001, 101, 1023])
def test_stretch_is_bicubic(frames: int) -> None:
    logmel = torch.randn(2, 8, frames)
    expected = F.interpolate(logmel[:, None], (8, 1024), mode="bicubic", align_corners=True)[:, 0]
    stretched = logmel @ bicubic_matrix(frames, 1024, torch.device("cpu")).T
    torch.testing.assert_close(stretched, expected, atol=1e-5, rtol=0)


def test_fold_and_stack() -> None:
    logmel = torch.arange(64 * 1024).reshape(1, 64, 1024)
    image = fold(logmel, 4)
    for stretch in range(4):  # stretch c lies in rows 64c to 64c + 63
        rows = slice(64 * stretch, 64 * stretch + 64)
        assert torch.equal(image[0, 0, rows], logmel[0, :, 256 * stretch : 256 * stretch + 256])
    repeated = stack(logmel, 4, 100)
    for stretch in range(4):
        assert torch.equal(repeated[0, 0, 64 * stretch : 64 * stretch + 64], logmel[0, :, 100:356])


def test_spec_augment_masks_little() -> None:
    torch.manual_seed(0)
    masked = SpecAugment()(torch.ones(200, 64, 1001)) == 0
    bands, frames = masked.all(dim=2).sum(dim=1), masked.all(dim=1).sum(dim=1)
    assert bands.max() <= 2 * 7
    assert frames.max() <= 2 * 63
    assert bands.float().mean() == pytest.approx(2 * 3.5, rel=0.15)
    assert frames.float().mean() == pytest.approx(2 * 31.5, rel=0.15)
    assert len(set(frames.tolist())) > 50  # each clip has its own


def test_band_norm_is_batch_norm_2d() -> None:
    torch.manual_seed(0)
    own, reference = BandNorm(8), torch.nn.BatchNorm2d(8)
    x = torch.randn(4, 8, 50) * 3 + 2
    out = own(x)
    # (B, F, T, 1) as the published code has it; double precision, where torch's gradients are right
    expected = reference.double()(x.double()[..., None])[..., 0]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    (out * torch.linspace(0, 1, 50)).square().sum().backward()
    (expected * torch.linspace(0, 1, 50, dtype=torch.float64)).square().sum().backward()
    assert own.weight.grad is not None
    assert reference.weight.grad is not None
    torch.testing.assert_close(own.weight.grad.double(), reference.weight.grad, rtol=1e-4, atol=1e-4)
    assert reference.running_var is not None
    torch.testing.assert_close(own.running_var, reference.running_var.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("shift", [0, 4])
def test_attention_is_the_written_out_one(shift: int, clips: int, training: bool) -> None:
    torch.manual_seed(0)
    attention, tokens = WindowAttention(16, 4, 8).train(training), torch.randn(clips, 4 * 64, 16)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    mask = shifted_window_mask(16, 8, shift) if shift else None
    out, none = attention(tokens, 4, mask)
    same, weights = attention(tokens, 4, mask, need_weights=True)
    assert none is None
    torch.testing.assert_close(out, same, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4 * clips, 4, 64))
    if mask is not None:
        assert weights.reshape(clips, 4, 4, 64, 64)[:, mask[:, None].expand(4, 4, 64, 64) < 0].max() == 0
        assert set(mask.unique().tolist()) == {-100.0, 0.0}
        assert MASK_SCALE * -100 <= -1e4


def test_kept_bias_follows_the_weights() -> None:
    """What evaluation keeps is made anew after a load, a step in place, a change of mode and a move."""
    torch.manual_seed(0)
    attention, tokens = WindowAttention(16, 4, 8).eval(), torch.randn(1, 64, 16)
    table = attention.relative_position_bias_table

    def right() -> bool:
        with torch.inference_mode():
            kept = attention(tokens, 1, None)[0]
        with torch.enable_grad():
            return torch.allclose(kept, attention(tokens, 1, None)[0], atol=1e-5)

    assert right()
    assert attention._kept is not None
    attention.load_state_dict({**attention.state_dict(), "relative_position_bias_table": torch.randn_like(table)})
    assert right()
    with torch.no_grad():
        table.add_(torch.randn_like(table))
    assert right()
    table.data.copy_(torch.randn_like(table))  # as Lightning's weight averaging does before validation
    assert not right()
    attention.train().eval()
    assert right()
    attention.double().float()
    table.data = torch.randn_like(table)
    assert right()


def test_shifted_windows_keep_strangers_apart() -> None:
    """A token attends over the edge of its window, but not around the edge of the map."""
    torch.manual_seed(0)
    block = SwinBlock(8, size=16, heads=2, window=8, shift=4, drop_path=0.0).eval()
    torch.nn.init.normal_(block.attn.qkv.weight)
    place = torch.argsort(window_order(16, 8, 4)).view(16, 16)  # of each token of the map
    x = torch.randn(1, 256, 8, requires_grad=True)
    block(x)[0][0, place[5, 5]].sum().backward()
    assert x.grad is not None
    reached = x.grad[0].abs().sum(dim=-1)[place] > 0
    assert reached[4:12, 4:12].all()
    assert reached.sum() == 64
    x.grad = None
    block(x)[0][0, place[0, 0]].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().sum(dim=-1) > 0).sum() == 16


def test_gather_is_a_change_of_order() -> None:
    now, wanted = window_order(16, 8, 0), window_order(16, 8, 4)
    index = change_of_order(now, wanted)
    tokens = torch.randn(2, 256, 3, dtype=torch.float64)  # row by row
    assert torch.equal(gather(tokens[:, now], index), tokens[:, wanted])
    assert torch.autograd.gradcheck(lambda x: gather(x, index[:256]), tokens.requires_grad_())


def test_merging_takes_neighbours_down_first() -> None:
    order = merging_order(4, torch.arange(4))
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(10000, 2, 2))
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert sorted(set(dropped[:, 0, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped[:, 0, 0], dropped[:, 1, 1])


def test_parts_make_the_whole() -> None:
    network, waveform = small(), noise(2, 10)
    with torch.inference_mode():
        logmel = network.forward_frontend(waveform)
        assert logmel.shape == (2, 64, 1001)
        (image,) = network.images(logmel)
        assert image.shape == (2, 1, 256, 256)
        grid, attention = network.forward_features(image)
        assert grid.shape == (2, 128, 2, 32)
        assert attention is None
        outputs = network.forward_head(grid)
        whole = network(waveform)
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {
        "clipwise_output": (2, 5),
        "clipwise_logits": (2, 5),
        "framewise_logits": (2, 32, 5),
        "framewise_output": (2, 1024, 5),
        "latent_output": (2, 128),
    }
    for name, value in whole.items():
        assert torch.equal(value, outputs[name])
    steps = outputs["framewise_output"].reshape(2, 32, 32, 5)
    assert torch.equal(steps, steps[:, :, :1].expand_as(steps))


def test_without_tscam() -> None:
    network = small(enable_tscam=False)
    assert not network.unused_parameters()
    assert network.head.weight.shape == (5, 128)
    with torch.inference_mode():
        grid, _ = network.forward_features(next(iter(network.images(network.forward_frontend(noise(1, 10))))))
        outputs = network.forward_head(grid)
    tokens = grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(outputs["clipwise_output"], network.head(tokens.mean(dim=1)).sigmoid())
    frames = network.head(grid.sum(dim=2).transpose(1, 2)).sigmoid()
    torch.testing.assert_close(outputs["framewise_output"][:, ::32], frames)


def test_attention_heatmap() -> None:
    plain, heated = small(), small(attn_heatmap=True)
    heated.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        image = next(iter(plain.images(plain.forward_frontend(noise(2, 10)))))
        grid, attention = heated.forward_features(image)
        with_map, without = heated.forward_head(grid, attention), plain.forward_head(plain.forward_features(image)[0])
    assert attention is not None
    assert attention.shape == (2, 32)
    torch.testing.assert_close(attention.mean(dim=1), torch.full((2,), 1 / 64))  # the weights of 64 tokens sum to 1
    low, high = attention.amin(1, keepdim=True), attention.amax(1, keepdim=True)
    factor = ((0.15 * attention + 0.85 * high - low) / (high - low))[:, :, None]
    torch.testing.assert_close(
        with_map["framewise_output"][:, ::32], without["framewise_output"][:, ::32] * factor, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(with_map["clipwise_output"], without["clipwise_output"])


def test_repeat_mode() -> None:
    network, waveform = small(repeat_mode=True), noise(1, 10)
    with torch.inference_mode():
        images = list(network.images(network.forward_frontend(waveform)))
        assert len(images) == 4
        mean = torch.stack(
            [network.forward_head(*network.forward_features(i))["clipwise_output"] for i in images]
        ).mean(0)
        torch.testing.assert_close(network(waveform)["clipwise_output"], mean)
        network.train()
        (image,) = network.images(network.forward_frontend(waveform))
    assert torch.equal(image[:, :, :64], image[:, :, 192:])


def test_long_audio_in_training_is_a_random_stretch() -> None:
    network = small().train()
    logmel = torch.arange(2000.0).repeat(1, 64, 1)
    torch.manual_seed(0)
    starts = {next(iter(network.images(logmel)))[0, 0, 0, 0].item() for _ in range(5)}
    assert len(starts) > 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": (1, 2, 4)}, "one number a stage"),
        ({"num_heads": (3, 2, 4, 8)}, "3 heads do not divide"),
        ({"mel_bins": 300}, "mel_bins 300"),
        ({"attn_heatmap": True, "attention_window": 4}, "one window"),
        ({"patch_size": 5}, "htsat_patch_size 5"),
        ({"attention_window": 7}, "htsat_window_size 7"),
        ({"spec_size": 64, "mel_bins": 8, "attention_window": 2}, "cannot be unfolded"),
    ],
)
def test_sizes_that_clash_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)


def test_overlapping_patches_build() -> None:
    with torch.inference_mode():
        assert small(patch_size=8)(noise(1, 10))["clipwise_output"].shape == (1, 5)


def test_gradient_checkpointing_changes_nothing() -> None:
    network, waveform = small(drop_path=0.0, spec_augment=False).train(), noise(2, 10)
    other = copy.deepcopy(network)
    other.set_gradient_checkpointing(True)
    for each in (network, other):
        each(waveform)["clipwise_logits"].sum().backward()
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_builder_and_autocast() -> None:
    network = build_model(
        resolve({"htsat_dim": 16, "htsat_depth": [1, 1, 1, 1], "htsat_num_head": [1, 2, 4, 8]})
    ).eval()
    waveform = noise(1, 10)
    with torch.inference_mode():
        plain = network(waveform)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logmel, mixed = network.forward_frontend(waveform), network(waveform)
    assert logmel.dtype == mixed["clipwise_output"].dtype == torch.float32
    assert torch.equal(logmel, network.forward_frontend(waveform))
    assert (plain["clipwise_output"] - mixed["clipwise_output"]).abs().max() < 0.05
