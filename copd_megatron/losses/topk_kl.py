"""Divergence between a student and a teacher known by k log-probs per token and the exact mass of the rest.

Both sides become distributions on k + 1 outcomes, the tail being the last, so the result is a divergence:
never negative, a lower bound of the full-vocabulary one by the data-processing inequality, and equal to it at
k = V (``copd_kernels.topk_kl``). Renormalising inside the k instead would be biased. The k ids may be the
teacher's or the student's. Reverse KL: Gu et al. 2023, arXiv:2306.08543; Jensen-Shannon: Agarwal et al. 2023,
arXiv:2306.13649.

Shape suffixes: T tokens, K ids per token.
"""
from typing import Literal

import torch
from torch import Tensor

from copd_kernels.backend import Backend, implementation

MASS_TOLERANCE = 0.05
"""How far the teacher's masses may be from summing to 1: bfloat16 log-probs miss by about 0.01."""


def log_tail(logprobs_TK: Tensor) -> Tensor:
    """[T] natural log of the mass outside the K log-probs, float32 or wider; -inf where none is left.

    Take it after any rounding of the log-probs, so that head and tail sum to 1.
    """
    if logprobs_TK.dtype != torch.float64:
        logprobs_TK = logprobs_TK.float()
    # log1p, not log(1 - mass): the student's ids may have next to no mass under the teacher.
    return torch.log1p(-logprobs_TK.exp().sum(1).clamp_max(1))


def topk_divergence(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, teacher_log_tail_T: Tensor,
                    kind: Literal["reverse", "forward", "jsd"] = "reverse",
                    jsd_weight: float = 0.5, kernels: Backend = "reference") -> Tensor:
    """Divergence per token on the K ids plus tail, in nats.

    Args:
        student_logprobs_TK: [T, K] natural logs of the student's FULL softmax at the ids, from
            ``model.vocab_parallel.score(at_ids_TK=...)``; carries the gradient.
        teacher_logprobs_TK: [T, K] the teacher's at the same ids (distinct within a row), not renormalised.
        teacher_log_tail_T: [T] natural log of the teacher's remaining mass, from :func:`log_tail`; -inf for
            none, which adds exactly 0 where the student has no mass left either, and else a large finite
            penalty to ``reverse``.
        kind: reverse KL(student || teacher), forward KL(teacher || student), or jsd.
        jsd_weight: the teacher's share of the Jensen-Shannon mixture, in (0, 1).
        kernels: what evaluates it.

    Returns:
        [T] in the student's dtype, >= 0 up to rounding; neither masked nor reduced.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: the teacher's masses do not sum to 1 (renormalised log-probs, a tail given as a mass instead of
            a logarithm); on CUDA a device-side assertion.
    """
    shapes = [tuple(t.shape) for t in (student_logprobs_TK, teacher_logprobs_TK, teacher_log_tail_T)]
    if not (len(shapes[0]) == 2 and shapes[0] == shapes[1] and shapes[0][:1] == shapes[2]):
        raise ValueError(f"student, teacher, tail: {shapes}; [T, K], [T, K], [T]")
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight: {jsd_weight}; between 0 and 1, both excluded")
    error_T = (teacher_logprobs_TK.detach().exp().sum(1) + teacher_log_tail_T.detach().exp() - 1).abs()
    # Without waiting for the device: on CUDA it stops the process at its next synchronisation.
    torch._assert_async((error_T < MASS_TOLERANCE).all(), f"teacher_log_tail_T: masses miss 1 by {MASS_TOLERANCE} or "
                        "more; head and tail must sum to 1, the tail as a natural logarithm")
    divergence = implementation("topk_kl", kernels).topk_divergence
    return divergence(student_logprobs_TK, teacher_logprobs_TK, teacher_log_tail_T, kind, jsd_weight)


def topk_overlap(student_ids_TK: Tensor, teacher_ids_TK: Tensor) -> Tensor:
    """[T] float32, |S & T| / K: the student's top-k ids that are the teacher's too (the paper's O_k)."""
    return (student_ids_TK[:, :, None] == teacher_ids_TK[:, None, :]).any(2).float().mean(1)
