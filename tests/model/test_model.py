"""The network's parts against plain references, and its published variants."""

import pytest
import torch
import torchlibrosa
from torch.nn import functional as F

from model.encoders.htsat import HTSAT_Swin_Transformer, Maps, scale_probabilities
from model.export import Probabilities
from model.frontend import BandNorm, LogMel, Spectrogram, fold, resizing_matrix, stack, stretch
from model.layers.swin import (
    MASK_SCALE,
    DropPath,
    WindowAttention,
    change_of_order,
    gather,
    shifted_window_mask,
    window_order,
)
from settings import UserError
from tests.networks import htsat, noise

SMALL = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "num_classes": 5}


def small(**changes: object) -> HTSAT_Swin_Transformer:
    torch.manual_seed(0)
    return HTSAT_Swin_Transformer(**{**SMALL, **changes}).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "hop"), [(32000, 320), (16000, 160)])
def test_frontend_is_torchlibrosas(rate: int, hop: int) -> None:
    waveform = noise(2, rate)
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


def test_several_views_of_one_class_a_clip() -> None:
    """The mean of their probabilities."""
    network = htsat(loss_type="clip_ce", task="single_label")
    maps = network.forward_features(network.features(noise(1, 10080)).repeat(1, 1, 2))
    with torch.inference_mode():
        each = [network.forward_head(Maps(grid[None], None, [], 1)).frame_logits.softmax(dim=-1) for grid in maps.grid]
        torch.testing.assert_close(network.forward_head(maps).frame_logits.softmax(dim=-1), torch.stack(each).mean(0))
    assert len(each) > 1


def test_too_short_a_waveform_is_refused() -> None:
    with pytest.raises(UserError, match="needs more than 512"):
        Spectrogram(1024, 320)(torch.zeros(1, 512))


@pytest.mark.parametrize("frames", [1001, 101, 1023])
def test_stretch_is_bicubic(frames: int) -> None:
    logmel = torch.randn(2, 8, frames)
    expected = F.interpolate(logmel[:, None], (8, 1024), mode="bicubic", align_corners=True)[:, 0]
    stretched = logmel @ resizing_matrix(frames, 1024, torch.device("cpu"), align_corners=True).T
    torch.testing.assert_close(stretched, expected, atol=1e-5, rtol=0)


def test_fold_and_stack() -> None:
    logmel = torch.arange(64 * 1024).reshape(1, 64, 1024)
    image = fold(logmel, 4)
    for part in range(4):  # part c lies in rows 64c to 64c + 63
        rows = slice(64 * part, 64 * part + 64)
        assert torch.equal(image[0, 0, rows], logmel[0, :, 256 * part : 256 * part + 256])
    repeated = stack(logmel, 4, 100)
    for part in range(4):
        assert torch.equal(repeated[0, 0, 64 * part : 64 * part + 64], logmel[0, :, 100:356])


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


def test_gather_is_a_change_of_order() -> None:
    now, wanted = window_order(8, 4, 0), window_order(8, 4, 2)
    index = change_of_order(now, wanted)
    tokens = torch.randn(2, 64, 1, dtype=torch.float64)  # row by row
    inverse = change_of_order(wanted, now)
    assert torch.equal(gather(tokens[:, now], index, inverse), tokens[:, wanted])
    assert torch.autograd.gradcheck(lambda x: gather(x, index, inverse), tokens.requires_grad_())


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(10000, 2, 2))
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert sorted(set(dropped[:, 0, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped[:, 0, 0], dropped[:, 1, 1])


def test_parts_make_the_whole() -> None:
    network, waveform = small(), noise(2, 320000)
    with torch.inference_mode():
        features = network.features(waveform)
        assert features.shape == (2, 64, 1001)
        assert [image.shape for image in network.images(features)] == [(2, 1, 256, 256)]
        maps = network.forward_features(features)
        assert maps.grid.shape == (2, 128, 2, 32)
        assert maps.attention is None
        outputs, published = network.forward_head(maps), network.published_outputs(waveform)
    torch.testing.assert_close(published["clipwise_output"], outputs.clip_logits.sigmoid())
    torch.testing.assert_close(published["latent_output"], outputs.embedding)
    steps = published["framewise_output"].reshape(2, 32, 32, 5)
    assert torch.equal(steps, steps[:, :, :1].expand_as(steps))
    torch.testing.assert_close(steps[:, :, 0], outputs.frame_logits.sigmoid())


def test_without_tscam() -> None:
    network = small(enable_tscam=False)
    assert not network.unused_parameters()
    assert network.head.weight.shape == (5, 128)
    with torch.inference_mode():
        maps = network.forward_features(network.features(noise(1, 320000)))
        outputs = network.forward_head(maps)
    tokens = maps.grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(outputs.clip_logits, network.head(tokens.mean(dim=1)))
    torch.testing.assert_close(outputs.frame_logits, network.head(maps.grid.sum(dim=2).transpose(1, 2)))


def test_attention_heatmap() -> None:
    plain, heated = small(), small(attn_heatmap=True)
    heated.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        features = plain.features(noise(2, 320000))
        maps = heated.forward_features(features)
        attention = maps.attention
        with_map, without = heated.forward_head(maps), plain.forward_head(plain.forward_features(features))
    assert attention is not None
    assert attention.shape == (2, 32)
    torch.testing.assert_close(attention.mean(dim=1), torch.full((2,), 1 / 64))  # the weights of 64 tokens sum to 1
    low, high = attention.amin(1, keepdim=True), attention.amax(1, keepdim=True)
    factor = ((0.15 * attention + 0.85 * high - low) / (high - low))[:, :, None]
    expected = without.frame_logits.sigmoid() * factor
    torch.testing.assert_close(with_map.frame_logits.sigmoid(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(with_map.clip_logits, without.clip_logits)


def test_scaled_probabilities_of_sure_frames_are_finite() -> None:
    logits = torch.tensor([-60.0, 0.0, 60.0])
    torch.testing.assert_close(scale_probabilities(logits, torch.tensor(1.0)), logits)
    torch.testing.assert_close(scale_probabilities(logits, torch.tensor(0.5)).sigmoid(), logits.sigmoid() / 2)


def test_repeat_mode() -> None:
    network, waveform = small(repeat_mode=True), noise(1, 320000)
    with torch.inference_mode():
        features = network.features(waveform)
        images = network.images(features)
        assert len(images) == 4
        found = network(waveform).clip_logits.sigmoid()
        stretched = stretch(features, 64, 1024)
        for number, image in enumerate(images):
            assert torch.equal(image, stack(stretched, 4, 256 * number))
        single, each = small(), []
        for image in images:
            single.images = lambda _, image=image: [image]  # type: ignore[method-assign,misc]
            each.append(single(waveform).clip_logits.sigmoid())
        torch.testing.assert_close(found, torch.stack(each).mean(dim=0), atol=1e-6, rtol=1e-5)
        log_mel = network.log_mel(waveform)
        torch.testing.assert_close(Probabilities(network, log_mel)(log_mel)[0], found, atol=1e-5, rtol=1e-4)
        network.train()
        (image,) = network.images(features)
    assert torch.equal(image[:, :, :64], image[:, :, 192:])


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
    with pytest.raises(UserError, match=said):
        small(**changes)


def test_overlapping_patches_build() -> None:
    with torch.inference_mode():
        assert small(patch_size=8)(noise(1, 320000)).clip_logits.shape == (1, 5)
