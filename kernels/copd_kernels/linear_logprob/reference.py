"""The definition of linear_logprob in plain torch: log p_v = z_v - lse, z = hidden weight^T / temperature.

Gradients: d log p_u / d z_v = [u = v] - p_v and d H / d z_v = -p_v (log p_v + H).
"""
from typing import NamedTuple

import torch
from torch import Tensor

from copd_kernels.vocab_topk.reference import by_rows, pick_logits, row_lse

GATHERED = 2**24
"""Numbers of the head that exist in another dtype at a time in :func:`picked_gradient`."""


class ShardScores(NamedTuple):
    """What one vocabulary shard knows about a block of tokens; see the package's contract."""

    lse_T: Tensor
    entropy_T: Tensor | None
    picked_TK: Tensor
    rest_TH: Tensor | None = None


def math_dtype(hidden: Tensor) -> torch.dtype:
    """float64 for float64 hidden states, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def logits_memory(hidden_TH: Tensor, weight_VH: Tensor, tokens: int) -> Tensor | None:
    """[tokens, V] for the logits of one chunk after another; None on CUDA, whose allocator keeps what was freed.

    On a CPU a fresh tensor of this size costs its page faults, a fifth of the product.
    """
    if hidden_TH.is_cuda:
        return None
    return torch.empty(tokens, weight_VH.shape[0], dtype=math_dtype(hidden_TH), device=hidden_TH.device)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right, accumulated and returned in ``dtype``; in ``out`` if given."""
    # Only CUDA can multiply bfloat16 into float32; elsewhere the (exact) upcast is a copy of the weight.
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def block_logits(hidden_TH: Tensor, weight_VH: Tensor, temperature: float,
                 memory_CV: Tensor | None = None) -> Tensor:
    """[T, V] logits hidden weight^T / temperature in the math dtype, which the caller owns.

    ``memory_CV``: from :func:`logits_memory`, for at least T tokens, whose first rows become the logits.
    """
    out = None if memory_CV is None else memory_CV[:len(hidden_TH)]
    logits_TV = _product(hidden_TH.detach(), weight_VH.detach().t(), math_dtype(hidden_TH), out)
    return logits_TV if temperature == 1.0 else logits_TV.div_(temperature)


def hidden_gradient(grad_logits_TV: Tensor, hidden_TH: Tensor, weight_VH: Tensor,
                    temperature: float) -> Tensor:
    """[T, H] gradient of the hidden states in the math dtype, the transpose of :func:`block_logits`.

    A bfloat16 head on CUDA rounds the logit gradients to bfloat16 first, as the forward product's inputs are.
    """
    if grad_logits_TV.is_cuda and hidden_TH.dtype == weight_VH.dtype == torch.bfloat16:
        grad_logits_TV = grad_logits_TV.to(torch.bfloat16)
    grad_TH = _product(grad_logits_TV, weight_VH, math_dtype(hidden_TH))
    return grad_TH if temperature == 1.0 else grad_TH.div_(temperature)


def shard_entropy_(logits_TV: Tensor, lse_T: Tensor) -> Tensor:
    """[T] entropy of the shard's own softmax in nats, 0 for an empty shard. Leaves log-probs in ``logits_TV``."""
    if logits_TV.shape[1] == 0:
        return torch.zeros_like(lse_T)
    logprobs_TV = logits_TV.sub_(lse_T[:, None])
    return by_rows(lambda block_TV: -block_TV.exp().mul_(block_TV).sum(1), logprobs_TV)


def rest_(logits_TV: Tensor, lse_T: Tensor, ids_TK: Tensor, hidden_TH: Tensor, weight_VH: Tensor,
          temperature: float) -> Tensor:
    """[T, H] ``rest_TH`` of the contract. Overwrites ``logits_TV``; ``lse_T``: over the shard."""
    probs_TV = logits_TV.sub_(lse_T[:, None]).exp_()
    if probs_TV.shape[1]:
        # The least of the probability and 0 at an id, and infinity at an id of another shard.
        bound_TK = torch.where(_inside(ids_TK, probs_TV.shape[1]), 0.0, torch.inf).to(probs_TV.dtype)
        probs_TV.scatter_reduce_(1, ids_TK.clamp(0, probs_TV.shape[1] - 1), bound_TK, "amin")
    return hidden_gradient(probs_TV, hidden_TH, weight_VH, temperature)


def _inside(ids_TK: Tensor, vocab: int) -> Tensor:
    return (ids_TK >= 0) & (ids_TK < vocab)


def linear_logprob(hidden_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, temperature: float = 1.0,
                   entropy: bool = False, rest: bool = False, memory_CV: Tensor | None = None) -> ShardScores:
    """Scores of one block of tokens under one shard of the head.

    Args:
        hidden_TH: [T, H] final-normed hidden states, any float dtype.
        weight_VH: [V, H] this shard's rows of the head.
        ids_TK: [T, K] int64, counted from the shard's first row; outside [0, V) means another shard's.
        temperature: > 0, divides the logits.
        entropy: also return the entropy of the shard's softmax.
        rest: also return ``rest_TH``, at the cost of a second product.
        memory_CV: as :func:`block_logits` takes it.

    Returns:
        ShardScores in the math dtype, without a graph.
    """
    with torch.no_grad():
        logits_TV = block_logits(hidden_TH, weight_VH, temperature, memory_CV)
        lse_T = row_lse(logits_TV)
        picked_TK = pick_logits(logits_TV, ids_TK)
        entropy_T = shard_entropy_(logits_TV, lse_T) if entropy else None
        # After the entropy the logits are log-probs already.
        rest_TH = rest_(logits_TV, torch.zeros_like(lse_T) if entropy else lse_T, ids_TK, hidden_TH, weight_VH,
                        temperature) if rest else None
        return ShardScores(lse_T, entropy_T, picked_TK, rest_TH)


