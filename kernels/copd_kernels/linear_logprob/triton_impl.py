"""linear_logprob on a GPU: torch's matrix product, then one program per row of logits.

The product is left to cuBLAS, which no hand-written one beats at these shapes (T x V x H with V of 10^5); what is
fused is everything else. Forward: one read of the logits gives log-sum-exp, entropy and the picked logits (the
reference reads them four times). The logits then become probabilities, or in the backward of the entropy their own
gradient, in place, in one read and one write.

Entropy in one read: with s = sum exp(z - m) and u = sum (z - m) exp(z - m), H = log s - u / s; when the running
maximum m rises by d, s and u become e^-d s and e^-d (u - d s).

What the ids add to a gradient is summed up from the head's rows where they lie: gathered, they would be K times the
hidden states, in float32.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from copd_kernels.linear_logprob.reference import ShardScores, block_logits, hidden_gradient, picked_factors

__all__ = ["linear_logprob", "linear_logprob_backward", "picked_gradient", "rest_", "row_scores"]

BLOCK = 4096
"""Logits of a row that one program holds at a time."""

PART = 32
"""Ids that a row's ids are compared with at a time: all with all would be K^2 numbers in registers."""

WIDE = 512
"""Hidden dims that one program adds rows of the head up for."""


@triton.jit
def _scores(LOGITS, IDS, LSE, ENTROPY, PICKED, vocab, stride, picks,
            ENTROPY_TOO: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    place = tl.arange(0, BLOCK)
    peak = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + place, mask=start + place < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # else -inf - -inf
        mass = tl.exp(x - shift)
        keep = tl.exp(peak - shift)
        if ENTROPY_TOO:
            moved = tl.where(total == 0.0, 0.0, weighted + (peak - shift) * total)
            weighted = keep * moved + tl.sum(tl.where(mass == 0.0, 0.0, (x - shift) * mass), 0)
        total = total * keep + tl.sum(mass, 0)
        peak = higher
    tl.store(LSE + row, peak + tl.log(total))
    if ENTROPY_TOO:
        tl.store(ENTROPY + row, tl.log(total) - weighted / total)
    pick = tl.arange(0, J)
    wanted = tl.load(IDS + row * picks + pick, mask=pick < picks, other=-1)
    here = (wanted >= 0) & (wanted < vocab)
    tl.store(PICKED + row * picks + pick, tl.load(logits + wanted, mask=here, other=0.0), mask=pick < picks)


@triton.jit
def _gradient(LOGITS, IDS, LSE, GRAD_PICKED, ENTROPY, GRAD_ENTROPY, vocab, stride, picks,
              PICKS_TOO: tl.constexpr, ENTROPY_TOO: tl.constexpr, J: tl.constexpr, PART: tl.constexpr,
              BLOCK: tl.constexpr):
    """Row of logits -> its gradient, in place: [u = v] g_u - p_v sum g - g_H p_v (log p_v + H)."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    lse = tl.load(LSE + row)
    pick = tl.arange(0, J)
    total = 0.0
    wanted = tl.full([J], -1, tl.int64)
    if PICKS_TOO:
        wanted = tl.load(IDS + row * picks + pick, mask=pick < picks, other=-1)
        total = tl.sum(tl.load(GRAD_PICKED + row * picks + pick, mask=pick < picks, other=0.0).to(tl.float32), 0)
    slope = 0.0
    entropy = 0.0
    if ENTROPY_TOO:
        slope = tl.load(GRAD_ENTROPY + row)
        entropy = tl.load(ENTROPY + row)
    here = (wanted >= 0) & (wanted < vocab)
    own = tl.load(logits + wanted, mask=here, other=0.0).to(tl.float32) - lse
    tl.debug_barrier()  # the picked logits are read before they are overwritten
    place = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        inside = start + place < vocab
        logprob = tl.load(logits + start + place, mask=inside, other=float("-inf")).to(tl.float32) - lse
        grad = -tl.exp(logprob) * total
        if ENTROPY_TOO:
            grad -= tl.where(logprob == float("-inf"), 0.0, slope * tl.exp(logprob) * (logprob + entropy))
        tl.store(logits + start + place, grad, mask=inside)
    if PICKS_TOO:
        # An id given twice gets the sum, written twice: the same number, so the order of the writes is no matter.
        summed = tl.zeros([J], tl.float32)
        for first in range(0, picks, PART):
            part = first + tl.arange(0, PART)
            others = tl.load(IDS + row * picks + part, mask=part < picks, other=-1)
            given = tl.load(GRAD_PICKED + row * picks + part, mask=part < picks, other=0.0).to(tl.float32)
            summed += tl.sum(tl.where(wanted[:, None] == others[None, :], given[None, :], 0.0), 1)
        base = -tl.exp(own) * total
        if ENTROPY_TOO:
            base -= slope * tl.exp(own) * (own + entropy)
        tl.debug_barrier()  # after the elementwise writes of all threads
        tl.store(logits + wanted, base + summed, mask=here)


@triton.jit
def _probabilities(LOGITS, IDS, LSE, vocab, stride, picks, J: tl.constexpr, BLOCK: tl.constexpr):
    """Row of logits -> its probabilities, in place, 0 at the ids."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    lse = tl.load(LSE + row)
    place = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        inside = start + place < vocab
        x = tl.load(logits + start + place, mask=inside, other=float("-inf")).to(tl.float32)
        tl.store(logits + start + place, tl.exp(x - lse), mask=inside)
    tl.debug_barrier()  # after the elementwise writes of all threads
    pick = tl.arange(0, J)
    wanted = tl.load(IDS + row * picks + pick, mask=pick < picks, other=-1)
    tl.store(logits + wanted, tl.zeros([J], tl.float32), mask=(wanted >= 0) & (wanted < vocab))


@triton.jit
def _add_rows(OUT, WEIGHT, IDS, FACTORS, hidden, stride, picks, BLOCK: tl.constexpr):
    """OUT[t] += sum over k of FACTORS[t, k] WEIGHT[IDS[t, k]], in the order of k."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    out = OUT + token * hidden + column
    total = tl.load(out, mask=inside, other=0.0)
    for k in range(0, picks):
        factor = tl.load(FACTORS + token * picks + k)
        if factor != 0.0:  # as it is for an id of another shard
            at = tl.load(IDS + token * picks + k)
            total += factor * tl.load(WEIGHT + at * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total, mask=inside)


def _fits(hidden_TH: Tensor) -> None:
    if hidden_TH.dtype == torch.float64:
        raise ValueError("linear_logprob in Triton: float64 hidden states; float32, bfloat16 or float16; use the "
                         "reference (model.kernels=reference)")


def _width(picks: int) -> int:
    return triton.next_power_of_2(max(1, picks))


def linear_logprob(hidden_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, temperature: float = 1.0,
                   entropy: bool = False, rest: bool = False, memory_CV: Tensor | None = None) -> ShardScores:
    """As ``reference.linear_logprob``. ValueError for float64."""
    _fits(hidden_TH)
    with torch.no_grad():
        logits_TV = block_logits(hidden_TH, weight_VH, temperature, memory_CV)
        scores = row_scores(logits_TV, ids_TK, entropy)
        if not rest:
            return scores
        return scores._replace(rest_TH=rest_(logits_TV, scores.lse_T, ids_TK, hidden_TH, weight_VH, temperature))


def rest_(logits_TV: Tensor, lse_T: Tensor, ids_TK: Tensor, hidden_TH: Tensor, weight_VH: Tensor,
          temperature: float) -> Tensor:
    """As ``reference.rest_``, on float32 logits."""
    tokens, vocab = logits_TV.shape
    if tokens and vocab:
        _probabilities[(tokens,)](logits_TV, ids_TK.contiguous(), lse_T, vocab, logits_TV.stride(0), ids_TK.shape[1],
                                  J=_width(ids_TK.shape[1]), BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
                                  num_warps=8)
    return hidden_gradient(logits_TV, hidden_TH, weight_VH, temperature)


def row_scores(logits_TV: Tensor, ids_TK: Tensor, entropy: bool = False) -> ShardScores:
    """Log-sum-exp, entropy if asked, and picked logits of float32 logits that exist already."""
    tokens, vocab = logits_TV.shape
    if vocab == 0:
        lse_T = logits_TV.new_full((tokens,), -torch.inf)
        return ShardScores(lse_T, torch.zeros_like(lse_T) if entropy else None, logits_TV.new_zeros(ids_TK.shape))
    lse_T = logits_TV.new_empty(tokens)
    entropy_T = torch.empty_like(lse_T) if entropy else None
    picked_TK = logits_TV.new_empty(ids_TK.shape)
    if tokens:
        _scores[(tokens,)](logits_TV, ids_TK.contiguous(), lse_T, entropy_T if entropy else lse_T, picked_TK, vocab,
                           logits_TV.stride(0), ids_TK.shape[1], ENTROPY_TOO=entropy, J=_width(ids_TK.shape[1]),
                           BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=8)
    return ShardScores(lse_T, entropy_T, picked_TK)


def linear_logprob_backward(hidden_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, temperature: float,
                            lse_T: Tensor, grad_picked_TK: Tensor | None, entropy_T: Tensor | None = None,
                            grad_entropy_T: Tensor | None = None) -> Tensor:
    """As ``reference.linear_logprob_backward``. ValueError for float64."""
    _fits(hidden_TH)
    with torch.no_grad():
        logits_TV = block_logits(hidden_TH, weight_VH, temperature)
        tokens, vocab = logits_TV.shape
        if tokens and vocab:
            grad_picked = lse_T if grad_picked_TK is None else grad_picked_TK.contiguous()
            entropies = ((lse_T, lse_T) if grad_entropy_T is None
                         else (entropy_T.contiguous(), grad_entropy_T.contiguous()))
            _gradient[(tokens,)](logits_TV, ids_TK.contiguous(), lse_T, grad_picked, *entropies, vocab,
                                 logits_TV.stride(0), ids_TK.shape[1], PICKS_TOO=grad_picked_TK is not None,
                                 ENTROPY_TOO=grad_entropy_T is not None, J=_width(ids_TK.shape[1]),
                                 PART=min(PART, _width(ids_TK.shape[1])),
                                 BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=8)
        return hidden_gradient(logits_TV, hidden_TH, weight_VH, temperature)


def picked_gradient(rest_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, logprobs_TK: Tensor, grad_TK: Tensor,
                    temperature: float) -> Tensor:
    """As ``reference.picked_gradient``. ValueError for float64."""
    _fits(rest_TH)
    with torch.no_grad():
        vocab, hidden = weight_VH.shape
        ids_TK, factor_TK, total_T1 = picked_factors(ids_TK, logprobs_TK, grad_TK.to(rest_TH.dtype), vocab, temperature)
        grad_TH = (rest_TH * -total_T1).contiguous()
        if vocab and ids_TK.numel():
            weight_VH = weight_VH if weight_VH.stride(1) == 1 else weight_VH.contiguous()
            _add_rows[(len(ids_TK), triton.cdiv(hidden, WIDE))](
                grad_TH, weight_VH, ids_TK.contiguous(), factor_TK.contiguous(), hidden, weight_VH.stride(0),
                ids_TK.shape[1], BLOCK=min(WIDE, triton.next_power_of_2(hidden)), num_warps=4)
        return grad_TH
