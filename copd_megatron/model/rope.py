"""Rotary angles of a backbone, in the form Megatron's attention applies them.

Angle of frequency i at position p: p_d(i) * theta^(-2i / head_dim), with d(i) the row (temporal, height,
width) that frequency i follows. Plain rotary follows row 0. Qwen2.5-VL (Bai et al. 2025, arXiv:2502.13923) gives the
rows consecutive sections of the frequencies; Qwen3-VL (Bai et al. 2025, arXiv:2511.21631) interleaves them,
T H W T H W ..., and leaves the highest indices to T. Everything is computed in float32 whatever the backbone's dtype,
as transformers does; Megatron takes cos and sin and rounds them to the activations' dtype.

Shapes: T tokens, D = head_dim.
"""
from __future__ import annotations

from functools import lru_cache

import torch

from copd_megatron.model.spec import BackboneSpec, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[D/2] float32 on the CPU: angle per position step of each frequency, scaling applied."""
    if rope.frequencies is not None:
        return torch.tensor(rope.frequencies, dtype=torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (rope.theta ** exponents)


def position_row_of_frequency(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[D/2] int64: which row of the position ids (0 temporal, 1 height, 2 width) each frequency follows."""
    if rope.mrope_section is not None and not rope.mrope_interleaved:
        return torch.arange(3).repeat_interleave(torch.tensor(rope.mrope_section))
    rows = torch.zeros(head_dim // 2, dtype=torch.int64)
    if rope.mrope_section is not None:
        for row in (1, 2):
            rows[row : 3 * rope.mrope_section[row] : 3] = row
    return rows


def rotary_frequencies(spec: BackboneSpec, position_ids_3T: torch.Tensor) -> torch.Tensor:
    """Angles [T, 1, 1, D] float32 on the device of ``position_ids_3T`` [3, T] (any integer dtype).

    Both halves of the last dim are equal, as Megatron's rotate-half (non-interleaved) rotary expects.
    """
    frequencies, rows = _tables(spec.rope, spec.head_dim, position_ids_3T.device)
    angles = position_ids_3T.float()[rows].T * frequencies
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


@lru_cache
def _tables(rope: RopeSpec, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``inverse_frequencies`` and ``position_row_of_frequency`` there: a copy per pass would wait for the device."""
    return inverse_frequencies(rope, head_dim).to(device), position_row_of_frequency(rope, head_dim).to(device)
