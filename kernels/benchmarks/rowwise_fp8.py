"""rowwise_fp8: rows to FP8 with a scale each, with and without a multiplier, against torch's separate operations.

    python kernels/benchmarks/rowwise_fp8.py [--check] [--csv FILE]
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main, sides

SHAPES = ((16384, 2560), (16384, 9728))
"""Rows and columns: hidden states and feed-forward activations of a 4B model."""


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Activations, and gradients with the weight's scales as multiplier."""
    for shape in ((3, 32),) if small else SHAPES:
        for multiplied in (False, True):
            yield _case(*shape, multiplied, torch.float32 if small else torch.bfloat16, device)


def _case(rows: int, size: int, multiplied: bool, dtype: torch.dtype, device: torch.device) -> Case:
    from copd_kernels.rowwise_fp8 import reference, triton_impl

    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, size, generator=generator, device=device).to(dtype)
    multiplier = torch.rand(size, generator=generator, device=device) if multiplied else None
    return Case(f"{'gradients' if multiplied else 'activations'} M={rows} K={size}", dtype,
                sides(lambda module: module.quantise_rows(x, multiplier), reference=reference, triton=triton_impl),
                rows * size * (dtype.itemsize + 1) + 4 * rows + 4 * size * multiplied, 0)


if __name__ == "__main__":
    raise SystemExit(main("rowwise_fp8", cases))
