"""Megatron's tensor-parallel linears with the adapters of many experts on top.

    y = W x + (alpha / r) B A x                                (Hu et al. 2021, arXiv:2106.09685)

Column-parallel: h = A x is computed whole on every rank (A replicated), B is sharded like W; the
backward of copy-to-TP sums dh over the ranks, so the gradient of A is complete everywhere.
Row-parallel: A is sharded like W's columns, h is summed over TP, B is replicated and added after the
base's own reduction, so the gradient of B is complete everywhere.
Sequence parallelism (each rank has a share of the rows between linears): column-parallel, h is computed on the rank's
own rows and gathered, its backward reduce-scatters dh, and A's gradient is a part that the optimizer sums over TP;
row-parallel, h is reduce-scattered, B acts on the rank's own rows, and B's gradient is such a part. One collective
of [rows, r] per linear, whatever the number of experts.
With fewer key/value heads than ranks, B of k and v is a copy on each rank that holds the head; its gradient there is a
part, too (`adapter_bank.Cut`).
A fused linear keeps its parts' own A and B (q, k, v; gate, up), as PEFT does, so exports are lossless.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from copd_kernels.backend import Backend, implementation
from copd_kernels.grouped_lora.reference import Columns
from copd_kernels.rowwise_fp8.linear import frozen_linear
from copd_megatron.model.adapter_bank import LoraFactors, Routing
from copd_megatron.model.fp8 import is_fp8
from copd_megatron.model.te import TeProduct


class _Adapted:
    """What column and row linears share: adding each expert's delta to its rows of the stream."""

    parts: tuple[str, ...]
    """Projections this linear fuses, in the order ``arrange`` expects."""
    routing: Routing
    lora: Mapping[str, Mapping[str, LoraFactors]]
    """Expert -> projection -> factors; empty below the first adapted layer."""
    kernels: Backend
    """``triton``: all experts in one launch; ``reference``: one after the other."""

    product: TeProduct | None = None
    """What multiplies in the base's place: Transformer Engine's FP8."""

    def attach(self, parts: tuple[str, ...], routing: Routing, lora: Mapping, kernels: Backend) -> None:
        """Connect this linear to the bank. Called once, when the backbone is built."""
        self.parts, self.routing, self.lora, self.kernels = parts, routing, lora, kernels

    def _forward_impl(self, input, weight, bias, allreduce_dgrad, sequence_parallel, tp_group, **how):
        """Megatron's product, or that of a weight in FP8; all with the same collectives."""
        if self.product is None and not is_fp8(weight):
            return super()._forward_impl(input, weight, bias=bias, allreduce_dgrad=allreduce_dgrad,
                                         sequence_parallel=sequence_parallel, tp_group=tp_group, **how)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        y = self.product(input) if self.product else frozen_linear(input, weight, self.weight_scale, self.kernels)
        return y if bias is None else y + bias

    def add_adapters(self, x: Tensor, y: Tensor) -> Tensor:
        """y [T, 1, out] plus each routed expert's delta on its rows of x [T, 1, in]; y may be overwritten."""
        if self.kernels == "triton":
            return self._add_grouped(x, y)
        if self.routing.shard is not None:
            return self._add_shared_out(x, y)
        return _added(y, [(rows, self.delta(_rows(x, rows), self.lora[expert]))
                          for expert, rows in self.routing.current if self.lora.get(expert)])

    def _add_shared_out(self, x: Tensor, y: Tensor) -> Tensor:
        """The same under sequence parallelism; x and y have the rows of the base's input and output.

        Every rank calls the collective of every linear, in forward and backward, even without adapted rows.
        """
        inner, outer = self.routes()
        entering = [(rows, self.lora[expert]) for expert, rows in inner if self.lora.get(expert)]
        if not entering:
            return y
        downs = [(rows, self.down(_rows(x, rows), factors)) for rows, factors in entering]
        width = max(down.shape[-1] for _, down in downs)
        h = x.new_zeros(*x.shape[:-1], width)
        h = self.exchange(_added(h, [(rows, F.pad(down, (0, width - down.shape[-1]))) for rows, down in downs]))
        leaving = [(rows, self.lora[expert], down.shape[-1])
                   for (expert, rows), (_, down) in zip([r for r in outer if self.lora.get(r[0])], downs)]
        return _added(y, [(rows, self.up(_rows(h, rows)[..., :own], factors)) for rows, factors, own in leaving])

    def _add_grouped(self, x: Tensor, y: Tensor) -> Tensor:
        """The same for all experts at once (``copd_kernels.grouped_lora``)."""
        ops, split = implementation("grouped_lora", self.kernels), self.routing.shard is not None
        inner, outer = self.routes() if split else (self.routing.current, self.routing.current)
        places = [n for n, (expert, _) in enumerate(inner) if self.lora.get(expert)]
        if not places:
            return y
        factors = [[self.lora[inner[n][0]].get(part) for n in places] for part in self.parts]
        rank = max(f.A.shape[0] for own in factors for f in own if f is not None)
        # Of every part the same number of columns, so that the parts of an expert with another rank lie alike.
        down = [torch.cat([_padded(own[n], x, rank) for own in factors]) for n in range(len(places))]
        h = ops.grouped_down(x[:, 0], down, self.routing.segments(inner, places, x.device))[:, None]
        h = (self.exchange(h) if split else self.meet(h))[:, 0]
        out = y[:, 0]
        for place, (own, columns) in enumerate(zip(factors, self.columns())):
            there = [n for n, f in enumerate(own) if f is not None]
            if there:
                rows = self.routing.segments(outer, [places[n] for n in there], x.device)
                out = ops.grouped_up(out, h[:, place * rank:(place + 1) * rank], [own[n].B for n in there],
                                     [own[n].scaling for n in there], rows, columns)
        return out[:, None]

    def columns(self) -> Sequence[Columns | None]:
        """Of each part: where its rows of B go in the fused output, see ``grouped_lora``."""
        raise NotImplementedError

    def meet(self, h: Tensor) -> Tensor:
        """What tensor parallelism does to h between A and B, without sequence parallelism."""
        raise NotImplementedError

    def routes(self) -> tuple[Sequence, Sequence]:
        """Under sequence parallelism: the routes of the base's input rows and of its output rows."""
        raise NotImplementedError

    def exchange(self, h: Tensor) -> Tensor:
        """Under sequence parallelism: h of the input's rows -> h of the output's rows."""
        raise NotImplementedError

    def down(self, x: Tensor, factors: Mapping[str, LoraFactors]) -> Tensor:
        """A x of all parts side by side, for rows x."""
        raise NotImplementedError

    def up(self, h: Tensor, factors: Mapping[str, LoraFactors]) -> Tensor:
        """B h of all parts in the layout of the base's output."""
        raise NotImplementedError

    def delta(self, x: Tensor, factors: Mapping[str, LoraFactors]) -> Tensor:
        """The adapter's output for rows x, in the layout of the base's output."""
        raise NotImplementedError


