"""The shape of a frozen backbone, independent of the file format it came from.

Every supported family is one stack: token embedding, ``num_layers`` pre-norm blocks (RMSNorm, grouped-query
attention with rotary positions, RMSNorm, SwiGLU or a Mixture of SwiGLU experts), a final RMSNorm and a head
over the vocabulary. What differs between families is stated here as data, so that no other module asks for a
family's name.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from copd_megatron.config.model import AdapterConfig
from copd_megatron.parallel.layout import Layout
from copd_megatron.types import UserError

Family = Literal["qwen3_vl", "qwen2_5_vl", "qwen3", "qwen2", "llama", "qwen3_moe", "qwen3_vl_moe"]

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Linears of a dense layer's MLP."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), rotate-half form.

    Example: ``RopeSpec(theta=5e6, frequencies=None, mrope_section=(24, 20, 20))`` is Qwen3-VL.
    """

    theta: float
    """Base of the inverse frequencies theta^(-2i / head_dim)."""
    frequencies: tuple[float, ...] | None = None
    """Angle per position step of each of the head_dim / 2 frequencies, float32 values, where a scaling (linear,
    dynamic, yarn, longrope, llama3) makes them differ from plain ones; None for plain rotary."""
    mrope_section: tuple[int, int, int] | None = None
    """How many of the head_dim / 2 frequencies turn with the temporal, height and width position; None turns all
    with the temporal position."""
    mrope_interleaved: bool = True
    """Sections alternate (T H W T H W ... T T, Qwen3-VL) or lie one after the other (Qwen2.5-VL)."""
    attention_factor: float = 1.0
    """Rotated queries and keys are multiplied by it (yarn, longrope)."""
    max_positions: int | None = None
    """Beyond this many positions the scaling (dynamic, longrope) takes other frequencies for all tokens: a state would
    depend on what comes later. Such lengths are refused; None: no limit."""

    def check_length(self, positions: int, what: str) -> None:
        """Raise UserError if ``what`` has more positions than these frequencies hold for."""
        if self.max_positions is not None and positions > self.max_positions:
            raise UserError(f"model.path: {what} reaches position {positions}, the backbone's rope scaling changes its "
                            f"frequencies beyond {self.max_positions}; allowed is up to there; shorten prompts or "
                            "rollout.max_completion_tokens, or use a backbone with a fixed scaling (yarn)")


@dataclass(frozen=True)
class MoeSpec:
    """Layers whose MLP is a Mixture of Experts without token dropping (Shazeer et al. 2017, arXiv:1701.06538).

    A token passes the ``top_k`` MoE experts of which softmax(router logits), in float32 or wider, thinks most.

    Example: ``MoeSpec(experts=128, top_k=8, ffn_hidden_size=768, norm_topk=True, layers=range(48))``.
    """

    experts: int
    top_k: int
    ffn_hidden_size: int
    """SwiGLU size of each MoE expert."""
    norm_topk: bool
    """The weights of the chosen are divided by their sum."""
    layers: tuple[int, ...]
    """Global, 0-based, ascending; the others are dense."""


