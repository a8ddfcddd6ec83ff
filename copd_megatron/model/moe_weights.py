"""Weights of MoE layers: their names and shapes in Hugging Face checkpoints, and a rank's slices of them.

The same numbers are stored in three ways (E MoE experts, F their feed-forward size, H hidden size):

    split        experts.3.gate_proj.weight [F, H], up_proj [F, H], down_proj [H, F]    Qwen3-MoE as published
    fused        experts.gate_up_proj [E, 2 F, H], experts.down_proj [E, H, F]          written by transformers 5
    transposed   experts.gate_up_proj [E, H, 2 F], experts.down_proj [E, F, H]          Qwen3-VL-MoE as published

Expert parallelism (EP) gives a rank neighbouring MoE experts, their tensor parallelism (ETP) rows of gate and up and
columns of down, as Megatron's ``SequentialMLP`` holds them.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from copd_megatron.model.pieces import Piece
from copd_megatron.model.safetensor_reader import TensorEntry
from copd_megatron.model.spec import BackboneSpec, Family
from copd_megatron.parallel.layout import Coordinates, Layout
from copd_megatron.types import UserError

Storage = Literal["split", "fused", "transposed"]

STORAGES: dict[Family, tuple[Storage, ...]] = {
    "qwen3_moe": ("split", "fused"),
    "qwen3_vl_moe": ("fused", "transposed"),
}
"""The ways that transformers reads for a family, the one that it prefers where shapes leave the choice first."""

@dataclass(frozen=True)
class MoeShard:
    """Which part of every MoE expert, of which MoE experts, a rank holds. Example: ``MoeShard(ep=2, ep_rank=1)``."""

    ep: int = 1
    ep_rank: int = 0
    etp: int = 1
    etp_rank: int = 0

    @classmethod
    def of(cls, layout: Layout, coords: Coordinates) -> MoeShard:
        """The shard of a rank."""
        return cls(layout.ep, coords.ep, layout.etp, coords.etp)


WHOLE = MoeShard()
"""Every MoE expert, whole."""


def moe_shapes(spec: BackboneSpec, mlp: str, storage: Storage) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a MoE layer's MLP; ``mlp`` precedes them ("model.layers.0.mlp.")."""
    moe, hidden = spec.moe, spec.hidden_size
    ffn = moe.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{mlp}gate.weight": (moe.experts, hidden)}
    if storage == "split":
        for number in range(moe.experts):
            one = f"{mlp}experts.{number}."
            shapes |= {f"{one}gate_proj.weight": (ffn, hidden), f"{one}up_proj.weight": (ffn, hidden),
                       f"{one}down_proj.weight": (hidden, ffn)}
        return shapes
    gate_up, down = (2 * ffn, hidden), (hidden, ffn)
    if storage == "transposed":
        gate_up, down = gate_up[::-1], down[::-1]
    return shapes | {f"{mlp}experts.gate_up_proj": (moe.experts, *gate_up),
                     f"{mlp}experts.down_proj": (moe.experts, *down)}


def find_storage(spec: BackboneSpec, mlps: Iterable[str], entries: Mapping[str, TensorEntry]) -> Storage:
    """How a checkpoint stores its MoE experts: the first way of the family that fits every MoE layer.

    Args:
        mlps: what precedes each MoE layer's tensors.

    Raises:
        UserError: names or shapes fit none; the message says what the way that comes nearest misses.
    """
    problems = {}
    for storage in STORAGES[spec.family]:
        expected = {name: shape for mlp in mlps for name, shape in moe_shapes(spec, mlp, storage).items()}
        wrong = [name for name, shape in expected.items() if name not in entries or entries[name].shape != shape]
        if not wrong:
            return storage
        problems[storage] = len(wrong), wrong[0], expected[wrong[0]]
    storage, (_, name, shape) = min(problems.items(), key=lambda item: item[1][0])
    found = f"has shape {list(entries[name].shape)}" if name in entries else "is missing"
    raise UserError(f"model.path: tensor {name!r} {found}, config.json asks for {list(shape)} where MoE experts are "
                    f"stored {storage}; {spec.family} is read {' or '.join(STORAGES[spec.family])}; check that config "
                    "and weights belong together, and that all files are there")


def moe_pieces(spec: BackboneSpec, mlp: str, shard: MoeShard, storage: Storage) -> dict[str, list[Piece]]:
    """Pieces of every parameter of a MoE layer on one rank, by the names that Megatron gives them."""
    moe = spec.moe
    rows = _part(moe.ffn_hidden_size, shard.etp_rank, shard.etp)
    up_rows = slice(rows.start + moe.ffn_hidden_size, rows.stop + moe.ffn_hidden_size)
    pieces = {"mlp.router.weight": [Piece(f"{mlp}gate.weight")]}
    own = _part(moe.experts, shard.ep_rank, shard.ep)
    for place, number in enumerate(range(own.start, own.stop)):
        here = f"mlp.experts.local_experts.{place}."
        if storage == "split":
            one = f"{mlp}experts.{number}."
            fc1 = [Piece(f"{one}gate_proj.weight", rows), Piece(f"{one}up_proj.weight", rows)]
            fc2 = [Piece(f"{one}down_proj.weight", cols=rows)]
        else:
            turned = storage == "transposed"
            fc1 = [Piece(f"{mlp}experts.gate_up_proj", part, index=number, transposed=turned)
                   for part in (rows, up_rows)]
            fc2 = [Piece(f"{mlp}experts.down_proj", cols=rows, index=number, transposed=turned)]
        pieces |= {f"{here}linear_fc1.weight": fc1, f"{here}linear_fc2.weight": fc2}
    return pieces


def _part(size: int, rank: int, ranks: int) -> slice:
    return slice(size * rank // ranks, size * (rank + 1) // ranks)
