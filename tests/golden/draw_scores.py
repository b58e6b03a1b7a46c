"""The toy detection task behind `toy` in detection.json. NumPy only."""

import numpy as np


def draw_scores(clips, classes, frames, seed):
    """Logits (clips, classes, frames) float32 of 40 ms frames, and for each clip its events (onset s, offset s, class),
    which the logits follow with errors."""
    stream = np.random.RandomState(seed)
    logits, events = [], []
    for _ in range(clips):
        active = np.zeros((classes, frames))
        for _ in range(stream.randint(2, 6)):
            c, start = stream.randint(classes), stream.randint(0, frames - 30)
            active[c, start : min(frames, start + stream.randint(8, 90))] = 1
        noise = stream.standard_normal((classes, frames)) + 0.8 * stream.standard_normal((classes, 1))
        noise = sum(np.roll(noise, k, axis=1) for k in range(5)) / 3
        logits.append(3.0 * np.roll(active, stream.randint(-3, 4), axis=1) - 2.0 + noise)
        mine = []
        for c in range(classes):
            edges = np.flatnonzero(np.diff(np.concatenate(([0], active[c], [0]))))
            mine += [(round(a * 0.04, 2), round(b * 0.04, 2), c) for a, b in zip(edges[::2], edges[1::2])]
        events.append(mine)
    return np.asarray(logits, dtype=np.float32), events
