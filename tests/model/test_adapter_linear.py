"""Column- and row-parallel linears with the adapters of several experts: dense products in float64 are the truth."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.adapter_bank import KEPT, Routing
from copd_megatron.model.adapter_linear import AdapterColumnLinear
from copd_megatron.model.backbone import Backbone
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.random_backbone import SPEC
from support.ranks import run_ranks

LINEARS = {"qkv": ("self_attn", "linear_qkv", ("q_proj", "k_proj", "v_proj")),
           "proj": ("self_attn", "linear_proj", ("o_proj",)),
           "fc1": ("mlp", "linear_fc1", ("gate_proj", "up_proj")), "fc2": ("mlp", "linear_fc2", ("down_proj",))}
RANKS = {"a": 3, "b": 2, "c": 5}
"""LoRA rank of each expert."""
SCALES = {"a": 2.0, "b": 0.5, "c": 1.5}
TOKENS = 12
ROWS = {"a": torch.tensor([9, 2, 6]), "b": slice(0, 0), "c": slice(3, 6)}
"""One by index, one without rows, one slice; some rows have no expert. Under sequence parallelism see ``shares``."""


def drawn(name: str, *shape: int) -> torch.Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name))), dtype=torch.float64)


def shares(rank: int, ranks: int) -> list[tuple[str, torch.Tensor]]:
    """What a rank's part of the stream has of the experts' rows, counted from its first."""
    size = TOKENS // ranks
    rows = {name: torch.arange(r.start, r.stop) if isinstance(r, slice) else r for name, r in ROWS.items()}
    return [(name, r[(r >= rank * size) & (r < (rank + 1) * size)] - rank * size) for name, r in rows.items()]


def on_a_rank(layout: Layout, kernels: str, dtype: str) -> dict[str, Any]:
    """Of every linear: this rank's shards, input, output, and the gradients of what its shards and rows are."""
    groups = Groups.create(layout, Placement.build(tuple(RANKS), 1))
    backbone = Backbone(SPEC, groups, ModelConfig(path="-", dtype=dtype, kernels=kernels), AdapterConfig(rank=3))
    bank, rank, found = backbone.bank, groups.coords.tp, {}
    for expert, own in RANKS.items():
        bank.put(expert, {name: bank.shard(name, drawn(expert + name, *bank.full_shape(name, own)))
                          for name in bank.factor_names()}, SCALES[expert], trainable=True)
    bank.routing.set(tuple(ROWS.items()), shares(rank, layout.tp) if layout.sequence_parallel else None)
    for key, (module, name, parts) in LINEARS.items():
        linear = getattr(getattr(backbone.layers[0], "self_attention" if module == "self_attn" else module), name)
        column = isinstance(linear, AdapterColumnLinear)
        with torch.no_grad():
            linear.weight.copy_(drawn(f"{key}{rank}", *linear.weight.shape))
        width, split = linear.weight.shape[1], layout.sequence_parallel
        x = drawn(f"x{key}", TOKENS, 1, width * (1 if column else layout.tp))
        x = (x.chunk(layout.tp)[rank] if split and column else x if column else x.chunk(layout.tp, 2)[rank]).to(
            linear.weight.dtype).requires_grad_()
        y = linear(x)[0]
        pull = drawn(f"pull{key}{rank if column else ''}", TOKENS, 1, linear.weight.shape[0])
        pull = (pull.chunk(layout.tp)[rank] if split and not column else pull).to(y.dtype)
        factors = {f"{expert} {part} {which}": bank.parameters_of(expert)[f"layers.0.{module}.{part}.lora_{which}"]
                   for expert in RANKS for part in parts for which in "AB"}
        gradients = torch.autograd.grad((y * pull).sum(), [x, *factors.values()], materialize_grads=True)
        if split:  # the optimizer sums parts over the ranks
            for factor, gradient in zip(factors, gradients[1:]):
                if factor.endswith("A") == column:
                    dist.all_reduce(gradient, group=groups.tp)
        found[key] = {"weight": linear.weight.detach(), "y": y.detach(), "x": gradients[0],
                      **dict(zip(factors, gradients[1:]))}
    groups.destroy()
    return found


