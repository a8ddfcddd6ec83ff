"""How ranks are laid out: world size = replicas x tensor x pipeline."""
from typing import Literal

from pydantic import Field

from copd_megatron.config.section import Section


class ParallelConfig(Section):
    """Layout of one backbone replica; what is left of the world size becomes replicas."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size (TP)."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size (PP)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """torch.distributed backend; auto is NCCL on CUDA and gloo on a CPU."""
    debug_checks: bool = False
    """Assert that all ranks of a TP group hold bitwise equal hidden states, and that what experts exchange arrives
    as it was sent (checksums)."""
    timeout_s: float = Field(1800.0, gt=0)
    """Collectives that wait longer than this fail."""
