"""Rotary angles of a backbone, in the form Megatron's attention applies them.

Angle of frequency i at position p: p_d(i) * theta^(-2i / head_dim), with d(i) the row (temporal, height,
width) that frequency i follows. Plain rotary follows row 0. Qwen3-VL (Bai et al. 2025, arXiv:2511.21631)
interleaves the rows, T H W T H W ..., and leaves the highest indices to T. Everything is computed in float32
whatever the backbone's dtype, as transformers does; Megatron takes cos and sin and rounds them to the
activations' dtype.

Shapes: T tokens, D = head_dim.
"""
from __future__ import annotations

import math

import torch

from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.types import UserError


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[D/2] float32 on the CPU: angle per position step of each frequency, scaling applied.

    Raises UserError for a scaling type other than linear and llama3.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta ** exponents)
    if rope.scaling is None:
        return plain
    kind = rope.scaling["rope_type"]
    if kind == "linear":
        return plain / rope.scaling["factor"]
    if kind == "llama3":
        return _llama3(plain, rope.scaling)
    raise UserError(f"model.path: the backbone's rope scaling is {kind!r}; supported are default, linear and "
                    "llama3; use a backbone with one of these")


def _llama3(plain: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by the factor, short ones kept, the band between
    blended linearly in context length / wavelength (Grattafiori et al. 2024, arXiv:2407.21783; bounds from
    the config)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    blend = (context / wavelength - low) / (high - low)
    scaled = torch.where(wavelength > context / low, plain / factor, plain)
    blended = (1 - blend) * scaled / factor + blend * scaled
    in_band = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(in_band, blended, scaled)


def position_row_of_frequency(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[D/2] int64: which row of the position ids (0 temporal, 1 height, 2 width) each frequency follows."""
    rows = torch.zeros(head_dim // 2, dtype=torch.int64)
    if rope.mrope_section is not None:
        for row in (1, 2):
            rows[row : 3 * rope.mrope_section[row] : 3] = row
    return rows


def rotary_frequencies(spec: BackboneSpec, position_ids_3T: torch.Tensor) -> torch.Tensor:
    """Angles [T, 1, 1, D] float32 on the device of ``position_ids_3T`` [3, T] (any integer dtype).

    Both halves of the last dim are equal, as Megatron's rotate-half (non-interleaved) rotary expects.
    """
    device = position_ids_3T.device
    frequencies = inverse_frequencies(spec.rope, spec.head_dim).to(device)
    rows = position_row_of_frequency(spec.rope, spec.head_dim).to(device)
    angles = position_ids_3T.float()[rows].T * frequencies
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]
