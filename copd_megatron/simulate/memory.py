"""Bytes of one rank, by part and by phase of a step, from the shapes that the trainer itself would build.

Weights come from the translation that loads them (``model.translate``), adapters from the bank that holds them
(``model.adapter_bank``), microbatches from `job`: nothing is estimated there, and nothing is allocated. What a pass
needs on top is counted tensor by tensor in `activations`.

    peak = always + the largest of the phases      phases never overlap: rollout, score, update, evaluate

Context parallelism divides the rows of a rank. Allocator fragmentation, the CUDA context and communication buffers
are no part of it: `hardware.Hardware.usable` leaves room for them.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.backbone import DTYPES, stage_layers
from copd_megatron.model.moe_weights import MoeShard
from copd_megatron.model.pieces import Piece
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.te import RECIPES
from copd_megatron.model.translate import HEAD_NAME, TEXT_PREFIX, expected_shapes, layer_pieces
from copd_megatron.model.vision import CACHE_BYTES, stage_needs_features
from copd_megatron.parallel.layout import Coordinates, Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.rollout.kv_cache import FIRST_CAPACITY
from copd_megatron.simulate.activations import (
    Width,
    backward_bytes,
    forward_bytes,
    forward_row_bytes,
    head_bytes,
    saved_bytes,
)
from copd_megatron.simulate.job import Job, Rows
from copd_megatron.simulate.lower_states import kept_bytes

STEP_BYTES = 4
"""Adam's count of updates, one float32 per parameter."""
SCALE_BYTES = 4
"""float32 scale of a row in FP8."""
TE_BYTES = 2
"""Of a weight in FP8 by Transformer Engine on Hopper: as it is, and transposed for the gradient."""
MOE_EXPERTS = "moe experts"
PHASES = ("rollout", "score", "update", "evaluate")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. Example: ``RankMemory({"layers": 7e9, ...}, {"update": {"activations": 9e9, ...}, ...})``."""

    always: Mapping[str, float]
    """Part -> bytes that stay from step to step."""
    phases: Mapping[str, Mapping[str, float]]
    """Phase -> part -> bytes that exist during it only."""

    @property
    def always_bytes(self) -> float:
        """What stays from step to step."""
        return sum(self.always.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> float:
        """The most that the rank ever holds."""
        return self.always_bytes + sum(self.phases[self.peak_phase].values())

    def parts(self) -> dict[str, float]:
        """Part -> its largest bytes in any phase; a table of them adds up to more than the peak."""
        found = dict(self.always)
        for parts in self.phases.values():
            for part, size in parts.items():
                found[part] = max(found.get(part, 0), size)
        return found


@dataclass(frozen=True)
class _Seat:
    """Where a rank stands, as the bank asks: sizes and coordinates, no process group."""

    layout: Layout
    coords: Coordinates


@lru_cache(maxsize=4096)
def backbone_bytes(spec: BackboneSpec, layout: Layout, stage: int, dtype: str, fp8: str = "none") -> dict[str, int]:
    """Bytes of the frozen shards of a stage: embedding, layers, MoE experts (if it has any), head. Every TP rank holds
    equally many.

    ``fp8``: ``model.fp8``; in FP8 rows a linear has a byte per element and a float32 scale per row, Transformer Engine
    keeps each element twice.
    """
    storage = "fused" if spec.moe else None  # of the ways that MoE experts are stored, that with the fewest tensors
    shapes = expected_shapes(spec, storage)
    item = DTYPES[dtype].itemsize
    layers = experts = 0
    of_stage = stage_layers(spec.num_layers, layout.pp, stage, layout.vp)
    for alike in ([i for i in of_stage if spec.is_moe(i) == moe] for moe in (False, True)):
        shard = MoeShard(ep=layout.ep, etp=layout.etp)
        for name, pieces in (layer_pieces(spec, alike[0], 0, layout.tp, shard, storage) if alike else {}).items():
            elements = sum(piece.elements(shapes[piece.name]) for piece in pieces)
            rows = sum(Piece(p.name, p.rows).elements(shapes[p.name][:1]) for p in pieces)
            rounded = fp8 != "none" and ".linear_" in name and name.endswith(".weight")
            in_fp8 = TE_BYTES * elements if fp8 in RECIPES else elements + SCALE_BYTES * rows
            size = len(alike) * (in_fp8 if rounded else item * elements)
            if ".experts." in name:
                experts += size
            else:
                layers += size
    hidden = spec.hidden_size
    table = spec.padded_vocab_size(layout.tp) // layout.tp * hidden
    first, last = stage == 0, stage == layout.pp - 1
    own_head = HEAD_NAME in shapes or not first
    norm = math.prod(shapes[f"{TEXT_PREFIX[spec.family]}norm.weight"])
    return {"embedding": item * table * first, "layers": layers, **({MOE_EXPERTS: experts} if experts else {}),
            "head": item * (norm + table * own_head) * last}


@lru_cache(maxsize=4096)
def _adapter_elements(spec: BackboneSpec, layout: Layout, stage: int, rank: int, targets: tuple[str, ...],
                      first_layer: int) -> tuple[int, int]:
    """(elements, tensors) of one expert's adapters on a rank of a stage."""
    seat = _Seat(layout, layout.coordinates(layout.rank_of(pp=stage)))
    bank = AdapterBank(spec, AdapterConfig(rank=rank, targets=targets, first_layer=first_layer), seat,
                       stage_layers(spec.num_layers, layout.pp, stage, layout.vp), torch.float32, torch.device("meta"))
    names = bank.factor_names()
    return sum(math.prod(bank.local_shape(name, rank)) for name in names), len(names)


