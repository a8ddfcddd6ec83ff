"""vocab_topk on a GPU: each row of logits is read once from memory, one program per row.

Only what lies strictly above a bound can be among the best: k columns seen already are at least the bound, and an equal
one has a higher id, and loses. So a few columns of each block enter a queue. Where a block offers more than k, or the
queue is full, the k best are kept, found by bisecting for the k-th largest, which becomes the bound: counting needs few
registers, so that several programs share a multiprocessor and hide each other's waiting. What is left in the queue at
the end, a few hundred, is sorted by a second kernel. Rows in ascending order, and many equal values, are only slower.

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

BLOCK = 1024
"""Columns that one program holds at a time."""

QUEUE = 512
"""Candidates that may wait; never less than twice k."""

NOTHING = tl.constexpr(-(2**63))
"""A key below every real one."""

LEAST = tl.constexpr(-(2**31))
"""A number below those of all values."""


@triton.jit
def _ordered(x):
    """int32 numbers in the order of float32 values."""
    x = tl.where(x == 0, 0.0, x)  # -0 equals 0
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _best_of(ordered, mask, k):
    """The k largest of the masked numbers, of which there are at least k; among equals the first. Also the least."""
    least = tl.where(_count(mask & (ordered >= 0)) >= k, 0, tl.full([], LEAST, tl.int32))
    for bit in range(31):
        higher = least + (1 << (30 - bit))
        least = tl.where(_count(mask & (ordered >= higher)) >= k, higher, least)
    above, level = mask & (ordered > least), mask & (ordered == least)
    return above | (level & (tl.cumsum(level.to(tl.int32), 0) <= k - _count(above))), least


@triton.jit
def _collect(LOGITS, QUEUES, WAITING, LSE, vocab, stride, k, BLOCK: tl.constexpr, QUEUE: tl.constexpr):
    """Keys of a superset of the row's k best, in the order of ids, and the row's log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    logits, queue = LOGITS + row * stride, QUEUES + row * QUEUE
    column, place = tl.arange(0, BLOCK), tl.arange(0, QUEUE)
    bound = tl.full([], LEAST, tl.int32)
    # A sum of its own for each place in a block: they meet once, at the end of the row.
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    waiting = 0
    following = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + column
        inside = ids < vocab
        x = following
        ahead = ids + BLOCK  # on its way while this block is looked at
        following = tl.load(logits + ahead, mask=ahead < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        # Nothing but -inf so far: exp(-inf - -inf) would not be a number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.exp(x - shift)
        peak = higher
        ordered = _ordered(x)
        enters = inside & (ordered > bound)
        count = _count(enters)
        if count > k:
            enters, bound = _best_of(ordered, enters, k)
            count = k
        if waiting + count > QUEUE:
            keys = tl.load(queue + place, mask=place < waiting, other=NOTHING)
            waits, least = _best_of((keys >> 32).to(tl.int32), place < waiting, k)
            tl.debug_barrier()  # everybody has read the queue before it is written again
            tl.store(queue + tl.cumsum(waits.to(tl.int32), 0) - 1, keys, mask=waits)
            tl.debug_barrier()
            waiting = k
            if least >= bound:  # else k of this block are better, and all of them fit
                bound = least
                enters = enters & (ordered > bound)
                count = _count(enters)
        if count > 0:
            keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
            tl.store(queue + waiting + tl.cumsum(enters.to(tl.int32), 0) - 1, keys, mask=enters)
            waiting += count
            tl.debug_barrier()  # what one thread wrote another will read
    tl.store(WAITING + row, waiting)
    highest = tl.max(peak, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(LSE + row, highest + tl.log(tl.sum(total * tl.exp(peak - shift), 0)))


@triton.jit
def _sort(LOGITS, QUEUES, WAITING, IDS, VALUES, FOUND, PICKED, vocab, stride, k, picks,
          K: tl.constexpr, J: tl.constexpr, QUEUE: tl.constexpr):
    """The row's k best keys, as values and ids, and the logits asked for."""
    row = tl.program_id(0).to(tl.int64)
    place, column = tl.arange(0, QUEUE), tl.arange(0, K)
    best = tl.topk(tl.load(QUEUES + row * QUEUE + place, mask=place < tl.load(WAITING + row), other=NOTHING), K)
    ordered = (best >> 32).to(tl.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    real = best != NOTHING
    tl.store(VALUES + row * k + column, tl.where(real, values, float("-inf")), mask=column < k)
    tl.store(FOUND + row * k + column, tl.where(real, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1), mask=column < k)
    if J > 0:
        pick = tl.arange(0, J)
        wanted = tl.load(IDS + row * picks + pick, mask=pick < picks, other=-1)
        here = (wanted >= 0) & (wanted < vocab)
        picked = tl.load(LOGITS + row * stride + wanted, mask=here, other=0.0)
        tl.store(PICKED + row * picks + pick, picked, mask=pick < picks)


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
        block, queue = min(BLOCK, max(16, triton.next_power_of_2(vocab))), max(QUEUE, 2 * places)
        queue_RQ = torch.empty(rows, queue, dtype=torch.int64, **like)
        waiting_R = torch.empty(rows, dtype=torch.int32, **like)
        _collect[(rows,)](logits_RV, queue_RQ, waiting_R, lse_R, vocab, logits_RV.stride(0), k, BLOCK=block,
                          QUEUE=queue, num_warps=4)
        _sort[(rows,)](logits_RV, queue_RQ, waiting_R, found_RK if ids_RJ is None else ids_RJ.contiguous(), values_RK,
                       found_RK, picked_RJ, vocab, logits_RV.stride(0), k, picks, K=places,
                       J=triton.next_power_of_2(picks) if picks else 0, QUEUE=queue, num_warps=4)
    else:
        values_RK.fill_(-torch.inf), found_RK.fill_(NO_ID), lse_R.fill_(-torch.inf), picked_RJ.zero_()
    return TopK(values_RK, found_RK, lse_R, None if ids_RJ is None else picked_RJ)
