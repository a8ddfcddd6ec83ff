"""Megatron's MoE layer as we use it: frozen router and MoE experts, no token dropped, on rows that ranks share out.

    y = sum over the top-k MoE experts e of p_e fc2_e(silu(gate_e x) * up_e x),    p = softmax(router x)

A row passes the MoE experts of its own choice and no other row matters, so prefix sharing, packs and layouts change
nothing but the order of sums. Rows travel to the ranks that hold their MoE experts by all-to-all (expert parallelism,
EP; Lepikhin et al. 2020, arXiv:2006.16668), and are gathered where an expert is cut (its tensor parallelism, ETP).

EP and ETP span the TP and CP ranks of a replica, each with rows of its own. So every one of these ranks must call every
MoE layer as often as the others, with rows or without (``join``), and its backward likewise: the attention before it
sees to it that rows need a gradient on all of these ranks or on none.
"""
from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from copd_kernels.backend import Backend
from copd_kernels.rowwise_fp8.linear import frozen_linear
from copd_megatron.config.model import ModelConfig
from copd_megatron.model.adapter_bank import Routing
from copd_megatron.model.fp8 import hold_in_fp8
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.te import RECIPES
from copd_megatron.parallel.layout import Layout
from copd_megatron.platform import device, on_device
from copd_megatron.types import UserError

Product = Literal["reference", "grouped"]

GROUPED_ALIGNMENT_BYTES = 16
"""torch's grouped matrix product wants rows of so many bytes, or a multiple."""


def moe_options(spec: BackboneSpec, layout: Layout) -> dict:
    """What ``TransformerConfig`` must be told about the MoE layers; nothing for dense backbones."""
    if spec.moe is None:
        return {}
    return dict(
        num_moe_experts=spec.moe.experts, moe_router_topk=spec.moe.top_k, moe_ffn_hidden_size=spec.moe.ffn_hidden_size,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp,
        moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, moe_grouped_gemm=False,
        # Ours decides by itself; Megatron only refuses the other value where top_k is 1.
        moe_router_pre_softmax=True)


class FrozenRouter(TopKRouter):
    """p = softmax over all MoE experts, in float32 or wider, of which the top k stay, as transformers has it.

    Megatron's own takes the softmax of the k largest logits, which rounds differently, and its backward makes a
    gradient of the weight.
    """

    norm_topk: bool

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Megatron makes it on the CPU, and brings it to the device in its own gating.
        self.weight = nn.Parameter(self.weight.detach().to(device()), requires_grad=False)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [..., E] in the dtype of the rows."""
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, E], 0 where not chosen, and the choice [T, E] bool, from logits [T, 1, E]."""
        logits = logits.flatten(0, -2)
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        top, chosen = scores.topk(self.topk, dim=-1)
        if self.norm_topk:
            top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(logits).scatter(1, chosen, top.to(logits.dtype))
        return weights, torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)


class FrozenExperts(SequentialMLP):
    """This rank's MoE experts. Their weights are Megatron's, side by side in one tensor per linear.

    ``reference`` multiplies expert by expert, as ``SequentialMLP`` does; ``grouped`` all of them in one call. In FP8
    rows (``model.fp8``) they are multiplied one by one.
    """

    recompute = False

    def __init__(self, num_local_experts: int, config: TransformerConfig,
                 pg_collection: ProcessGroupCollection | None = None, name: str | None = None,
                 product: Product = "reference", fp8: str = "none", kernels: Backend = "reference"):
        config = copy.copy(config)
        config.sequence_parallel = False  # what an expert is given are whole rows
        super().__init__(num_local_experts, config, MLPSubmodules(ColumnParallelLinear, RowParallelLinear),
                         pg_collection=pg_collection, name=name)
        self.product, self.kernels, self.fp8 = product, kernels, fp8 == "frozen_rowwise"
        self.stacks = [self._stacked(linear) for linear in ("linear_fc1", "linear_fc2")]

    def _stacked(self, linear: str) -> Tensor | None:
        """[experts, out, in]: the weights move into it, so that both products read the same memory. None in FP8."""
        linears = [getattr(expert, linear) for expert in self.local_experts]
        if self.fp8:
            for one in linears:
                hold_in_fp8(one, f"{linear} of a MoE expert")
            return None
        stack = torch.stack([one.weight.data for one in linears])
        for one, weight in zip(linears, stack):
            one.weight.data = weight
        return stack

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor,
                permuted_probs: Tensor) -> tuple[Tensor, None]:
        """[n, H] from rows [n, H] sorted by expert and their weights [n]; ``tokens_per_expert`` [experts] adds up to n.

        Under ETP what comes out is a part of the sum.
        """
        counts = tokens_per_expert.tolist()
        inner = self._multiply(0, permuted_local_hidden_states, counts)
        if self.recompute and torch.is_grad_enabled():
            inner = checkpoint(_weighted_swiglu, inner, permuted_probs, use_reentrant=False, preserve_rng_state=False)
        else:
            inner = _weighted_swiglu(inner, permuted_probs)
        return self._multiply(1, inner, counts), None

    def _multiply(self, which: int, x: Tensor, counts: list[int]) -> Tensor:
        linears = [(expert.linear_fc1, expert.linear_fc2)[which] for expert in self.local_experts]
        if not len(x):
            # Whoever has no rows is still part of the graph: the backward of the exchange runs on every rank.
            return self._one(linears[0], x)
        if self.product == "grouped":
            ends = on_device(np.cumsum(counts, dtype=np.int32), x.device)
            return F.grouped_mm(x, self.stacks[which].transpose(1, 2), offs=ends)
        parts = zip(linears, x.split(counts))
        return torch.cat([self._one(linear, rows) for linear, rows in parts if len(rows)])

    def _one(self, linear: ColumnParallelLinear | RowParallelLinear, rows: Tensor) -> Tensor:
        """One MoE expert's product; whatever ranks exchange, they exchange outside."""
        if self.fp8:
            return frozen_linear(rows, linear.weight, linear.weight_scale, self.kernels)
        return linear(rows)[0]


