"""A figure of a file of any length: its sound is read block by block and averaged to the figure's resolution."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from data.audio import cut_pieces, stream_audio
from evaluation.plots import ClipSound, ClipView, clip_figure, save_png, tags_figure
from evaluation.postprocess import PostProcessing
from inference.tagger import Tagged
from inference.windows import frame_count, step_count
from model.frontend import POWER_FLOOR
from model.registry import encoder_module
from settings import Config

MOST_COLUMNS = 3000  # of a spectrogram
HOPS_AT_ONCE = 1024
MOST_TAGS = 10
MOST_LETTERS = 60  # of a name in a title


def draw_recording(
    path: Path,
    source: Path,
    tagged: Tagged,
    events: Sequence[tuple[float, float, str]],
    post: Optional[PostProcessing],
    settings: Config,
) -> None:
    """Write a picture: waveform and log-mel spectrogram of `source`, frame scores, and events (onset, offset, class).

    Its title is the name of the picture without the ending, and the duration. post: None for an encoder without a time
    axis, whose tags are drawn in place of scores and events. Raises UserError where the source cannot be read.
    """
    sound = sound_of_file(source, settings, tagged.duration)
    name = "".join(letter if letter.isprintable() else "?" for letter in path.stem)
    title = f"{name[:MOST_LETTERS]}{'...' * (len(name) > MOST_LETTERS)}, {tagged.duration:.1f} s"
    if post is None:
        save_png(tags_figure(tagged.top(MOST_TAGS), sound, tagged.duration, title), path)
        return
    number = {label: k for k, label in enumerate(tagged.labels)}
    scores, seconds_per_frame = post.smooth(
        tagged.framewise[None], durations=np.array([tagged.duration]), seconds_per_frame=tagged.seconds_per_frame
    )
    frames = min(scores.shape[1], step_count(tagged.duration, seconds_per_frame))
    view = ClipView(
        duration=tagged.duration,
        labels=list(tagged.labels),
        scores=scores[0, :frames],
        seconds_per_frame=seconds_per_frame,
        thresholds=post.thresholds,
        truth=[],
        found=[(number[label], onset, offset) for onset, offset, label in events],
        sound=sound,
        truth_known=False,
        title=title,
    )
    save_png(clip_figure(view), path)


def sound_of_file(path: Path, settings: Config, duration: float) -> ClipSound:
    """Log-mel spectrogram and waveform of an audio file of `duration` seconds, in the mel bands of its encoder.

    A column of the spectrogram is the mean power of some hops; the waveform has the lowest and the highest sample of
    each hop. Raises UserError where the file cannot be read.
    """
    analysis, rate = encoder_module(settings.encoder).build_analysis(settings), settings.sample_rate
    hop = analysis.hop
    pool = frame_count(duration * rate, hop * MOST_COLUMNS)  # hops in a column
    size = hop * pool  # samples in a column
    columns, extremes = [], []
    for piece in cut_pieces(stream_audio(path, rate), size * max(1, HOPS_AT_ONCE // pool)):
        count = -(-len(piece) // size)
        padded = np.pad(piece, (0, max(count * size + analysis.beyond, analysis.shortest) - len(piece)))
        power = analysis.power(torch.from_numpy(padded)[None])[:, : count * pool]  # (1, hops, bins)
        mel = power.unflatten(1, (count, pool)).mean(dim=2) @ analysis.bands
        columns.append(10 * torch.log10(mel.clamp(min=POWER_FLOOR))[0].numpy())
        hops = padded[: count * size].reshape(-1, hop)[: -(-len(piece) // hop)]
        extremes.append(np.stack([hops.min(axis=1), hops.max(axis=1)], axis=1).reshape(-1))
    return ClipSound(
        waveform=np.concatenate(extremes),
        sample_rate=round(2 * rate / hop),
        logmel=np.concatenate(columns),
        # Low bands that are narrower than a bin have no centre of their own.
        band_hz=np.maximum.accumulate(analysis.bands.argmax(dim=0).numpy() * rate / 2 / (len(analysis.bands) - 1)),
    )
