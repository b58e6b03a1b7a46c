"""The common interface of HEAR 2021 (Turian et al., Holistic Evaluation of Audio Representations, PMLR 176).

load_model, get_scene_embeddings and get_timestamp_embeddings, for tools that take a module with these functions. Audio
is (n_sounds, n_samples) in [-1, 1] at model.sample_rate. A scene's embedding is the encoder's (of longer sounds, the
mean over the windows), a timestamp's that of a frame, whose middle is its time: every 312.5 ms for HTS-AT, where HEAR
recommends 50 ms or less for its tasks with events. Nothing is random, and no gradient is kept.
"""

import numpy as np
import torch
from torch import Tensor, nn

from inference.tagger import Tagged, Tagger
from settings import UserError

DEFAULT_CHECKPOINT = "htsat-audioset"


class HearModel(nn.Module):
    """A Tagger as HEAR's tools expect a model: `.to(device)` moves it."""

    def __init__(self, tagger: Tagger) -> None:
        super().__init__()
        self.network, self.tagger = tagger.encoder(), tagger
        self.sample_rate: int = self.network.sample_rate
        self.scene_embedding_size: int = self.network.channels
        self.timestamp_embedding_size: int = self.network.channels

    def embed(self, audio: Tensor, *, timestamps: bool) -> list[Tagged]:
        """What the Tagger says about each of the (n_sounds, n_samples). Raises UserError for other shapes."""
        if audio.ndim != 2:
            raise UserError(f"HEAR's audio has the shape (n_sounds, n_samples); {tuple(audio.shape)} was given.")
        self.network.eval()
        found = []
        for _, tagged in self.tagger.tag_waveforms(audio.detach().cpu().float(), frame_embeddings=timestamps):
            if isinstance(tagged, UserError):
                raise tagged
            found.append(tagged)
        return found


def load_model(model_file_path: str = "") -> HearModel:
    """A model from a checkpoint: a file, or a known name. Nothing given: htsat-audioset, on the CPU.

    Raises UserError where it is missing, does not fit, or is no network of this project.
    """
    return HearModel(Tagger.from_checkpoint(model_file_path or DEFAULT_CHECKPOINT, device="cpu", precision="32"))


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """(n_sounds, n_samples) -> (n_sounds, scene_embedding_size) float32, on the device of `audio`."""
    found = model.embed(audio, timestamps=False)
    size = model.scene_embedding_size
    return torch.from_numpy(np.array([t.embedding for t in found], np.float32).reshape(-1, size)).to(audio.device)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """(n_sounds, n_samples) -> (n_sounds, T, timestamp_embedding_size) float32, and (n_sounds, T) milliseconds.

    The times are the middles of the frames, rising; the last frame ends with the sound. Raises
    UserError for an encoder without a time axis.
    """
    if not model.tagger.has_frames:
        raise UserError("The encoder has no time axis: it gives scene embeddings, but none of timestamps.")
    found = model.embed(audio, timestamps=True)
    if not found:
        return torch.zeros(0, 0, model.timestamp_embedding_size), torch.zeros(0, 0)
    embeddings = np.stack([tagged.frame_embeddings for tagged in found if tagged.frame_embeddings is not None])
    times = np.stack([tagged.times().mean(axis=1) * 1000 for tagged in found]).astype(np.float32)
    return torch.from_numpy(embeddings).to(audio.device), torch.from_numpy(times).to(audio.device)
