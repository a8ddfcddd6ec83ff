"""How ranks are laid out: world size = replicas x tensor x pipeline x context."""
from typing import Literal

from pydantic import Field

from copd_megatron.config.section import Section


class ParallelConfig(Section):
    """Layout of one backbone replica; what is left of the world size becomes replicas."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size (TP)."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size (PP): stages of neighbouring layers, one-forward-one-backward."""
    virtual_pipeline: int = Field(1, ge=1)
    """Chunks of layers on each pipeline stage (interleaved 1F1B, Narayanan et al. 2021, arXiv:2104.04473): bubbles so
    many times smaller, as many times more hops from stage to stage, in decoding too. Above 1 it needs pipeline of 3
    or more, and microbatches are filled up to a multiple of pipeline."""
    context: int = Field(1, ge=1)
    """Context-parallel size (CP): the rows of every microbatch are split over so many ranks, which gather keys and
    values. Rollout splits prompts over them instead."""
    sequence_parallel: bool = False
    """Split rows over the TP ranks between linears too (Korthikanti et al. 2022, arXiv:2205.05198): less memory for
    activations at equal communication. Needs tensor > 1."""
    moe_expert: int = Field(1, ge=1)
    """Ranks that MoE experts are spread over (EP), within a replica; 1 for backbones without MoE layers."""
    moe_expert_tensor: int = Field(1, ge=1)
    """Tensor-parallel size of MoE experts (ETP); moe_expert x moe_expert_tensor = tensor x context."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """torch.distributed backend; auto is NCCL on CUDA and gloo on a CPU."""
    debug_checks: bool = False
    """Assert that what experts exchange arrives as it was sent (checksums), and that the ranks of a tensor-parallel
    group hold the same hidden states, bit for bit, after every layer (with sequence_parallel: before the head)."""
    timeout_s: float = Field(1800.0, gt=0)
    """Collectives that wait longer than this fail."""