def _weighted_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up * weights[:, None]


def choose_product(model: ModelConfig, spec: BackboneSpec, layout: Layout, dtype: torch.dtype) -> Product:
    """``model.moe_experts`` as it acts here: "auto" is "grouped" on CUDA where sizes and dtype permit it.

    Raises:
        UserError: "grouped" was asked for, and they do not, or there is FP8.
    """
    wanted = model.moe_experts
    if spec.moe is not None and model.fp8 in RECIPES:
        raise UserError(f"model.fp8: {model.fp8} with a backbone that has MoE layers; frozen_rowwise and none are "
                        "allowed; choose one")
    if spec.moe is not None and wanted == "grouped" and model.fp8 != "none":
        raise UserError(f"model.moe_experts: grouped with model.fp8={model.fp8}, whose products are one per MoE "
                        "expert; auto and reference are allowed; set model.moe_experts=auto")
    if spec.moe is None or wanted == "reference" or model.fp8 != "none":
        return "reference"
    ffn = spec.moe.ffn_hidden_size // layout.etp
    aligned = all(size * dtype.itemsize % GROUPED_ALIGNMENT_BYTES == 0 for size in (spec.hidden_size, ffn))
    possible = aligned and dtype != torch.float64
    if wanted == "grouped" and not possible:
        raise UserError(f"model.moe_experts: grouped, with {dtype}, hidden size {spec.hidden_size} and {ffn} "
                        f"feed-forward rows of a MoE expert on a rank; allowed are float32 and bfloat16, and rows of "
                        f"a multiple of {GROUPED_ALIGNMENT_BYTES} bytes; set model.moe_experts=auto")
    return "grouped" if possible and (wanted == "grouped" or torch.cuda.is_available()) else "reference"


class FrozenMoE(MoELayer):
    """MoE layer of a stream whose rows are shared out over the TP ranks, or whole on each of them.

    Rows that every TP rank has (decoding) are shared out for the time of this layer, so that each is routed once and
    all ranks end up with the same bits.
    """

    def __init__(self, *args, routing: Routing, norm_topk: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.stream, self.router.norm_topk = routing, norm_topk

    def forward(self, hidden_states: Tensor, intermediate_tensors=None, padding_mask=None) -> tuple[Tensor, None]:
        """[T, 1, H] and no bias, from [T, 1, H]."""
        tp = self.attn_tp_group.size()
        if tp == 1 or self.stream.shard is not None:
            return self._routed(hidden_states), None
        rows = len(hidden_states)
        mine = scatter_to_sequence_parallel_region(F.pad(hidden_states, (0, 0, 0, 0, 0, -rows % tp)),
                                                   group=self.attn_tp_group)
        out = gather_from_sequence_parallel_region(self._routed(mine), tensor_parallel_output_grad=False,
                                                   group=self.attn_tp_group)
        return out[:rows], None

    def _routed(self, hidden: Tensor) -> Tensor:
        out = super().forward(hidden)[0]
        # Megatron's dispatcher would keep them, and through them the graph of this call, until the next.
        dispatcher = self.token_dispatcher
        dispatcher.probs = dispatcher.routing_map = dispatcher.reversed_local_input_permutation_mapping = None
        return out

    def join(self) -> None:
        """Take part in one call of this layer on the other ranks, without rows. No gradient."""
        weight = self.router.weight
        self._routed(weight.new_zeros(0, 1, weight.shape[1]))
