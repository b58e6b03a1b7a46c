"""From a checkpoint and audio of any length to clip scores, frame scores and embeddings. The only inference path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from model import build_model
from model.checkpoint import LoadReport, decided_settings, load_network, read_checkpoint
from model.htsat import HTSAT_Swin_Transformer
from prepare.audio import read_audio
from prepare.labels import published_labels
from settings import Config, requested, resolve

WINDOW_OVERLAP = 0.5  # share of a window that the next one covers again


@dataclass(frozen=True)
class Tagged:
    """What was heard in one recording. K classes, T frames of seconds_per_frame; embedding: mean of the windows'."""

    clipwise: np.ndarray  # (K,) probabilities
    framewise: np.ndarray  # (T, K) probabilities, frame t begins at t * seconds_per_frame
    embedding: np.ndarray  # (C,)
    seconds_per_frame: float
    duration: float  # seconds

    def top(self, count: int, labels: Sequence[str]) -> list[tuple[str, float]]:
        """The `count` classes with the highest scores, best first."""
        best = np.argsort(-self.clipwise)[:count]
        return [(labels[k], float(self.clipwise[k])) for k in best]


class Tagger:
    """A network with its labels and front-end, ready to listen.

    A recording is cut into windows of the length the network was trained on, which overlap by half; the last one ends
    with the recording. Frame scores are averaged at their absolute times, clip scores over the windows. A recording
    shorter than a window is padded with zeros, or repeated where the network was trained on repeated clips.
    """

    def __init__(
        self, network: HTSAT_Swin_Transformer, settings: Config, labels: Sequence[str], report: LoadReport
    ) -> None:
        self.network = network.eval()
        self.settings, self.labels, self.report = settings, list(labels), report
        self.device = torch.device("cpu")

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "auto", given: Optional[Mapping[str, Any]] = None
    ) -> "Tagger":
        """Load a checkpoint. device: auto (CUDA where there is one), cpu, cuda, cuda:1, ...

        A checkpoint that carries no settings (a published one) takes them from config.py and `given`, as in
        {"dataset_type": "audioset"}. Raises ValueError where the file is missing or does not fit.
        """
        checkpoint = read_checkpoint(path)
        frontend_from = requested("frontend_from", given or {})
        settings = resolve(given or {}, checkpoint=decided_settings(checkpoint, frontend_from))
        network = build_model(settings)
        report = load_network(network, checkpoint, frontend_from=frontend_from, configured=settings.model_dump())
        labels = checkpoint.labels or published_labels(settings.dataset_type, settings.classes_num)
        tagger = cls(network, settings, labels, report)
        return tagger.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    def to(self, device: str) -> "Tagger":
        """Move the network to a device."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def tag_file(self, path: str | Path) -> Tagged:
        """Tag an audio file of any length, rate and number of channels. Raises ValueError where it is unreadable."""
        return self.tag(read_audio(Path(path), self.settings.sample_rate))

    @torch.inference_mode()
    def tag(self, waveform: np.ndarray, batch_size: int = 4) -> Tagged:
        """Tag (samples,) float audio at settings.sample_rate. Raises ValueError for empty or non-finite audio."""
        if waveform.ndim != 1 or len(waveform) == 0 or not np.isfinite(waveform).all():
            raise ValueError(f"A waveform of finite samples (samples,) is needed; shape {waveform.shape} was given.")
        window, rate = self.settings.clip_samples, self.settings.sample_rate
        starts = window_starts(len(waveform), window)
        clips, frames, embeddings = [], [], []
        for at in range(0, len(starts), batch_size):
            batch = torch.stack([self._window(waveform, start) for start in starts[at : at + batch_size]])
            batch = batch.to(self.device)
            clip, frame, embedding = self.network.probabilities(batch)
            clips.append(clip.cpu())
            frames.append(frame.cpu())
            embeddings.append(embedding.cpu())
        clipwise, framewise = torch.cat(clips).numpy(), torch.cat(frames).numpy()
        seconds_per_frame = window / rate / framewise.shape[1]
        duration = len(waveform) / rate
        return Tagged(
            clipwise=clipwise.mean(axis=0),
            framewise=overlap_average(framewise, np.asarray(starts) / rate, seconds_per_frame, duration),
            embedding=torch.cat(embeddings).mean(dim=0).numpy(),
            seconds_per_frame=seconds_per_frame,
            duration=duration,
        )

    def _window(self, waveform: np.ndarray, start: int) -> Tensor:
        window = self.settings.clip_samples
        cut = waveform[start : start + window].astype(np.float32)
        if len(cut) < window:
            repeats = self.settings.short_clips == "repeat"
            cut = np.resize(cut, window) if repeats else np.pad(cut, (0, window - len(cut)))
        return torch.from_numpy(cut)


def window_starts(samples: int, window: int) -> list[int]:
    """First samples of windows that overlap by WINDOW_OVERLAP and cover a recording; the last one ends with it."""
    if samples <= window:
        return [0]
    hop = int(window * (1 - WINDOW_OVERLAP))
    return [*range(0, samples - window, hop), samples - window]


def overlap_average(framewise: np.ndarray, starts: np.ndarray, seconds_per_frame: float, duration: float) -> np.ndarray:
    """(W, steps, K) scores of windows that begin at `starts` (seconds) -> (T, K) on one grid over the duration.

    Each frame of the grid takes, from every window that covers its middle, the score there; those are averaged.
    """
    count = max(1, int(np.ceil(duration / seconds_per_frame - 1e-9)))
    begin = np.arange(count) * seconds_per_frame
    middle = (begin + np.minimum(begin + seconds_per_frame, duration)) / 2
    total = np.zeros((count, framewise.shape[2]))
    covered = np.zeros((count, 1))
    for scores, start in zip(framewise, starts, strict=True):
        step = np.floor((middle - start) / seconds_per_frame).astype(int)
        inside = (step >= 0) & (step < len(scores))
        total[inside] += scores[step[inside]]
        covered[inside] += 1
    assert (covered > 0).all(), "the windows leave a gap"
    return total / covered
