"""Training on event times: what a batch brings, that labels follow the sound, teachers, and the whole command."""

import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

import main
from clip_dataset import FrameClipDataset
from data_generator import SEDDataModule, event_seconds
from evaluation.scores import load_scores
from frame_training import FrameSEDWrapper, Targets, build_wrapper
from model import build_model
from model.checkpoint import read_checkpoint
from prepare.clip_store import STRONG, UNLABELLED, WEAK, Clip, ClipStoreWriter, Event, read_store_table
from prepare.demo import LABELS
from pseudo_labels import TeacherWriter
from samplers import FrameBalancedSampler, LabellingSampler
from sed_model import SEDWrapper
from settings import Config, resolve
from tests.helpers import TINY, TINY_FLAGS

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
    return FrameClipDataset(read_store_table(store), clip_samples=samples, fit=fit, sample_rate=RATE, **more)


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


def test_an_older_store_tells_by_its_events(store: Path, tmp_path: Path) -> None:
    import h5py

    with h5py.File(store, "a") as file:
        del file["labelling"]
    assert read_store_table(store).labelling is not None
    assert read_store_table(store).labelling.tolist() == [STRONG] * 3  # type: ignore[union-attr]


def test_teachers_logits_come_by_name(store: Path, tmp_path: Path) -> None:
    from pseudo_labels import TeacherLogits

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
    with pytest.raises(ValueError, match="No clip has events"):
        FrameBalancedSampler((np.zeros(0, int), np.zeros(0, int), np.zeros(0)), 4, seed=1)


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
    with pytest.raises(ValueError, match="leaves no strong clip among the 8 of a batch"):
        LabellingSampler(kinds, [0.05, 0.45, 0.5], 8, seed=3)
    with pytest.raises(ValueError, match="no weak training clips"):
        LabellingSampler(kinds[kinds != WEAK], [0.5, 0.25, 0.25], 8, seed=3)


def tiny(workspace: Path, **changes: Any) -> Config:
    values = {**TINY, "workspace": str(workspace / "workspace"), "loss_type": "frame_bce", "spec_augment": False}
    return resolve({**values, "mixup_alpha": 0.0, **changes})


def first_batch(settings: Config, clips: int = 8) -> tuple[FrameSEDWrapper, dict[str, Any]]:
    torch.manual_seed(0)
    data = SEDDataModule(settings, ("train",))
    wrapper = build_wrapper(build_model(settings), settings, data.tables["train"].labels).train()
    assert isinstance(wrapper, FrameSEDWrapper)
    wrapper.log = lambda *_, **__: None  # type: ignore[method-assign]
    return wrapper, data.dataset("train").__getitems__(range(clips))


def test_the_loss_says_which_training(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, loss_type="clip_bce")
    assert type(build_wrapper(build_model(settings), settings, [])) is SEDWrapper


def test_times_are_learned_by_heart(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, htsat_drop_path=0.0, htsat_readout_stage=3)
    wrapper, batch = first_batch(settings)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        loss = wrapper.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0)
        optimizer.step()
    waveform, targets = wrapper._hear(batch["waveform"] / 32767, batch)
    with torch.no_grad():
        found = wrapper.eval()(waveform)["framewise_logits"] > 0
    wanted = targets.frames >= 0.5
    assert wanted.any()
    assert (found == wanted).float().mean() > 0.97
    assert (found & wanted).sum() / (found | wanted).sum() > 0.8


class HeardError(Exception):
    """Ends a training step where the network would begin."""


