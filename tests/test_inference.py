"""One inference path for any length."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference import Tagger, overlap_average, window_starts
from model import build_model
from settings import resolve

TINY: dict[str, Any] = {"htsat_dim": 16, "htsat_depth": [1, 1, 1, 1], "htsat_num_head": [1, 2, 4, 8]}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    torch.manual_seed(0)
    settings = resolve(TINY)
    path = tmp_path_factory.mktemp("tagger") / "tiny.ckpt"
    weights = {f"sed_model.{key}": value for key, value in build_model(settings).state_dict().items()}
    labels = [f"label {k}" for k in range(10)]
    torch.save({"state_dict": weights, "settings": settings.model_dump(), "labels": labels}, path)
    return Tagger.from_checkpoint(path, device="cpu")


def noise(seconds: float) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(int(seconds * 32000)).astype(np.float32)


@pytest.mark.parametrize(("seconds", "frames"), [(0.01, 1), (1, 4), (10, 32), (10.3, 33), (25, 80), (31.3, 101)])
def test_output_is_as_long_as_the_input(tagger: Tagger, seconds: float, frames: int) -> None:
    tagged = tagger.tag(noise(seconds))
    assert tagged.framewise.shape == (frames, 10)
    assert tagged.duration == pytest.approx(seconds, abs=1e-4)
    assert np.isfinite(tagged.framewise).all()
    assert tagged.embedding.shape == (128,)


def test_ten_seconds_are_the_networks_own(tagger: Tagger) -> None:
    waveform = noise(10)
    tagged = tagger.tag(waveform)
    with torch.inference_mode():
        outputs = tagger.network(torch.from_numpy(waveform)[None])
    np.testing.assert_allclose(tagged.clipwise, outputs["clipwise_output"][0], atol=1e-6)
    np.testing.assert_allclose(tagged.framewise, outputs["framewise_output"][0, ::32], atol=1e-6)
    np.testing.assert_allclose(tagged.embedding, outputs["latent_output"][0], atol=1e-5)
    best = tagged.top(3, tagger.labels)
    assert [score for _, score in best] == sorted(tagged.clipwise.tolist(), reverse=True)[:3]


@pytest.mark.parametrize("samples", [1, 99, 100, 101, 149, 150, 151, 1000, 1033])
def test_windows_cover_every_sample(samples: int) -> None:
    starts = window_starts(samples, 100)
    covered = np.zeros(max(samples, 100), dtype=int)
    for start in starts:
        covered[start : start + 100] += 1
    assert covered.min() >= 1
    assert starts[-1] + 100 == max(samples, 100)


def test_scores_are_averaged_at_their_times() -> None:
    """Two windows of 4 frames of 1 s, the second 2 s later: the middle is the mean of both."""
    scores = np.array([[[0.0]] * 4, [[1.0]] * 4])
    found = overlap_average(scores, np.array([0.0, 2.0]), seconds_per_frame=1.0, duration=6.0)
    assert found[:, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_bad_audio_is_refused(tagger: Tagger, tmp_path: Path) -> None:
    for waveform in (np.zeros(0), np.zeros((2, 100)), np.array([0.0, np.inf])):
        with pytest.raises(ValueError, match="finite samples"):
            tagger.tag(waveform)
    with pytest.raises(ValueError, match="There is no file"):
        tagger.tag_file(tmp_path / "missing.wav")
