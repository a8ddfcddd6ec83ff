"""Optimizer, schedule, merge and evaluation of a run."""
from typing import Literal

from pydantic import Field

from copd_megatron.config.section import Section


class OptimizerConfig(Section):
    """AdamW per expert, constant learning rate after a linear warm-up."""

    lr: float = Field(2e-5, gt=0)
    """Learning rate after the warm-up (about 20x of the paper's full-parameter 1e-6, as LoRA wants)."""
    warmup_steps: int = Field(10, ge=0)
    """Updates of linear warm-up from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Per-expert gradient clipping by global norm."""
    microbatch_tokens: int = Field(16384, ge=1)
    """Tokens of one microbatch, prefixes counted once."""


class ScheduleConfig(Section):
    """N cycles of S_rl RLVR steps and S_opd OPD steps."""

    cycles: int = Field(1, ge=1)
    """Number of cycles N."""
    rl_steps: int = Field(3, ge=0)
    """RLVR steps per cycle, S_rl (the paper's best ratio is 3 : 2)."""
    opd_steps: int = Field(2, ge=0)
    """OPD steps per cycle, S_opd; 0 trains independent experts."""


class MergeConfig(Section):
    """How the experts become one policy."""

    rule: Literal["uniform", "task_arithmetic"] = "uniform"
    """uniform: mean of the experts' weight deltas; task_arithmetic: scale x their sum."""
    scale: float = 0.6
    """lambda of task arithmetic (arXiv:2212.04089)."""


class EvaluationConfig(Section):
    """Held-out evaluation of backbone, experts and the merged policy on every domain."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the end."""
    prompts: int = Field(256, ge=1)
    """Held-out prompts per domain while training."""
    final_prompts: int = Field(1000, ge=1)
    """Held-out prompts per domain in the last evaluation."""
    samples: int = Field(1, ge=1)
    """Completions per prompt: avg@k and pass@k. 1 with greedy decoding by default."""
    greedy: bool = True
    """Greedy decoding (samples must be 1), else sampled at ``temperature`` and ``top_p``."""
    temperature: float = Field(1.0, gt=0)
    """Temperature when sampled."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass when sampled."""
    keep_best: bool = True
    """Export the merged policy of the best evaluation so far (by mean accuracy) besides the last."""
