"""The definition of linear_logprob in plain torch: log p_v = z_v - lse, z = hidden weight^T / temperature.

Gradients: d log p_u / d z_v = [u = v] - p_v and d H / d z_v = -p_v (log p_v + H).
"""
from typing import NamedTuple

import torch
from torch import Tensor

from copd_kernels.vocab_topk.reference import pick_logits


class ShardScores(NamedTuple):
    """What one vocabulary shard knows about a block of tokens; see the package's contract."""

    lse_T: Tensor
    entropy_T: Tensor | None
    picked_TK: Tensor


def math_dtype(hidden: Tensor) -> torch.dtype:
    """float64 for float64 hidden states, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated and returned in ``dtype``."""
    # Only CUDA can multiply bfloat16 into float32; elsewhere the (exact) upcast is a copy of the weight.
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def block_logits(hidden_TH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    """[T, V] logits hidden weight^T / temperature in the math dtype; the caller owns the fresh tensor."""
    logits_TV = _product(hidden_TH, weight_VH.t(), math_dtype(hidden_TH))
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
    """[T] entropy of the shard's own softmax in nats, 0 for an empty shard. Overwrites ``logits_TV``."""
    if logits_TV.shape[1] == 0:
        return torch.zeros_like(lse_T)
    logprobs_TV = logits_TV.sub_(lse_T[:, None])
    return -logprobs_TV.exp().mul_(logprobs_TV).sum(1)


def linear_logprob(hidden_TH: Tensor, weight_VH: Tensor, ids_TK: Tensor, temperature: float = 1.0,
                   entropy: bool = False) -> ShardScores:
    """Scores of one block of tokens under one shard of the head.

    Args:
        hidden_TH: [T, H] final-normed hidden states, any float dtype.
        weight_VH: [V, H] this shard's rows of the head.
        ids_TK: [T, K] int64, counted from the shard's first row; outside [0, V) means another shard's.
        temperature: > 0, divides the logits.
        entropy: also return the entropy of the shard's softmax.

    Returns:
        ShardScores in the math dtype, without a graph.
    """
    with torch.no_grad():
        logits_TV = block_logits(hidden_TH, weight_VH, temperature)
        lse_T = logits_TV.logsumexp(1)
        picked_TK = pick_logits(logits_TV, ids_TK)
        return ShardScores(lse_T, shard_entropy_(logits_TV, lse_T) if entropy else None, picked_TK)


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
            inside_TK = (ids_TK >= 0) & (ids_TK < grad_TV.shape[1])
            grad_TV.scatter_add_(1, ids_TK.clamp(0, grad_TV.shape[1] - 1),
                                 grad_picked_TK.to(grad_TV.dtype).masked_fill(~inside_TK, 0))
        return hidden_gradient(grad_TV, hidden_TH, weight_VH, temperature)
