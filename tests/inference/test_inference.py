"""One inference path for any length, rate and number of channels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from evaluation.postprocess import PostProcessing
from inference import Tagged, Tagger
from inference.tagger import BATCHES_AHEAD
from settings import UserError, resolve
from tests.helpers import TINY
from tests.levels import LABELS, RATE, Levels, levels_tagger
from tests.networks import htsat, save_network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network for 8 kHz, with labels and a calibration."""
    settings, labels = resolve({**TINY, "sample_rate": RATE}), [f"label {k}" for k in range(10)]
    calibrated = PostProcessing(tuple(labels), thresholds=(0.1,), source="calibrated").as_dict()
    content: dict[str, Any] = {"settings": settings.model_dump(), "labels": labels, "postprocessing": calibrated}
    return save_network(tmp_path_factory.mktemp("tagger") / "tiny.ckpt", htsat(TINY, sample_rate=RATE), **content)


@pytest.fixture(scope="module")
def tagger(checkpoint: Path) -> Tagger:
    return Tagger.from_checkpoint(checkpoint, device="cpu")


class Counting(Levels):
    """Levels that notes the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.batches.append(len(waveform))
        return super().probabilities(waveform)


def tagger_of(network: Levels) -> Tagger:
    return Tagger(network, resolve({"sample_rate": RATE}), LABELS)


def noise(seconds: float, rate: int = RATE) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(max(1, round(seconds * rate))).astype(np.float32)


def check_shape(tagged: Tagged, seconds: float) -> None:
    times = tagged.times()
    assert tagged.duration == pytest.approx(seconds, abs=1.01 / RATE)
    assert times[0, 0] == 0
    assert times[-1, 1] == tagged.duration
    np.testing.assert_array_equal(times[1:, 0], times[:-1, 1])
    assert (times[:, 1] > times[:, 0]).all()
    assert len(tagged.framewise) == len(times) == max(1, int(tagged.duration / tagged.seconds_per_frame + 0.5 + 1e-9))
    lengths = times[:, 1] - times[:, 0]
    assert len(times) == 1 or lengths.min() > 0.49 * tagged.seconds_per_frame  # no row of a millisecond at the end
    assert np.isfinite(tagged.framewise).all()


@pytest.mark.parametrize("seconds", [0.01, 0.3125, 1, 9.99, 10, 10.0001, 10.3, 14.9, 25, 31.3, 600])
def test_output_is_as_long_as_the_input(seconds: float) -> None:
    tagged = levels_tagger().tag(np.full(round(seconds * RATE), 0.5, np.float32))
    check_shape(tagged, seconds)
    whole = slice(0, -1 if tagged.duration < 10 else None)  # zeros follow a short recording
    np.testing.assert_allclose(tagged.framewise[whole, 0], 0.5, atol=1e-6)
    assert not tagged.framewise[:, 1].any()


@pytest.mark.filterwarnings("ignore:.*clipped")
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_files_of_every_rate_and_number_of_channels(rate: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    sound = noise(12.7, rate)
    sound[rate : 2 * rate] += 0.5
    soundfile.write(path, np.stack([sound * (k + 1) for k in range(channels)], axis=1), rate, subtype="FLOAT")
    tagger = levels_tagger()
    tagged = tagger.tag_file(path)
    check_shape(tagged, 12.7)
    mean = (channels + 1) / 2
    assert tagged.framewise[4:6, 0] == pytest.approx(0.5 * mean, abs=0.05 * mean)
    array = tagger.tag(np.stack([sound * (k + 1) for k in range(channels)]), rate)
    np.testing.assert_allclose(tagged.framewise, array.framewise, atol=1e-5)


def test_the_network_itself_at_any_length(tagger: Tagger) -> None:
    for seconds in (0.01, 7, 10.2, 33):
        tagged = tagger.tag(noise(seconds), frame_embeddings=True)
        check_shape(tagged, seconds)
        assert tagged.frame_embeddings is not None
        assert tagged.frame_embeddings.shape == (len(tagged.framewise), 128)
        assert tagged.embedding.shape == (128,)


@pytest.mark.parametrize("sound", [np.zeros(120000), np.ones(120000), -np.ones(120000), np.tile([1.0, -1.0], 60000)])
def test_silence_and_full_scale(tagger: Tagger, sound: np.ndarray) -> None:
    tagged = tagger.tag(sound)
    check_shape(tagged, 15)
    assert ((tagged.clipwise >= 0) & (tagged.clipwise <= 1)).all()


def test_ten_seconds_are_the_networks_own(tagger: Tagger) -> None:
    waveform = noise(10)
    tagged = tagger.tag(waveform, frame_embeddings=True)
    with torch.inference_mode():
        network = tagger.encoder()
        outputs = network(torch.from_numpy(waveform)[None])
        clipwise = network.class_probabilities(outputs.clip_logits)
    np.testing.assert_array_equal(tagged.clipwise, clipwise[0])
    np.testing.assert_array_equal(tagged.framewise, outputs.frame_logits[0].sigmoid())
    np.testing.assert_array_equal(tagged.embedding, outputs.embedding[0])
    assert tagged.frame_embeddings is not None
    np.testing.assert_array_equal(tagged.frame_embeddings, outputs.frames[0])
    best = tagged.top(3)
    assert [score for _, score in best] == sorted(tagged.clipwise.tolist(), reverse=True)[:3]
    assert best == tagged.top(3, tagger.labels)


@pytest.mark.filterwarnings("ignore:.*clipped")
def test_files_together_score_as_each_alone(tagger: Tagger, tmp_path: Path) -> None:
    paths = []
    for number, seconds in enumerate((3.0, 27.5, 0.2, 10.0, 12.0)):
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], noise(seconds) * (number + 1), RATE)
    (tmp_path / "bad.wav").write_text("no sound")
    paths.insert(2, tmp_path / "bad.wav")
    together = list(tagger.tag_files(paths))
    assert [path for path, _ in together] == paths
    assert isinstance(together[2][1], UserError)
    for path, found in together[:2] + together[3:]:
        assert isinstance(found, Tagged)
        alone = tagger.tag_file(path)
        for name in ("clipwise", "framewise", "embedding"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=1e-5)
        again = tagger.tag_file(path)
        np.testing.assert_array_equal(alone.embedding, again.embedding)


def test_windows_of_several_recordings_share_a_batch() -> None:
    network = Counting()
    tagger = tagger_of(network)
    sounds = [np.full(RATE, level, np.float32) for level in (0.1, 0.2, 0.3, 0.4, 0.5)]
    heard = [found for _, found in tagger.tag_waveforms(sounds)]
    assert network.batches == [4, 1]
    assert [found.framewise[0, 0] for found in heard if isinstance(found, Tagged)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5]
    )


def test_progress_counts_every_second_once(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(33.3), RATE)
    soundfile.write(tmp_path / "b.wav", noise(2), RATE)
    heard: list[float] = []
    list(levels_tagger().tag_files([tmp_path / "a.wav", tmp_path / "b.wav"], progress=heard.append))
    assert sum(heard) == pytest.approx(35.3)


EVENTS = [("up", 1.0, 3.0), ("down", 4.6, 5.4), ("up", 9.0, 11.5), ("down", 14.8, 15.2), ("up", 19.0, 26.0)]
EVENTS += [("down", 27.3, 44.1), ("up", 47.0, 48.2), ("down", 54.6, 55.8), ("up", 60.0, 64.9)]


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("before", [0.0, 0.1, 1.7, 4.93, 5.0, 8.88])
def test_events_are_the_same_wherever_windows_cut(before: float, overlap: float) -> None:
    """65 s of known events, after `before` seconds of silence: each is found once, within a step of its times."""
    sound = np.zeros(round((before + 65) * RATE), np.float32)
    for label, onset, offset in EVENTS:
        sound[round((before + onset) * RATE) : round((before + offset) * RATE)] = 0.9 if label == "up" else -0.9
    tagged = levels_tagger(window_overlap=overlap).tag(sound)
    table = tagged.events(PostProcessing(("up", "down"), thresholds=(0.3,)), "a.wav").sort_values("onset")
    found = list(table[["event_label", "onset", "offset"]].itertuples(index=False, name=None))
    assert [label for label, *_ in found] == [label for label, *_ in EVENTS]
    for (_, onset, offset), (_, true_onset, true_offset) in zip(found, EVENTS, strict=True):
        assert abs(onset - before - true_onset) <= tagged.seconds_per_frame
        assert abs(offset - before - true_offset) <= tagged.seconds_per_frame


def test_clip_scores_of_long_recordings() -> None:
    """A sound in one of several windows: the highest window says that it occurs, the mean how much."""
    sound = np.zeros(30 * RATE, np.float32)
    sound[: 10 * RATE] = 0.8
    assert levels_tagger().tag(sound).clipwise == pytest.approx([0.8, 0])
    mean = levels_tagger(clip_pooling="mean").tag(sound).clipwise
    assert mean == pytest.approx([0.8 * 1.5 / 5, 0])
    assert resolve({"dataset_type": "esc-50"}).clip_pooling == "mean"


def test_short_clips_are_filled_up_by_the_settings() -> None:
    sound = np.full(RATE, 0.5, np.float32)
    assert levels_tagger(short_clips="pad").tag(sound).clipwise == pytest.approx([0.5, 0])
    assert levels_tagger(short_clips="repeat").tag(sound).clipwise == pytest.approx([0.5, 0])


def test_a_short_recording_is_scored_by_its_own_steps(tagger: Tagger) -> None:
    """The padding does not pull the tags down: their logits are the mean of those of the steps that hold sound."""
    tagged, network = tagger.tag(noise(5.0)), tagger.encoder()
    with torch.inference_mode():
        outputs = network(torch.from_numpy(np.pad(noise(5.0), (0, 5 * RATE)))[None])
        expected = outputs.frame_logits[0, : network.frames // 2].mean(dim=0).sigmoid()
    assert len(tagged.framewise) == network.frames // 2
    np.testing.assert_allclose(tagged.clipwise, expected, rtol=1e-4)


def test_odd_sounds_are_warned_of(tagger: Tagger, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="full scale"):
        tagger.tag(noise(1) * 32767)
    silent = tagger.tag(np.zeros(RATE, np.float32))
    assert ([remark.kind for remark in silent.remarks], silent.silent) == (["silent"], True)
    soundfile.write(tmp_path / "a.wav", np.stack([noise(1), -noise(1)], axis=1), RATE)
    with pytest.warns(UserWarning, match=r"a\.wav: .* cancel"):
        assert tagger.tag_file(tmp_path / "a.wav").silent


def test_bins_and_calibrated_events(tagger: Tagger) -> None:
    tagged = tagger.tag(noise(13))
    bins = tagged.in_bins(1.0, "max")
    assert bins.framewise.shape == (13, 10)
    assert bins.seconds_per_frame == 1.0
    assert tagger.postprocessing.source == "calibrated"
    events = tagged.events(tagger.postprocessing, "a.wav")
    assert set(events.filename) == {"a.wav"}
    assert len(events) == 10  # every score lies above 0.1: one event for each class
    assert (events.onset == 0).all()
    assert np.allclose(events.offset, 13)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_is_near(checkpoint: Path, tagger: Tagger, precision: Any) -> None:
    found = Tagger.from_checkpoint(checkpoint, device="cpu", precision=precision).tag(noise(10))
    np.testing.assert_allclose(found.clipwise, tagger.tag(noise(10)).clipwise, atol=0.02)


def test_kinds_of_arrays() -> None:
    tagger = levels_tagger()
    sound = noise(2)
    expected = tagger.tag(sound).framewise
    for other in (torch.from_numpy(sound), sound.astype(np.float64), sound[None], np.stack([sound, sound])):
        np.testing.assert_allclose(tagger.tag(other).framewise, expected, atol=1e-6)
    as_int = np.round(sound * 32767).astype(np.int16)
    np.testing.assert_allclose(tagger.tag(as_int).framewise, expected, atol=1e-4)
    np.testing.assert_allclose(tagger.tag(np.stack([as_int, as_int])).framewise, expected, atol=1e-4)


def test_bad_audio_is_refused(tagger: Tagger, tmp_path: Path) -> None:
    bad: list[Any] = [
        np.zeros(0),
        np.zeros((100000, 2)),
        np.array([0.0, np.inf]),
        np.array([np.nan]),
        np.zeros((1, 2, 3)),
    ]
    bad += [np.zeros(100, np.int64), np.zeros((0, 5)), np.zeros((2, 0))]
    for waveform in bad:
        with pytest.raises(UserError, match="finite samples"):
            tagger.tag(waveform)
    with pytest.raises(UserError, match=r"missing\.wav"):
        tagger.tag_file(tmp_path / "missing.wav")
    late = noise(30)
    late[-5] = np.nan
    soundfile.write(tmp_path / "late.wav", late, RATE, subtype="FLOAT")
    with pytest.raises(UserError, match="NaN"):
        tagger.tag_file(tmp_path / "late.wav")


def test_names_of_known_checkpoints(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTSAT_CHECKPOINTS", str(tmp_path))
    with pytest.raises(UserError, match=r"HTSAT_ESC_exp=1_fold=1_acc=0\.985\.ckpt"):  # which has no address
        Tagger.from_checkpoint("htsat-esc50")
    (tmp_path / "HTSAT_AudioSet_Saved_1.ckpt").write_bytes(checkpoint.read_bytes())
    assert Tagger.from_checkpoint("htsat-audioset", device="cpu").labels[0] == "label 0"
    with pytest.raises(UserError, match="htsat-nothing"):
        Tagger.from_checkpoint("htsat-nothing")


def test_a_published_checkpoint_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files say nothing of themselves: the name brings data set, labels and front-end."""
    monkeypatch.setenv("HTSAT_CHECKPOINTS", str(tmp_path))
    save_network(tmp_path / "HTSAT_SCV2_Saved_2.ckpt", htsat(TINY, dataset_type="scv2"))
    tagger = Tagger.from_checkpoint("htsat-scv2", device="cpu", given=TINY)
    assert (tagger.settings.sample_rate, tagger.settings.short_clips, tagger.labels[0]) == (16000, "repeat", "bed")


