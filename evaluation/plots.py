"""Pictures of what a network heard."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.scores import EventList

TRUE_COLOUR, FOUND_COLOUR = "#0a7f5a", "#d1495b"


def draw_clip(
    path: Path,
    *,
    title: str,
    logmel: np.ndarray,
    mel_edges: np.ndarray,
    framewise: np.ndarray,
    seconds_per_frame: float,
    labels: list[str],
    truth: EventList,
    found: EventList,
    duration: float,
) -> None:
    """Draw the log-mel spectrogram of a clip, and under it the frame scores with true and detected events.

    logmel: (T, F) in dB; mel_edges: (F,) centre of each band in Hz; framewise: (frames, K). Classes that neither
    occur nor score above 0.1 are left out.
    """
    active = {label for label, _, _ in truth} | {label for label, _, _ in found}
    shown = [k for k in range(len(labels)) if k in active or framewise[:, k].max() > 0.1] or [0]
    figure = Figure(figsize=(9, 3.0 + 0.42 * len(shown)), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 0.42 * len(shown) + 0.3])

    bands = logmel.shape[1]
    image = top.imshow(
        logmel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, duration, 0, bands),
        vmin=np.percentile(logmel, 2), vmax=logmel.max(),
    )  # fmt: skip
    ticks = np.linspace(0, bands - 1, 5).astype(int)
    top.set_yticks(ticks + 0.5, [f"{mel_edges[k]:.0f}" for k in ticks])
    top.set_ylabel("frequency (Hz)")
    top.set_title(title, loc="left")
    figure.colorbar(image, ax=top, label="power (dB)", pad=0.01)

    scores = bottom.imshow(
        framewise[:, shown].T, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest",
        extent=(0, len(framewise) * seconds_per_frame, len(shown) - 0.5, -0.5),
    )  # fmt: skip
    for events, shift, colour in ((truth, -0.3, TRUE_COLOUR), (found, 0.3, FOUND_COLOUR)):
        for label, onset, offset in events:
            row = shown.index(label) + shift
            bottom.plot([onset, offset], [row, row], color=colour, linewidth=4, solid_capstyle="butt")
    bottom.set_yticks(range(len(shown)), [labels[k] for k in shown])
    bottom.set_xlim(0, duration)
    bottom.set_xlabel("time (s)")
    bottom.plot([], [], color=TRUE_COLOUR, linewidth=4, label="true")
    bottom.plot([], [], color=FOUND_COLOUR, linewidth=4, label="detected")
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    figure.colorbar(scores, ax=bottom, label="score", pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.size": 9}):
        figure.savefig(path, dpi=110)
