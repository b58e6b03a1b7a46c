"""LAION-CLAP's HTS-AT as transformers keeps it: the same maps, the same log-mel, and no classifier."""

from pathlib import Path
from typing import Any

import pytest
import torch

from inference import Tagger
from model import Network, build_model
from model.checkpoint import LoadReport, decided_settings, load_network, read_checkpoint
from settings import Config, UserError, resolve
from tests.networks import awake, noise

SIZES: dict[str, Any] = {
    "patch_embeds_hidden_size": 8,
    "depths": [1, 2, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],
    "hidden_size": 64,
}
TEXT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
CLASSES = ("ClapModel", "ClapAudioModelWithProjection", "ClapAudioModel")


def reference(name: str, path: Path, **sizes: Any) -> Any:
    """A model of transformers with random weights, also where it begins with zeros, which it saves in a folder."""
    import transformers  # here: it takes seconds

    audio = transformers.ClapAudioConfig(**{**SIZES, **sizes})
    config = transformers.ClapConfig(text_config=TEXT, audio_config=audio) if name == "ClapModel" else audio
    torch.manual_seed(0)
    model = awake(getattr(transformers, name)(config)).eval()
    model.save_pretrained(path)
    return model


def fine_tuned(path: Path) -> tuple[Network, Config, LoadReport]:
    """A network with the weights and the front-end of a file, as `train --frontend_from checkpoint` begins."""
    checkpoint = read_checkpoint(path)
    settings = resolve({"classes_num": 3}, checkpoint=decided_settings(checkpoint, "checkpoint", fine_tuning=True))
    network = build_model(settings).eval()
    report = load_network(network, checkpoint, new_classifier=True, frontend_from="checkpoint")
    return network, settings, report


@pytest.mark.parametrize("name", CLASSES)
def test_the_maps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = reference(name, tmp_path)
    network, settings, report = fine_tuned(tmp_path / "model.safetensors")
    assert (report.kind, report.share, report.classifier) == ("LAION-CLAP", 1.0, "new (the file has none)")
    assert (settings.encoder, settings.sample_rate, settings.clip_samples) == ("htsat", 48000, 480000)
    assert (settings.htsat_dim, settings.htsat_depth, settings.htsat_num_head) == (8, [1, 2, 1, 1], [1, 2, 4, 8])

    log_mel = noise(2, 1001 * 64).view(2, 1001, 64) * 100 - 40
    audio = model if name == "ClapAudioModel" else model.audio_model
    with torch.inference_mode():
        expected = audio(log_mel[:, None])
        maps = network.forward_features(network.normalize(log_mel))
        outputs = network.forward_head(maps)
    assert expected.last_hidden_state.std() > 0.1
    torch.testing.assert_close(maps.grid, expected.last_hidden_state, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.embedding, expected.pooler_output, rtol=0, atol=1e-4)
    assert outputs.frame_logits.shape == (2, 32, 3)


def test_the_log_mel_is_that_of_transformers(tmp_path: Path) -> None:
    """With the settings of laion/clap-htsat-unfused."""
    from transformers import ClapFeatureExtractor

    reference("ClapAudioModel", tmp_path)
    network, settings, _ = fine_tuned(tmp_path / "model.safetensors")
    sound = noise(1, settings.clip_samples)
    extract = ClapFeatureExtractor(frequency_min=50, frequency_max=14000, truncation="rand_trunc", padding="repeatpad")
    expected = extract(sound[0].numpy(), sampling_rate=48000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(network.log_mel(sound), expected[0], rtol=0, atol=1e-3)


def test_it_has_nothing_to_evaluate(tmp_path: Path) -> None:
    reference("ClapAudioModel", tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors.*train.*tscam_conv"):
        Tagger.from_checkpoint(tmp_path / "model.safetensors")


def test_fusion_is_refused(tmp_path: Path) -> None:
    reference("ClapAudioModel", tmp_path, enable_fusion=True, fusion_type="aff_2d")
    with pytest.raises(UserError, match=r"model\.safetensors.*feature fusion"):
        read_checkpoint(tmp_path / "model.safetensors")
