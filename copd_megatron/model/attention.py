"""The attention inside Megatron's layers: told by the pack which tokens meet.

Megatron hands ``packed_seq_params`` through to ``core_attention`` untouched, so a subclass of it
carries our structure down: any object with ``attend(layer, q, k, v)`` may sit there (a pack's
streams here, a decode step in ``rollout.kv_cache``).

Under context parallelism a rank has the queries of its rows and gathers all ranks' keys and values: 2 x kv_heads x
d numbers per token of the microbatch and layer, and a reduce-scatter of as many in the backward. All of them are held
for the backward unless ``model.recompute`` says otherwise.

Shapes: T tokens of the stream that this rank has, heads and kv_heads of this tensor-parallel rank, d = head dim.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from copd_kernels.backend import missing_for_triton
from copd_kernels.prefix_attention import fused, reference
from copd_kernels.prefix_attention.plan import MOST_DIM, Plan
from copd_megatron.config.model import ModelConfig
from copd_megatron.platform import device
from copd_megatron.types import UserError

KV = tuple[Tensor, Tensor]
Attention = Literal["reference", "flash", "triton"]


def choose_attention(model: ModelConfig, head_dim: int, dtype: torch.dtype) -> Attention:
    """``model.attention`` as it acts here.

    Raises:
        UserError: "triton" was asked for where it cannot run.
    """
    if model.attention in ("reference", "flash"):
        return model.attention
    missing = missing_for_triton(device(), dtype)
    if not missing and head_dim > MOST_DIM:
        missing = f"a head dim of {head_dim}, above {MOST_DIM}"
    if model.attention == "triton" and missing:
        raise UserError(f"model.attention: triton: {missing}; auto, flash and reference are allowed here; choose one "
                        "of them")
    return "triton" if model.attention == "triton" or device().type == "cuda" and not missing else "flash"


@dataclass
class StreamAttention(PackedSeqParams):
    """Attention over one stream of a pack."""

    # "sbhd" makes Megatron apply rotary positions token by token, as given.
    qkv_format: str = "sbhd"
    plan: Plan | None = None
    spans: Sequence[tuple[int, ...]] = ()
    backend: Attention = "flash"
    group: ProcessGroup | None = None
    """The context-parallel group, if rows are shared out over it."""
    key_order: Tensor | None = None
    """Brings gathered keys into the order of the stream."""
    recompute: bool = False
    """Forget gathered keys and scores, and make them again in the backward."""
    trunk_kv: dict[int, KV] | None = None
    """Layer -> K, V of trunks evaluated before; None: trunks are in the stream."""
    capture: dict[int, KV] | None = field(default=None)
    """When given, receives the stream's own K and V per layer, detached, those of other ranks included."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, heads, d] from q [T, heads, d] and k, v [T, kv_heads, d] of 1-based layer ``layer``."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._attend, layer, q, k, v, use_reentrant=False, preserve_rng_state=False)
        return self._attend(layer, q, k, v)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.group is not None:
            k, v = self._everybodys(k, v)
        if self.capture is not None:
            if self.group is None:
                v = v.clone()  # a view of the layer's fused q, k, v, all of which would live as long as the capture
            self.capture[layer] = (k.detach(), v.detach())
        trunk_kv = self.trunk_kv[layer] if self.trunk_kv is not None else None
        if self.backend == "reference":
            return reference.prefix_attention(q, k, v, self.spans, trunk_kv)
        if self.backend == "triton":
            from copd_kernels.prefix_attention import triton_impl  # the package triton may be missing

            return triton_impl.prefix_attention(q, k, v, self.plan, trunk_kv)
        return fused.prefix_attention(q, k, v, self.plan, trunk_kv)

    def _everybodys(self, k: Tensor, v: Tensor) -> KV:
        """Keys and values of all context ranks in stream order; the backward sums what each rank owes the others."""
        both = torch.cat([k, v], -1)
        if torch.is_grad_enabled() and not both.requires_grad:
            # No row of this rank is adapted here. The others' may be, and their backward needs this rank's part.
            both.requires_grad_()
        gathered = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=self.group)
        return gathered.index_select(0, self.key_order).split(k.shape[-1], -1)


class PackCoreAttention(torch.nn.Module):
    """``core_attention`` of the layer spec: hands the stream to whoever knows its structure."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__()
        self.layer_number = layer_number

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None,
                packed_seq_params=None):
        """[T, 1, heads x d] from query [T, 1, heads, d] and key, value [T, 1, kv_heads, d]."""
        out = packed_seq_params.attend(self.layer_number, query[:, 0], key[:, 0], value[:, 0])
        return out.reshape(out.shape[0], 1, -1)
