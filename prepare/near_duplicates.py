"""Clips of two splits with nearly the same audio: another loudness, a shift, a click, zeros at an end, one codec more.

A fingerprint of each clip, quantiles of its log-mel bands over time, finds candidates among all pairs; the
cross-correlation of their waveforms decides.
"""

from functools import cache

import numpy as np
from scipy import fft

FRAME_SECONDS = 0.032
BANDS, LOWEST_HZ = 32, 50.0
QUANTILES = (0.25, 0.5, 0.75)  # over time: a click or some zeros change few frames
STEP_DB = 0.5  # of the quantization to int8
RANGE_DB = 60.0  # below the usual loudest band, where rounding to int16 shows
SIZE = BANDS * len(QUANTILES)  # bytes of a fingerprint
CANDIDATE_DB = 3.0  # root mean square distance of two fingerprints
MOST_FRAMES = 160  # of a clip, at equal distances
MOST_CANDIDATES = 500  # pairs, the closest, whose waveforms are compared
BLOCK = 4096  # clips compared at once: 64 MB
LEAST_CORRELATION = 0.95
COMPARED_SAMPLES = 2**18
LOUDEST_SHARE = 0.005  # of the samples, which are limited: a click does not decide

Pair = tuple[int, int]


@cache
def _band_edges(size: int, rate: int) -> np.ndarray:
    """Bins of a spectrum where mel bands begin, and the end of the last one; at most BANDS bands."""
    first, last = 2595 * np.log10(1 + np.array([LOWEST_HZ, rate / 2]) / 700)
    mel = np.linspace(first, last, BANDS + 1)
    return np.unique(np.round(700 * (10 ** (mel / 2595) - 1) * size / rate).astype(int))


def fingerprint(waveform: np.ndarray, rate: int) -> np.ndarray:
    """(samples,) int16 -> (SIZE,) int8, in steps of STEP_DB about their mean."""
    size = max(round(FRAME_SECONDS * rate), 2)
    whole = max(len(waveform) // size, 1) * size
    padded = np.pad(waveform[:whole], (0, max(whole - len(waveform), 0)))
    parts = padded.reshape(-1, size)
    frames = parts[:: -(-len(parts) // MOST_FRAMES)].astype(np.float32) * np.hanning(size).astype(np.float32)
    power = np.abs(fft.rfft(frames)) ** 2
    edges = _band_edges(size, rate)
    bands = np.add.reduceat(power[:, : edges[-1]], edges[:-1], axis=1)
    energy = bands.sum(axis=1)
    bands = bands[energy > 1e-6 * np.quantile(energy, 0.9)] if energy.any() else bands  # without padding
    level = 10 * np.log10(bands + size)  # about the power of rounding to int16
    level = np.maximum(level, np.quantile(level.max(axis=1), 0.75) - RANGE_DB)
    shape = np.quantile(level, QUANTILES, axis=0).ravel()
    found = np.zeros(SIZE, dtype=np.int8)
    found[: len(shape)] = np.round((shape - shape.mean()) / STEP_DB).clip(-127, 127)
    return found


def candidates(first: np.ndarray, second: np.ndarray) -> list[Pair]:
    """(N, SIZE) and (M, SIZE) fingerprints -> the pairs (n, m) within CANDIDATE_DB, the closest MOST_CANDIDATES."""
    most = SIZE * (CANDIDATE_DB / STEP_DB) ** 2
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(first), BLOCK):
        one = first[start : start + BLOCK].astype(np.float32)
        for begin in range(0, len(second), BLOCK):
            other = second[begin : begin + BLOCK].astype(np.float32)
            distance = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
            rows, columns = np.nonzero(distance <= most)
            values = distance[rows, columns]
            best = np.argsort(values, kind="stable")[:MOST_CANDIDATES]
            triples = zip(values[best], start + rows[best], begin + columns[best], strict=True)
            found += [(float(value), int(row), int(column)) for value, row, column in triples]
        found = sorted(found)[:MOST_CANDIDATES]
    return [(row, column) for _, row, column in found]


def nearly_same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two (samples,) int16 agree at some shift, at any loudness: correlation of at least LEAST_CORRELATION."""
    one, other = _limited(first), _limited(second)
    size = fft.next_fast_len(len(one) + len(other))
    product = fft.irfft(fft.rfft(one, size) * np.conj(fft.rfft(other, size)), size)
    return bool(np.abs(product).max() >= LEAST_CORRELATION * np.linalg.norm(one) * np.linalg.norm(other) > 0)


def _limited(waveform: np.ndarray) -> np.ndarray:
    """Differences of samples (hum and rumble count less), the loudest limited; (samples,) float32."""
    steps = np.diff(waveform[:COMPARED_SAMPLES].astype(np.float32))
    most = np.quantile(np.abs(steps), 1 - LOUDEST_SHARE)
    return steps.clip(-most, most)