def adapter_bytes(job: Job, layout: Layout, stage: int) -> dict[str, int]:
    """Bytes that one trained expert adds to a rank: its adapters, their gradients, Adam's moments."""
    adapter = job.adapter
    elements, tensors = _adapter_elements(job.spec, layout, stage, adapter.rank, adapter.targets, adapter.first_layer)
    weights = elements * torch.promote_types(DTYPES[job.model.dtype], torch.float32).itemsize
    return {"adapters": weights, "gradients": weights, "optimizer": 2 * weights + STEP_BYTES * tensors}


def rank_memory(job: Job, layout: Layout, placement: Placement, replica: int, stage: int) -> RankMemory:
    """Bytes of any rank of this replica and stage (TP and CP ranks of one stage hold equally much)."""
    hosted = len(placement.experts_of(replica))
    one = adapter_bytes(job, layout, stage)
    always: dict[str, float] = dict(backbone_bytes(job.spec, layout, stage, job.model.dtype, job.model.fp8))
    layers = stage_layers(job.spec.num_layers, layout.pp, stage, layout.vp)
    if stage_needs_features(job.spec, layers):
        always["vision tower"] = job.vision_bytes
        always["vision cache"] = _feature_cache_bytes(job)
    if job.rollout.prefix_store_bytes:
        always["prefix store"] = job.rollout.prefix_store_bytes
    always |= {part: hosted * size for part, size in one.items()}
    if job.rlvr.kl_coef and job.rlvr.kl_reference != "backbone":
        always["adapters"] += one["adapters"]
    foreign = (len(job.experts) - hosted) * one["adapters"]
    width = Width.of(job, layout)
    batches = job.microbatches(job.groups(placement, replica))
    largest = max(batches, key=lambda rows: rows.tokens)
    decoding = _rollout_bytes(job, layout, placement, replica, stage, width)
    kept, wave = {}, {}
    if job.rollout.lower_states_bytes and job.adapter.first_layer in layers:
        kept = {"lower states": kept_bytes(job, placement, replica, layout.cp)}
        rows = _wave_rows(job, placement, replica).own / layout.cp
        wave = {"lower states": kept["lower states"] + rows * width.hidden * width.item}
    # The merged policy concatenates the ranks of all experts, so it is as large as they are together.
    merged = (len(job.experts) - hosted + len(job.experts)) * one["adapters"] if len(job.experts) > 1 else 0
    return RankMemory(always, {
        "rollout": {**decoding, **wave},
        "score": {"guest adapters": foreign, **_score_bytes(job, layout, stage, largest, width), **kept},
        "update": {**_update_bytes(job, layout, stage, largest, len(batches), width), **kept},
        "evaluate": {"guest adapters": merged, **decoding},
    })


def _feature_cache_bytes(job: Job) -> float:
    """Features of all prompts that the run sees, up to the cache's budget."""
    item = DTYPES[job.model.dtype].itemsize
    tokens = sum(lengths.visual_tokens for lengths in job.prompts.values()) * job.rollout.prompts_per_step
    return min(CACHE_BYTES, tokens * job.steps * (1 + job.spec.deepstack_layers) * job.spec.hidden_size * item)


