"""Clips of a score store for figures: their sound from the clip store, scores, true and detected events."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import pad
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from data.clip_store import Waveforms, open_store
from data.names import shown
from evaluation.plots import ClipSound, ClipView, clip_figure, save_png
from evaluation.postprocess import PostProcessing
from evaluation.scores import Scores
from utils import int16_to_float32

WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.01  # of a picture's spectrogram, for every network
MOST_LETTERS = 60  # of a picture's name: with 4 bytes each, a file system's 255 are not reached
MEL_BANDS, LOWEST_HZ, HIGHEST_HZ = 64, 50.0, 14000.0


def read_sounds(scores: Scores, clips: Sequence[int]) -> dict[int, ClipSound]:
    """The sound of some clips (by their number) from the clip store; empty where that file no longer exists."""
    store = Path(str(scores.attributes.get("clip_store", "")))
    if not store.is_file():
        print(f"No sound, in the pictures and in the report: there is no clip store {store}.")
        return {}
    sounds = {}
    with open_store(store, "audio_name") as file:
        rate = int(file.attrs.get("sample_rate", 32000))  # a file of PANNs has no attribute, and 32 kHz
        waveforms = Waveforms(file)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(map(bytes.decode, file["audio_name"][:].tolist())):
            for known in {name, name.partition("#t=")[0]}:  # a piece by itself, and as one of its recording's
                rows.setdefault(known, []).append(row)
        for clip in clips:
            read = np.concatenate([waveforms.read(row) for row in rows[scores.names[clip]]])
            samples = torch.from_numpy(read[: int(scores.durations[clip] * rate)])
            sounds[clip] = sound_of(int16_to_float32(samples).numpy(), rate)
    return sounds


def sound_of(waveform: np.ndarray, sample_rate: int) -> ClipSound:
    """(samples,) float32 with its log-mel spectrogram."""
    window = round(WINDOW_SECONDS * sample_rate)
    mel = MelSpectrogram(
        sample_rate, window, hop_length=round(HOP_SECONDS * sample_rate), f_min=LOWEST_HZ,
        f_max=min(HIGHEST_HZ, sample_rate / 2), n_mels=MEL_BANDS, norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    padded = pad(torch.from_numpy(waveform), (0, max(window - len(waveform), 0)))
    logmel = AmplitudeToDB()(mel(padded)).numpy().T
    return ClipSound(waveform, sample_rate, logmel, mel.mel_scale.fb.argmax(dim=0).numpy() * sample_rate / window)


def view_clip(
    scores: Scores, post: PostProcessing, found: pd.DataFrame, clip: int, sound: Optional[ClipSound] = None
) -> ClipView:
    """A clip (by its number) for a figure. found: the detected events of all clips."""
    seconds = scores.durations[clip : clip + 1]
    smoothed, step = post.smooth(
        scores.frame_scores()[clip : clip + 1], durations=seconds, seconds_per_frame=scores.seconds_per_frame
    )
    detected = found[found.filename == scores.names[clip]]
    places = [scores.labels.index(label) for label in detected.event_label]
    return ClipView(
        duration=float(seconds[0]),
        labels=scores.labels,
        scores=smoothed[0],
        seconds_per_frame=step,
        thresholds=post.thresholds,
        truth=scores.events[clip] if scores.events else [],
        found=list(zip(places, detected.onset.tolist(), detected.offset.tolist(), strict=True)),
        sound=sound,
    )


def draw_clips(
    scores: Scores, post: PostProcessing, found: pd.DataFrame, sounds: dict[int, ClipSound], folder: Path
) -> list[Path]:
    """Draw the clips of `sounds` into a folder, as <clip>.png."""
    paths = [folder / f"{name}.png" for name in file_names([scores.names[clip] for clip in sounds])]
    for path, (clip, sound) in zip(paths, sounds.items(), strict=True):
        save_png(clip_figure(view_clip(scores, post, found, clip, sound)), path)
    return paths


def file_names(clips: Sequence[str]) -> list[str]:
    """A name of one file for each clip, without ending: its stem, or its path with _ where several share the stem."""
    stems = Counter(Path(clip).stem.casefold() for clip in clips)
    taken: Counter[str] = Counter()
    names = []
    for clip in clips:
        alone = stems[Path(clip).stem.casefold()] == 1
        name = shown(Path(clip).stem if alone else clip.replace("/", "_"))[:MOST_LETTERS]
        taken[name.casefold()] += 1
        number = taken[name.casefold()]
        names.append(name if number == 1 else f"{name}_{number}")
    return names
