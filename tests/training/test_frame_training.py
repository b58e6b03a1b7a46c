"""Training on event times: what a batch brings, that labels follow the sound, teachers, and the whole command."""

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

import main
import sed_model
from data.clip_dataset import FrameClipDataset
from data.clip_store import STRONG, UNLABELLED, WEAK, Clip, ClipStoreWriter, Event, read_store_table
from data.frame_targets import Events, Targets, rasterize
from data.pseudo_labels import TeacherLogits, TeacherWriter
from data.samplers import PARTS, EpochSampler, FrameBalancedSampler, LabellingSampler
from data_generator import active_frames, event_seconds, load_training_data
from model import build_model
from model.checkpoint import read_checkpoint
from sed_model import FrameSEDWrapper, SEDWrapper, build_wrapper
from settings import Config, UserError, resolve
from tests.helpers import LEAN, LEAN_FLAGS, call, last_checkpoint

RATE = 8


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three clips of 8 Hz: strong of 2 s, weak of 4 s, unlabelled of 1 s."""
    path = tmp_path / "folder.h5"
    with ClipStoreWriter(path, clip_samples=32, sample_rate=RATE, labels=["a", "b"]) as writer:
        events = [Event(1, 0.5, 1.0), Event(0, 1.5, 9.0)]
        writer.add(Clip("strong.wav", np.ones(16, np.int16), [0, 1], split="train", events=events))
        writer.add(Clip("weak.wav", np.ones(32, np.int16), [1], split="train", labelling=WEAK))
        writer.add(Clip("none.wav", np.ones(8, np.int16), [], split="train", labelling=UNLABELLED))
    return path


def dataset(store: Path, fit: str = "pad", samples: int = 32, **more: Any) -> FrameClipDataset:
    return FrameClipDataset(read_store_table(store), clip_samples=samples, fit=fit, **more)


def test_a_batch_brings_events_and_what_is_known(store: Path) -> None:
    batch = dataset(store).__getitems__([1, 0, 2])
    assert batch["labelling"].tolist() == [WEAK, STRONG, UNLABELLED]
    events = batch["events"]
    assert events.clip.tolist() == [1, 1]
    assert events.label.tolist() == [1, 0]
    assert events.onset.tolist() == [0.5, 1.5]
    assert events.offset.tolist() == [1.0, 2.0]  # cut at the end of its clip


def test_events_are_repeated_and_cut_with_the_sound(store: Path) -> None:
    events = dataset(store, "repeat").__getitems__([0])["events"]
    times = sorted(zip(events.label.tolist(), events.onset.tolist(), events.offset.tolist(), strict=True))
    assert times == [(0, 1.5, 2.0), (0, 3.5, 4.0), (1, 0.5, 1.0), (1, 2.5, 3.0)]
    events = dataset(store, samples=6).__getitems__([0])["events"]  # 0.75 s
    assert (events.label.tolist(), events.onset.tolist(), events.offset.tolist()) == ([1], [0.5], [0.75])
    item = pickle.loads(pickle.dumps(dataset(store)))[0]  # as a spawned worker has it
    assert item["labelling"] == STRONG
    assert item["events"].label.tolist() == [1, 0]


def test_crops_begin_anywhere_in_a_recording(tmp_path: Path) -> None:
    """Pieces of 2 s at 100 Hz, whose samples count on: sound and events are the recording's from the start on."""
    with ClipStoreWriter(tmp_path / "folder.h5", clip_samples=200, sample_rate=100, labels=["a", "b"]) as writer:
        for k, end in ((0, 200), (1, 400), (2, 500)):
            events = {0: [Event(0, 1.0, 2.0)], 1: [Event(0, 0.0, 0.5), Event(1, 1.5, 2.0)], 2: []}[k]
            sound = np.arange(200 * k, end, dtype=np.int16)
            writer.add(Clip(f"x.wav#t={2 * k},{end // 100}", sound, [], split="train", events=events))
    clips = FrameClipDataset(read_store_table(tmp_path / "folder.h5"), clip_samples=200, fit="pad", crops=True)
    batch = clips.__getitems__([0 + 3 * (PARTS // 2), 1 + 3 * (PARTS * 3 // 4), 2 + 3 * (PARTS // 2), 0])
    starts = [100, 348, 400, 0]
    for place, start in enumerate(starts):
        wanted = np.arange(start, start + 200)
        np.testing.assert_array_equal(batch["waveform"][place].numpy(), np.where(wanted < 500, wanted, 0))
    frames = rasterize(batch["events"], clips=4, classes=2, steps=50, seconds=2.0)
    whole = np.zeros((150, 2))  # steps of 40 ms of the recording
    whole[25:63, 0], whole[62, 0], whole[87, 1], whole[88:100, 1] = 1, 0.5, 0.5, 1
    for place, start in enumerate(starts):
        np.testing.assert_allclose(frames[place].numpy(), whole[start // 4 :][:50], atol=1e-4)
    assert batch["labelling"].tolist() == [STRONG] * 4


def test_an_older_store_tells_by_its_events(store: Path) -> None:
    with h5py.File(store, "a") as file:
        del file["labelling"]
    labelling = read_store_table(store).labelling
    assert labelling is not None
    assert labelling.tolist() == [STRONG] * 3


def test_teachers_logits_come_by_name(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "teacher.h5"
    logits = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    with TeacherWriter(path, labels=["a", "b"], steps=4, clip_seconds=4.0, source="test") as writer:
        writer.add(["weak.wav"], logits)
    batch = dataset(store, teacher=TeacherLogits(path, ["a", "b"])).__getitems__([0, 1])
    assert batch["has_teacher"].tolist() == [False, True]
    assert torch.equal(batch["teacher"][1], torch.from_numpy(logits[0]).half())
    assert not batch["teacher"][0].any()


def test_seconds_of_events_balance_the_classes(store: Path) -> None:
    clip, label, seconds = event_seconds(read_store_table(store).select(np.array([2, 0])))
    assert (clip.tolist(), label.tolist(), seconds.tolist()) == ([1, 1], [1, 0], [0.5, 7.5])
    # Class 0: 9 s in clip 0, 1 s in clip 1. Class 1: 1 s in clip 2. Clip 3 is silent.
    events = np.array([0, 1, 2]), np.array([0, 0, 1]), np.array([9.0, 1.0, 1.0])
    sampler = FrameBalancedSampler(events, 4, seed=1)
    sampler.length = 60000
    shares = np.bincount(sampler.draw(np.random.default_rng(0)), minlength=4) / 60000
    np.testing.assert_allclose(shares, [0.3, 1 / 30, 1 / 3, 1 / 3], atol=0.01)
    assert list(sampler) == list(sampler)
    with pytest.raises(UserError, match="events"):
        FrameBalancedSampler((np.zeros(0, int), np.zeros(0, int), np.zeros(0)), 4, seed=1)


def test_published_weights_of_active_frames() -> None:
    """Those of PretrainedSED for a table of frames (clips, classes), times 1000; a clip without events is not drawn."""
    count = np.array([
        [0, 0, 0, 0, 0, 0], [250, 0, 0, 0, 0, 0], [170, 45, 0, 33, 77, 0], [172, 0, 0, 0, 139, 150],
        [80, 0, 106, 0, 0, 16], [84, 0, 232, 0, 23, 0], [99, 83, 7, 138, 0, 0], [210, 0, 131, 0, 0, 0],
    ])  # fmt: skip
    weights = [0, 228.310496, 890.485719, 1439.112355, 364.178181, 620.712217, 1316.128569, 450.674102]
    clip, label = np.nonzero(count)
    options: dict[str, Any] = {"published": True, "replacement": False, "seed": 1}
    sampler = FrameBalancedSampler((clip, label, count[clip, label]), 8, draws=7, **options)
    np.testing.assert_allclose(1000 * sampler.weight, weights, rtol=1e-6)
    drawn = [list(sampler) for sampler.epoch in range(4000)]
    assert all(sorted(each) == list(range(1, 8)) for each in drawn)  # each once
    first = np.bincount([each[0] for each in drawn], minlength=8) / len(drawn)
    np.testing.assert_allclose(first, np.array(weights) / np.sum(weights), atol=0.03)
    with pytest.raises(UserError, match="epoch_clips"):
        FrameBalancedSampler((clip, label, count[clip, label]), 8, **options)


def test_active_frames_of_a_table(store: Path) -> None:
    """0.5 to 1 s touches frames 12 to 24, 1.5 s on all from 37 on of 100."""
    clip, label, frames = active_frames(read_store_table(store).select(np.array([2, 0])), 4.0)
    assert sorted(zip(clip.tolist(), label.tolist(), frames.tolist(), strict=True)) == [(1, 0, 63), (1, 1, 13)]


def test_an_epoch_has_as_many_draws_as_were_asked_for(demo_workspace: Path) -> None:
    """Of 14 clips, for every way of drawing; the steps follow."""
    ways: list[dict[str, Any]] = [{}, {"balanced_data": True}, {"labelling_shares": "1,0,0"}]
    ways += [{"balanced_data": True, "balanced_by": by} for by in ("frames", "active_frames")]
    for changes in ways:
        for draws in (6, 30):
            data = load_training_data(tiny(demo_workspace, epoch_clips=draws, **changes), ("train",))
            loader = data.train_dataloader()
            assert isinstance(loader.sampler, EpochSampler)
            assert len(list(loader.sampler)) == draws
            assert len(loader) == data.steps_per_epoch(1)
    counts = np.bincount(list(EpochSampler(14, seed=1, draws=30)))
    assert set(counts.tolist()) == {2, 3}  # none twice before all were there


def test_batches_have_the_shares_that_were_asked_for() -> None:
    kinds = np.repeat([STRONG, WEAK, UNLABELLED], [20, 4, 40])
    whole = LabellingSampler(kinds, [0.25, 0.25, 0.5], 8, seed=3)
    drawn = np.array(list(whole))
    assert len(drawn) == 64
    for batch in drawn.reshape(-1, 8):
        assert np.bincount(kinds[batch], minlength=3).tolist() == [4, 2, 2]
        assert (kinds[batch] == kinds[batch[::-1]]).all()  # the partners of mixup, of which each knows as much
    strong = drawn[kinds[drawn] == STRONG]
    assert len(set(strong)) == len(strong)  # none twice before all were there
    halves = [list(LabellingSampler(kinds, [0.25, 0.25, 0.5], 8, seed=3, rank=rank, world=2)) for rank in (0, 1)]
    for half in halves:
        for batch in np.array(half).reshape(-1, 4):
            assert np.bincount(kinds[batch], minlength=3).tolist() == [2, 1, 1]
    with pytest.raises(UserError, match="no strong clip"):
        LabellingSampler(kinds, [0.05, 0.45, 0.5], 8, seed=3)
    with pytest.raises(UserError, match="no weak training clips"):
        LabellingSampler(kinds[kinds != WEAK], [0.5, 0.25, 0.25], 8, seed=3)


def tiny(workspace: Path, **changes: Any) -> Config:
    values = {**LEAN, "workspace": str(workspace / "workspace"), "loss_type": "frame_bce", "spec_augment": False}
    return resolve({**values, "mixup_alpha": 0.0, **changes})


def first_batch(settings: Config, clips: int = 8) -> tuple[FrameSEDWrapper, dict[str, Any]]:
    torch.manual_seed(0)
    data = load_training_data(settings, ("train",))
    wrapper = build_wrapper(build_model(settings), settings, data.tables["train"].labels).train()
    assert isinstance(wrapper, FrameSEDWrapper)
    wrapper.log = lambda *_, **__: None  # type: ignore[method-assign]
    return wrapper, data.dataset("train").__getitems__(range(clips))


def test_the_loss_says_which_training(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, loss_type="clip_bce")
    assert type(build_wrapper(build_model(settings), settings, [])) is SEDWrapper


@pytest.mark.slow
def test_times_are_learned_by_heart(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, htsat_drop_path=0.0)
    wrapper, batch = first_batch(settings, clips=4)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        loss = wrapper.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
    waveform, targets = wrapper.augment_waveform(wrapper.sound(batch), batch)
    with torch.no_grad():
        found = wrapper.eval()(waveform).frame_logits > 0
    assert targets.frames is not None
    wanted = targets.frames >= 0.5
    assert wanted.any()
    assert (found == wanted).float().mean() > 0.97
    assert (found & wanted).sum() / (found | wanted).sum() > 0.8


def reaching_the_loss(wrapper: FrameSEDWrapper, batch: dict[str, Any]) -> tuple[Tensor, Targets]:
    """Features and targets of a training step, without the network's work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper.sed_model, "forward_features", lambda features: features)
        patch.setattr(wrapper.sed_model, "forward_head", lambda maps: maps)
        patch.setattr(wrapper, "loss", lambda _, targets, features: (features, targets))
        features, targets = wrapper.training_loss(batch)
    return features, targets


def frames_of(wrapper: FrameSEDWrapper, batch: dict[str, Any]) -> Tensor:
    frames = reaching_the_loss(wrapper, batch)[1].frames
    assert frames is not None
    return frames


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"enable_time_shift": True},
        {"crop_size": 200000},
        {"gain_range": 12.0},
        {"frequency_warp": 0.2, "filter_augment": 6.0},
        {"enable_time_shift": True, "crop_size": 160000, "spec_augment": True, "filter_augment": 3.0},
    ],
    ids=str,
)
def test_labels_follow_the_sound_to_the_loss(demo_workspace: Path, changes: dict[str, Any]) -> None:
    """A loud second in silence, wherever the augmentations bring it: the loudest steps are those of the target."""
    wrapper, batch = first_batch(tiny(demo_workspace, **changes), clips=4)
    wrapper.sed_model.bn0.eval()  # type: ignore[union-attr]  # so that loudness stays loudness
    waveform = torch.zeros(4, 320000)
    waveform[:, 128000:160000] = torch.randn(4, 32000) * 0.3
    batch["waveform"] = waveform
    clips = torch.arange(4)
    one = Events(clips, clips, torch.full((4,), 4.0), torch.full((4,), 5.0))
    teacher = torch.full((4, 10, 40), -20.0)
    teacher[range(4), range(4), 16:20] = 20.0
    batch |= {"events": one, "teacher": teacher.half(), "has_teacher": torch.ones(4, dtype=torch.bool)}
    for seed in range(5):
        torch.manual_seed(seed)
        features, targets = reaching_the_loss(wrapper, batch)
        assert targets.teacher is not None
        assert targets.frames is not None
        loud = torch.nn.functional.adaptive_avg_pool1d(features.amax(dim=1)[:, None], targets.frames.shape[1])[:, 0]
        for clip in range(4):
            target = targets.frames[clip, :, clip]
            torch.testing.assert_close(targets.teacher[clip, :, clip], target, atol=2e-3, rtol=0)
            if target.max() > 0.9:
                assert target[loud[clip].argmax()] > 0.3
            assert not targets.frames[clip, :, [k for k in range(10) if k != clip]].any()


@pytest.mark.parametrize("waveforms", [False, True])
def test_mixup_mixes_what_is_known_alike(demo_workspace: Path, waveforms: bool) -> None:
    wrapper, batch = first_batch(tiny(demo_workspace, mixup_alpha=0.5, mixup_waveforms=waveforms), clips=4)
    batch["labelling"] = torch.tensor([STRONG, WEAK, STRONG, STRONG])  # the partners: 0 and 3, 1 and 2
    plain = wrapper.augment_waveform(wrapper.sound(batch), batch)[1].frames
    assert plain is not None
    frames = frames_of(wrapper, batch)
    assert torch.equal(frames[1:3], plain[1:3])
    assert ((frames[0] > 0) == (plain[0] + plain[3] > 0)).all()
    assert not torch.equal(frames[0], plain[0])
    batch["has_teacher"] = torch.tensor([True, False, False, False])  # the teacher's scores cannot be mixed with none
    batch["teacher"] = torch.zeros(4, 10, 40).half()
    assert torch.equal(frames_of(wrapper, batch)[[0, 3]], plain[[0, 3]])


def test_a_mask_lies_over_both_sounds_that_were_mixed(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of each clip is masked, another half than its partner's: of mixed waveforms, nothing is left there."""

    def mask_halves(features: Tensor, count: int, longest: int) -> tuple[Tensor, Tensor]:
        kept = torch.ones(4, features.shape[2], dtype=torch.bool)
        kept[:2, :63], kept[2:, 63:] = False, False
        return features * kept[:, None], kept

    monkeypatch.setattr("training.augment.mask_time", mask_halves)
    settings = tiny(demo_workspace, mixup_alpha=0.5, mixup_waveforms=True, spec_augment=True)
    wrapper, batch = first_batch(settings, clips=4)
    frames = frames_of(wrapper, batch)
    assert frames[:2, 17:].any()
    assert frames[:2, :16].max() < 1e-6
    assert frames[2:, 16:].max() < 1e-6


def test_weak_clips_teach_by_their_classes(demo_workspace: Path) -> None:
    wrapper, batch = first_batch(tiny(demo_workspace, loss_type="weak_strong_bce"), clips=4)
    batch["labelling"] = torch.tensor([STRONG, WEAK, UNLABELLED, STRONG])
    wrapper.eval()
    before = wrapper.training_loss(batch)
    batch["target"][2] = 1 - batch["target"][2]  # nothing is known of it
    assert torch.equal(wrapper.training_loss(batch), before)
    batch["target"][1] = 1 - batch["target"][1]
    assert not torch.equal(wrapper.training_loss(batch), before)


def test_a_teacher_has_its_share(demo_workspace: Path) -> None:
    losses = {}
    for weight in (0.0, 0.5, 1.0):
        wrapper, batch = first_batch(tiny(demo_workspace, distillation_weight=weight), clips=4)
        batch |= {"teacher": torch.randn(4, 10, 40).half(), "has_teacher": torch.ones(4, dtype=torch.bool)}
        wrapper.eval()
        losses[weight] = wrapper.training_loss(batch).item()
        if weight == 1.0:
            batch["has_teacher"][:] = False  # no clip of the batch has one: the labels have it all
            assert wrapper.training_loss(batch).item() == pytest.approx(losses[0.0], rel=1e-6)
    assert losses[0.5] == pytest.approx((losses[0.0] + losses[1.0]) / 2, rel=1e-5)


def test_data_without_times_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "workspace/data/demo/demo.h5"
    with ClipStoreWriter(path, clip_samples=8, sample_rate=32000, labels=[str(k) for k in range(10)]) as writer:
        for split in ("train", "validation"):
            writer.add(Clip(split, np.ones(8, np.int16), [1], split=split))
    with pytest.raises(UserError, match="event times for train"):
        load_training_data(tiny(tmp_path), ("train", "validation"))


def test_processes_learn_from_all_their_clips_alike(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, with 3 and 1 labelled clips, 1 and 2 with a teacher: the mean of their losses is that of one."""
    settings = tiny(demo_workspace, loss_type="weak_strong_bce", htsat_drop_path=0.0)
    wrapper, _ = first_batch(settings)
    wrapper.sed_model.eval()
    batch = load_training_data(settings, ("train",)).dataset("train").__getitems__(range(8))
    batch["labelling"] = torch.tensor([STRONG, WEAK, STRONG, 0, 0, WEAK, 0, 0])
    batch["teacher"] = torch.randn(8, 10, 4).half()
    batch["has_teacher"] = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0]).bool()
    alone = wrapper.training_loss(batch)
    losses = []
    for part in (slice(0, 4), slice(4, 8)):
        events = batch["events"]
        inside = (events.clip >= part.start) & (events.clip < part.stop)
        columns = (events.clip[inside] - part.start, events.label[inside], events.onset[inside], events.offset[inside])
        mine = {name: value[part] for name, value in batch.items() if isinstance(value, Tensor)}
        calls = iter([4.0, 3.0])  # the sums over both processes, in the order in which they are asked for

        def sum_of_processes(count: Tensor, sums: Any = calls) -> Tensor:
            return torch.tensor(next(sums))

        trainer = type("Trainer", (), {"world_size": 2})()
        with monkeypatch.context() as patch:
            patch.setattr(sed_model, "sum_of_processes", sum_of_processes)
            patch.setattr(wrapper, "_trainer", trainer)
            patch.setattr(FrameSEDWrapper, "trainer", trainer)
            losses.append(wrapper.training_loss({**mine, "events": type(events)(*columns)}))
    torch.testing.assert_close(torch.stack(losses).mean(), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_command_trains_and_resumes(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything at once; a resumed run ends with the weights of an unbroken one, teacher and all."""
    monkeypatch.chdir(demo_workspace)
    words = ["train", *LEAN_FLAGS, "--loss_type", "weak_strong_bce", "--mean_teacher", "1"]
    words += ["--mixup_alpha", "0.5", "--enable_time_shift", "True", "--filter_augment", "3", "--mix_style", "0.5"]
    words += ["--balanced_data", "True", "--balanced_by", "frames", "--sequence_head", "gru", "--sequence_dim", "8"]
    words += ["--lr_schedule", "cosine", "--max_epoch", "2", "--epoch_clips", "16", "--random_crops", "True"]
    words += ["--augment_by", "batches", "--wavmix", "0.5", "--frame_shift", "0.1", "--time_mask", "0.2"]
    words += ["--touched_targets", "True", "--decay_matrices_only", "True", "--layer_decay", "0.9"]
    call(*words, "--exp_name", "frames")
    whole_step = SEDWrapper.training_step

    def stop(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 6:  # in the middle of the second epoch
            raise UserError("stopped")
        return whole_step(self, batch, batch_idx)

    words += ["--exp_name", "broken", "--checkpoint_every_steps", "1", "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(SEDWrapper, "training_step", stop)
        assert main.main(words) == 2
    call(*words)
    whole, broken = (last_checkpoint(name)["state_dict"] for name in ("frames", "broken"))
    assert any(key.startswith("teacher.") for key in whole)
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    names = [path.name for path in Path("workspace/runs/frames/checkpoints").glob("epoch_*.ckpt")]
    assert all("-frame_mAP_" in name for name in names)
    best = "workspace/runs/frames/checkpoints/best.ckpt"
    assert not any("teacher" in key for key in read_checkpoint(best).state_dict)
    call("test", "--resume_checkpoint", best, "--fl_local", "True", "--accelerator", "cpu")
