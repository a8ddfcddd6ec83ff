"""Divergences over the whole vocabulary between two sets of hidden states before the frozen, sharded head.

Logits exist for a chunk of tokens and one rank's shard at a time, see ``vocab_parallel``. Reverse KL: Gu et al. 2023,
arXiv:2306.08543; generalised Jensen-Shannon: Agarwal et al. 2023, arXiv:2306.13649.

Shape suffixes: T tokens, H hidden, V this rank's real vocabulary rows.
"""
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from copd_kernels.linear_logprob.reference import block_logits, hidden_gradient, math_dtype
from copd_kernels.vocab_topk.reference import row_blocks, row_lse
from copd_megatron.model.vocab_parallel import Head, check_hidden, everybodys, merge_lse, own_tokens, sum_over

DivergenceKind = Literal["reverse", "forward", "jsd"]
"""reverse: KL(student || teacher); forward: KL(teacher || student); jsd: generalised Jensen-Shannon."""


def full_divergence(student_hidden_TH: Tensor, teacher_hidden_TH: Tensor, head: Head,
                    kind: DivergenceKind = "reverse", *, temperature: float = 1.0,
                    jsd_weight: float = 0.5) -> Tensor:
    """Exact divergence over the whole vocabulary, per token; the gradient goes to the student only.

    Args:
        student_hidden_TH, teacher_hidden_TH: [T, H] final-normed hidden states, the same on every rank.
        kind: see :data:`DivergenceKind`.
        jsd_weight: the teacher's share of the mixture, in (0, 1); only read for ``jsd``.

    Returns:
        [T] nats, float32 (float64 for float64 hidden states), equal on every rank of ``head.group``.
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
    differentiable = torch.is_grad_enabled() and student_hidden_TH.requires_grad
    own = _FullDivergence.apply(own_tokens(student_hidden_TH, head), own_tokens(teacher_hidden_TH, head), head,
                                kind, temperature, jsd_weight, differentiable)
    return everybodys([own], head, len(student_hidden_TH))[0]


class _FullDivergence(torch.autograd.Function):
    """Chunked full-vocabulary divergence.

    A token's value depends on its own hidden state alone. So the forward takes the gradient of every value while
    its logits exist, and the backward only scales the rows: as many products as with logits that are kept.
    """

    @staticmethod
    def forward(ctx: Any, student_TH: Tensor, teacher_TH: Tensor, head: Head, kind: str, temperature: float,
                jsd_weight: float, differentiable: bool) -> Tensor:
        like = {"dtype": math_dtype(student_TH), "device": student_TH.device}
        value_T = torch.zeros(len(student_TH), **like)
        slope_TH = torch.empty(student_TH.shape, **like) if differentiable else None
        memories = head.logits_memory(student_TH), head.logits_memory(student_TH)
        for rows in head.chunks(student_TH):
            logits = [block_logits(hidden_TH[rows], head.real_weight, temperature, memory_CV)
                      for hidden_TH, memory_CV in zip((student_TH, teacher_TH), memories)]
            value_T[rows], grad_TV = _chunk_divergence_(*logits, head, kind, jsd_weight)
            if slope_TH is not None:
                slope_TH[rows] = hidden_gradient(grad_TV, student_TH[rows], head.real_weight, temperature)
            del logits, grad_TV  # or they live on beside the next chunk's
        ctx.save_for_backward(slope_TH)
        ctx.group, ctx.dtype = head.group, student_TH.dtype
        return value_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Any, ...]:
        slope_TH, = ctx.saved_tensors
        return (sum_over(slope_TH * grad_T[:, None], ctx.group).to(ctx.dtype), *(None,) * 6)


def _chunk_divergence_(student_TV: Tensor, teacher_TV: Tensor, head: Head, kind: str, jsd_weight: float
                       ) -> tuple[Tensor, Tensor]:
    """Of a chunk's logits: values [T] over the whole vocabulary, and their gradients by this shard's logits [T, V].

    Overwrites both.
    """
    lse_T2 = merge_lse(torch.stack([row_lse(student_TV), row_lse(teacher_TV)], 1), head.group)
    probs_TV, pull_TV = student_TV.sub_(lse_T2[:, :1]), teacher_TV.sub_(lse_T2[:, 1:])
    parts = [_divergence_(*block, kind, jsd_weight) for block in zip(row_blocks(probs_TV), row_blocks(pull_TV))]
    sums_T2 = sum_over(torch.cat(parts), head.group)
    return sums_T2[:, 0], pull_TV.sub_(probs_TV.mul_(sums_T2[:, 1:]))


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
