"""Small numerics of the paper. Closed to additions: new code has a room of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # preparing data takes float32_to_int16 from here, and would wait seconds for torch
    import torch

INT16_SCALE = 32767.0  # int16 = float x 32767, as PANNs packed AudioSet


def float32_to_int16(waveform: np.ndarray) -> np.ndarray:
    """(...,) float waveform in [-1, 1] -> int16; values outside are clipped. Raises ValueError for NaN or infinity."""
    if not np.isfinite(waveform).all():
        raise ValueError("The waveform holds NaN or infinite samples.")
    return np.round(np.clip(waveform, -1.0, 1.0) * INT16_SCALE).astype(np.int16)


def int16_to_float32(waveform: torch.Tensor) -> torch.Tensor:
    """(...,) int16 waveform -> float32 in [-1, 1], on the device where it lies. Float input is returned as float32."""
    return waveform.float() if waveform.is_floating_point() else waveform.float() / INT16_SCALE


def do_mixup(x: torch.Tensor, mixup_lambda: torch.Tensor, partner: torch.Tensor | None = None) -> torch.Tensor:
    """Mix each item of a batch with its partner (mixup, Zhang et al. 2018), by default in the reversed batch.

    x: (B, ...); mixup_lambda: (B,), the weight of the item itself; partner: (B,) places. Returns (B, ...).
    """
    weight = mixup_lambda.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return x * weight + (x.flip(0) if partner is None else x[partner]) * (1 - weight)


def get_mix_lambda(alpha: float, batch_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(batch_size,) mixup weights from Beta(alpha, alpha)."""
    import torch

    concentration = torch.full((batch_size,), float(alpha))
    return torch.distributions.Beta(concentration, concentration).sample().to(device)


def d_prime(auc: float) -> float:
    """Sensitivity index d' = sqrt(2) z(AUC), z the inverse normal distribution function (Hershey et al. 2017)."""
    from scipy.special import ndtri  # here: what prepares data and tags files takes the functions above alone

    return float(np.sqrt(2.0) * ndtri(auc))
