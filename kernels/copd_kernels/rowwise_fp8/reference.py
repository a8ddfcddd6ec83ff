"""The definition of rowwise_fp8 in plain torch."""
from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number that e4m3 holds."""
EPS = 1e-30
"""A row's largest magnitude counts as at least this."""
ALIGNMENT = 16
"""Hopper's FP8 products want inner and outer sizes that are multiples of this."""


def quantise_rows(x_MK: Tensor, multiplier_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows in FP8 with their scales.

    Args:
        x_MK: [M, K] any float dtype.
        multiplier_K: [K] float32, multiplied into every row first; None: nothing is.

    Returns:
        q [M, K] float8_e4m3fn and s [M, 1] float32, with x ~ s q.
    """
    x_MK = x_MK.float() if multiplier_K is None else x_MK.float() * multiplier_K
    scale_M1 = row_scales(x_MK)
    return cast(x_MK, scale_M1), scale_M1


def row_scales(x_MK: Tensor) -> Tensor:
    """[M, 1] float32 scale of each row."""
    return x_MK.float().abs().amax(-1, keepdim=True).clamp_min(EPS) / LARGEST


def cast(x_MK: Tensor, scale_M1: Tensor) -> Tensor:
    """[M, K] float8_e4m3fn: x / scale, clamped."""
    return (x_MK.float() / scale_M1).clamp(-LARGEST, LARGEST).to(FP8)


def dequantise(q_NK: Tensor, scale_N1: Tensor) -> Tensor:
    """[N, K] float32."""
    return q_NK.float() * scale_N1
