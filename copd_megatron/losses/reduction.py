"""From losses per token to one number: weights that make any split of the batch sum to the same loss.

loss = sum over ranks, microbatches and tokens of w_t loss_t, with

seq_mean    w_t = 1 / (tokens of its sequence x all sequences)       GRPO, arXiv:2402.03300, and CoPD
token_mean  w_t = 1 / all tokens                                     DAPO, arXiv:2503.14476
constant    w_t = 1 / (longest allowed completion x all sequences)   Dr.GRPO, arXiv:2503.20783

"all" counts the whole update: every rank, microbatch and split. So gradients are SUMMED over ranks.
"""
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["seq_mean", "token_mean", "constant"]


def token_weights(lengths: Tensor, kind: Reduction, total_sequences: int, total_tokens: int, max_tokens: int,
                  *, loss_mask_T: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight of every token of the sequences at hand.

    Args:
        lengths: [S] int64, tokens of each whole sequence here, in the order of the flat token stream. 0 is
            allowed: the sequence adds nothing but belongs in ``total_sequences``.
        total_sequences: sequences of the whole update, over all ranks, microbatches and splits.
        total_tokens: LOSS tokens of the whole update; only read by ``token_mean``.
        max_tokens: longest allowed completion; only read by ``constant``.
        loss_mask_T: [T] bool, T = sum of lengths; masked tokens weigh 0 and do not count as tokens of their
            sequence. None: every token carries loss.

    Returns:
        [T] of ``dtype`` on the device of ``lengths``.

    Raises:
        ValueError: a total that is too small for what is here, an unknown kind, a mask of another length.
    """
    tokens = int(lengths.sum())
    mask_T = lengths.new_ones(tokens, dtype=torch.bool) if loss_mask_T is None else loss_mask_T
    if len(mask_T) != tokens:
        raise ValueError(f"loss_mask_T: {len(mask_T)} entries; one for each of {tokens} tokens")
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    counts_S = torch.zeros_like(lengths).index_add(0, sequence_T, mask_T.to(lengths.dtype))
    if total_sequences < len(lengths):
        raise ValueError(f"total_sequences: {total_sequences}; at least the {len(lengths)} that are here")
    if kind == "seq_mean":
        weights_T = 1.0 / (counts_S[sequence_T].double() * total_sequences)
    elif kind == "token_mean":
        here = int(counts_S.sum())
        if total_tokens < here:
            raise ValueError(f"total_tokens: {total_tokens}; at least the {here} that are here")
        weights_T = lengths.new_full((tokens,), 1.0 / max(total_tokens, 1), dtype=torch.float64)
    elif kind == "constant":
        if max_tokens < 1:
            raise ValueError(f"max_tokens: {max_tokens}; at least 1")
        scale = 1.0 / (max_tokens * max(total_sequences, 1))
        weights_T = lengths.new_full((tokens,), scale, dtype=torch.float64)
    else:
        raise ValueError(f"kind: {kind!r}; seq_mean, token_mean or constant")
    return weights_T.masked_fill(~mask_T, 0).to(dtype)
