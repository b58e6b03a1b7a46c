"""The functions of HEAR 2021, with its shapes and units."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from inference import Tagger, hear
from model import build_model
from settings import UserError, resolve
from tests.helpers import SIZES, TINY
from tests.networks import htsat, save_network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> hear.HearModel:
    settings = resolve({**TINY, "sample_rate": 8000}).model_dump()
    path = save_network(tmp_path_factory.mktemp("hear") / "a.ckpt", htsat(TINY, sample_rate=8000), settings=settings)
    return hear.load_model(str(path))


def audio(sounds: int, seconds: float) -> torch.Tensor:
    return 0.1 * torch.randn(sounds, round(seconds * 8000), generator=torch.Generator().manual_seed(0))


def test_the_model_says_what_it_takes_and_gives(model: hear.HearModel) -> None:
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate == 8000
    assert model.scene_embedding_size == model.timestamp_embedding_size == 128
    model.to("cpu")
    assert sum(1 for _ in model.parameters()) > 0


@pytest.mark.parametrize("seconds", [0.05, 4, 10, 12.3])
def test_shapes_and_times(model: hear.HearModel, seconds: float) -> None:
    sounds = audio(3, seconds)
    scenes = hear.get_scene_embeddings(sounds, model)
    embeddings, times = hear.get_timestamp_embeddings(sounds, model)
    steps = max(1, int(seconds / 0.3125 + 0.5 + 1e-9))
    assert scenes.shape == (3, 128)
    assert embeddings.shape == (3, steps, 128)
    assert times.shape == (3, steps)
    for tensor in (scenes, embeddings, times):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert torch.isfinite(tensor).all()
    assert (times.diff(dim=1) > 0).all()
    last = seconds * 1000 - (steps - 1) * 312.5  # milliseconds of the last frame
    assert times[0, 0] == pytest.approx((last if steps == 1 else 312.5) / 2)
    assert times[0, -1] == pytest.approx(seconds * 1000 - last / 2)


def test_nothing_is_random_and_sounds_do_not_mix(model: hear.HearModel) -> None:
    sounds = audio(5, 3)
    model.train()  # as a tool may leave it
    first = hear.get_scene_embeddings(sounds, model)
    assert torch.equal(first, hear.get_scene_embeddings(sounds, model))
    alone = hear.get_scene_embeddings(sounds[3:4], model)
    torch.testing.assert_close(first[3:4], alone, atol=1e-5, rtol=0)
    embeddings, _ = hear.get_timestamp_embeddings(sounds, model)
    again, _ = hear.get_timestamp_embeddings(sounds, model)
    assert torch.equal(embeddings, again)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3


def test_ten_seconds_average_to_the_scene(model: hear.HearModel) -> None:
    sounds = audio(2, 10)
    embeddings, _ = hear.get_timestamp_embeddings(sounds, model)
    scenes = hear.get_scene_embeddings(sounds, model)
    torch.testing.assert_close(embeddings.mean(dim=1), scenes, atol=1e-5, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(scenes, model.network.eval()(sounds).embedding, atol=1e-5, rtol=0)


def test_mistakes(model: hear.HearModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="n_sounds, n_samples"):
        hear.get_scene_embeddings(torch.zeros(8000), model)
    with pytest.raises(UserError, match="finite"):
        hear.get_timestamp_embeddings(torch.full((1, 8000), torch.nan), model)
    assert hear.get_scene_embeddings(torch.zeros(0, 8000), model).shape == (0, 128)
    assert hear.get_timestamp_embeddings(torch.zeros(0, 8000), model)[0].shape == (0, 0, 128)
    monkeypatch.setenv("HTSAT_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr("model.registry.download", Mock(side_effect=UserError("offline")))
    with pytest.raises(UserError, match="htsat-audioset"):
        hear.load_model()


def test_an_exported_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = Tagger(object(), resolve({"sample_rate": 8000}), ["a"])  # type: ignore[arg-type]
    monkeypatch.setattr(Tagger, "from_checkpoint", lambda *_, **__: exported)
    with pytest.raises(UserError, match="load the checkpoint itself"):
        hear.load_model("model.onnx")


def test_an_encoder_without_a_time_axis_gives_scenes_alone() -> None:
    settings = resolve(SIZES["ast"])
    model = hear.HearModel(Tagger(build_model(settings), settings, []))
    sounds = 0.1 * torch.randn(2, settings.clip_samples)
    assert hear.get_scene_embeddings(sounds, model).shape == (2, model.scene_embedding_size)
    with pytest.raises(UserError, match="time axis"):
        hear.get_timestamp_embeddings(sounds, model)
