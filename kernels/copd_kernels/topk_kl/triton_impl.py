"""topk_kl on a GPU: one program per token reads both sides once and writes the divergence and its gradient.

The gradient is computed in the forward, where everything it needs is in registers, and scaled in the backward.
With p, q the two sides, the K ids contribute to d / d log p_k

    reverse  p_k (log p_k - log q_k + 1)      forward  -q_k      jsd  (1 - w) p_k (log p_k - log m_k)

and the student's tail t = 1 - sum p, through dt / d log p_k = -p_k, one common factor times p_k.
"""
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

KINDS = {"reverse": 0, "forward": 1, "jsd": 2}


@triton.jit
def _log_sum(a, b):
    """log(exp a + exp b) of finite a, b."""
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _row(STUDENT, TEACHER, TAIL, VALUE, GRAD, k, floor, log_floor, log_w, log_rest, w,
         KIND: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, K)
    inside = column < k
    log_p = tl.load(STUDENT + row * k + column, mask=inside, other=0.0)
    log_q = tl.load(TEACHER + row * k + column, mask=inside, other=0.0).to(tl.float32)
    log_q_tail = tl.load(TAIL + row).to(tl.float32)
    p = tl.where(inside, tl.exp(log_p), 0.0)
    q = tl.where(inside, tl.exp(log_q), 0.0)
    q_tail = tl.exp(log_q_tail)
    log_q_tail = tl.maximum(log_q_tail, log_floor)
    rest = 1 - tl.sum(p, 0)
    mass = tl.maximum(rest, 0.0)
    log_mass = tl.log(tl.maximum(rest, floor))
    # Derivatives of the tail's mass and of its logarithm by the rest; both are clamped.
    by_mass = tl.where(rest >= 0, 1.0, 0.0)
    by_log = tl.where(rest >= floor, 1 / tl.maximum(rest, floor), 0.0)
    if KIND == 0:
        value = tl.sum(p * (log_p - log_q), 0) + mass * (log_mass - log_q_tail)
        own = p * (log_p - log_q + 1)
        common = by_mass * (log_mass - log_q_tail) + by_log * mass
    elif KIND == 1:
        value = tl.sum(q * (log_q - log_p), 0) + q_tail * (log_q_tail - log_mass)
        own = -q
        common = -by_log * q_tail
    else:
        log_m = _log_sum(log_q + log_w, log_p + log_rest)
        log_m_tail = _log_sum(log_q_tail + log_w, log_mass + log_rest)
        value = tl.sum(w * q * (log_q - log_m) + (1 - w) * p * (log_p - log_m), 0)
        value += w * q_tail * (log_q_tail - log_m_tail) + (1 - w) * mass * (log_mass - log_m_tail)
        own = (1 - w) * p * (log_p - log_m)
        share = tl.exp(log_mass + log_rest - log_m_tail)  # the student's part of the mixture's tail
        common = by_mass * (1 - w) * (log_mass - log_m_tail)
        common += by_log * ((1 - w) * mass * (1 - share) - w * q_tail * share)
    tl.store(VALUE + row, value)
    tl.store(GRAD + row * k + column, own - common * p, mask=inside)


class _Divergence(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, student_TK: Tensor, teacher_TK: Tensor, tail_T: Tensor, kind: int, w: float) -> Tensor:
        tokens, k = student_TK.shape
        floor = torch.finfo(student_TK.dtype).eps / 8
        value_T, grad_TK = student_TK.new_empty(tokens), torch.empty_like(student_TK)
        if tokens:
            _row[(tokens,)](student_TK, teacher_TK, tail_T, value_T, grad_TK, k, floor, math.log(floor), math.log(w),
                            math.log1p(-w), w, KIND=kind, K=triton.next_power_of_2(k), num_warps=1 if k <= 128 else 4)
        ctx.save_for_backward(grad_TK)
        return value_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Any, ...]:
        grad_TK, = ctx.saved_tensors
        return grad_TK * grad_T[:, None], None, None, None, None


def topk_divergence(student_logprobs_TK: Tensor, teacher_logprobs_TK: Tensor, teacher_log_tail_T: Tensor,
                    kind: str = "reverse", jsd_weight: float = 0.5) -> Tensor:
    """As ``reference.topk_divergence``, in float32.

    Raises:
        ValueError: an unknown kind, or student log-probs of another dtype.
    """
    if student_logprobs_TK.dtype != torch.float32:
        raise ValueError(f"topk_kl in Triton: {student_logprobs_TK.dtype}; float32; use the reference "
                         "(model.kernels=reference)")
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}; reverse, forward or jsd")
    teacher_TK, tail_T = (x.detach().contiguous() for x in (teacher_logprobs_TK, teacher_log_tail_T))
    return _Divergence.apply(student_logprobs_TK.contiguous(), teacher_TK, tail_T, KINDS[kind], jsd_weight)
