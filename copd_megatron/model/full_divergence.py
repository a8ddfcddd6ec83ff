"""Divergences over the whole vocabulary between two sets of hidden states before the frozen, sharded head.

Logits exist for a chunk of tokens and one rank's shard at a time, see ``vocab_parallel``, and once: both sides'
log-probs come from the same ones. Reverse KL: Gu et al. 2023, arXiv:2306.08543; generalised Jensen-Shannon: Agarwal et
al. 2023, arXiv:2306.13649.

Shape suffixes: T tokens, H hidden, V this rank's real vocabulary rows.
"""
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from copd_kernels.linear_logprob.reference import block_logits, hidden_gradient, math_dtype
from copd_kernels.vocab_topk.reference import pick_logits, row_blocks, row_lse
from copd_megatron.model.vocab_parallel import (
    Head,
    check_hidden,
    check_ids,
    everybodys,
    merge_lse,
    own_tokens,
    sum_over,
)

DivergenceKind = Literal["reverse", "forward", "jsd"]
"""reverse: KL(student || teacher); forward: KL(teacher || student); jsd: generalised Jensen-Shannon."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """What :func:`full_divergence` says about T tokens; float32, or float64 for float64 hidden states."""

    value_T: Tensor
    """Nats; differentiable."""
    logprobs_T: Tensor | None = None
    """The student's log-prob of the target token, to record: without a graph."""
    teacher_logprobs_T: Tensor | None = None
    """The teacher's, likewise."""


def full_divergence(student_hidden_TH: Tensor, teacher_hidden_TH: Tensor, head: Head,
                    kind: DivergenceKind = "reverse", *, temperature: float = 1.0, jsd_weight: float = 0.5,
                    target_ids_T: Tensor | None = None) -> Divergence:
    """Exact divergence over the whole vocabulary, per token; the gradient goes to the student only.

    Args:
        student_hidden_TH, teacher_hidden_TH: [T, H] final-normed hidden states, the same on every rank.
        kind: see :data:`DivergenceKind`.
        jsd_weight: the teacher's share of the mixture, in (0, 1); only read for ``jsd``.
        target_ids_T: [T] int64 global token ids, e.g. the sampled ones: also both sides' log-probs there, at the cost
            of no further product.

    Returns:
        Divergence, equal on every rank of ``head.group``.

    Raises:
        ValueError: shapes, temperature, kind or weight do not fit.
        RuntimeError: an id outside the vocabulary; on CUDA a device-side assertion.
    """
    check_hidden(student_hidden_TH, head, temperature)
    if teacher_hidden_TH.shape != student_hidden_TH.shape:
        raise ValueError(f"teacher_hidden_TH: {tuple(teacher_hidden_TH.shape)}; the student's "
                         f"{tuple(student_hidden_TH.shape)}")
    if kind not in ("reverse", "forward", "jsd"):
        raise ValueError(f"kind: {kind!r}; reverse, forward or jsd")
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight: {jsd_weight}; between 0 and 1, both excluded")
    teacher_hidden_TH = teacher_hidden_TH.detach().to(student_hidden_TH.dtype)
    if target_ids_T is not None:
        check_ids(target_ids_T[:, None], student_hidden_TH, head)
        target_ids_T = own_tokens(target_ids_T, head)
    differentiable = torch.is_grad_enabled() and student_hidden_TH.requires_grad
    return Divergence(*everybodys(_FullDivergence.apply(
        own_tokens(student_hidden_TH, head), own_tokens(teacher_hidden_TH, head), target_ids_T, head, kind,
        temperature, jsd_weight, differentiable), head, len(student_hidden_TH)))