def heard(wrapper: FrameSEDWrapper, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Targets]:
    """Features and targets as they reach the loss."""
    seen: dict[str, Any] = {}
    outputs = {"framewise_logits": torch.zeros(()), "clipwise_logits": torch.zeros(())}
    monkeypatch.setattr(wrapper.sed_model, "forward_logmel", lambda logmel: seen.update(logmel=logmel) or outputs)

    def label_loss(_: Any, targets: Targets) -> Tensor:
        seen["targets"] = targets
        raise HeardError

    monkeypatch.setattr(wrapper, "_label_loss", label_loss)
    with pytest.raises(HeardError):
        wrapper.training_loss(batch)
    return seen["logmel"], seen["targets"]


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
def test_labels_follow_the_sound_to_the_loss(
    demo_workspace: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A loud second in silence, wherever the augmentations bring it: the loudest steps are those of the target."""
    settings = tiny(demo_workspace, **changes)
    wrapper, batch = first_batch(settings, clips=4)
    wrapper.sed_model.bn0.eval()  # so that loudness stays loudness
    waveform = torch.zeros(4, 320000)
    waveform[:, 128000:160000] = torch.randn(4, 32000) * 0.3
    batch["waveform"] = waveform
    events = batch["events"]
    one = type(events)(torch.arange(4), torch.arange(4), torch.full((4,), 4.0), torch.full((4,), 5.0))
    teacher = torch.full((4, 10, 40), -20.0)
    teacher[range(4), range(4), 16:20] = 20.0
    batch |= {"events": one, "teacher": teacher.half(), "has_teacher": torch.ones(4, dtype=torch.bool)}
    for seed in range(5):
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            logmel, targets = heard(wrapper, batch, patch)
        assert targets.teacher is not None
        steps = targets.frames.shape[1]
        loud = torch.nn.functional.adaptive_avg_pool1d(logmel.amax(dim=1)[:, None], steps)[:, 0]
        for clip in range(4):
            target = targets.frames[clip, :, clip]
            torch.testing.assert_close(targets.teacher[clip, :, clip], target, atol=2e-3, rtol=0)
            if target.max() > 0.9:
                assert target[loud[clip].argmax()] > 0.3
            assert not targets.frames[clip, :, [k for k in range(10) if k != clip]].any()


def test_mixup_mixes_what_is_known_alike(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for waveforms in (False, True):
        wrapper, batch = first_batch(tiny(demo_workspace, mixup_alpha=0.5, mixup_waveforms=waveforms), clips=4)
        batch["labelling"] = torch.tensor([STRONG, WEAK, STRONG, STRONG])  # the partners: 0 and 3, 1 and 2
        plain = wrapper._hear(batch["waveform"] / 32767, batch)[1].frames
        frames = heard(wrapper, batch, monkeypatch)[1].frames
        assert torch.equal(frames[1:3], plain[1:3])
        shared = plain[0] + plain[3]
        assert ((frames[0] > 0) == (shared > 0)).all()
        assert not torch.equal(frames[0], plain[0])


def test_a_mask_lies_over_both_sounds_that_were_mixed(
    demo_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of each clip is masked, another half than its partner's: of mixed waveforms, nothing is left there."""

    def mask_halves(logmel: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.ones_like(targets)
        keep[:2, :16], keep[2:, 16:] = 0, 0
        return logmel, targets * keep

    monkeypatch.setattr("augment_features.mask_time", mask_halves)
    settings = tiny(demo_workspace, mixup_alpha=0.5, mixup_waveforms=True, spec_augment=True)
    wrapper, batch = first_batch(settings, clips=4)
    frames = heard(wrapper, batch, monkeypatch)[1].frames
    assert frames[:2, 16:].any()
    assert not frames[:2, :16].any()
    assert not frames[2:, 16:].any()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "clip_bce", "mean_teacher": 1.0}, "mean_teacher: only loss_type = frame_bce"),
        ({"task": "single_label"}, "set task = multilabel"),
        ({"enable_token_label": True}, "do not go with"),
        ({"labelling_shares": [0.5, 0.6, 0.1]}, "0.25,0.25,0.5"),
        ({"labelling_shares": [0.5, 0.5, 0.0], "balanced_data": True}, "set one of them"),
        ({"distillation_weight": 1.5}, "at most 1"),
        ({"balanced_by": "frames"}, "set --balanced_data True"),
        ({"mixup_waveforms": True, "mixup_alpha": 0.0}, "no effect with mixup_alpha = 0"),
    ],
)
def test_settings_that_cannot_be(demo_workspace: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(demo_workspace, **changes)


def test_data_without_times_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "workspace/data/demo/demo.h5"
    with ClipStoreWriter(path, clip_samples=8, sample_rate=32000, labels=[str(k) for k in range(10)]) as writer:
        for split in ("train", "validation"):
            writer.add(Clip(split, np.ones(8, np.int16), [1], split=split))
    with pytest.raises(ValueError, match="needs clips with event times for train"):
        SEDDataModule(tiny(tmp_path), ("train", "validation"))


def test_processes_learn_from_all_their_clips_alike(
    demo_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, with 3 and 1 labelled clips, 1 and 2 with a teacher: the mean of their losses is that of one."""
    settings = tiny(demo_workspace, loss_type="weak_strong_bce", htsat_drop_path=0.0)
    wrapper, _ = first_batch(settings)
    wrapper.sed_model.eval()
    batch = SEDDataModule(settings, ("train",)).dataset("train").__getitems__(range(8))
    batch["labelling"] = torch.tensor([STRONG, WEAK, STRONG, 0, 0, WEAK, 0, 0])
    batch["teacher"] = torch.randn(8, 10, 4).half()
    batch["has_teacher"] = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0]).bool()
    alone = wrapper.training_loss(batch)
    totals = {3: 4.0, 1: 4.0, 2: 3.0}  # labelled clips; those with a teacher, of which 1 is taken apart below
    losses = []
    for rank, part in enumerate((slice(0, 4), slice(4, 8))):
        events = batch["events"]
        inside = (events.clip >= part.start) & (events.clip < part.stop)
        columns = (events.clip[inside] - part.start, events.label[inside], events.onset[inside], events.offset[inside])
        mine = {name: value[part] for name, value in batch.items() if isinstance(value, Tensor)}
        calls = iter([4.0, 3.0])  # the sums over both processes, in the order in which they are asked for

        class Strategy:
            @staticmethod
            def reduce(count: Tensor, reduce_op: str, sums: Any = calls) -> Tensor:
                assert reduce_op == "sum"
                return torch.tensor(next(sums))

        trainer = type("Trainer", (), {"world_size": 2, "strategy": Strategy})()
        with monkeypatch.context() as patch:
            patch.setattr(wrapper, "_trainer", trainer)
            patch.setattr(FrameSEDWrapper, "trainer", trainer)
            losses.append(wrapper.training_loss({**mine, "events": type(events)(*columns)}))
    torch.testing.assert_close(torch.stack(losses).mean(), alone, rtol=1e-5, atol=1e-6)


def test_clips_without_labels_validate_nothing(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, batch = first_batch(tiny(demo_workspace, loss_type="weak_strong_bce"), clips=4)
    logged: dict[str, float] = {}
    monkeypatch.setattr(wrapper, "log", lambda name, value, **_: logged.update({name: float(value)}))
    monkeypatch.setattr(FrameSEDWrapper, "trainer", type("Trainer", (), {"world_size": 1})())
    batch["labelling"] = torch.tensor([STRONG, WEAK, UNLABELLED, STRONG])
    found = []
    for _ in range(2):
        wrapper.eval().on_validation_epoch_start()
        with torch.no_grad():
            wrapper.validation_step(batch, 0)
        wrapper.on_validation_epoch_end()
        found.append(dict(logged))
        batch["target"][2] = 1 - batch["target"][2]
    assert found[0]["mAP"] > 0
    assert found[0] == found[1]


def changed_store(workspace: Path, folder: Path, change: Any) -> Path:
    """A copy of the demo's data under `folder`, changed by a function of the open file; returns its dataset_path."""
    folder.mkdir()
    shutil.copy(workspace / "workspace/data/demo/demo.h5", folder / "demo.h5")
    with h5py.File(folder / "demo.h5", "r+") as file:
        change(file)
    return folder


def test_clip_labels_leave_out_what_has_none(demo_workspace: Path, tmp_path: Path) -> None:
    """To clip_bce, a clip without labels would be one without any class."""

    def forget(file: h5py.File) -> None:
        file["labelling"][:4] = UNLABELLED
        file["target"][:4] = False

    place = str(changed_store(demo_workspace, tmp_path / "some", forget))
    settings = tiny(demo_workspace, loss_type="clip_bce", dataset_path=place)
    with pytest.warns(UserWarning, match="4 of 14 clips for train have no labels: clip_bce leaves them out"):
        data = SEDDataModule(settings, ("train",))
    assert len(data.tables["train"]) == 10
    settings = tiny(demo_workspace, loss_type="weak_strong_bce", dataset_path=place)
    with pytest.warns(UserWarning, match="4 of 14 training clips have no labels, and weak_strong_bce learns nothing"):
        assert len(SEDDataModule(settings, ("train",)).tables["train"]) == 14


def test_events_that_are_never_heard_are_told(demo_workspace: Path) -> None:
    settings = tiny(demo_workspace, clip_samples=96000, balanced_data=True, balanced_by="frames")
    with pytest.warns(UserWarning, match=r"\d+ of \d+ events for train begin after the 3 s"):
        data = SEDDataModule(settings, ("train",))
    table = data.tables["train"]
    clip, _, seconds = event_seconds(table, 3.0)
    assert 0 < seconds.min() <= seconds.max() <= 3.0
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, FrameBalancedSampler)
    deaf = sorted(set(range(len(table))) - set(clip.tolist()))  # clips that sound after the 3 s only are silent
    weight = np.diff(sampler.upto, prepend=0)
    np.testing.assert_allclose(weight[deaf], 1 / len(deaf))


def test_a_split_without_events_is_refused(demo_workspace: Path, tmp_path: Path) -> None:
    def silence(file: h5py.File) -> None:
        validating = np.flatnonzero(file["split"][:] == b"validation")
        kept = ~np.isin(file["event_clip"][:], validating)
        for name in ("event_clip", "event_class", "event_onset", "event_offset"):
            column = file[name][:][kept]
            del file[name]
            file[name] = column

    place = str(changed_store(demo_workspace, tmp_path / "silent", silence))
    with pytest.raises(ValueError, match="No clip for validation in .* has an event"):
        SEDDataModule(tiny(demo_workspace, dataset_path=place), ("train", "validation"))


def test_a_teacher_of_clips_of_another_length_is_refused(demo_workspace: Path, tmp_path: Path) -> None:
    data = SEDDataModule(tiny(demo_workspace), ("train",)).tables["train"]
    names = [name.decode() for name in data.names]
    for seconds, name in ((5.0, "short.h5"), (10.0, "long.h5")):
        writer = TeacherWriter(tmp_path / name, labels=data.labels, steps=4, clip_seconds=seconds, source="test")
        with writer:
            writer.add(names[:7], np.zeros((7, 10, 4)))
    with pytest.raises(ValueError, match="5 s a clip, and the network is given 10 s"):
        SEDDataModule(tiny(demo_workspace, teacher_path=str(tmp_path / "short.h5")), ("train",))
    with pytest.warns(UserWarning, match="has 50.0% of the 14 training clips"):
        SEDDataModule(tiny(demo_workspace, teacher_path=str(tmp_path / "long.h5")), ("train",))


def test_what_is_set_for_training_does_not_hinder_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """config.py as edited for a training on event times, while a checkpoint of clip labels is used."""
    edited = types.ModuleType("config")
    values = {**resolve({"loss_type": "frame_bce"}).model_dump(), "mean_teacher": 1.0, "gain_range": 3.0}
    vars(edited).update({name: value for name, value in values.items()})
    monkeypatch.setitem(sys.modules, "config", edited)
    settings = resolve({}, checkpoint=resolve({"loss_type": "frame_bce"}).model_dump() | {"loss_type": "clip_bce"})
    assert settings.loss_type == "clip_bce"


def test_a_test_leaves_out_what_is_not_known(
    demo_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Events found in a weak clip would be false alarms; an event after clip_samples could not be found."""
    monkeypatch.chdir(tmp_path)

    def forget(file: h5py.File) -> None:
        first, second, _ = np.flatnonzero(file["split"][:] == b"test")
        file["labelling"][first], file["labelling"][second] = WEAK, UNLABELLED

    place = changed_store(demo_workspace, tmp_path / "known", forget)
    settings = tiny(tmp_path, exp_name="known", clip_samples=160000)
    content = {"state_dict": {f"sed_model.{k}": v for k, v in build_model(settings).state_dict().items()}}
    torch.save({**content, "settings": settings.model_dump(), "labels": LABELS}, "known.ckpt")
    words = ["test", "--resume_checkpoint", "known.ckpt", "--accelerator", "cpu", "--dataset_path", str(place)]
    for local, clips, said in (("False", 2, "1 of 3 clips for test have no labels: they are left out"),
                               ("True", 1, "2 of 3 clips for test have no event times: they are left out")):  # fmt: skip
        assert main.main([*words, "--fl_local", local, "--heatmap_dir", "scores"]) == 0
        assert said in capsys.readouterr().out
        scores = load_scores(Path("scores/test.h5"))
        assert len(scores.names) == clips
    assert scores.events is not None
    assert all(offset <= 5.0 for _, _, offset in scores.events[0])


def test_a_run_stopped_in_an_epoch_keeps_its_mean_teacher(
    demo_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint in the middle of an epoch has the teacher of its step, not of the step before."""
    monkeypatch.chdir(demo_workspace)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ["train", *TINY_FLAGS, "--loss_type", "frame_bce", "--mean_teacher", "1", "--max_epoch", "1"]
    words += ["--checkpoint_every_steps", "1", "--labelling_shares", "1,0,0", "--resume", "auto"]
    whole = SEDWrapper.training_step

    def stop(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise ValueError("stopped")
        return whole(self, batch, batch_idx)

    assert main.main([*words, "--exp_name", "unbroken_teacher"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(SEDWrapper, "training_step", stop)
        assert main.main([*words, "--exp_name", "stopped_teacher"]) == 2
    assert main.main([*words, "--exp_name", "stopped_teacher"]) == 0
    torch.set_num_threads(threads)
    unbroken, stopped = (
        torch.load(f"workspace/runs/{name}_teacher/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("unbroken", "stopped")
    )
    assert all(torch.equal(value, stopped[key]) for key, value in unbroken.items())


def test_the_command_trains_and_goes_on(demo_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything at once; a run that is gone on with ends with the weights of an unbroken one, teacher and all."""
    monkeypatch.chdir(demo_workspace)
    words = ["train", *TINY_FLAGS, "--loss_type", "weak_strong_bce", "--mean_teacher", "1", "--mixup_alpha", "0.5"]
    words += ["--enable_time_shift", "True", "--filter_augment", "3", "--mix_style", "0.5", "--balanced_data", "True"]
    words += [
        "--balanced_by",
        "frames",
        "--sequence_head",
        "gru",
        "--sequence_dim",
        "8",
        "--lr_scheduler_epoch",
        "2,2,2",
    ]
    assert main.main([*words, "--exp_name", "frames", "--max_epoch", "2"]) == 0
    assert main.main([*words, "--exp_name", "broken", "--max_epoch", "1"]) == 0
    assert main.main([*words, "--exp_name", "broken", "--max_epoch", "2", "--resume", "auto"]) == 0
    whole, broken = (
        torch.load(f"workspace/runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("frames", "broken")
    )
    assert any(key.startswith("teacher.") for key in whole)
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    names = [path.name for path in Path("workspace/runs/frames/checkpoints").glob("epoch_*.ckpt")]
    assert all("-frame_mAP_" in name for name in names)
    best = "workspace/runs/frames/checkpoints/best.ckpt"
    assert not any("teacher" in key for key in read_checkpoint(best).state_dict)
    assert main.main(["test", "--resume_checkpoint", best, "--fl_local", "True", "--accelerator", "cpu"]) == 0
