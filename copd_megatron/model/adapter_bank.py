"""All experts' adapters on one pipeline stage, by Hugging Face names.

Each factor is drawn for its full shape from (seed, expert, name) and then sliced, so it does not
depend on the layout. A ~ U(-1/sqrt(in), 1/sqrt(in)) (PEFT's default), B = 0: a new expert is the
backbone. Adapters are kept in float32 (float64 under a float64 backbone) and cast where used.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from copd_kernels.grouped_lora.segments import Segments
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.seeding import generator_for

MODULE_OF = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
             "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}
ROW_PARALLEL = ("o_proj", "down_proj")
KEPT = 32
"""Sorted routes that are kept: those of a few microbatches, whose layers alternate in a pipeline."""


@dataclass
class Routing:
    """Which rows of the stream in flight belong to which expert; set by the backbone per layer call."""

    current: Sequence[tuple[str, Tensor | slice]] = ()
    """Of the rows inside attention and MLP."""
    shard: Sequence[tuple[str, Tensor | slice]] | None = None
    """Of this rank's rows between them, the same experts in the same order; None: all rows are on every
    tensor-parallel rank there too (no sequence parallelism)."""
    _sorted: dict[tuple[int, tuple[int, ...], torch.device], tuple[Any, Segments]] = field(default_factory=dict)
    """What ``segments`` made, with the routes, so that their ids stay theirs."""

    def set(self, current: Sequence[tuple[str, Tensor | slice]],
            shard: Sequence[tuple[str, Tensor | slice]] | None = None) -> None:
        """Before a layer is called."""
        self.current, self.shard = current, shard

    def segments(self, routes: Sequence[tuple[str, Tensor | slice]], places: Sequence[int],
                 device: torch.device) -> Segments:
        """Rows of some experts, sorted once for all linears and layers: its tables are copies to the device.

        Args:
            routes: ``current`` or ``shard``; not changed in place between calls.
            places: which of them, in order.
        """
        key = id(routes), tuple(places), device
        if key not in self._sorted:
            if len(self._sorted) >= KEPT:
                del self._sorted[next(iter(self._sorted))]
            self._sorted[key] = routes, Segments.build([routes[n][1] for n in places], device)
        return self._sorted[key][1]


@dataclass(frozen=True)
class LoraFactors:
    """One adapter on one projection: A [r, in], B [out, r], this rank's shard of each."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float


@dataclass
class _Slot:
    """One policy's adapters: name -> parameter, and the scaling they share."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    scaling: float = 1.0
    version: int = 0
    """See `AdapterBank.version_of`."""
    writes: int = 0
    """In-place writes to the parameters up to that version, as torch counts them."""

    def count_writes(self) -> int:
        """In-place writes to the parameters so far."""
        return sum(parameter._version for parameter in self.parameters.values())


def projection_shape(spec: BackboneSpec, projection: str) -> tuple[int, int]:
    """(out, in) of a projection's full weight."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    return {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q),
            "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}[projection]


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism cuts a factor: into ``pieces`` along ``dim``, each on ``copies`` ranks in a row.

    Copies: B of k and v has as many pieces as there are key/value heads, if there are fewer than ranks. Each rank's
    gradient of a copy is a part, from its own query heads; the optimizer sums them.
    """

    dim: int
    pieces: int
    copies: int = 1

    def of_rank(self, tp_rank: int) -> int:
        """Which piece a rank holds."""
        return tp_rank // self.copies


def cut_of(spec: BackboneSpec, tp: int, projection: str, factor: str) -> Cut | None:
    """How A or B is cut; None when every rank holds it whole."""
    if (factor == "lora_A") != (projection in ROW_PARALLEL):
        return None
    pieces = min(tp, spec.num_kv_heads) if projection in ("k_proj", "v_proj") else tp
    return Cut(1 if factor == "lora_A" else 0, pieces, tp // pieces)


def factor_shape(spec: BackboneSpec, name: str, rank: int) -> tuple[int, int]:
    """Shape of the unsharded factor ``name`` of a policy with LoRA rank ``rank``."""
    projection, factor = name.rsplit(".", 2)[1:]
    out, inp = projection_shape(spec, projection)
    return (rank, inp) if factor == "lora_A" else (out, rank)


def concatenated_factor(name: str, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Factor ``name`` of the policy whose delta is the sum of f_i B_i A_i, for ``parts`` (A_i or B_i, f_i): exactly,
    A = [A_1; A_2; ...] and B = [f_1 B_1, f_2 B_2, ...], to be used with scaling 1."""
    if name.endswith("lora_A"):
        return torch.cat([factor for factor, _ in parts])
    return torch.cat([factor * scale for factor, scale in parts], 1)