class _FullDivergence(torch.autograd.Function):
    """Chunked full-vocabulary divergence.

    A token's value depends on its own hidden state alone. So the forward takes the gradient of every value while
    its logits exist, and the backward only scales the rows: as many products as with logits that are kept.
    """

    @staticmethod
    def forward(ctx: Any, student_TH: Tensor, teacher_TH: Tensor, ids_T: Tensor | None, head: Head, kind: str,
                temperature: float, jsd_weight: float, differentiable: bool
                ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        like = {"dtype": math_dtype(student_TH), "device": student_TH.device}
        value_T = torch.zeros(len(student_TH), **like)
        logprobs_T, teacher_T = (None if ids_T is None else torch.zeros(len(student_TH), **like) for _ in range(2))
        slope_TH = torch.empty(student_TH.shape, **like) if differentiable else None
        memories = head.logits_memory(student_TH), head.logits_memory(student_TH)
        for rows in head.chunks(student_TH):
            logits = [block_logits(hidden_TH[rows], head.real_weight, temperature, memory_CV)
                      for hidden_TH, memory_CV in zip((student_TH, teacher_TH), memories)]
            own_ids_T1 = None if ids_T is None else ids_T[rows, None] - head.vocab_start
            value_T[rows], picked_T2, grad_TV = _chunk_divergence_(*logits, own_ids_T1, head, kind, jsd_weight)
            if ids_T is not None:
                logprobs_T[rows], teacher_T[rows] = picked_T2.unbind(1)
            if slope_TH is not None:
                slope_TH[rows] = hidden_gradient(grad_TV, student_TH[rows], head.real_weight, temperature)
            del logits, grad_TV  # or they live on beside the next chunk's
        ctx.save_for_backward(slope_TH)
        ctx.group, ctx.dtype = head.group, student_TH.dtype
        ctx.mark_non_differentiable(*([] if ids_T is None else [logprobs_T, teacher_T]))
        return value_T, logprobs_T, teacher_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        slope_TH, = ctx.saved_tensors
        return (sum_over(slope_TH * grad_T[:, None], ctx.group).to(ctx.dtype), *(None,) * 7)


def _chunk_divergence_(student_TV: Tensor, teacher_TV: Tensor, ids_T1: Tensor | None, head: Head, kind: str,
                       jsd_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk's logits: values [T] and the log-probs of student and teacher at the ids, [T, 2] ([T, 0] without
    ids), both over the whole vocabulary, and the gradients of the values by this shard's logits [T, V].

    Overwrites both. ``ids_T1`` count from the shard's first row.
    """
    lse_T2 = merge_lse(torch.stack([row_lse(student_TV), row_lse(teacher_TV)], 1), head.group)
    probs_TV, pull_TV = student_TV.sub_(lse_T2[:, :1]), teacher_TV.sub_(lse_T2[:, 1:])
    # While these are log-probs.
    picked = [] if ids_T1 is None else [pick_logits(logprobs_TV, ids_T1) for logprobs_TV in (probs_TV, pull_TV)]
    parts = [_divergence_(*block, kind, jsd_weight) for block in zip(row_blocks(probs_TV), row_blocks(pull_TV))]
    sums_TJ = sum_over(torch.cat([torch.cat(parts), *picked], 1), head.group)
    return sums_TJ[:, 0], sums_TJ[:, 2:], pull_TV.sub_(probs_TV.mul_(sums_TJ[:, 1:2]))


def _divergence_(log_p_TV: Tensor, log_q_TV: Tensor, kind: str, jsd_weight: float) -> Tensor:
    """[T, 2]: this shard's part of the divergence of the student's p, and of sum(p c). Leaves p and p c in the inputs.

    c is the derivative by p: log p - log q for reverse, -q / p for forward, (1 - w)(log p - log m) for
    Jensen-Shannon. The gradient of the logits is p c - p sum(p c), the sum over the whole vocabulary.
    """
    if kind == "reverse":
        pull_TV, probs_TV = log_q_TV.neg_().add_(log_p_TV), log_p_TV.exp_()
        pull_T = pull_TV.mul_(probs_TV).sum(1)
        return torch.stack([pull_T, pull_T], 1)
    if kind == "forward":
        gap_TV, pull_TV = log_q_TV - log_p_TV, log_q_TV.exp_().neg_()
        log_p_TV.exp_()
        return torch.stack([-gap_TV.mul_(pull_TV).sum(1), pull_TV.sum(1)], 1)
    log_m_TV = _log_mixture(log_p_TV, log_q_TV, jsd_weight)
    gap_TV = log_q_TV - log_m_TV
    teacher_T = gap_TV.mul_(log_q_TV.exp_()).sum(1)
    pull_TV = torch.sub(log_p_TV, log_m_TV, out=log_q_TV).mul_(1 - jsd_weight)
    pull_T = pull_TV.mul_(log_p_TV.exp_()).sum(1)
    return torch.stack([pull_T.add(teacher_T, alpha=jsd_weight), pull_T], 1)


def _log_mixture(log_p_TV: Tensor, log_q_TV: Tensor, teacher_share: float) -> Tensor:
    log_m_TV = log_p_TV + math.log1p(-teacher_share)
    return torch.logaddexp(log_m_TV, log_q_TV + math.log(teacher_share), out=log_m_TV)