def test_devices_and_runtimes() -> None:
    tagger = levels_tagger()
    assert tagger.to("auto").device == torch.device("cpu")
    with pytest.raises(UserError, match="warp9"):
        Tagger(torch.nn.Linear(1, 1), tagger.settings, ["up"]).to("warp9")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="embeddings of frames"):
        tagger.tag(noise(1), frame_embeddings=True)
    with pytest.raises(UserError, match="window_overlap"):
        levels_tagger(window_overlap=1.0)

    class Broken(Levels):
        def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            clip, frames, embedding = super().probabilities(waveform)
            return clip * torch.nan, frames, embedding

    with pytest.raises(UserError, match="not finite"):
        tagger_of(Broken()).tag(noise(1))


class Loud(Counting):
    """Levels that shares its scale among the windows of a batch, as 8-bit networks do: one bad one spoils all."""

    def probabilities(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clip, frames, embedding = super().probabilities(waveform)
        spoil = torch.nan if waveform.abs().max() > 100 else 1
        return clip * spoil, frames * spoil, embedding * spoil


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_recording_without_finite_scores_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """It may be long, and the others share batches with it. depth: batches begun before a result is taken."""
    monkeypatch.setitem(BATCHES_AHEAD, "cpu", depth)
    quiet, loud = np.full(RATE, 0.5, np.float32), noise(60)
    progress: list[float] = []
    loud[25 * RATE] = 1000
    network = Loud()
    tagger = tagger_of(network)
    sounds = [(k, list[Any](), (block for block in [each])) for k, each in enumerate((quiet, loud, quiet, quiet * 1.5))]
    found = [heard for _, heard in tagger._tag_all(sounds, False, progress.append)]
    errors = [number for number, heard in enumerate(found) if isinstance(heard, UserError)]
    assert errors == [1]
    assert "1000" in str(found[1])
    scores = [heard.framewise[0, 0] for heard in found if isinstance(heard, Tagged)]
    assert scores == pytest.approx([0.5, 0.5, 0.75])
    assert sum(network.batches) < 20, "what follows the bad window is not tagged"
    half = Tagger(network, tagger.settings, LABELS, precision="bf16-mixed")
    with pytest.raises(UserError, match="precision bf16-mixed"):
        half.tag(loud)
