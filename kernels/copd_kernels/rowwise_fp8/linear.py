"""The linear layer with a frozen weight in FP8 rows; see the package's contract."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from copd_kernels.backend import Backend, implementation


def _product(q_MK: Tensor, s_M1: Tensor, columns_KN: Tensor, s_1N: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, N]; ``columns_KN`` is stored column by column, as FP8 tensor cores want it."""
    if not len(q_MK):
        return q_MK.new_empty(0, columns_KN.shape[1], dtype=dtype)
    # Row-wise scales come with bfloat16 results only on CUDA.
    out_dtype = torch.bfloat16 if q_MK.is_cuda else dtype
    return torch._scaled_mm(q_MK, columns_KN, scale_a=s_M1, scale_b=s_1N, out_dtype=out_dtype).to(dtype)


class _FrozenLinear(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, q_NK: Tensor, s_N1: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(q_NK, s_N1)
        ctx.backend = backend
        quantised = implementation("rowwise_fp8", backend).quantise_rows(x_MK)
        return _product(*quantised, q_NK.t(), s_N1.t(), x_MK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Any, ...]:
        q_NK, s_N1 = ctx.saved_tensors
        quantised = implementation("rowwise_fp8", ctx.backend).quantise_rows(grad_MN, s_N1[:, 0])
        ones_1K = torch.ones(1, q_NK.shape[1], device=q_NK.device)
        # The bytes are turned for this product and forgotten: a second copy for good would double the weight.
        columns_NK = q_NK.t().contiguous().t()
        return _product(*quantised, columns_NK, ones_1K, grad_MN.dtype), None, None, None


def frozen_linear(x: Tensor, q_NK: Tensor, s_N1: Tensor, backend: Backend = "reference") -> Tensor:
    """[..., N] from x [..., K], in x's dtype; the gradient goes to x.

    Args:
        q_NK: [N, K] float8_e4m3fn.
        s_N1: [N, 1] float32, its rows' scales.
        backend: what quantises x and its gradient.

    Raises:
        ValueError: sizes that FP8 products cannot take, or float64.
    """
    n, k = q_NK.shape
    if n % 16 or k % 16 or x.dtype == torch.float64 or x.shape[-1] != k:
        raise ValueError(f"frozen_linear: weight [{n}, {k}], x {tuple(x.shape)} {x.dtype}; both sizes multiples of 16, "
                         "x float32 or narrower")
    rows = x.reshape(-1, k)
    return _FrozenLinear.apply(rows, q_NK, s_N1, backend).view(*x.shape[:-1], n)
