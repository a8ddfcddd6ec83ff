"""vocab_topk on a GPU: each row of logits is read once from memory, one program per row.

Candidates wait in a buffer of ``BLOCK`` places, which is merged into the best when the next block's do not fit. The
first block fills it; from then on only what lies strictly above the last of the best is a candidate (an equal value
has a higher id, and loses), a few per block. So the expensive sort runs two or three times per row instead of once
per block; rows in ascending order are only slower.

A value and its id are one int64 key: the float's bits made order-preserving above, the complement of the id below,
so that one sort orders by (value descending, id ascending).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from copd_kernels.vocab_topk.reference import NO_ID, TopK, check_topk, merge_topk

__all__ = ["merge_topk", "vocab_topk"]

MOST = 256
"""The largest k."""

BLOCK = 4096
"""Columns that one program holds at a time, and candidates that may wait."""

NOTHING = tl.constexpr(-(2**63))
"""A key below every real one."""


@triton.jit
def _keys(x, ids):
    """int64 keys of float32 values and int32 ids."""
    x = tl.where(x == 0, 0.0, x)  # -0 equals 0
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _values(keys):
    """float32 values of keys."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _better(best, others, K: tl.constexpr):
    """The K best of both, descending."""
    return tl.topk(tl.ravel(tl.join(best, tl.topk(others, K))), K)


@triton.jit
def _row(LOGITS, IDS, CANDIDATES, VALUES, FOUND, LSE, PICKED, vocab, stride, k, picks,
         K: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    buffer = CANDIDATES + row * BLOCK
    place = tl.arange(0, BLOCK)
    best = tl.full([K], NOTHING, tl.int64)
    bound = float("-inf")
    peak = float("-inf")
    total = 0.0
    waiting = 0
    for start in range(0, vocab, BLOCK):
        ids = start + place
        inside = ids < vocab
        x = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        # A row of -inf only: exp(-inf - -inf) would not be a number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift), 0)
        peak = higher
        enters = inside & ((x > bound) | (start == 0))
        count = tl.sum(enters.to(tl.int32), 0)
        if waiting + count > BLOCK:
            best = _better(best, tl.load(buffer + place, mask=place < waiting, other=NOTHING), K)
            bound = _values(tl.min(best, 0))  # the first block alone has more than K columns
            enters = inside & (x > bound)
            count = tl.sum(enters.to(tl.int32), 0)
            waiting = 0
            tl.debug_barrier()  # everybody has read the buffer before it is written again
        tl.store(buffer + waiting + tl.cumsum(enters.to(tl.int32), 0) - 1, _keys(x, ids), mask=enters)
        waiting += count
        tl.debug_barrier()  # what one thread wrote another will read
    best = _better(best, tl.load(buffer + place, mask=place < waiting, other=NOTHING), K)
    column = tl.arange(0, K)
    real = best != NOTHING
    tl.store(VALUES + row * k + column, tl.where(real, _values(best), float("-inf")), mask=column < k)
    found = tl.where(real, (0x7FFFFFFF - (best & 0x7FFFFFFF)), -1)
    tl.store(FOUND + row * k + column, found, mask=column < k)
    tl.store(LSE + row, peak + tl.log(total))
    if J > 0:
        pick = tl.arange(0, J)
        wanted = tl.load(IDS + row * picks + pick, mask=pick < picks, other=-1)
        here = (wanted >= 0) & (wanted < vocab)
        tl.store(PICKED + row * picks + pick, tl.load(logits + wanted, mask=here, other=0.0), mask=pick < picks)


def vocab_topk(logits_RV: Tensor, k: int, ids_RJ: Tensor | None = None) -> TopK:
    """As ``reference.vocab_topk``; float32, k at most ``MOST``, rows contiguous.

    Raises:
        ValueError: another dtype, or a larger k.
    """
    check_topk(logits_RV, k, ids_RJ)
    if logits_RV.dtype != torch.float32 or k > MOST:
        raise ValueError(f"vocab_topk in Triton: {logits_RV.dtype}, k {k}; float32 and at most {MOST}; use the "
                         "reference (model.kernels=reference)")
    rows, vocab = logits_RV.shape
    logits_RV = logits_RV if logits_RV.stride(-1) == 1 else logits_RV.contiguous()
    like = {"device": logits_RV.device}
    values_RK = torch.empty(rows, k, dtype=torch.float32, **like)
    found_RK = torch.empty(rows, k, dtype=torch.int64, **like)
    lse_R = torch.empty(rows, dtype=torch.float32, **like)
    picks = 0 if ids_RJ is None else ids_RJ.shape[1]
    picked_RJ = torch.empty(rows, picks, dtype=torch.float32, **like)
    if rows and vocab:
        places = max(4, triton.next_power_of_2(k))  # tl.topk needs a few
        block = max(2 * places, min(BLOCK, triton.next_power_of_2(vocab)))
        _row[(rows,)](logits_RV, found_RK if ids_RJ is None else ids_RJ.contiguous(),
                      torch.empty(rows, block, dtype=torch.int64, **like), values_RK, found_RK, lse_R, picked_RJ,
                      vocab, logits_RV.stride(0), k, picks, K=places, J=triton.next_power_of_2(picks) if picks else 0,
                      BLOCK=block, num_warps=8)
    else:
        values_RK.fill_(-torch.inf), found_RK.fill_(NO_ID), lse_R.fill_(-torch.inf), picked_RJ.zero_()
    return TopK(values_RK, found_RK, lse_R, None if ids_RJ is None else picked_RJ)