def picked_gradient(rest_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, logprobs_TK: Tensor, grad_TK: Tensor,
                    temperature: float) -> Tensor:
    """This shard's part of the gradient of the hidden states, from what the forward kept.

    Args:
        rest_TH: this shard's part of the whole softmax's, see the package's contract.
        ids_TK: counted from the shard's first row; they may repeat.
        logprobs_TK: log-probs at the ids over the whole vocabulary.
        grad_TK: gradient of these log-probs.

    Returns:
        [T, H] in the math dtype; its sum over the shards is the gradient.
    """
    with torch.no_grad():
        vocab = weight_VH.shape[0]
        ids_TK, factor_TK, total_T1 = picked_factors(ids_TK, logprobs_TK, grad_TK.to(rest_TH.dtype), vocab, temperature)
        grad_TH = rest_TH * -total_T1
        if vocab:
            grad_TH += _weighted_rows(weight_VH, ids_TK, factor_TK)
        return grad_TH


def picked_factors(ids_TK: Tensor, logprobs_TK: Tensor, grad_TK: Tensor, vocab: int, temperature: float
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """What ``picked_gradient`` multiplies the ids' own rows of the head with, and the rest.

    Args:
        grad_TK: in the math dtype.

    Returns:
        ids [T, K], each row in rising order, inside [0, V); factors [T, K], 0 at ids of another shard; and [T, 1],
        the sum of the gradients.
    """
    total_T1 = grad_TK.sum(1, keepdim=True)
    ids_TK, order_TK = ids_TK.sort(1)  # an id given twice has its probability taken off once
    own_TK = logprobs_TK.exp().gather(1, order_TK)
    own_TK[:, 1:].masked_fill_(ids_TK[:, 1:] == ids_TK[:, :-1], 0)
    factor_TK = grad_TK.gather(1, order_TK).addcmul_(total_T1, own_TK, value=-1)
    factor_TK.masked_fill_(~_inside(ids_TK, vocab), 0).div_(temperature)
    return ids_TK.clamp(0, max(0, vocab - 1)), factor_TK, total_T1


def _weighted_rows(weight_VH: Tensor, ids_TK: Tensor, factor_TK: Tensor) -> Tensor:
    """[T, H] sum over k of factor_TK weight_VH[ids_TK] in the dtype of the factors."""
    if weight_VH.dtype == factor_TK.dtype:
        return torch.nn.functional.embedding_bag(ids_TK, weight_VH, mode="sum", per_sample_weights=factor_TK)
    # Of a few tokens at a time: the rows of a chunk's tokens may be many times as large as its logits.
    tokens = max(1, GATHERED // max(1, ids_TK.shape[1] * weight_VH.shape[1]))
    return torch.cat([(factor[:, None] @ weight_VH[ids].to(factor.dtype))[:, 0]
                      for ids, factor in zip(ids_TK.split(tokens), factor_TK.split(tokens))])


def linear_logprob_backward(hidden_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, temperature: float,
                            lse_T: Tensor, grad_picked_TK: Tensor | None, entropy_T: Tensor | None = None,
                            grad_entropy_T: Tensor | None = None) -> Tensor:
    """This shard's part of the gradient of the hidden states.

    Args:
        lse_T, entropy_T: over the WHOLE vocabulary; ``entropy_T`` is needed with ``grad_entropy_T``.
        grad_picked_TK: [T, K] gradient of the log-probs at ``ids_TK`` (not of the logits), or None.
        grad_entropy_T: [T] gradient of the entropy over the whole vocabulary, or None.

    Returns:
        [T, H] in the math dtype; its sum over the shards is the gradient.
    """
    with torch.no_grad():
        grad_TV = block_logits(hidden_TH, weight_VH, temperature).sub_(lse_T[:, None])  # log-probs so far
        total_T = torch.zeros_like(lse_T) if grad_picked_TK is None else grad_picked_TK.sum(1)
        if grad_entropy_T is None:
            grad_TV.exp_().mul_(-total_T[:, None])
        else:
            probs_TV = grad_TV.exp()
            grad_TV.add_(entropy_T[:, None]).mul_(grad_entropy_T[:, None]).add_(total_T[:, None])
            grad_TV.mul_(probs_TV).neg_()
        if grad_picked_TK is not None and grad_TV.shape[1]:
            inside_TK = _inside(ids_TK, grad_TV.shape[1])
            grad_TV.scatter_add_(1, ids_TK.clamp(0, grad_TV.shape[1] - 1),
                                 grad_picked_TK.to(grad_TV.dtype).masked_fill(~inside_TK, 0))
        return hidden_gradient(grad_TV, hidden_TH, weight_VH, temperature)
