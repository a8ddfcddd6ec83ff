"""Experts and their data: one entry per expert, each with a task and a reward."""
from typing import Any

from pydantic import Field

from copd_megatron.config.section import Section


class RewardConfig(Section):
    """One named, weighted part of the reward."""

    weight: float = 1.0
    """Its share in the sum that becomes the reward."""
    function: Any = None
    """None: the task's own verifier part of that name. Else a callable or "pkg.module:name":
    ``f(item, completion_text) -> float``, or verl's ``compute_score(data_source, solution_str,
    ground_truth, extra_info)`` as it is; plain, batched (lists in, list out) or async."""


class ExpertConfig(Section):
    """One expert policy."""

    task: Any
    """A ``Task``, a callable that returns one, or "pkg.module:Name"."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for a callable or named task."""
    rewards: dict[str, RewardConfig] = Field(
        default_factory=lambda: {"accuracy": RewardConfig(weight=0.9), "format": RewardConfig(weight=0.1)})
    """Weighted parts of the reward, each logged."""
    init_from: str | None = None
    """PEFT adapter folder that the expert begins as, bit by bit; None begins as the backbone. Its rank may be at most
    ``adapter.rank``, its scaling a power of two away from ``adapter.alpha / adapter.rank``, its weights among
    ``adapter.targets``; the rest begins as a new expert's. At --resume the save is laid over it."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the work, beside the other experts': decides how many replicas it gets, or with whom it shares
    one. Measured as metric ``{expert}/tokens``. It changes the speed, never what is learned."""
