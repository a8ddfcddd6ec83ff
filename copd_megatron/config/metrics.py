"""Where the numbers go."""
from typing import Literal

from pydantic import Field

from copd_megatron.config.section import Section


class MetricsConfig(Section):
    """Sinks of metrics and rollouts."""

    tensorboard: bool = True
    """Write TensorBoard events under <run>/tensorboard."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases; needs the [wandb] extra."""
    wandb_project: str = "copd"
    """W&B project."""
    rollouts: bool = True
    """Write every completion to <run>/rollouts/step_N.parquet."""
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    """auto: a live display on a terminal, plain lines elsewhere."""
    overlap_k: int = Field(10, ge=1)
    """k of the pairwise top-k overlap between experts (the paper uses 10)."""
    overlap_tokens: int = Field(512, ge=1)
    """Completion tokens per expert, all its replicas together, on which overlap and symmetric KL are measured."""
    overlap_every: int = Field(1, ge=1)
    """Steps between these measurements, each of which brings all experts' adapters to every replica. The last
    step of a phase is always measured."""
