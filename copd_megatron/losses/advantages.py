"""Advantages: what a group's rewards, or a teacher's log-probs, say about each completion or token.

grpo     A_i = (r_i - mean r) / (std r + 1e-6), std with n - 1   (Shao et al. 2024, arXiv:2402.03300)
dr_grpo  A_i = r_i - mean r                                      (Liu et al. 2025, arXiv:2503.20783)
rloo     A_i = r_i - mean of the others                          (Ahmadian et al. 2024, arXiv:2402.14740)
OPD      A_t = beta (log pi_teacher(y_t) - log pi_student(y_t))  (Gu et al. 2026, arXiv:2604.27083)

Shape suffixes: B prompts, G completions of a prompt, T tokens.
"""
from typing import Literal

import torch
from torch import Tensor

STD_EPS = 1e-6
"""Added to the standard deviation of a group's rewards."""


def has_signal(rewards_BG: Tensor) -> Tensor:
    """[B] bool: does the group have unequal rewards? Dynamic sampling (DAPO) resamples the others."""
    return rewards_BG.amax(1) > rewards_BG.amin(1)


def group_advantages(rewards_BG: Tensor, kind: Literal["grpo", "dr_grpo", "rloo"]) -> Tensor:
    """[B, G] advantages of the completions of each prompt, in the rewards' float dtype.

    A group with equal rewards gets exactly 0. Not clipped, not whitened over the batch.

    Args:
        rewards_BG: [B, G] finite floats, G >= 2.

    Raises:
        ValueError: another shape, a group of one (it has no baseline), a reward that is not finite.
    """
    if rewards_BG.dim() != 2 or rewards_BG.shape[1] < 2:
        raise ValueError(f"rewards_BG: {tuple(rewards_BG.shape)}; [prompts, at least 2 completions]")
    if not bool(rewards_BG.isfinite().all()):
        raise ValueError("rewards_BG: not finite; a verifier must return a finite number")
    centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
    if kind == "grpo":
        advantages_BG = centred_BG / (rewards_BG.std(1, keepdim=True, correction=1) + STD_EPS)
    elif kind == "dr_grpo":
        advantages_BG = centred_BG
    elif kind == "rloo":
        group = rewards_BG.shape[1]
        advantages_BG = centred_BG * (group / (group - 1))  # r - mean of the others
    else:
        raise ValueError(f"kind: {kind!r}; grpo, dr_grpo or rloo")
    # The mean of equal floats may differ from them by a rounding, which 1e-6 would blow up.
    return advantages_BG.masked_fill(~has_signal(rewards_BG)[:, None], 0)


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int, penalty: float) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476), to be ADDED to the reward.

    0 up to ``max_tokens - buffer`` tokens, then linear down to ``-penalty`` at ``max_tokens`` and beyond.

    Args:
        lengths: completion lengths in tokens, any shape.
        buffer: tokens over which the punishment grows; 0 turns it off.

    Returns:
        float32 of the shape of ``lengths``, in [-penalty, 0].
    """
    if not 0 <= buffer <= max_tokens:
        raise ValueError(f"buffer: {buffer}; between 0 and max_tokens, {max_tokens}")
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    excess = lengths.to(torch.float32) - (max_tokens - buffer)
    return -penalty * (excess / buffer).clamp(0, 1)


def distillation_advantages(teacher_logprobs_T: Tensor, student_logprobs_T: Tensor, beta: float | Tensor,
                            delta_guard: float | None = None) -> tuple[Tensor, Tensor]:
    """Advantages of sampled on-policy distillation, beta * delta with delta = teacher - student.

    Goes through the same clipped surrogate as a reward's advantage. It is the single-sample estimate of the
    reverse KL: the student's mean of delta is -KL(student || teacher) <= 0. No outcome reward, no clamp, no
    whitening, no discount.

    Args:
        teacher_logprobs_T, student_logprobs_T: [T] natural logs of the sampled tokens at one temperature,
            from the weights before the update.
        delta_guard: drop tokens with |delta| >= this; None keeps all (the paper).

    Returns:
        advantages [T], detached, 0 where dropped; kept [T] bool. A dropped token has no loss but still counts
        in the reduction unless the caller takes ``kept`` into its loss mask.
    """
    if teacher_logprobs_T.shape != student_logprobs_T.shape:
        raise ValueError(f"teacher_logprobs_T: {tuple(teacher_logprobs_T.shape)}; the student's "
                         f"{tuple(student_logprobs_T.shape)}")
    delta_T = (teacher_logprobs_T - student_logprobs_T).detach()
    kept_T = torch.ones_like(delta_T, dtype=torch.bool)
    if delta_guard is not None:
        kept_T = delta_T.abs() < delta_guard
    return (beta * delta_T).masked_fill(~kept_T, 0), kept_T
