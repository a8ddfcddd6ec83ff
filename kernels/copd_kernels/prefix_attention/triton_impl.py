"""prefix_attention in Triton: one launch forward, two backward, no gathers and no padded copies.

A program of the forward holds a tile of query rows, the query heads of one key/value head folded into it, and walks
over the trunk's keys and then over the rows' own (``tiles``), merging as it goes: the running maximum and sum are the
log-sum-exp of what was seen (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691). All leaves
of a group that lie next to each other share tiles, so that short completions still fill the matrix units; only the
rims of the causal part and the last tile of a trunk are masked.

The backward computes scores again from the log-sum-exp. One launch by query tiles gives the gradient of queries, one
by key tiles those of keys and values, which is left out where they need none. No atomics: equal inputs, equal bits.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from copd_kernels.prefix_attention.plan import MOST_DIM, Plan
from copd_kernels.prefix_attention.tiles import key_tiles, query_tiles

LOG2_E = 1.4426950408889634
"""Scores are kept in bits, as GPUs have exp2 in hardware."""


class Launch(NamedTuple):
    """How a kernel is cut: query rows (tokens x folded heads) and keys of a tile, warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class Launches(NamedTuple):
    """Of the three kernels."""

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch


SIZES: dict[tuple[bool, int], Launches] = {
    (False, 64): Launches(Launch(128, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
    (False, 128): Launches(Launch(128, 64, 8, 2), Launch(64, 64, 4, 2), Launch(64, 64, 8, 2)),
    (False, 256): Launches(Launch(64, 32, 4, 2), Launch(32, 32, 4, 1), Launch(32, 32, 8, 1)),
    (True, 64): Launches(Launch(32, 32, 4, 2), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1)),
    (True, 128): Launches(Launch(32, 32, 8, 1), Launch(16, 32, 8, 1), Launch(32, 32, 8, 1)),
    (True, 256): Launches(Launch(16, 32, 8, 1), Launch(16, 32, 8, 1), Launch(16, 32, 8, 1)),
}
"""(4-byte dtype, head dim at most) -> launches."""


@triton.jit
def _load(AT, real, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD]: the D numbers from each address on; zero where a row is not real, and beyond D."""
    column = tl.arange(0, BD)
    mask = real[:, None]
    if D < BD:
        mask = mask & (column < D)[None, :]
    return tl.load(AT[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(AT, x, real, D: tl.constexpr, BD: tl.constexpr):
    column = tl.arange(0, BD)
    tl.store(AT[:, None] + column[None, :], x.to(AT.dtype.element_ty), mask=real[:, None] & (column < D)[None, :])


@triton.jit
def _dot(a, b, total, EXACT: tl.constexpr):
    return tl.dot(a, b, total, input_precision="ieee" if EXACT else "tf32")


@triton.jit
def _attend(q, peak, mass, total, K, V, sk, sv, start, stop, end, low, high, scale, MASKED: tl.constexpr,
            EXACT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Keys [start, stop) seen by a tile; those from ``end`` on are not read."""
    for first in range(start, stop, BN):
        key = first + tl.arange(0, BN)
        k = _load(K + key.to(tl.int64) * sk, key < end, D, BD)
        s = _dot(q, tl.trans(k), tl.zeros([q.shape[0], BN], tl.float32), EXACT) * scale
        if MASKED:
            s = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        shift = higher
        if MASKED:
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # else -inf - -inf
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(peak - shift)
        mass = mass * keep + tl.sum(p, 1)
        v = _load(V + key.to(tl.int64) * sv, key < end, D, BD)
        total = _dot(p.to(v.dtype), v, total * keep[:, None], EXACT)
        peak = higher
    return peak, mass, total


@triton.jit
def _forward(Q, K, V, TRUNK_K, TRUNK_V, OUT, LSE, TILES, BOUNDS, scale, heads, group, sqt, sqh, skt, skh, svt, svh,
             stkt, stkh, stvt, stvh, FOLD: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr):
    tile = TILES + tl.program_id(0) * 7
    head = tl.program_id(1) * FOLD + tl.arange(0, BM) % FOLD
    kv = tl.program_id(1) * FOLD // group
    row = tl.load(tile) + tl.arange(0, BM) // FOLD
    real = row < tl.load(tile + 1)
    low = tl.load(BOUNDS + 2 * row, mask=real, other=0)
    high = tl.load(BOUNDS + 2 * row + 1, mask=real, other=0)
    q = _load(Q + row.to(tl.int64) * sqt + head * sqh, real, D, BD)
    peak = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, BD], tl.float32)
    start = tl.load(tile + 2)
    stop = tl.load(tile + 3)
    whole = start + (stop - start) // BN * BN
    peak, mass, total = _attend(q, peak, mass, total, TRUNK_K + kv * stkh, TRUNK_V + kv * stvh, stkt, stvt, start,
                                whole, stop, low, high, scale, False, EXACT, D, BD, BN)
    peak, mass, total = _attend(q, peak, mass, total, TRUNK_K + kv * stkh, TRUNK_V + kv * stvh, stkt, stvt, whole,
                                stop, stop, low * 0, low * 0 + stop, scale, True, EXACT, D, BD, BN)
    start = tl.load(tile + 4)
    stop = tl.load(tile + 6)
    whole = start + (tl.load(tile + 5) - start) // BN * BN
    peak, mass, total = _attend(q, peak, mass, total, K + kv * skh, V + kv * svh, skt, svt, start, whole, stop, low,
                                high, scale, False, EXACT, D, BD, BN)
    peak, mass, total = _attend(q, peak, mass, total, K + kv * skh, V + kv * svh, skt, svt, whole, stop, stop, low,
                                high, scale, True, EXACT, D, BD, BN)
    mass = tl.where(real, mass, 1.0)
    at = row.to(tl.int64) * heads + head
    _store(OUT + at * D, total / mass[:, None], real, D, BD)
    tl.store(LSE + at, peak + tl.log2(mass), mask=real)


