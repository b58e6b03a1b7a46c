"""Finer grids of steps: where a sound lands, what published weights give on them, and what does not fit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from model import Outputs
from model.checkpoint import load_network, read_checkpoint
from model.encoders.htsat import HTSAT_Swin_Transformer
from model.layers.readout import Lateral, Readout
from model.layers.swin import SwinBlock, merging_order, shifted_window_mask, window_order
from settings import UserError
from tests.networks import SMALL, awake, htsat, save_network

small = partial(htsat, {**SMALL, "htsat_depth": [2, 1, 2], "htsat_window_size": 4})  # maps of 16, 8 and 4 tokens
GRIDS: list[tuple[dict[str, Any], int]] = [  # settings, and the frames of a step
    ({}, 16), ({"htsat_time_stride": 2}, 8), ({"htsat_readout_stage": 2}, 8), ({"htsat_readout_stage": 1}, 4),
    ({"htsat_time_stride": 2, "htsat_readout_stage": 2}, 4), ({"htsat_time_stride": 2, "htsat_readout_stage": 1}, 2),
]  # fmt: skip


def outputs_of(network: HTSAT_Swin_Transformer, features: Tensor) -> Outputs:
    return network.forward_head(network.forward_features(features))


def logmel(clips: int = 2) -> Tensor:
    return torch.randn(clips, 32, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("changes", "frames"), GRIDS, ids=str)
def test_outputs_follow_the_grid(changes: dict[str, Any], frames: int) -> None:
    network = awake(small(**changes))
    assert network.frames == 128 // frames
    with torch.inference_mode():
        outputs = outputs_of(network, logmel())
    assert outputs.frame_logits.shape == (2, network.frames, 5)
    assert outputs.frames.shape == (2, network.frames, network.channels)
    torch.testing.assert_close(outputs.clip_logits, outputs.frame_logits.mean(dim=1))
    new = {key.split(".")[0] for key in network.state_dict().keys() - small().state_dict().keys()}
    assert new == ({"readout"} if "htsat_readout_stage" in changes else set())


@pytest.mark.parametrize("frame", [3, 49, 64, 127])
@pytest.mark.parametrize(("changes", "frames"), GRIDS, ids=str)
def test_a_sound_lands_on_its_step(changes: dict[str, Any], frames: int, frame: int) -> None:
    """Without attention a token knows its own patch alone: only the steps that cover a frame may change with it."""
    network = awake(small(**changes))
    for block in network.blocks():
        assert isinstance(block, SwinBlock)
        nn.init.zeros_(block.attn.proj.weight)
    before, after = logmel(1), logmel(1)
    after[:, :, frame] += 3
    grids = []
    with torch.inference_mode():
        for features in (before, after):
            maps = network.forward_features(features)
            if network.readout is None:
                grids.append(maps.grid)
            else:  # the finest lateral alone: the others, and the last stage, are as coarse as before
                steps, earlier = network.frames, maps.earlier
                grids.append(network.readout.laterals[0](earlier[0], network.freq_ratio, network.freq_bins, steps))
    changed = (grids[0] - grids[1]).abs().amax(dim=(0, 1, 2)) > 1e-6
    # Patches that overlap in time cover one frame more at each end, but not over the edge of a folded stretch of time.
    more = 1 if "htsat_time_stride" in changes else 0
    begins = torch.arange(network.frames) * frames
    covers = (begins - more <= frame) & (frame < begins + frames + more) & (begins // 64 == frame // 64)
    assert torch.equal(changed, covers)


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


def test_windows_keep_strangers_apart() -> None:
    """A token attends over the edge of its window, but not around the edges of the map, whatever its sides."""
    torch.manual_seed(0)
    size, window, shift = (8, 16), 4, 2
    block = SwinBlock(8, size, heads=2, window=window, shift=shift, drop_path=0.0).eval()
    nn.init.normal_(block.attn.qkv.weight)
    place = torch.argsort(window_order(size, window, shift)).view(size)  # of each token of the map
    for row, column, rows, columns in [
        (5, 9, slice(2, 6), slice(6, 10)), (0, 0, slice(0, 2), slice(0, 2)), (7, 3, slice(6, 8), slice(2, 6)),
        (3, 15, slice(2, 6), slice(14, 16)),
    ]:  # fmt: skip
        x = torch.randn(1, 128, 8, requires_grad=True)
        block(x)[0][0, place[row, column]].sum().backward()
        assert x.grad is not None
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[rows, columns] = True
        assert torch.equal(x.grad[0].abs().sum(dim=-1)[place] > 0, wanted)


def test_a_map_of_one_row_of_windows_is_not_shifted() -> None:
    first, _, last = small(htsat_time_stride=2).stages
    assert (last.blocks[1].windows, last.blocks[1].attn_mask) == (2, None)
    assert first.blocks[1].attn_mask.shape == (32, 16, 16)


def test_merging_takes_neighbours_down_first() -> None:
    assert merging_order(4, torch.arange(4)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert merging_order((2, 4), torch.arange(2)).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    image = torch.arange(4 * 8).view(4, 8)
    fours = rearrange(image, "(h i) (w j) -> (h w) (j i)", i=2, j=2).flatten()
    assert torch.equal(merging_order((4, 8), torch.arange(8)), fours)


def test_embedding_is_the_last_stages_mean() -> None:
    plain, fine = small(), awake(small(htsat_readout_stage=1))
    fine.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        wanted, found = outputs_of(plain, logmel()), outputs_of(fine, logmel())
    assert torch.equal(found.embedding, wanted.embedding)
    assert not torch.allclose(found.clip_logits, wanted.clip_logits, atol=1e-4)


def test_attention_map_covers_the_finer_steps() -> None:
    plain, fine = small(htsat_attn_heatmap=True), small(htsat_attn_heatmap=True, htsat_readout_stage=2)
    fine.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        attention = plain.forward_features(logmel()).attention
        heated = outputs_of(fine, logmel())
        fine.attn_heatmap = False
        ratio = heated.frame_logits.sigmoid() / outputs_of(fine, logmel()).frame_logits.sigmoid()
    assert attention is not None
    torch.testing.assert_close(ratio, ratio[:, :, :1].expand_as(ratio))
    assert ratio[:, ::2, 0].argmax(dim=1).tolist() == attention.argmax(dim=1).tolist()
    torch.testing.assert_close(ratio[:, ::2], ratio[:, 1::2])


def test_published_weights_load_into_a_finer_grid(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_network(tmp_path / "coarse.ckpt", small()))
    fine = small(htsat_time_stride=2)
    with torch.no_grad():
        for parameter in fine.parameters():
            if parameter.requires_grad:  # not those of the front-end
                parameter.zero_()
    report = load_network(fine, checkpoint)
    assert (report.missing, report.unexpected, report.reshaped, report.fresh) == ([], [], [], [])
    assert report.share == 1
    for name, parameter in fine.named_parameters():
        assert torch.equal(parameter, checkpoint.state_dict[name]), name
    assert torch.equal(fine.state_dict()["layers.0.blocks.1.attn_mask"], shifted_window_mask((16, 32), 4, 2))


def test_masks_of_another_map_are_not_taken_over(tmp_path: Path) -> None:
    """Maps of 8 x 32 and of 16 x 16 tokens have equally many windows, but other neighbours."""
    sizes = {"htsat_patch_size": 8, "htsat_depth": [2], "htsat_num_head": [1], "enable_tscam": False}
    square, network = small(**sizes), small(**sizes, htsat_stride=8, htsat_time_stride=2)
    name = "layers.0.blocks.1.attn_mask"
    mask, other = network.state_dict()[name].clone(), square.state_dict()[name]
    load_network(network, read_checkpoint(save_network(tmp_path / "square.ckpt", square)))
    assert torch.equal(network.state_dict()[name], mask)
    assert mask.shape == other.shape
    assert not torch.equal(mask, other)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"htsat_readout_stage": 4}, "htsat_readout_stage 4"),
        ({"htsat_readout_stage": 0}, "htsat_readout_stage"),
        ({"htsat_time_stride": 8}, "htsat_time_stride 8"),
        ({"htsat_time_stride": 1}, "htsat_time_stride 1"),
        ({"htsat_patch_size": 9, "htsat_stride": 1, "htsat_time_stride": 3}, "multiple of htsat_time_stride 3 x 4"),
        ({"htsat_time_stride": 2, "htsat_window_size": 3}, "3 does not divide the 16 x 32 tokens of stage 0"),
        ({"htsat_time_stride": 2, "htsat_attn_heatmap": True}, "htsat_attn_heatmap .* 4 x 8 tokens"),
    ],
)
def test_grids_that_do_not_fit_are_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        small(**changes)