@dataclass(frozen=True)
class BackboneSpec:
    """Everything that the backbone is built from.

    Example: Qwen3-VL-4B has 36 layers of 2560, 32 query heads on 8 key/value heads of 128, SwiGLU 9728, a
    tied head over 151936 tokens, and visual features added after layers 0, 1 and 2.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """SwiGLU size of dense layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """True size; the sharded tables are padded to a multiple of the tensor-parallel size."""
    norm_eps: float
    rope: RopeSpec
    qk_norm: bool
    """RMSNorm over head_dim on every query and key head, before the rotation."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied_head: bool
    """The head is the embedding table."""
    deepstack_layers: int
    """Visual features are added to the output of layers 0 .. n-1; 0 for text-only backbones."""
    image_token_id: int | None = None
    video_token_id: int | None = None
    moe: MoeSpec | None = None
    """None: every layer is dense."""

    @property
    def is_visual(self) -> bool:
        """Whether prompts may carry images and videos."""
        return self.image_token_id is not None

    def padded_vocab_size(self, tp: int) -> int:
        """The smallest multiple of ``tp`` that holds the vocabulary."""
        return -(-self.vocab_size // tp) * tp

    def kv_groups(self, tp: int) -> int:
        """Groups of query heads that share a key/value head on one rank, over all ``tp`` ranks: with fewer heads than
        ranks, each head is on several ranks, which share out its queries."""
        return max(self.num_kv_heads, tp)

    def is_moe(self, layer: int) -> bool:
        """Whether the MLP of (global) layer ``layer`` is a Mixture of Experts."""
        return self.moe is not None and layer in self.moe.layers

    def has_linear(self, layer: int, projection: str) -> bool:
        """Whether (global) layer ``layer`` has the linear; a MoE layer has none in its MLP that is its own."""
        return projection not in MLP_PROJECTIONS or not self.is_moe(layer)

    def check_adapter(self, adapter: AdapterConfig) -> None:
        """Raise UserError unless adapters begin in a layer that exists and every target has a linear there."""
        first = adapter.first_layer
        if first >= self.num_layers:
            raise UserError(f"adapter.first_layer: {first}; the backbone has {self.num_layers} layers, so allowed is "
                            f"0 to {self.num_layers - 1}; lower it")
        there = [t for t in adapter.targets if any(self.has_linear(i, t) for i in range(first, self.num_layers))]
        if len(there) < len(adapter.targets):
            lost = [t for t in adapter.targets if t not in there]
            instead = json.dumps(there or ["q_proj", "k_proj", "v_proj", "o_proj"])
            raise UserError(f"adapter.targets: {', '.join(lost)}; from adapter.first_layer={first} on all MLPs of the "
                            "backbone are Mixtures of Experts, whose moe_experts stay frozen; allowed are linears of "
                            f"attention; set adapter.targets={instead}")

    def check_layout(self, layout: Layout) -> None:
        """Raise UserError unless the backbone can be cut this way: heads, feed-forwards, layers, MoE experts."""
        self.check_parallel(layout.tp, layout.pp, layout.vp)
        self._check_moe(layout)

    def _check_moe(self, layout: Layout) -> None:
        ep, etp, moe = layout.ep, layout.etp, self.moe
        if moe is None:
            if ep * etp > 1:
                raise UserError(f"parallel.moe_expert, parallel.moe_expert_tensor: {ep} x {etp}, but the backbone has "
                                "no MoE layers that they could cut; 1 and 1 are allowed; leave them out")
            return
        if moe.experts % ep:
            raise UserError(f"parallel.moe_expert: {ep} does not divide the backbone's {moe.experts} MoE experts; "
                            f"allowed are divisors of {moe.experts}; choose one")
        if moe.ffn_hidden_size % etp:
            raise UserError(f"parallel.moe_expert_tensor: {etp} does not divide the {moe.ffn_hidden_size} feed-forward "
                            f"rows of a MoE expert; allowed are divisors of {moe.ffn_hidden_size}; choose one")
        if layout.tp > 1 and not layout.sequence_parallel:
            raise UserError(f"parallel.sequence_parallel: false with parallel.tensor={layout.tp} and a backbone with "
                            "MoE layers, which route every row once; it must be true; set it, or parallel.tensor=1")

    def check_parallel(self, tp: int, pp: int, vp: int = 1) -> None:
        """Raise UserError unless ``tp`` divides query heads and the feed-forward of dense layers, fits the key/value
        heads (divides them or is a multiple), and ``pp`` with ``vp`` leaves no stage and no chunk of layers empty."""
        dense = self.moe is None or len(self.moe.layers) < self.num_layers
        for what, left in (
            (f"{self.num_heads} query heads", self.num_heads % tp),
            (f"{self.num_kv_heads} key/value heads", self.kv_groups(tp) % min(self.num_kv_heads, tp)),
            (f"{self.ffn_hidden_size} feed-forward rows", self.ffn_hidden_size % tp if dense else 0),
        ):
            if left:
                rows = f" and {self.ffn_hidden_size} feed-forward rows" if dense else ""
                raise UserError(
                    f"parallel.tensor: {tp} does not fit the backbone's {what}; allowed are common divisors of "
                    f"{self.num_heads} query heads{rows} that divide {self.num_kv_heads} key/value heads or are a "
                    "multiple of them; choose one of them")
        if not 1 <= pp <= self.num_layers:
            raise UserError(
                f"parallel.pipeline: {pp} stages for the backbone's {self.num_layers} layers; allowed is "
                f"1 to {self.num_layers}; use fewer stages")
        if pp * vp > self.num_layers:
            raise UserError(
                f"parallel.virtual_pipeline: {vp} chunks of layers on each of {pp} stages for the backbone's "
                f"{self.num_layers} layers; allowed is 1 to {self.num_layers // pp}; use fewer, or fewer stages")