@triton.jit
def _query_slope(q, grad, lse, delta, total, K, V, sk, sv, start, stop, end, low, high, scale, MASKED: tl.constexpr,
                 EXACT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Adds dS K over keys [start, stop), as ``_attend`` walks over them."""
    for first in range(start, stop, BN):
        key = first + tl.arange(0, BN)
        k = _load(K + key.to(tl.int64) * sk, key < end, D, BD)
        v = _load(V + key.to(tl.int64) * sv, key < end, D, BD)
        nothing = tl.zeros([q.shape[0], BN], tl.float32)
        p = tl.exp2(_dot(q, tl.trans(k), nothing, EXACT) * scale - lse[:, None])
        if MASKED:
            p = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), p, 0.0)
        ds = p * (_dot(grad, tl.trans(v), nothing, EXACT) - delta[:, None])
        total = _dot(ds.to(k.dtype), k, total, EXACT)
    return total


@triton.jit
def _query_gradient(Q, K, V, TRUNK_K, TRUNK_V, OUT, GRAD, LSE, DELTA, DQ, TILES, BOUNDS, scale, slope, heads, group,
                    sqt, sqh, skt, skh, svt, svh, stkt, stkh, stvt, stvh, FOLD: tl.constexpr, EXACT: tl.constexpr,
                    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tile = TILES + tl.program_id(0) * 7
    head = tl.program_id(1) * FOLD + tl.arange(0, BM) % FOLD
    kv = tl.program_id(1) * FOLD // group
    row = tl.load(tile) + tl.arange(0, BM) // FOLD
    real = row < tl.load(tile + 1)
    low = tl.load(BOUNDS + 2 * row, mask=real, other=0)
    high = tl.load(BOUNDS + 2 * row + 1, mask=real, other=0)
    at = row.to(tl.int64) * heads + head
    grad = _load(GRAD + at * D, real, D, BD)
    delta = tl.sum(grad.to(tl.float32) * _load(OUT + at * D, real, D, BD).to(tl.float32), 1)
    tl.store(DELTA + at, delta, mask=real)
    lse = tl.load(LSE + at, mask=real, other=0.0)
    q = _load(Q + row.to(tl.int64) * sqt + head * sqh, real, D, BD)
    total = tl.zeros([BM, BD], tl.float32)
    start = tl.load(tile + 2)
    stop = tl.load(tile + 3)
    whole = start + (stop - start) // BN * BN
    total = _query_slope(q, grad, lse, delta, total, TRUNK_K + kv * stkh, TRUNK_V + kv * stvh, stkt, stvt, start,
                         whole, stop, low, high, scale, False, EXACT, D, BD, BN)
    total = _query_slope(q, grad, lse, delta, total, TRUNK_K + kv * stkh, TRUNK_V + kv * stvh, stkt, stvt, whole,
                         stop, stop, low * 0, low * 0 + stop, scale, True, EXACT, D, BD, BN)
    start = tl.load(tile + 4)
    stop = tl.load(tile + 6)
    whole = start + (tl.load(tile + 5) - start) // BN * BN
    total = _query_slope(q, grad, lse, delta, total, K + kv * skh, V + kv * svh, skt, svt, start, whole, stop, low,
                         high, scale, False, EXACT, D, BD, BN)
    total = _query_slope(q, grad, lse, delta, total, K + kv * skh, V + kv * svh, skt, svt, whole, stop, stop, low,
                         high, scale, True, EXACT, D, BD, BN)
    _store(DQ + at * D, total * slope, real, D, BD)


@triton.jit
def _key_slope(k, v, dk, dv, key, Q, GRAD, LSE, DELTA, BOUNDS, RUNS, first_run, last_run, scale, heads, first_head,
               sqt, sqh, MASKED: tl.constexpr, FOLD: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr,
               BD: tl.constexpr, BM: tl.constexpr):
    """Adds dS^T Q and P^T dO over the query rows of some runs, for ``FOLD`` query heads."""
    head = first_head + tl.arange(0, BM) % FOLD
    for run in range(first_run, last_run):
        stop = tl.load(RUNS + 2 * run + 1)
        for start in range(tl.load(RUNS + 2 * run), stop, BM // FOLD):
            row = start + tl.arange(0, BM) // FOLD
            # With FOLD no divisor of BM, the last places would be the first rows of the next tile.
            real = (row < stop) & (tl.arange(0, BM) < BM // FOLD * FOLD)
            at = row.to(tl.int64) * heads + head
            q = _load(Q + row.to(tl.int64) * sqt + head * sqh, real, D, BD)
            grad = _load(GRAD + at * D, real, D, BD)
            lse = tl.load(LSE + at, mask=real, other=0.0)
            delta = tl.load(DELTA + at, mask=real, other=0.0)
            nothing = tl.zeros([k.shape[0], BM], tl.float32)
            p = tl.exp2(_dot(k, tl.trans(q), nothing, EXACT) * scale - lse[None, :])
            if MASKED:
                low = tl.load(BOUNDS + 2 * row, mask=real, other=0)
                high = tl.load(BOUNDS + 2 * row + 1, mask=real, other=0)
                p = tl.where((key[:, None] >= low[None, :]) & (key[:, None] < high[None, :]), p, 0.0)
            dv = _dot(p.to(grad.dtype), grad, dv, EXACT)
            ds = p * (_dot(v, tl.trans(grad), nothing, EXACT) - delta[None, :])
            dk = _dot(ds.to(q.dtype), q, dk, EXACT)
    return dk, dv


@triton.jit
def _key_gradient(Q, K, V, GRAD, LSE, DELTA, DK, DV, PARTS, ITEMS, RUNS, BOUNDS, scale, slope, heads, group, sqt, sqh,
                  skt, skh, svt, svh, FOLD: tl.constexpr, EXACT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr):
    item = ITEMS + tl.program_id(0) * 6
    kv = tl.program_id(1)
    key = tl.load(item) + tl.arange(0, BN)
    real = key < tl.load(item + 1)
    k = _load(K + key.to(tl.int64) * skt + kv * skh, real, D, BD)
    v = _load(V + key.to(tl.int64) * svt + kv * svh, real, D, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    first = tl.load(item + 2)
    middle = tl.load(item + 3)
    last = tl.load(item + 4)
    for head in range(kv * group, (kv + 1) * group, FOLD):
        dk, dv = _key_slope(k, v, dk, dv, key, Q, GRAD, LSE, DELTA, BOUNDS, RUNS, first, middle, scale, heads, head,
                            sqt, sqh, True, FOLD, EXACT, D, BD, BM)
        dk, dv = _key_slope(k, v, dk, dv, key, Q, GRAD, LSE, DELTA, BOUNDS, RUNS, middle, last, scale, heads, head,
                            sqt, sqh, False, FOLD, EXACT, D, BD, BM)
    dk *= slope
    slot = tl.load(item + 5)
    kv_heads = tl.num_programs(1)
    if slot < 0:
        at = (key.to(tl.int64) * kv_heads + kv) * D
        _store(DK + at, dk, real, D, BD)
        _store(DV + at, dv, real, D, BD)
    else:
        at = (slot.to(tl.int64) * kv_heads + kv) * (2 * BN * BD) + tl.arange(0, BN) * BD
        _store(PARTS + at, dk, real, BD, BD)
        _store(PARTS + at + BN * BD, dv, real, BD, BD)


@triton.jit
def _add_parts(PARTS, DK, DV, SUMS, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Gradients of the keys that several programs shared, added in the order of their query rows."""
    line = SUMS + tl.program_id(0) * 4
    kv = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    key = tl.load(line) + tl.arange(0, BN)
    real = key < tl.load(line + 1)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    at = (tl.load(line + 2).to(tl.int64) * kv_heads + kv) * (2 * BN * BD) + tl.arange(0, BN) * BD
    for _ in range(0, tl.load(line + 3)):
        dk += _load(PARTS + at, real, BD, BD)
        dv += _load(PARTS + at + BN * BD, real, BD, BD)
        at += kv_heads * (2 * BN * BD)
    at = (key.to(tl.int64) * kv_heads + kv) * D
    _store(DK + at, dk, real, D, BD)
    _store(DV + at, dv, real, D, BD)


def fold(group: int, queries: int) -> int:
    """How many of a group's query heads lie side by side in a tile: all, or the largest divisor that fits."""
    return max(n for n in range(1, min(group, queries) + 1) if group % n == 0)


def launches(dim: int, dtype: torch.dtype) -> Launches:
    """Tile sizes for a head dim."""
    return next(sizes for (wide, most), sizes in SIZES.items() if wide == (dtype.itemsize == 4) and dim <= most)


def _exact(x: Tensor) -> bool:
    """Whether products of float32 stay float32: where the caller asks so of torch's own."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _sizes(q: Tensor, k: Tensor, launch: Launch) -> dict[str, Any]:
    """A kernel's constants and options."""
    dim = q.shape[2]
    return {"FOLD": fold(q.shape[1] // k.shape[1], launch.queries), "EXACT": _exact(q), "D": dim,
            "BD": max(16, triton.next_power_of_2(dim)), "BM": launch.queries, "BN": launch.keys,
            "num_warps": launch.warps, "num_stages": launch.stages}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


class _PrefixAttention(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, trunk_k: Tensor | None,
                trunk_v: Tensor | None) -> Tensor:
        ctx.plan, ctx.inside = plan, trunk_k is None
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
        out, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[:2], dtype=torch.float32)
        trunk = (k, v) if trunk_k is None else (trunk_k, trunk_v)
        launch = launches(dim, q.dtype).forward
        sizes = _sizes(q, k, launch)
        table = query_tiles(plan, launch.queries // sizes["FOLD"])
        if len(table.tiles):
            _forward[(len(table.tiles), heads // sizes["FOLD"])](
                q, k, v, *trunk, out, lse, table.tiles, table.bounds, dim ** -0.5 * LOG2_E, heads, heads // kv_heads,
                *_strides(q, k, v, *trunk), **sizes)
        ctx.save_for_backward(q, k, v, out, lse, *(() if trunk_k is None else trunk))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *outside = ctx.saved_tensors
        trunk, grad = outside or (k, v), grad.contiguous()
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
        scale = dim ** -0.5 * LOG2_E, dim ** -0.5
        delta, dq = torch.zeros_like(lse), q.new_zeros(q.shape)
        launch = launches(dim, q.dtype).query_gradient
        sizes = _sizes(q, k, launch)
        table = query_tiles(ctx.plan, launch.queries // sizes["FOLD"])
        if len(table.tiles):
            _query_gradient[(len(table.tiles), heads // sizes["FOLD"])](
                q, k, v, *trunk, out, grad, lse, delta, dq, table.tiles, table.bounds, *scale, heads,
                heads // kv_heads, *_strides(q, k, v, *trunk), **sizes)
        if not any(ctx.needs_input_grad[1:3]):
            return dq, None, None, None, None, None
        dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
        launch = launches(dim, q.dtype).key_gradient
        sizes = _sizes(q, k, launch)
        keys = key_tiles(ctx.plan, launch.keys, ctx.inside)
        if len(keys.items):
            parts = lse.new_empty(keys.slots, kv_heads, 2, launch.keys, sizes["BD"])
            _key_gradient[(len(keys.items), kv_heads)](
                q, k, v, grad, lse, delta, dk, dv, parts, keys.items, keys.runs, table.bounds, *scale, heads,
                heads // kv_heads, *_strides(q, k, v), **sizes)
            if len(keys.sums):
                _add_parts[(len(keys.sums), kv_heads)](parts, dk, dv, keys.sums, D=dim, BD=sizes["BD"],
                                                       BN=launch.keys, num_warps=4)
        return dq, dk, dv, None, None, None


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan,
                     trunk_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """As ``reference.prefix_attention``, with the spans sorted into ``plan`` beforehand.

    Raises:
        ValueError: float64, or a head dim above ``MOST_DIM``.
    """
    if q.dtype == torch.float64 or q.shape[2] > MOST_DIM:
        raise ValueError(f"prefix_attention in Triton: {q.dtype}, head dim {q.shape[2]}; float32, bfloat16 or "
                         f"float16, and at most {MOST_DIM}; use another form (model.attention=auto)")
    q, k, v, *trunk = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v, *(trunk_kv or ())))
    return _PrefixAttention.apply(q, k, v, plan, *(trunk or (None, None)))
