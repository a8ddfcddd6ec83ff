"""grouped_lora on a GPU: all experts in one launch, forward and backward.

A program multiplies one tile of rows of one expert with its factor (the experts' factors lie side by side, padded to
the largest rank); rows are gathered on load and scattered on store, so that nothing is copied into order first.
Gradients of factors: one program per expert and tile of the factor, a loop over the expert's rows.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from copd_kernels.grouped_lora.reference import Columns, check_down, check_up
from copd_kernels.grouped_lora.segments import TILE, Segments

WIDE, DEEP = 128, 64
"""Columns of a program's output, and steps of its sum."""

PROGRAMS, FEWEST_ROWS = 512, 256
"""A gradient of factors shares an expert's rows out, so that about so many programs run, each over at least so many
rows: a factor alone has a few dozen blocks, too few for a GPU."""


@triton.jit
def _multiply(X, W, Y, ROWS, OWNERS, FIRSTS, BOUNDS, SCALES, N, K, sx, swg, swn, swk, sy, first, width, step,
              own_first, own_width, own_step, ADD: tl.constexpr, EXACT: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Y[t, column(n)] (+)= s_g sum_k X[t, own(k)] W[g, n, k] for the rows t of a tile of expert g."""
    tile = tl.program_id(0)
    g = tl.load(OWNERS + tile)
    place = tl.load(FIRSTS + tile) + tl.arange(0, BM)
    real = place < tl.load(BOUNDS + g + 1)
    row = tl.load(ROWS + place, mask=real, other=0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    weight = W + g.to(tl.int64) * swg
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        from_column = own_first + k // own_width * own_step + k % own_width
        x = tl.load(X + row[:, None] * sx + from_column[None, :], mask=real[:, None] & (k[None, :] < K), other=0.0)
        w = tl.load(weight + n[None, :] * swn + k[:, None] * swk, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee" if EXACT else "tf32")
    total *= tl.load(SCALES + g)
    to = Y + row[:, None] * sy + (first + n // width * step + n % width)[None, :]
    mask = real[:, None] & (n[None, :] < N)
    if ADD:
        total += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, total.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _outer(L, R, D, ROWS, BOUNDS, SCALES, N, K, sl, sr, sds, sdg, sdn, first, width, step, splits,
           EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """D[i, g, n, k] = s_g sum over the i-th share of the rows t of expert g of L[t, column(n)] R[t, k], float32."""
    g = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    from_column = first + n // width * step + n % width
    total = tl.zeros((BN, BK), tl.float32)
    begin = tl.load(BOUNDS + g)
    stop = tl.load(BOUNDS + g + 1)
    share = tl.cdiv(tl.cdiv(stop - begin, splits), BM) * BM
    begin += split * share
    stop = tl.minimum(begin + share, stop)
    for start in range(begin, stop, BM):
        place = start + tl.arange(0, BM)
        real = place < stop
        row = tl.load(ROWS + place, mask=real, other=0)
        left = tl.load(L + row[None, :] * sl + from_column[:, None], mask=real[None, :] & (n[:, None] < N), other=0.0)
        right = tl.load(R + row[:, None] * sr + k[None, :], mask=real[:, None] & (k[None, :] < K), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee" if EXACT else "tf32")
    total *= tl.load(SCALES + g)
    tl.store(D + split.to(tl.int64) * sds + g.to(tl.int64) * sdg + n[:, None] * sdn + k[None, :], total,
             mask=(n[:, None] < N) & (k[None, :] < K))


def _exact(x: Tensor) -> bool:
    """Whether products of float32 stay float32: where the caller asks so of torch's own."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _multiplied(x: Tensor, stack: Tensor, out: Tensor, scales: Tensor, segments: Segments, transposed: bool,
                to: Columns, of: Columns, add: bool) -> Tensor:
    """``out`` with the products of all experts' rows; ``stack`` [G, N, K], or [G, K, N] where ``transposed``."""
    n, k = stack.shape[1:] if not transposed else (stack.shape[2], stack.shape[1])
    strides = (stack.stride(1), stack.stride(2)) if not transposed else (stack.stride(2), stack.stride(1))
    owners, firsts = segments.tiles
    if len(owners) and n and k:
        wide = max(16, min(WIDE, triton.next_power_of_2(n)))
        _multiply[(len(owners), triton.cdiv(n, wide))](
            x, stack, out, segments.rows, owners, firsts, segments.bounds, scales, n, k, x.stride(0), stack.stride(0),
            *strides, out.stride(0), *to, *of, ADD=add, EXACT=_exact(x), BM=TILE, BN=wide,
            BK=max(16, min(DEEP, triton.next_power_of_2(k))), num_warps=4)
    return out