def dense(key: str, results: list[dict[str, Any]], split: bool) -> list[dict[str, torch.Tensor]]:
    """What every rank should have found."""
    module, _, parts = LINEARS[key]
    column, tp = key in ("qkv", "fc1"), len(results)
    weights = [result[key]["weight"].double() for result in results]
    x = drawn(f"x{key}", TOKENS, weights[0].shape[1] * (1 if column else tp)).requires_grad_()
    down, up = ({(e, p): drawn(f"{e}layers.0.{module}.{p}.lora_{which}", *shape(e, p)).requires_grad_()
                 for e in RANKS for p in parts} for which, shape in (
        ("A", lambda e, p: (RANKS[e], x.shape[1])), ("B", lambda e, p: (out_of(p), RANKS[e]))))
    out = []
    for rank in range(tp if column else 1):
        y = x @ (weights[rank] if column else torch.cat(weights, 1)).T
        for expert, rows in ROWS.items():
            deltas = [SCALES[expert] * x[rows] @ down[expert, p].T @ up[expert, p].chunk(tp if column else 1)[rank].T
                      for p in parts]
            if key == "qkv":  # per key/value head its queries, its key, its value
                heads = SPEC.num_kv_heads // tp
                deltas = [torch.cat([d.unflatten(1, (heads, -1)) for d in deltas], 2).flatten(1)]
            y = y.index_put((torch.arange(TOKENS)[rows],), torch.cat(deltas, 1), accumulate=True)
        out.append(y)
    pulls = [drawn(f"pull{key}{rank if column else ''}", TOKENS, y.shape[1]) for rank, y in enumerate(out)]
    leaves = {"x": x} | {f"{e} {p} {which}": factors[e, p] for which, factors in (("A", down), ("B", up))
                         for e, p in factors}
    gradients = dict(zip(leaves, torch.autograd.grad(sum((y * pull).sum() for y, pull in zip(out, pulls)),
                                                     list(leaves.values()))))
    return [{"y": out[rank] if column else out[0].chunk(tp)[rank] if split else out[0],
             **{name: _of_rank(name, gradient, column, split, rank, tp) for name, gradient in gradients.items()}}
            for rank in range(tp)]


def out_of(projection: str) -> int:
    """Rows of a whole projection's B."""
    return {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48,
            "down_proj": 32}[projection]


def _of_rank(name: str, gradient: torch.Tensor, column: bool, split: bool, rank: int, tp: int) -> torch.Tensor:
    if name == "x":
        return gradient.chunk(tp, 1)[rank] if not column else gradient.chunk(tp)[rank] if split else gradient
    cut = {"A": None if column else 1, "B": 0 if column else None}[name[-1]]
    return gradient if cut is None else gradient.chunk(tp, cut)[rank]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sequence_parallel=True)],
                         ids=["one rank", "TP", "SP"])
@pytest.mark.parametrize("kernels, dtype, tolerance", [("reference", "float64", 1e-11), ("triton", "float32", 2e-5)])
def test_values_and_gradients_equal_dense_float64(layout, kernels, dtype, tolerance):
    results = run_ranks(layout.tp, on_a_rank, layout, kernels, dtype)
    for key in LINEARS:
        for result, truth in zip(results, dense(key, results, layout.sequence_parallel), strict=True):
            found = {name: value.double() for name, value in result[key].items() if name != "weight"}
            assert found.keys() == truth.keys()
            for name, wanted in truth.items():
                atol = tolerance * max(1.0, float(wanted.abs().max()))
                torch.testing.assert_close(found[name].view(wanted.shape), wanted.detach(), rtol=0, atol=atol,
                                           msg=lambda text, at=f"{key} {name}": f"{at}: {text}")


def test_rows_are_sorted_once_for_all_linears():
    """Also where the layers of several microbatches alternate; what is long gone is forgotten."""
    routing, cpu = Routing(), torch.device("cpu")
    first, second = (("a", slice(0, 3)), ("b", torch.tensor([5, 3]))), (("a", slice(1, 4)),)
    kept = routing.segments(first, (0, 1), cpu)
    assert kept.rows.tolist() == [0, 1, 2, 5, 3] and routing.segments(first, (1,), cpu).rows.tolist() == [5, 3]
    assert routing.segments(second, (0,), cpu).rows.tolist() == [1, 2, 3]
    assert routing.segments(first, [0, 1], cpu) is kept
    others = [(("a", slice(n, n + 1)),) for n in range(KEPT)]
    assert [routing.segments(other, (0,), cpu).rows.tolist() for other in others] == [[n] for n in range(KEPT)]
    assert routing.segments(first, (0, 1), cpu) is not kept
