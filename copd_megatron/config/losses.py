"""The two objectives: policy gradient on verified rewards (RLVR) and on-policy distillation (OPD)."""
from typing import Any, Literal

from pydantic import Field

from copd_megatron.config.section import Section


class RlvrConfig(Section):
    """Reinforcement learning with verifiable rewards; the defaults are the paper's GRPO."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """grpo: (r - mean) / (std + 1e-6) in the group; dr_grpo: r - mean (arXiv:2503.20783);
    rloo: r - mean of the others (arXiv:2402.14740)."""
    advantage_function: Any = None
    """None: ``advantage``. Else a callable or "pkg.module:name" in its place: ``f(rewards_BG) -> [B, G]``."""
    loss: Literal["clip", "gspo", "cispo"] = "clip"
    """clip: token-level clipped surrogate (PPO, GRPO, DAPO); gspo: sequence-level ratio
    (arXiv:2507.18071); cispo: clipped, detached importance weight (arXiv:2506.13585)."""
    loss_function: Any = None
    """None: ``loss``. Else a callable or "pkg.module:name" in its place, for native and sampled cross tokens:
    ``f(policy_logprobs_T, old_logprobs_T, advantages_T, sequence_ids_T, loss_mask_T) -> [T]`` losses."""
    clip_low: float = Field(0.2, ge=0)
    """Lower clip range: ratio >= 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0)
    """Upper clip range: ratio <= 1 + clip_high (DAPO's clip-higher, arXiv:2503.14476)."""
    dual_clip: float | None = Field(None, gt=1)
    """Upper bound on the ratio for negative advantages (arXiv:1912.09729); None: off."""
    reduction: Literal["seq_mean", "token_mean", "constant"] = "seq_mean"
    """seq_mean: mean over tokens, then over sequences (the paper); token_mean: over all tokens;
    constant: sum / max_completion_tokens, then mean over sequences (Dr.GRPO)."""
    minibatches_per_rollout: int = Field(1, ge=1)
    """Updates per rollout batch and epoch; whole groups, so at most ``rollout.prompts_per_step``."""
    epochs: int = Field(1, ge=1)
    """Passes over each rollout batch."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL penalty to ``kl_reference`` in the loss; 0: only logged."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL penalty (Schulman 2020)."""
    kl_reference: str = "backbone"
    """``backbone``, or a PEFT adapter folder that stays frozen."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    dynamic_sampling: bool = False
    """Resample prompts whose group has equal rewards (DAPO)."""
    dynamic_sampling_max_rounds: int = Field(3, ge=1)
    """Rounds of resampling before the batch goes on as it is."""
    overlong_buffer_tokens: int = Field(0, ge=0)
    """DAPO's soft overlong punishment starts this many tokens before the cut, ``rollout.max_completion_tokens``;
    0: off."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Punishment at the cut."""
    importance_correction: Literal["none", "truncated", "masked"] = "none"
    """Correct the mismatch between engine and trainer log-probs per token: cap or drop the weight."""
    importance_cap: float = Field(2.0, gt=1)
    """Cap of the importance weight (drop outside [1/cap, cap] when masked)."""


class OpdConfig(Section):
    """On-policy distillation between experts."""

    signal: Literal["sampled", "topk", "student_topk", "full"] = "sampled"
    """What the teacher returns: the sampled token's log-prob (the paper); log-probs of its own top-k, or of the
    student's (one more scoring of the student), with the mass of the rest; or its last hidden state, from which
    the shared head makes the full vocabulary."""
    beta: float = 1.0
    """Weight of the distillation signal."""
    topk: int = Field(64, ge=1)
    """k of signals topk and student_topk; the whole vocabulary if that is smaller."""
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"
    """reverse: KL(student || teacher); forward: KL(teacher || student); jsd: generalised Jensen-Shannon."""
    jsd_weight: float = Field(0.5, gt=0, lt=1)
    """Teacher's share of the Jensen-Shannon mixture."""
    delta_guard: float | None = Field(None, gt=0)
    """Drop tokens with |delta| at or above this; None: keep all (the paper)."""
    cross_ratio: float = Field(1.0, gt=0)
    """Cross completions per native completion of a student, over all its edges together (at most all
    prompts of a teacher's batch per edge). Native and cross completions are one batch to ``rlvr.reduction``:
    with 1.0 and ``seq_mean`` both halves weigh the same."""
    prompts: Literal["teacher", "student", "both"] = "teacher"
    """Whose prompts students answer: the teacher's domain (the paper), their own, or half of each. An edge that names
    ``prompts`` of its own keeps to it; a frozen teacher has none, so that students answer their own."""
    rollouts: Literal["fresh", "native"] = "fresh"
    """fresh: the student samples its cross completions (on-policy, the paper). native: it learns from those that the
    expert whose prompts they answer has just sampled for itself, and decodes none: off-policy unless that is the
    student, and weighted with pi_student / pi_sampler per token."""
    importance_cap: float = Field(2.0, gt=1)
    """Cap of that weight (``rollouts=native``)."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Rounding of the signal, applied on every path, co-hosted ones too."""
