"""Optimizer, schedule, merge and evaluation of a run."""
from typing import Annotated, Literal

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
    adam: Literal["auto", "torch", "te", "apex"] = "auto"
    """Who updates: Transformer Engine's or NVIDIA Apex's fused Adam on CUDA, or torch's; ``auto`` is the first of te
    and apex that is importable, else torch, as it is on a CPU and in float64."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Per-expert gradient clipping by global norm."""
    microbatch_tokens: int = Field(16384, ge=1)
    """Tokens of one microbatch, prefixes counted once."""


class ScheduleConfig(Section):
    """When the experts learn alone (RLVR) and when from each other (OPD)."""

    kind: Literal["fixed", "adaptive"] = "fixed"
    """fixed: N cycles of S_rl RLVR steps and S_opd OPD steps. adaptive: as many steps in all, but each phase
    ends when the mean overlap of the experts says so: OPD begins below ``enter_overlap`` and ends at
    ``leave_overlap``."""
    cycles: int = Field(1, ge=1)
    """Number of cycles N; the run has N x (``rl_steps`` + ``opd_steps``) steps, whatever the kind."""
    rl_steps: int = Field(3, ge=0)
    """RLVR steps per cycle, S_rl (the paper's best ratio is 3 : 2)."""
    opd_steps: int = Field(2, ge=0)
    """OPD steps per cycle, S_opd; 0 trains independent experts."""
    rl_steps_of: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Expert -> its own number of RLVR steps per cycle, where it is not ``rl_steps``; the longest sets the length
    of the phase. The others rest in the steps between, which are chosen so that all steps cost about the same
    by the tokens measured in the cycle before. Every expert takes part in every OPD step."""
    enter_overlap: float = Field(0.9, ge=0, le=1)
    """adaptive: begin OPD when the mean top-k overlap (k = ``metrics.overlap_k``) is below this."""
    leave_overlap: float = Field(0.95, ge=0, le=1)
    """adaptive: end OPD when it is at least this; not below ``enter_overlap``."""
    rl_length: tuple[Annotated[int, Field(ge=1)], int] = (1, 8)
    """adaptive: least and most steps of an RLVR phase, whatever the overlap."""
    opd_length: tuple[Annotated[int, Field(ge=1)], int] = (1, 8)
    """adaptive: least and most steps of an OPD phase, whatever the overlap."""


class MergeConfig(Section):
    """How the experts become one policy."""

    rule: Literal["uniform", "weighted", "task_arithmetic", "concat"] = "uniform"
    """uniform: mean of the experts' weight deltas; weighted: their sum, each times its weight; task_arithmetic: scale
    x their sum; concat: their sum. The merged policy is one adapter of all ranks side by side, exactly that sum."""
    scale: float = Field(0.6, allow_inf_nan=False)
    """lambda of task arithmetic (arXiv:2212.04089)."""
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """weighted: expert -> factor of its delta, one for each; they need not sum to 1."""


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
