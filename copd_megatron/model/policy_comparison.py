"""How far policies are apart at the same tokens: the likeliest ids of each, KL over the vocabulary. Without a graph.

Every policy's states pass the head once, with however many others it is compared. Logits exist for a chunk of tokens,
one rank's shard of the vocabulary and two policies at a time, see ``vocab_parallel``.

Shape suffixes: T tokens, H hidden, V this rank's real vocabulary rows, N policies, P = N - 1 others, K ids per token.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_kernels.backend import implementation
from copd_kernels.linear_logprob.reference import block_logits, math_dtype
from copd_kernels.vocab_topk.reference import row_blocks
from copd_megatron.model.vocab_parallel import (
    Head,
    check_hidden,
    everybodys,
    merge_lse,
    merge_shard_topk,
    own_tokens,
    sum_over,
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What :func:`compare_policies` says about T tokens, equal on every rank of the head's groups."""

    topk_ids_TNK: Tensor
    """int64 global ids of each policy's k likeliest tokens, the policy itself first, equal logits by lowest id."""
    kl_TP: Tensor
    """KL(policy || other) in nats; float32, or float64 for float64 hidden states."""


@torch.no_grad()
def compare_policies(own_TH: Tensor, others: Sequence[Tensor], head: Head, k: int, *,
                     temperature: float = 1.0) -> Comparison:
    """A policy beside several others on the same tokens.

    Args:
        own_TH: [T, H] final-normed hidden states under the policy, the same on every rank.
        others: the same tokens' states under each other policy.
        k: 1 to the size of the vocabulary.
        temperature: > 0, divides the logits.

    Raises:
        ValueError: shapes, k or temperature do not fit.
    """
    check_hidden(own_TH, head, temperature)
    if wrong := [tuple(other.shape) for other in others if other.shape != own_TH.shape]:
        raise ValueError(f"others: {wrong}; the policy's {tuple(own_TH.shape)}")
    if not 1 <= k <= head.vocab_size:
        raise ValueError(f"k: {k}; between 1 and the vocabulary's {head.vocab_size}")
    sides = [own_tokens(hidden_TH.to(own_TH.dtype), head) for hidden_TH in (own_TH, *others)]
    lse_TN, gap_TP, values_TNK, ids_TNK = _compare_shards(sides, head, k, temperature)
    whole_TN = merge_lse(lse_TN, head.group)
    share_TN = lse_TN - whole_TN  # natural logs; -inf of a shard without rows
    offset_TP = (share_TN[:, :1] - share_TN[:, 1:]).masked_fill(share_TN[:, :1].isinf(), 0)
    kl_TP = sum_over(share_TN[:, :1].exp() * (gap_TP + offset_TP), head.group)
    _, ids = merge_shard_topk(values_TNK.flatten(0, 1), ids_TNK.flatten(0, 1), head.group)
    return Comparison(*everybodys([ids.view(ids_TNK.shape), kl_TP], head, len(own_TH)))


def _compare_shards(sides: Sequence[Tensor], head: Head, k: int,
                    temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of this shard's rows: log-sum-exp [T, N], the mean of log p - log q under its own softmaxes [T, P], and the k
    largest logits with their global ids [T, N, K]."""
    own_TH, tokens = sides[0], len(sides[0])
    like = {"dtype": math_dtype(own_TH), "device": own_TH.device}
    lse_TN = torch.empty(tokens, len(sides), **like)
    gap_TP = torch.zeros(tokens, len(sides) - 1, **like)
    values_TNK = torch.empty(tokens, len(sides), k, **like)
    ids_TNK = torch.empty(tokens, len(sides), k, dtype=torch.int64, device=own_TH.device)
    vocab_topk = implementation("vocab_topk", head.kernels).vocab_topk
    memories = head.logits_memory(own_TH), head.logits_memory(own_TH)
    for rows in head.chunks(own_TH):
        for place, hidden_TH in enumerate(sides):
            logits_TV = block_logits(hidden_TH[rows], head.real_weight, temperature, memories[min(place, 1)])
            values_TNK[rows, place], ids_TNK[rows, place], lse_TN[rows, place], _ = vocab_topk(logits_TV, k)
            logprobs_TV = logits_TV.sub_(lse_TN[rows, place, None])
            if place == 0:
                own_TV = logprobs_TV
            else:
                gap_TP[rows, place - 1] = torch.cat([
                    torch.sub(own, other, out=other).mul_(own.exp()).sum(1)
                    for own, other in zip(row_blocks(own_TV), row_blocks(logprobs_TV))])
            del logits_TV, logprobs_TV  # or they live on beside the next policy's
        del own_TV
    return lse_TN, gap_TP, values_TNK, ids_TNK.add_(head.vocab_start)