class AdapterBank(nn.Module):
    """The adapters of this stage's layers for every policy, trainable or frozen.

    Policies are called slots by their name: the experts, frozen teachers, and "merged".
    """

    def __init__(self, spec: BackboneSpec, config: AdapterConfig, groups: Groups, layers: Sequence[int],
                 dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.spec, self.config, self.groups = spec, config, groups
        self.layers = [i for i in layers if i >= config.first_layer]
        self.dtype, self.device = dtype, device
        self.routing = Routing()
        self.slots: dict[str, _Slot] = {}
        self._linears: dict[tuple[int, str], dict[str, dict[str, LoraFactors]]] = {}
        self._versions = count()

    def names(self) -> list[str]:
        """Projections with an adapter on this stage: "layers.3.self_attn.q_proj", in layer order."""
        return [f"layers.{i}.{MODULE_OF[p]}.{p}" for i in self.layers for p in self.config.targets
                if self.spec.has_linear(i, p)]

    def factor_names(self) -> list[str]:
        """Names of all factors of one policy on this stage, in layer order."""
        return [f"{name}.{factor}" for name in self.names() for factor in ("lora_A", "lora_B")]

    def add_expert(self, name: str, seed: int, trainable: bool = True) -> None:
        """Add a freshly drawn policy of the configured rank."""
        factors = {}
        for full_name in self.names():
            projection = full_name.rsplit(".", 1)[1]
            out, inp = projection_shape(self.spec, projection)
            generator = generator_for(seed, name, full_name)
            a = (torch.rand(self.config.rank, inp, generator=generator, dtype=torch.float64) * 2 - 1) * inp ** -0.5
            factors[f"{full_name}.lora_A"] = self.shard(f"{full_name}.lora_A", a)
            factors[f"{full_name}.lora_B"] = self.shard(f"{full_name}.lora_B", torch.zeros(out, self.config.rank))
        self.put(name, factors, self.config.alpha / self.config.rank, trainable)

    def put(self, name: str, factors: Mapping[str, Tensor], scaling: float, trainable: bool = False) -> None:
        """Add or replace a policy from this rank's shards (name -> A or B as in ``parameters_of``)."""
        self.remove(name)
        slot = _Slot(scaling=scaling)
        for key, value in factors.items():
            parameter = nn.Parameter(value.detach().clone().to(self.device, self.dtype), requires_grad=trainable)
            parameter.cut = self._cut(key)
            slot.parameters[key] = parameter
            self.register_parameter(_parameter_key(name, key), parameter)
        self.slots[name] = slot
        self.changed(name)
        for full_name in self.names():
            if f"{full_name}.lora_A" not in slot.parameters:
                continue
            _, index, _, projection = full_name.split(".")
            target = self._linears.setdefault((int(index), _linear_of(projection)), {})
            target.setdefault(name, {})[projection] = LoraFactors(
                slot.parameters[f"{full_name}.lora_A"], slot.parameters[f"{full_name}.lora_B"], scaling)

    def remove(self, name: str) -> None:
        """Forget a policy; nothing happens if there is none of that name."""
        slot = self.slots.pop(name, None)
        if slot is None:
            return
        for key in slot.parameters:
            delattr(self, _parameter_key(name, key))
        for by_expert in self._linears.values():
            by_expert.pop(name, None)

    def changed(self, name: str) -> None:
        """Give a policy a new version; whoever writes to its parameters calls it afterwards, on all ranks alike."""
        slot = self.slots[name]
        slot.version, slot.writes = next(self._versions), slot.count_writes()

    def version_of(self, name: str) -> int:
        """What tells a policy's weights apart from all that were ever put or trained under its name: the same number
        on every rank of a replica, another one after every ``put`` and update.

        Raises:
            RuntimeError: the parameters were written to in place, but nobody called ``changed``.
        """
        slot = self.slots[name]
        if slot.count_writes() != slot.writes:
            raise RuntimeError(f"the adapters of {name!r} were written to without AdapterBank.changed; call it after "
                               "the write, or what was computed with the old ones may be taken for current")
        return slot.version

    def lora_of(self, layer: int, linear: str) -> dict[str, dict[str, LoraFactors]]:
        """Live view expert -> projection -> factors for one linear ("qkv", "proj", "fc1", "fc2")."""
        return self._linears.setdefault((layer, linear), {})

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Shards of one policy by name, e.g. "layers.0.mlp.up_proj.lora_A"; A is [r, in], B [out, r]."""
        return dict(self.slots[name].parameters)

    def scaling_of(self, name: str) -> float:
        """alpha / rank of one policy."""
        return self.slots[name].scaling

    def shard(self, name: str, full: Tensor) -> Tensor:
        """This rank's slice of a full factor."""
        cut = self._cut(name)
        return full if cut is None else full.chunk(cut.pieces, cut.dim)[cut.of_rank(self.groups.coords.tp)]

    def _cut(self, name: str) -> Cut | None:
        return cut_of(self.spec, self.groups.layout.tp, *name.rsplit(".", 2)[1:])

    def full_shape(self, name: str, rank: int) -> tuple[int, int]:
        """Shape of the unsharded factor of a policy with LoRA rank ``rank``."""
        return factor_shape(self.spec, name, rank)

    def local_shape(self, name: str, rank: int) -> tuple[int, int]:
        """Shape of this rank's shard of the factor."""
        shape = list(self.full_shape(name, rank))
        cut = self._cut(name)
        if cut is not None:
            shape[cut.dim] //= cut.pieces
        return shape[0], shape[1]

    @torch.no_grad()
    def put_combination(self, name: str, weights: Mapping[str, float]) -> None:
        """Add the policy whose weight delta is sum_e weights[e] * delta_e, exactly, by concatenating ranks."""
        slots = [(self.slots[e], w) for e, w in weights.items()]
        self.put(name, {key: concatenated_factor(key, [(s.parameters[key], w * s.scaling) for s, w in slots])
                        for key in slots[0][0].parameters}, 1.0)


def _parameter_key(policy: str, name: str) -> str:
    return f"{policy}/{name}".replace(".", "/")


def _linear_of(projection: str) -> str:
    return {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "proj",
            "gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2"}[projection]