def on_rank(rows: Rows, layout: Layout) -> Rows:
    """A rank's part of a microbatch."""
    cp = layout.cp
    return Rows(-(-rows.trunk // cp), -(-rows.leaves // cp), -(-rows.scored // cp), rows.visual, rows.trunks)


def _update_bytes(job: Job, layout: Layout, stage: int, batch: Rows, batches: int, width: Width) -> dict[str, float]:
    """Everything saved for the backward, and what the backward (or the head) makes on the way."""
    rows, last = on_rank(batch, layout), stage == layout.pp - 1
    head = head_bytes(job, rows, width, backward=True) if last else 0
    layers = backward_bytes(job, layout, rows, width)
    return {"activations": in_flight(layout, stage, batches) * saved_bytes(job, layout, stage, rows, width),
            **_larger("backward", layers, "head chunk", head)}


def in_flight(layout: Layout, stage: int, batches: int) -> float:
    """Microbatches that a stage holds for their backward at most, in Megatron's schedules (1F1B; interleaved, a chunk
    of the stage's layers counts as a part)."""
    if layout.vp == 1:
        return min(layout.pp - stage, batches)
    warmup = 2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp
    return min(warmup + 1, layout.filled_up(batches) * layout.vp) / layout.vp


def _score_bytes(job: Job, layout: Layout, stage: int, batch: Rows, width: Width) -> dict[str, float]:
    rows, last = on_rank(batch, layout), stage == layout.pp - 1
    head = head_bytes(job, rows, width, backward=False) if last else 0
    return _larger("forward", forward_bytes(job, rows, width), "head chunk", head)


def _larger(layers: str, layer_bytes: float, head: str, head_size: float) -> dict[str, float]:
    """What the layers and what the head make on the way never exist together: only the larger counts."""
    if head_size >= layer_bytes:
        return {layers: 0.0, head: head_size}
    return {layers: layer_bytes, head: 0.0}


def own_capacity(forced: int, completion_tokens: int) -> int:
    """Rows that a lane's own cache has room for at the end, as ``rollout.kv_cache.OwnCache`` grows it."""
    capacity = max(FIRST_CAPACITY, forced)
    while capacity < forced + completion_tokens - 1:
        capacity *= 2
    return capacity


class _Wave(NamedTuple):
    """The largest wave of a replica."""

    own: int
    """Rows that the lanes' own caches have room for."""
    trunks: int
    """Tokens of its prefixes."""
    lanes: int


def _wave_rows(job: Job, placement: Placement, replica: int) -> _Wave:
    own = trunks = lanes = 0
    limit = job.rollout.decode_lanes
    for group in job.decoded(job.groups(placement, replica)):
        taken = min(group.count * job.rollout.group_size, limit - lanes)
        prompts = -(-taken // job.rollout.group_size)
        forced = job.forced(group.domain)
        prefix = prompts * (job.prompts[group.domain].tokens - forced)
        own += taken * own_capacity(forced, job.completion_tokens)
        trunks += prefix
        lanes += taken
        if lanes == limit:
            break
    return _Wave(own, trunks, lanes)


def _rollout_bytes(job: Job, layout: Layout, placement: Placement, replica: int, stage: int,
                   width: Width) -> dict[str, float]:
    """The largest wave: one KV of every distinct prompt, one of every lane's own rows, the prefill that made it."""
    layers = len(stage_layers(job.spec.num_layers, layout.pp, stage, layout.vp))
    kv_row = 2 * width.kv * width.item * layers
    own, trunks, lanes = _wave_rows(job, placement, replica)
    vocab = job.spec.padded_vocab_size(layout.tp) // layout.tp
    last = stage == layout.pp - 1
    row = forward_row_bytes(width)
    own_bytes, sampling = own / layout.cp * kv_row, last * lanes * vocab * 3 * width.math + lanes * row
    # Lanes begin when all prompts are evaluated.
    prefill = max(0.0, min(trunks, job.rollout.max_prompt_tokens) / layout.cp * row - own_bytes - sampling)
    return {"kv cache": trunks / layout.cp * kv_row + own_bytes, "prefill": prefill, "sampling": sampling}
