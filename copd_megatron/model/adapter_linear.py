"""Megatron's tensor-parallel linears with the adapters of many experts on top.

    y = W x + (alpha / r) B A x                                (Hu et al. 2021, arXiv:2106.09685)

Column-parallel: h = A x is computed whole on every rank (A replicated), B is sharded like W; the
backward of copy-to-TP sums dh over the ranks, so the gradient of A is complete everywhere.
Row-parallel: A is sharded like W's columns, h is summed over TP, B is replicated and added after the
base's own reduction, so the gradient of B is complete everywhere.
A fused linear keeps its parts' own A and B (q, k, v; gate, up), as PEFT does, so exports are lossless.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from copd_megatron.model.adapter_bank import LoraFactors, Routing


class _Adapted:
    """What column and row linears share: adding each expert's delta to its rows of the stream."""

    parts: tuple[str, ...]
    """Projections this linear fuses, in the order ``arrange`` expects."""
    routing: Routing
    lora: Mapping[str, Mapping[str, LoraFactors]]
    """Expert -> projection -> factors; empty below the first adapted layer."""

    def attach(self, parts: tuple[str, ...], routing: Routing, lora: Mapping) -> None:
        """Connect this linear to the bank. Called once, when the backbone is built."""
        self.parts, self.routing, self.lora = parts, routing, lora

    def add_adapters(self, x: Tensor, y: Tensor) -> Tensor:
        """y [T, 1, out] plus each routed expert's delta on its rows of x [T, 1, in]."""
        slices = []
        for expert, rows in self.routing.current:
            factors = self.lora.get(expert)
            if factors and isinstance(rows, slice):
                slices.append((rows.start, rows, factors))
            elif factors:
                y = y.index_add(0, rows, self.delta(x.index_select(0, rows), factors))
        pieces, done = [], 0
        for start, rows, factors in sorted(slices, key=lambda entry: entry[0]):
            # One concatenation at the end instead of a copy of y per expert.
            pieces += [y[done:start], y[rows] + self.delta(x[rows], factors)]
            done = rows.stop
        if not pieces:
            return y
        pieces = [p for p in [*pieces, y[done:]] if len(p)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def delta(self, x: Tensor, factors: Mapping[str, LoraFactors]) -> Tensor:
        """The adapter's output for rows x, in the layout of the base's output."""
        raise NotImplementedError


class AdapterColumnLinear(_Adapted, ColumnParallelLinear):
    """Column-parallel linear (qkv, fc1) with adapters."""

    arrange: Callable[[list[Tensor]], Tensor]
    """Puts the parts' outputs into the layout of the fused output."""

    def forward(self, x, *args, **kwargs):
        """As the base class; adapters are added to the output before it is returned."""
        y, bias = super().forward(x, *args, **kwargs)
        return (self.add_adapters(x, y) if self.routing.current else y), bias

    def delta(self, x, factors):
        """[T, 1, out / tp]."""
        present = [p for p in self.parts if p in factors]
        stacked = torch.cat([factors[p].A for p in present]).to(x.dtype)
        h = copy_to_tensor_model_parallel_region(x @ stacked.T, group=self.tp_group)
        hidden = dict(zip(present, h.split([factors[p].A.shape[0] for p in present], -1)))
        out = [(hidden[p] * factors[p].scaling) @ factors[p].B.to(x.dtype).T if p in hidden
               else x.new_zeros(*x.shape[:-1], self.widths[i]) for i, p in enumerate(self.parts)]
        return self.arrange(out)


class AdapterQKVLinear(AdapterColumnLinear):
    """Megatron's fused qkv: per kv group [its query heads, k, v]."""

    def attach_heads(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """Head counts of this rank."""
        self.widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.kv_heads = kv_heads

    def arrange(self, parts):
        """q [T, 1, heads d], k, v [T, 1, kv_heads d] -> [T, 1, (heads + 2 kv_heads) d]."""
        shaped = [p.unflatten(-1, (self.kv_heads, -1)) for p in parts]
        return torch.cat(shaped, -1).flatten(-2)


class AdapterGateUpLinear(AdapterColumnLinear):
    """Megatron's fused fc1: [gate shard | up shard] on each rank."""

    @property
    def widths(self):
        """Output width of gate and of up on this rank."""
        return (self.output_size_per_partition // 2,) * 2

    def arrange(self, parts):
        """gate, up [T, 1, ffn / tp] -> [T, 1, 2 ffn / tp]."""
        return torch.cat(parts, -1)


class AdapterRowLinear(_Adapted, RowParallelLinear):
    """Row-parallel linear (o_proj, down_proj) with adapters."""

    def forward(self, x):
        """As the base class; adapters are added after the base's reduction over TP."""
        y, bias = super().forward(x)
        return (self.add_adapters(x, y) if self.routing.current else y), bias

    def delta(self, x, factors):
        """[T, 1, out]."""
        lora = factors[self.parts[0]]
        h = reduce_from_tensor_model_parallel_region(x @ lora.A.to(x.dtype).T, group=self.tp_group)
        return (h * lora.scaling) @ lora.B.to(x.dtype).T
