"""The same result from torch's fused kernels: dense parts, merged exactly by log-sum-exp.

With out_i and lse_i of the parts, lse = log sum_i exp(lse_i) and out = sum_i exp(lse_i - lse) out_i
(Milakov and Gimelshein 2018, arXiv:1805.02867). The backward of each part is the fused kernel's own
backward given the *merged* out and lse, because P_ij = exp(s_ij - lse) and
dS = P (dO V^T - rowsum(dO out)) need nothing else (as in Liu et al. 2023, arXiv:2310.01889).
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from copd_kernels.prefix_attention.plan import Block, Meeting, Plan

_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool,
           bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense attention with its log-sum-exp, without autograd.

    Args:
        q: [B, heads, Q, d]; k, v: [B, heads, K, d].
        bias: [B, 1, 1, K] of q's dtype, added to the scores (-inf hides padding keys; no row may hide all).
            CUDA's kernel wants K to be a multiple of 16 then.

    Returns:
        out [B, heads, Q, d] of q's dtype and lse [B, heads, Q] (float32, or float64 for float64).
    """
    if not q.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
    if bias is not None:
        bias = bias.expand(*q.shape[:3], -1)
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
    # The kernel pads the log-sum-exp to a multiple of 32 queries.
    return out, lse[..., :q.shape[2]]


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend`` for q, k, v, given out and lse of the whole (merged) softmax."""
    if not q.is_cuda:
        # torch 2.13's kernel takes 5 times as long in bfloat16 as in float32.
        wide = torch.promote_types(q.dtype, torch.float32)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.to(wide) for x in (grad, q, k, v, out)), lse, 0.0, causal)
        return tuple(x.to(q.dtype) for x in grads)
    missing = -lse.shape[2] % 32
    lse = torch.nn.functional.pad(lse, (0, missing), value=float("inf")).contiguous()
    none = torch.zeros((), dtype=torch.int64, device=q.device)
    # In half precision the kernel takes this layout of ``out`` for granted, whatever its strides say.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse, none, none, 0.0, [True, True, True, False], causal)[:3]


def _take(x: Tensor, block: Block) -> Tensor:
    """[T, h, d] -> [B, h, L, d] (or [T, h] -> [B, h, L])."""
    rows = x.index_select(0, block.index)
    return rows.view(*block.shape, *x.shape[1:]).transpose(1, 2).contiguous()


def _give(x: Tensor, block: Block) -> Tensor:
    """[B, h, L, ...] -> the real rows [n, h, ...]."""
    rows = x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])
    return rows if block.slots is None else rows.index_select(0, block.slots)


def _real(x: Tensor, block: Block) -> Tensor:
    """Zero the padding slots of a gathered gradient [B, h, L, d]."""
    if block.slots is None:
        return x
    mask = torch.zeros(block.index.numel(), dtype=x.dtype, device=x.device)
    mask[block.slots] = 1
    return x * mask.view(block.shape[0], 1, block.shape[1], 1)


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, heads, L, ...] -> [B, kv_heads, groups * L, ...]: queries of one kv head side by side."""
    batch, heads, length, *rest = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * length, *rest)


def unfold(x: Tensor, heads: int) -> Tensor:
    """Inverse of ``fold``."""
    batch, kv_heads, folded, *rest = x.shape
    return x.reshape(batch, heads, kv_heads * folded // heads, *rest)


def _dense_meetings(plan: Plan, own: tuple[Tensor, Tensor], outside: tuple[Tensor | None, Tensor | None]
                    ) -> Iterator[tuple[Meeting, tuple[Tensor, Tensor]]]:
    """Blocks in which every query sees every key, and where their keys and values are."""
    yield from ((block, own) for block in plan.earlier)
    yield from ((block, own if outside[0] is None else outside) for block in plan.trunk)


class _PrefixAttention(torch.autograd.Function):
    """Forward and backward over all blocks of a plan; trunk K and V from the stream or from outside."""

    @staticmethod
    def forward(ctx, q, k, v, plan: Plan, trunk_k, trunk_v):
        groups = q.shape[1] // k.shape[1]
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], float("-inf"), device=q.device,
                         dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for block in plan.causal:
            keys, values = (_take(x, block.keys).repeat_interleave(groups, 1) for x in (k, v))
            part, part_lse = attend(_take(q, block.queries), keys, values, True)
            rows = block.queries.rows
            out[rows], lse[rows] = _give(part, block.queries), _give(part_lse, block.queries)
        for block, (keys, values) in _dense_meetings(plan, (k, v), (trunk_k, trunk_v)):
            part, part_lse = attend(fold(_take(q, block.queries), k.shape[1]),
                                    _take(keys, block.keys), _take(values, block.keys), False)
            part = _give(unfold(part, q.shape[1]), block.queries)
            part_lse = _give(unfold(part_lse, q.shape[1]), block.queries)
            rows = block.queries.rows
            own_out, own_lse = out[rows], lse[rows]
            both = torch.logaddexp(own_lse, part_lse)
            merged = (own_out * (own_lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None])
            out[rows], lse[rows] = merged.to(out.dtype), both
        ctx.save_for_backward(q, k, v, out, lse, trunk_k, trunk_v)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, trunk_k, trunk_v = ctx.saved_tensors
        heads, kv_heads = q.shape[1], k.shape[1]
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for block in ctx.plan.causal:
            queries = block.queries
            keys, values = (_take(x, block.keys).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            parts = attend_backward(_real(_take(grad, queries), queries), _take(q, queries), keys, values,
                                    _take(out, queries), _take(lse, queries), True)
            dq.index_add_(0, queries.rows, _give(parts[0], queries))
            for total, part in ((dk, parts[1]), (dv, parts[2])):
                summed = part.view(part.shape[0], kv_heads, -1, *part.shape[2:]).sum(2)
                total.index_add_(0, block.keys.rows, _give(summed, block.keys))
        for block, (keys, values) in _dense_meetings(ctx.plan, (k, v), (trunk_k, trunk_v)):
            queries = block.queries
            parts = attend_backward(
                fold(_real(_take(grad, queries), queries), kv_heads), fold(_take(q, queries), kv_heads),
                _take(keys, block.keys), _take(values, block.keys), fold(_take(out, queries), kv_heads),
                fold(_take(lse, queries), kv_heads), False)
            dq.index_add_(0, queries.rows, _give(unfold(parts[0], heads), queries))
            if keys is k:
                dk.index_add_(0, block.keys.rows, _give(parts[1], block.keys))
                dv.index_add_(0, block.keys.rows, _give(parts[2], block.keys))
        return dq, dk, dv, None, None, None


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan,
                     trunk_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """As ``reference.prefix_attention``, with the spans sorted into ``plan`` beforehand."""
    trunk_k, trunk_v = trunk_kv if trunk_kv is not None else (None, None)
    return _PrefixAttention.apply(q, k, v, plan, trunk_k, trunk_v)
