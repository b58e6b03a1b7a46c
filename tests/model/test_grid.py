"""Finer grids of steps: where a sound lands, what published weights give on them, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from model import build_model
from model.checkpoint import load_network, read_checkpoint
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.layers.readout import Lateral, Readout
from model.layers.swin import SwinBlock, merging_order, shifted_window_mask, window_order
from settings import resolve
from tests.helpers import TINY

# A folded image of 64 x 64 from 32 bands and 128 frames: maps of 16, 8 and 4 tokens, 8 steps of 16 frames.
SMALL: dict[str, Any] = {
    "sample_rate": 8000, "window_size": 256, "hop_size": 80, "fmax": 4000.0, "mel_bins": 32, "spec_size": 64,
    "embed_dim": 16, "depths": (2, 1, 2), "num_heads": (1, 2, 4), "attention_window": 4, "num_classes": 5,
}  # fmt: skip
GRIDS: list[tuple[dict[str, Any], int]] = [  # settings, and the frames of a step
    ({}, 16), ({"time_stride": 2}, 8), ({"readout_stage": 2}, 8), ({"readout_stage": 1}, 4),
    ({"time_stride": 2, "readout_stage": 2}, 4), ({"time_stride": 2, "readout_stage": 1}, 2),
]  # fmt: skip


def small(**changes: Any) -> HTSAT_Swin_Transformer:
    torch.manual_seed(0)
    return HTSAT_Swin_Transformer(**{**SMALL, **changes}).eval()


def drawn(**changes: Any) -> HTSAT_Swin_Transformer:
    """With laterals that add something."""
    network = small(**changes)
    if network.readout is not None:
        for parameter in network.readout.parameters():
            nn.init.normal_(parameter, std=0.1)
    return network


def logmel(clips: int = 2) -> Tensor:
    return torch.randn(clips, 32, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("changes", "frames"), GRIDS, ids=str)
def test_outputs_follow_the_grid(changes: dict[str, Any], frames: int) -> None:
    network = drawn(**changes)
    assert (network.frames_per_step, network.steps) == (frames, 128 // frames)
    with torch.inference_mode():
        outputs = network.forward_logmel(logmel())
    assert outputs["framewise_logits"].shape == (2, network.steps, 5)
    assert outputs["framewise_output"].shape == (2, 128, 5)
    every_step = outputs["framewise_output"][:, ::frames]
    torch.testing.assert_close(every_step, outputs["framewise_logits"].sigmoid())
    torch.testing.assert_close(outputs["clipwise_logits"], outputs["framewise_logits"].mean(dim=1))


@pytest.mark.parametrize("frame", [3, 49, 64, 127])
@pytest.mark.parametrize(("changes", "frames"), GRIDS, ids=str)
def test_a_sound_lands_on_its_step(changes: dict[str, Any], frames: int, frame: int) -> None:
    """Without attention a token knows its own patch alone: only the steps that hear a frame may change with it."""
    network = drawn(**changes)
    for block in network.modules():
        if isinstance(block, SwinBlock):
            nn.init.zeros_(block.attn.proj.weight)
    before, after = logmel(1), logmel(1)
    after[:, :, frame] += 3
    grids = []
    with torch.inference_mode():
        for frames_of in (before, after):
            (image,) = network.images(frames_of)
            grid, _, *earlier = network.forward_features(image)
            if network.readout is None:
                grids.append(grid)
            else:  # the finest lateral alone: the others, and the last stage, are as coarse as before
                steps = network.steps
                grids.append(network.readout.laterals[0](earlier[0], network.freq_ratio, network.freq_bins, steps))
    changed = (grids[0] - grids[1]).abs().amax(dim=(0, 1, 2)) > 1e-6
    # Patches that overlap in time hear one frame more at each end, but not over the edge of a folded stretch of time.
    more = 1 if "time_stride" in changes else 0
    begins = torch.arange(network.steps) * frames
    hears = (begins - more <= frame) & (frame < begins + frames + more) & (begins // 64 == frame // 64)
    assert torch.equal(changed, hears)


def test_a_lateral_averages_over_frequency_and_keeps_time() -> None:
    lateral = Lateral(1, 1)
    lateral.norm, lateral.linear = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    grid = torch.randn(8, 32)  # two stretches of time under one another: frequency up, time right
    folded = torch.cat([grid[:, :16], grid[:, 16:]])  # (16, 16)
    tokens = folded.flatten()[merging_order((16, 16), torch.arange(64))]
    pooled = lateral(tokens[None, :, None], freq_ratio=2, freq_bins=2, steps=32)
    torch.testing.assert_close(pooled[0, 0], grid.unflatten(0, (2, 4)).mean(dim=1))


def test_a_readout_adds_its_laterals_from_the_top_down() -> None:
    torch.manual_seed(0)
    readout, grid = Readout([4, 8], [16, 8], 16, freq_ratio=2), torch.randn(1, 16, 2, 4)
    earlier = [torch.randn(1, 16 * 8, 4), torch.randn(1, 8 * 4, 8)]
    assert torch.equal(readout(grid, earlier), grid.repeat_interleave(4, dim=3))  # it begins with zeros
    for parameter in readout.parameters():
        nn.init.normal_(parameter)
    one, two = (lateral(x, 2, 2, s) for lateral, x, s in zip(readout.laterals, earlier, [16, 8], strict=True))
    wanted = grid.repeat_interleave(4, dim=3) + one + two.repeat_interleave(2, dim=3)
    torch.testing.assert_close(readout(grid, earlier), wanted)


def test_windows_of_a_wide_map() -> None:
    """A token attends over the edge of its window, but not around the edges of the map, whatever its sides."""
    torch.manual_seed(0)
    size, window, shift = (8, 16), 4, 2
    block = SwinBlock(8, size, heads=2, window=window, shift=shift, drop_path=0.0).eval()
    nn.init.normal_(block.attn.qkv.weight)
    place = torch.argsort(window_order(size, window, shift)).view(size)  # of each token of the map

    def reached(row: int, column: int) -> Tensor:
        x = torch.randn(1, 128, 8, requires_grad=True)
        block(x)[0][0, place[row, column]].sum().backward()
        assert x.grad is not None
        return x.grad[0].abs().sum(dim=-1)[place] > 0

    for row, column, rows, columns in [
        (5, 9, slice(2, 6), slice(6, 10)), (0, 0, slice(0, 2), slice(0, 2)), (7, 3, slice(6, 8), slice(2, 6)),
        (3, 15, slice(2, 6), slice(14, 16)),
    ]:  # fmt: skip
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[rows, columns] = True
        assert torch.equal(reached(row, column), wanted)


def test_a_map_of_one_row_of_windows_is_not_shifted() -> None:
    first, _, last = small(time_stride=2).layers
    assert last.blocks[1].windows == 2  # type: ignore[union-attr,index]
    assert last.blocks[1].attn_mask is None  # type: ignore[union-attr,index]
    assert first.blocks[1].attn_mask.shape == (32, 16, 16)  # type: ignore[union-attr,index]


def test_merging_order_of_a_wide_map() -> None:
    assert merging_order((2, 4), torch.arange(2)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    image = torch.arange(4 * 8).view(4, 8)
    fours = rearrange(image, "(h i) (w j) -> (h w) (j i)", i=2, j=2).flatten()
    assert torch.equal(merging_order((4, 8), torch.arange(8)), fours)


def test_embedding_is_the_last_stages_mean() -> None:
    plain, fine = small(), drawn(readout_stage=1)
    fine.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        wanted, found = plain.forward_logmel(logmel()), fine.forward_logmel(logmel())
    assert torch.equal(found["latent_output"], wanted["latent_output"])
    assert not torch.allclose(found["clipwise_logits"], wanted["clipwise_logits"], atol=1e-4)


def test_attention_map_covers_the_finer_steps() -> None:
    plain, fine = small(attn_heatmap=True), small(attn_heatmap=True, readout_stage=2)
    fine.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        (image,) = plain.images(logmel())
        _, attention = plain.forward_features(image)
        outputs = fine.forward_logmel(logmel())
    ratio = outputs["framewise_output"][:, :: fine.frames_per_step] / outputs["framewise_logits"].sigmoid()
    torch.testing.assert_close(ratio, ratio[:, :, :1].expand_as(ratio))
    assert ratio[:, ::2, 0].argmax(dim=1).tolist() == attention.argmax(dim=1).tolist()
    torch.testing.assert_close(ratio[:, ::2], ratio[:, 1::2])


def save(network: HTSAT_Swin_Transformer, path: Path) -> Path:
    torch.save({"state_dict": {f"sed_model.{key}": value for key, value in network.state_dict().items()}}, path)
    return path


def test_published_weights_load_into_a_finer_grid(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(small(), tmp_path / "coarse.ckpt"))
    fine = small(time_stride=2)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.zero_()
    report = load_network(fine, checkpoint)
    assert (report.missing, report.unexpected, report.reshaped, report.fresh) == ([], [], [], [])
    assert report.share == 1
    for name, parameter in fine.named_parameters():
        assert torch.equal(parameter, checkpoint.state_dict[name]), name
    mask = fine.state_dict()["layers.0.blocks.1.attn_mask"]
    assert torch.equal(mask, shifted_window_mask((16, 32), 4, 2))


def test_masks_of_another_map_are_not_taken_over(tmp_path: Path) -> None:
    """Maps of 8 x 32 and of 16 x 16 tokens have equally many windows, but other neighbours."""
    one_stage = {"patch_size": 8, "depths": (2,), "num_heads": (1,), "enable_tscam": False}
    square, network = small(**one_stage), small(**one_stage, patch_stride=8, time_stride=2)
    mask = network.state_dict()["layers.0.blocks.1.attn_mask"].clone()
    load_network(network, read_checkpoint(save(square, tmp_path / "square.ckpt")))
    assert torch.equal(network.state_dict()["layers.0.blocks.1.attn_mask"], mask)
    assert mask.shape == square.state_dict()["layers.0.blocks.1.attn_mask"].shape
    assert not torch.equal(mask, square.state_dict()["layers.0.blocks.1.attn_mask"])


def test_settings_reach_the_network() -> None:
    sizes = {**TINY, "htsat_spec_size": 64, "clip_samples": 32000, "mel_bins": 32}
    plain, stride = build_model(resolve(sizes)), build_model(resolve({**sizes, "htsat_time_stride": 2}))
    readout = build_model(resolve({**sizes, "htsat_readout_stage": 3, "htsat_time_stride": 2}))
    assert [network.steps for network in (plain, stride, readout)] == [4, 8, 16]
    keys = plain.state_dict().keys()
    assert stride.state_dict().keys() == keys
    assert {key.split(".")[0] for key in readout.state_dict() if key not in keys} == {"readout"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"readout_stage": 4}, "htsat_readout_stage 4 must be a stage from 1 to 3"),
        ({"readout_stage": 0}, "htsat_readout_stage 0"),
        ({"time_stride": 8}, "htsat_patch_size 4 must be htsat_time_stride 8 plus an even number"),
        ({"time_stride": 1}, "htsat_patch_size 4 must be htsat_time_stride 1 plus an even number"),
        ({"patch_size": 9, "patch_stride": 1, "time_stride": 3}, "multiple of htsat_time_stride 3 x 4"),
        ({"time_stride": 2, "attention_window": 3}, "3 does not divide the 16 x 32 tokens of stage 0"),
        ({"time_stride": 2, "attn_heatmap": True}, "one window: 4 x 8 tokens"),
    ],
)
def test_grids_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)
