"""rowwise_fp8 on a GPU: a row is read once from memory, its scale found and its FP8 bytes written by one program.

Without fusion the four passes over x (multiply, maximum, divide, cast) cost more than the FP8 product saves.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from copd_kernels.rowwise_fp8.reference import EPS, FP8, LARGEST

BLOCK = 4096


@triton.jit
def _row(X, Q, S, MULTIPLIER, K, stride, eps, largest, MULTIPLY: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    peak = 0.0
    x = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + place
        x = tl.load(X + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
        if MULTIPLY:
            x = x * tl.load(MULTIPLIER + k, mask=k < K, other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(x), 0))
    scale = tl.div_rn(tl.maximum(peak, eps), largest)  # Triton's own / is off by a bit or two
    tl.store(S + row, scale)
    for start in range(0, K, BLOCK):
        k = start + place
        if not ONCE:  # the row did not stay in registers; the cache has it
            x = tl.load(X + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
            if MULTIPLY:
                x = x * tl.load(MULTIPLIER + k, mask=k < K, other=0.0)
        y = tl.minimum(tl.maximum(tl.div_rn(x, scale), -largest), largest)
        tl.store(Q + row * K + k, y.to(tl.float8e4nv), mask=k < K)


def quantise_rows(x_MK: Tensor, multiplier_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``reference.quantise_rows``; float32, bfloat16 or float16."""
    rows, k = x_MK.shape
    x_MK = x_MK if x_MK.stride(-1) == 1 else x_MK.contiguous()
    q_MK = torch.empty(rows, k, dtype=FP8, device=x_MK.device)
    scale_M1 = torch.empty(rows, 1, dtype=torch.float32, device=x_MK.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(k))
        _row[(rows,)](x_MK, q_MK, scale_M1, scale_M1 if multiplier_K is None else multiplier_K, k, x_MK.stride(0), EPS,
                      LARGEST, MULTIPLY=multiplier_K is not None, ONCE=k <= block, BLOCK=block, num_warps=4)
    return q_MK, scale_M1