def _gradient_of(factors: Sequence[Tensor], left: Tensor, right: Tensor, scales: Tensor, segments: Segments,
                 columns: Columns) -> list[Tensor]:
    """Gradient of each factor [n_g, k_g] from left [T, >= n] and right [T, >= k]."""
    n, k = (max(f.shape[d] for f in factors) for d in (0, 1))
    wide, deep = (max(16, min(WIDE // 2, triton.next_power_of_2(size))) for size in (n, k))
    blocks = triton.cdiv(n, wide), triton.cdiv(k, deep)
    splits = max(1, min(PROGRAMS // (len(factors) * blocks[0] * blocks[1]), max(segments.lengths) // FEWEST_ROWS))
    parts = torch.empty(splits, len(factors), n, k, dtype=torch.float32, device=left.device)
    _outer[(len(factors) * splits, *blocks)](
        left, right, parts, segments.rows, segments.bounds, scales, n, k, left.stride(0), right.stride(0),
        *parts.stride()[:3], *columns, splits, EXACT=_exact(left), BM=32, BN=wide, BK=deep, num_warps=4)
    total = parts[0] if splits == 1 else parts.sum(0)
    return [part[:f.shape[0], :f.shape[1]].to(f.dtype).contiguous() for part, f in zip(total, factors)]


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[G, n, k] the factors side by side, padded with zeros."""
    if len({factor.shape for factor in factors}) == 1:
        return torch.stack(tuple(factors)).to(dtype)  # one launch, or two, for any number of experts
    n, k = (max(f.shape[d] for f in factors) for d in (0, 1))
    stack = factors[0].new_zeros(len(factors), n, k, dtype=dtype)
    for place, factor in zip(stack, factors):
        place[:factor.shape[0], :factor.shape[1]] = factor
    return stack


class _Down(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments, *factors: Tensor) -> Tensor:
        stack = _stacked(factors, x.dtype)
        ones = _on_device((1.0,) * len(factors), x.device)
        width = stack.shape[1]
        ctx.save_for_backward(x, *factors)
        ctx.segments, ctx.ones = segments, ones
        return _multiplied(x, stack, x.new_zeros(len(x), width), ones, segments, False, (0, width, 0),
                           (0, x.shape[1], 0), add=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        grad, ones, dx, gradients = grad.contiguous(), ctx.ones, None, [None] * len(factors)
        if ctx.needs_input_grad[0]:
            dx = _multiplied(grad, _stacked(factors, grad.dtype), torch.zeros_like(x), ones, ctx.segments, True,
                             (0, x.shape[1], 0), (0, grad.shape[1], 0), add=False)
        if any(ctx.needs_input_grad[2:]):
            gradients = _gradient_of(factors, grad, x, ones, ctx.segments, (0, grad.shape[1], 0))
        return dx, None, *gradients


class _Up(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, scales: Tensor, segments: Segments, columns: Columns,
                *factors: Tensor) -> Tensor:
        ctx.save_for_backward(h, *factors)
        ctx.segments, ctx.columns, ctx.scales = segments, columns, scales
        stack = _stacked(factors, h.dtype)
        # The same memory as a new tensor: autograd forbids marking a view, which Megatron's linears return, as changed.
        return _multiplied(h, stack, y.detach(), scales, segments, False, columns, (0, stack.shape[2], 0), add=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        h, *factors = ctx.saved_tensors
        scales, dense, dh, gradients = ctx.scales, grad.contiguous(), None, [None] * len(factors)
        if ctx.needs_input_grad[1]:
            stack = _stacked(factors, h.dtype)
            dh = _multiplied(dense, stack, torch.zeros_like(h), scales, ctx.segments, True, (0, stack.shape[2], 0),
                             ctx.columns, add=False)
        if any(ctx.needs_input_grad[5:]):
            gradients = _gradient_of(factors, dense, h, scales, ctx.segments, ctx.columns)
        return grad, dh, None, None, None, *gradients


@lru_cache(maxsize=1024)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """[G] float32. Kept, because the host waits for the device when it copies from memory that is not pinned."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it where its rows overlap or their numbers do not lie side by side."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _not_wide(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError("grouped_lora in Triton: float64; float32, bfloat16 or float16; use the reference "
                         "(model.kernels=reference)")


def grouped_down(x_TK: Tensor, factors: Sequence[Tensor], segments: Segments) -> Tensor:
    """As ``reference.grouped_down``. ValueError also for float64."""
    check_down(x_TK, factors, segments)
    _not_wide(x_TK)
    if not factors:
        return x_TK.new_zeros(len(x_TK), 0)
    return _Down.apply(_dense_rows(x_TK), segments, *factors)


def grouped_up(y_TM: Tensor, h_TR: Tensor, factors: Sequence[Tensor], scales: Sequence[float], segments: Segments,
               columns: Columns | None = None) -> Tensor:
    """As ``reference.grouped_up``, but y is overwritten (a copy, where its rows are not dense): the caller must not
    need it any more."""
    check_up(y_TM, h_TR, factors, segments, columns)
    _not_wide(h_TR)
    if not factors:
        return y_TM
    return _Up.apply(_dense_rows(y_TM), _dense_rows(h_TR), _on_device(tuple(map(float, scales)), h_TR.device),
                     segments, columns or (0, factors[0].shape[0], 0), *factors)