def _padded(factors: LoraFactors | None, x: Tensor, rank: int) -> Tensor:
    """[rank, in] A with rows of zeros below, for rows x [..., in]; all zeros where there is no adapter."""
    if factors is None:
        return x.new_zeros(rank, x.shape[-1])
    missing = rank - factors.A.shape[0]
    return F.pad(factors.A, (0, 0, 0, missing)) if missing else factors.A


def _rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _added(y: Tensor, updates: Sequence[tuple[Tensor | slice, Tensor]]) -> Tensor:
    """y with each update added to its rows; updates of different slices do not overlap."""
    slices = []
    for rows, update in updates:
        if isinstance(rows, slice):
            slices.append((rows.start, rows, update))
        else:
            y = y.index_add(0, rows, update)
    pieces, done = [], 0
    for start, rows, update in sorted(slices, key=lambda entry: entry[0]):
        # One concatenation at the end instead of a copy of y per expert.
        pieces += [y[done:start], y[rows] + update]
        done = rows.stop
    if not pieces:
        return y
    pieces = [p for p in [*pieces, y[done:]] if len(p)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class AdapterColumnLinear(_Adapted, ColumnParallelLinear):
    """Column-parallel linear (qkv, fc1) with adapters."""

    arrange: Callable[[list[Tensor]], Tensor]
    """Puts the parts' outputs into the layout of the fused output."""

    def forward(self, x, *args, **kwargs):
        """As the base class; adapters are added to the output before it is returned."""
        self.sequence_parallel = self.routing.shard is not None
        y, bias = super().forward(x, *args, **kwargs)
        return (self.add_adapters(x, y) if self.routing.current else y), bias

    def routes(self):
        """Own rows in, all rows out."""
        return self.routing.shard, self.routing.current

    def exchange(self, h):
        """Gather rows; the backward sums what the shards of B give."""
        return gather_from_sequence_parallel_region(h, tensor_parallel_output_grad=True, group=self.tp_group)

    def down(self, x, factors):
        """[T, 1, sum of ranks]."""
        stacked = torch.cat([factors[p].A for p in self.parts if p in factors]).to(x.dtype)
        return x @ stacked.T

    def up(self, h, factors):
        """[T, 1, out / tp]."""
        present = [p for p in self.parts if p in factors]
        hidden = dict(zip(present, h.split([factors[p].A.shape[0] for p in present], -1)))
        out = [(hidden[p] * factors[p].scaling) @ factors[p].B.to(h.dtype).T if p in hidden
               else h.new_zeros(*h.shape[:-1], self.widths[i]) for i, p in enumerate(self.parts)]
        return self.arrange(out)

    def meet(self, h):
        """The backward sums what the shards of B give."""
        return copy_to_tensor_model_parallel_region(h, group=self.tp_group)

    def delta(self, x, factors):
        """[T, 1, out / tp]."""
        return self.up(self.meet(self.down(x, factors)), factors)


class AdapterQKVLinear(AdapterColumnLinear):
    """Megatron's fused qkv: per kv group [its query heads, k, v]."""

    def attach_heads(self, heads: int, kv_heads: int, head_dim: int) -> None:
        """Head counts of this rank."""
        self.widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.kv_heads = kv_heads

    def columns(self):
        """Per kv group its queries, then k, then v."""
        q, k, v = (width // self.kv_heads for width in self.widths)
        return (0, q, q + k + v), (q, k, q + k + v), (q + k, v, q + k + v)

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

    def columns(self):
        """Gate, then up."""
        ffn, _ = self.widths
        return (0, ffn, 0), (ffn, ffn, 0)

    def arrange(self, parts):
        """gate, up [T, 1, ffn / tp] -> [T, 1, 2 ffn / tp]."""
        return torch.cat(parts, -1)


class AdapterRowLinear(_Adapted, RowParallelLinear):
    """Row-parallel linear (o_proj, down_proj) with adapters."""

    def forward(self, x):
        """As the base class; adapters are added after the base's reduction over TP."""
        self.sequence_parallel = self.routing.shard is not None
        y, bias = super().forward(x)
        return (self.add_adapters(x, y) if self.routing.current else y), bias

    def routes(self):
        """All rows in, own rows out."""
        return self.routing.current, self.routing.shard

    def exchange(self, h):
        """Sum what the shards of A give, each rank for its rows; the backward gathers."""
        return reduce_scatter_to_sequence_parallel_region(h, group=self.tp_group)

    def down(self, x, factors):
        """[T, 1, r], this shard's share of the sum."""
        return x @ factors[self.parts[0]].A.to(x.dtype).T

    def up(self, h, factors):
        """[T, 1, out]."""
        lora = factors[self.parts[0]]
        return (h * lora.scaling) @ lora.B.to(h.dtype).T

    def meet(self, h):
        """Sum what the shards of A give."""
        return reduce_from_tensor_model_parallel_region(h, group=self.tp_group)

    def columns(self):
        """B's rows are the output."""
        return (None,)

    def delta(self, x, factors):
        """[T, 1, out]."""
        return self.up(self.meet(self.down(x, factors)), factors)
