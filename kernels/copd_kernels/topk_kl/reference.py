"""The definition of topk_kl in plain torch, differentiable by autograd.

Reverse KL: sum_v p_v (log p_v - log q_v) over the K ids and the tail, p student, q teacher (Gu et al. 2023,
arXiv:2306.08543); generalised Jensen-Shannon as in Agarwal et al. 2023, arXiv:2306.13649.
"""
import math

import torch
from torch import Tensor


def topk_divergence(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, teacher_log_tail_T: Tensor,
                    kind: str = "reverse", jsd_weight: float = 0.5) -> Tensor:
    """[T] divergence in nats; see the package's contract for the formulas.

    Args:
        student_logprobs_TK: [T, K] natural logs of the student's FULL softmax; carries the gradient.
        teacher_logprobs_TK: [T, K] the teacher's at the same ids, not renormalised over the K.
        teacher_log_tail_T: [T] natural log of the teacher's mass outside the K ids; -inf for none.
        kind: ``reverse``, ``forward`` or ``jsd``.
        jsd_weight: the teacher's share of the mixture, in (0, 1).
    """
    floor = torch.finfo(student_logprobs_TK.dtype).eps / 8
    # Mass and logarithm of the tail are floored apart: no mass adds exactly 0, yet no logarithm is infinite.
    tail_T1 = 1 - student_logprobs_TK.exp().sum(1, keepdim=True)
    p_TJ = torch.cat([student_logprobs_TK.exp(), tail_T1.clamp_min(0)], 1)
    log_p_TJ = torch.cat([student_logprobs_TK, tail_T1.clamp_min(floor).log()], 1)
    log_q_TJ = torch.cat([teacher_logprobs_TK, teacher_log_tail_T[:, None]], 1).detach().to(log_p_TJ.dtype)
    q_TJ = log_q_TJ.exp()
    log_q_TJ = torch.cat([log_q_TJ[:, :-1], log_q_TJ[:, -1:].clamp_min(math.log(floor))], 1)
    if kind == "reverse":
        return (p_TJ * (log_p_TJ - log_q_TJ)).sum(1)
    if kind == "forward":
        return (q_TJ * (log_q_TJ - log_p_TJ)).sum(1)
    if kind == "jsd":
        log_m_TJ = torch.logaddexp(log_q_TJ + math.log(jsd_weight), log_p_TJ + math.log1p(-jsd_weight))
        return (jsd_weight * q_TJ * (log_q_TJ - log_m_TJ)
                + (1 - jsd_weight) * p_TJ * (log_p_TJ - log_m_TJ)).sum(1)
    raise ValueError(f"kind: {kind!r}; reverse, forward or jsd")
