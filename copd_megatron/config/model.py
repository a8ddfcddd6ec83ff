"""Backbone and adapters: what is frozen, what is trained, and how the forward is evaluated."""
from typing import Literal

from pydantic import Field

from copd_megatron.config.section import Section

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ModelConfig(Section):
    """The frozen backbone."""

    path: str
    """Local Hugging Face directory of the backbone (config.json, safetensors, tokenizer, processor)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Compute and storage type of the backbone; adapters are kept in float32 (float64 if this is)."""
    prefix_sharing: bool = True
    """Evaluate the prompt once for all completions of a group. False is the naive reference:
    every (completion, expert) pair carries its own copy of the prompt."""
    attention: Literal["auto", "reference", "flash", "triton"] = "auto"
    """Attention backend. ``reference`` is plain torch; ``flash`` merges prefix and completion parts by
    log-sum-exp over torch's fused kernels; ``triton`` is one kernel for all parts, for CUDA, not in float64 (decoding
    keeps torch's kernels); ``auto`` is triton where it can run, else flash."""
    fp8: Literal["none", "frozen_rowwise", "te_current", "te_blockwise"] = "none"
    """``frozen_rowwise``: the layers' linears are kept in FP8, 1 byte per parameter with one scale per output row, and
    multiplied in FP8 with activations scaled per token, forward and backward; all else stays in ``dtype``.
    ``te_current`` (one scale per tensor) and ``te_blockwise`` (1 x 128 and 128 x 128 blocks) are Transformer Engine's,
    for Hopper and bfloat16, 2 bytes per parameter."""
    norms: Literal["auto", "torch", "te", "apex"] = "auto"
    """Who computes norms, each in one launch: ``te`` Transformer Engine (rotary embeddings as well), ``apex`` NVIDIA
    Apex, both on CUDA; ``torch`` defines them; ``auto`` is the first of te and apex that is importable, else torch, as
    it is on a CPU and in float64."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Operators over the vocabulary (top-k, log-probs, divergences), and all experts' adapters in one launch.
    ``reference`` is plain torch and defines them; ``triton`` is fused, for CUDA; ``auto`` is triton on CUDA and
    reference on a CPU or in float64."""
    moe_experts: Literal["auto", "reference", "grouped"] = "auto"
    """How a rank's MoE experts are multiplied. ``reference`` takes one product per MoE expert, ``grouped`` torch's
    grouped product for all (not in float64); ``auto`` is grouped on CUDA where sizes permit."""
    head_chunk_tokens: int = Field(0, ge=0)
    """Tokens whose logits exist at one time in losses over the vocabulary; 0: as many as 96 MiB hold on a CPU (165 of
    151,936 ids in float32), 512 MiB on a GPU (883)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again instead of keeping it: ``selective`` norms, activations, attention and gathered
    keys (little work; about a quarter of a bfloat16 layer's memory, more under context parallelism), ``full`` each
    transformer layer (one hidden state per layer and token is left)."""


class AdapterConfig(Section):
    """The LoRA matrices of every expert (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(32, ge=1)
    """Rank r of every adapter."""
    alpha: float = Field(32.0, gt=0)
    """The update is (alpha / rank) B A x."""
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linears that carry an adapter. ``gate_proj``, ``up_proj`` and ``down_proj`` are those of dense layers: MoE
    experts and routers stay frozen."""
    scope: Literal["sequence", "completion"] = "sequence"
    """``sequence`` adapts every token (plain LoRA, merges exactly). ``completion`` adapts from the
    invocation tokens on (activated LoRA, arXiv:2504.12397): the prompt is shared by all experts."""
    first_layer: int = Field(0, ge=0)
    """Layers below this one carry no adapter; there all experts share every state."""
