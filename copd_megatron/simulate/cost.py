"""Seconds of a step, by phase, from operations, bytes and what the hardware reaches of its peaks.

    compute     matrix products / (peak x achieved), attention at its own share, spread over TP x CP; each stage has
                the operations of its own layers: those above `adapter.first_layer` have all the backward, and all the
                forward where states below are kept; the head is the last stage's
    pipeline    the longest stage's time for m microbatches, and every other stage's for one
    decoding    per step the larger of: reading the weights and the KV, computing, launching the operations
    collectives latency + bytes a rank sends / bandwidth, nothing overlaps; TP groups lie within a node while they fit
    recompute   the operations, launches and gathers that the backward does again: with `full` those of all layers above
                `adapter.first_layer`, with `selective` attention, gathered keys, norms and activations
    MoE         rows choose all MoE experts alike often; each crosses to its top k and back by all-to-all; decoding
                reads those that some lane has chosen
    step        the slowest replica of each phase, as phases end with collectives over all replicas

Operations are those of `flops` (prefix sharing and states kept from the rollout included). Not counted: data loading,
rewards, the vision tower, metrics, evaluation and saves.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from copd_megatron.model.backbone import DTYPES, stage_layers
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.flops import (
    Flops,
    PassStreams,
    Stream,
    UpdateShape,
    pass_flops,
    pass_streams,
    recomputed_flops,
    split_at,
)
from copd_megatron.simulate.hardware import Hardware
from copd_megatron.simulate.job import Group, Job
from copd_megatron.simulate.lower_states import kept_shares, sampled_here
from copd_megatron.simulate.memory import MOE_EXPERTS, adapter_bytes, backbone_bytes
from copd_megatron.simulate.traffic import chosen, transfers

OPERATIONS_PER_LAYER = 45
"""Kernels that one layer's forward launches in an eager program, adapters included; a backward launches twice."""
OPERATIONS_PER_MOE = 45
"""Those of a MoE layer besides: router, sorting, dispatch, grouped products."""
OPERATIONS_AGAIN = {"none": 0, "selective": 20}
"""Those that the backward of a layer launches again: two norms 14, activation 2, attention 4."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. Example: ``StepTime(rollout=31.0, score=2.1, exchange=0.1, update=6.4, reduce=0.0)``."""

    rollout: float
    score: float
    exchange: float
    update: float
    reduce: float
    """Of the adapters' gradients over an expert's replicas."""

    @property
    def total(self) -> float:
        """All of them: nothing overlaps."""
        return self.rollout + self.score + self.exchange + self.update + self.reduce


def assumptions(hardware: Hardware, dtype: str) -> list[str]:
    """What the estimate rests on, for people."""
    near, far, memory = (rate / 1e9 for rate in (hardware.intra_node_bandwidth, hardware.inter_node_bandwidth,
                                                 hardware.memory_bandwidth))
    return [
        f"matrix products reach {hardware.flops(dtype) / 1e12:.3g} TFLOP/s in {dtype} "
        f"({hardware.achieved.get(dtype, 0.5):.0%} of peak), attention {hardware.attention_achieved:.0%} of peak",
        f"memory {memory:.3g} GB/s; a rank sends {near:.3g} GB/s within a node of {hardware.ranks_per_node}, "
        f"{far:.3g} GB/s between nodes",
        f"decoding launches {OPERATIONS_PER_LAYER} operations per layer and step, "
        f"{hardware.operation_s * 1e6:.3g} us each",
        "all completions are of full length; nothing overlaps; data, rewards, vision tower and saves are not counted",
        *(f"{what}: {text}" for what, text in hardware.notes.items()),
    ]


def step_flops(job: Job, placement: Placement, replica: int, opd: bool = True, context: int = 1,
               layers: Sequence[int] | None = None) -> dict[str, Flops]:
    """Operations of one replica's step: phase (rollout, score, update) -> operations of all its ranks together.

    Args:
        context: CP, as each context rank keeps states of its own prompts.
        layers: only these, and the head if the last is among them; None: all.
    """
    total = {"rollout": Flops(), "score": Flops(), "update": Flops()}
    groups = job.groups(placement, replica, opd)
    room = kept_shares(job, placement, replica, context, opd)
    chosen_layers = None if layers is None else tuple(layers)
    for group in job.decoded(groups):
        total["rollout"] += _pass(job, group.domain, True, False, chosen_layers) * group.count
    for group in groups:
        here = sampled_here(job, placement, replica, group)
        total["update"] += _trained_pass(job, group.domain, True, True, room, here, chosen_layers) * group.count
        if group.edge is None:  # the KL to the backbone is always measured
            total["score"] += _trained_pass(job, group.domain, False, False, room, here, chosen_layers) * group.count
    if opd:
        for edge, student, host, prompts in transfers(job, placement):
            if host == replica:
                group = Group(edge.student, edge.teacher, prompts, edge)
                here = (student == host) * sampled_here(job, placement, host, group)
                total["score"] += _trained_pass(job, edge.teacher, True, False, room, here, chosen_layers) * prompts
    return total


def _trained_pass(job: Job, domain: str, adapted: bool, backward: bool, room: tuple[float, float], here: float,
                  layers: tuple[int, ...] | None) -> Flops:
    """The same in scoring or update, where what was kept is not evaluated again.

    Args:
        room: shares of completions and of prompts that were kept.
        here: share of the group that this replica sampled.
    """
    completions, prompts = here * room[0], here * room[1]  # prompts are kept where all completions are
    shares = {"nothing": 1 - completions, "completions": completions - prompts, "all": prompts}
    return sum((_pass(job, domain, adapted, backward, layers, kept) * share for kept, share in shares.items()),
               Flops())


def _pass(job: Job, domain: str, adapted: bool, backward: bool, layers: tuple[int, ...] | None,
          kept: str = "nothing") -> Flops:
    """One group of a domain under one policy, in some layers; ``kept``: what is given where it enters
    ``first_layer``."""
    key = ("pass", domain, adapted, backward, kept, layers)
    if key not in job.memo:
        streams = _streams(job, domain)
        prefix = job.prompts[domain].tokens - job.forced(domain)
        below = {"nothing": streams.below, "completions": Stream(prefix, prefix * (prefix + 1) // 2), "all": Stream()}
        streams = replace(streams, below=below[kept])
        if not adapted:
            streams = replace(streams, lanes=replace(streams.lanes, adapted=0))
        job.memo[key] = pass_flops(job.spec, job.adapter, streams, backward, layers=layers)
    return job.memo[key]


def _streams(job: Job, domain: str) -> PassStreams:
    """Of one group of a domain."""
    lengths = job.prompts[domain]
    shape = UpdateShape(lengths.tokens, job.completion_tokens, job.rollout.group_size, 1, lengths.header_tokens)
    return pass_streams(shape, job.adapter, 1, job.model.prefix_sharing)


def step_time(job: Job, layout: Layout, placement: Placement, hardware: Hardware, transport: str = "scatter",
              opd: bool = True) -> StepTime:
    """Seconds of one step on the slowest replica.

    Raises:
        UserError: the hardware knows nothing of the backbone's dtype.
    """
    phases = [_replica_time(job, layout, placement, replica, hardware, opd) for replica in _kinds(job, placement)]
    rollout, score, update = (max(times) for times in zip(*phases))
    return StepTime(rollout, score, _exchange_time(job, layout, placement, hardware, transport) if opd else 0.0,
                    update, _reduce_time(job, layout, placement, hardware))


def _kinds(job: Job, placement: Placement) -> Iterable[int]:
    """One replica for each different kind: of an expert's replicas the first has the largest share."""
    if placement.replicas <= len(placement.experts):
        return range(placement.replicas)
    return sorted({hosts[0] for hosts in placement.hosts})


def _replica_time(job: Job, layout: Layout, placement: Placement, replica: int, hardware: Hardware,
                  opd: bool) -> tuple[float, float, float]:
    """(rollout, score, update) seconds of one replica."""
    groups = job.groups(placement, replica, opd)
    if not groups:
        return 0.0, 0.0, 0.0
    batches = job.microbatches(groups)
    stages = [stage_layers(job.spec.num_layers, layout.pp, stage, layout.vp) for stage in range(layout.pp)]
    flops = [step_flops(job, placement, replica, opd, layout.cp, layers) for layers in stages]
    again = [sum((recomputed_flops(job.spec, job.adapter, _streams(job, group.domain), job.model.recompute, layers)
                  * group.count for group in groups), Flops()) for layers in stages]
    rows = _rows(job, placement, replica, opd, layout.cp, sum(batch.tokens for batch in batches))
    update = _Work([own["update"] + more for own, more in zip(flops, again)], *rows["update"], len(batches), True)
    score = _Work([own["score"] for own in flops], *rows["score"], len(batches), False)
    rollout = sum((own["rollout"] for own in flops), Flops())
    return (_rollout_time(job, layout, hardware, job.decoded(groups), rollout),
            *(_pipeline_time(job, layout, hardware, work, stages) for work in (score, update)))


@dataclass(frozen=True)
class _Work:
    """What all microbatches of scoring or update do."""

    flops: list[Flops]
    """Of each stage."""
    rows_below: float
    """That pass each layer below ``first_layer``."""
    rows_above: float
    """That pass each of the others."""
    batches: int
    backward: bool


def _rows(job: Job, placement: Placement, replica: int, opd: bool, context: int,
          rows: int) -> dict[str, tuple[float, float]]:
    """Phase -> rows that pass a layer below ``first_layer``, and another: as the operations are to those of one
    forward of the update's ``rows`` rows, from the lowest layer, by one policy."""
    found: dict[str, list[float]] = {"score": [], "update": []}
    groups = job.groups(placement, replica, opd)
    for layers in split_at(job.adapter.first_layer, range(job.spec.num_layers)):
        flops = step_flops(job, placement, replica, opd, context, layers)
        one = sum(_pass(job, group.domain, True, False, tuple(layers)).linears * group.count for group in groups)
        for phase, own in found.items():
            own.append(rows * flops[phase].linears / one if one else 0.0)
    return {"score": (found["score"][0], found["score"][1]), "update": (found["update"][0], float(rows))}


def _compute_time(job: Job, ranks: int, hardware: Hardware, flops: Flops) -> float:
    """Seconds of these operations, shared out over ``ranks``."""
    peak, rate = hardware.peak_flops[job.model.dtype], hardware.flops(job.model.dtype)
    products = (flops.linears + flops.adapters + flops.head) / rate
    return (products + flops.attention / (peak * hardware.attention_achieved)) / ranks


def _pipeline_time(job: Job, layout: Layout, hardware: Hardware, work: _Work, stages: list[list[int]]) -> float:
    """Seconds of all microbatches: the longest stage works without a break; the first and the last of them pass the
    others as well."""
    busy = [_stage_time(job, layout, hardware, work, flops, layers) for flops, layers in zip(work.flops, stages)]
    # Interleaved stages wait for a chunk of the first microbatch only, but run some microbatches twice.
    others = (sum(busy) - max(busy)) / layout.vp
    return (max(busy) * layout.filled_up(work.batches) + others) / work.batches


def _stage_time(job: Job, layout: Layout, hardware: Hardware, work: _Work, flops: Flops, layers: list[int]) -> float:
    """Seconds in which a stage does its part of all microbatches."""
    below, above = split_at(job.adapter.first_layer, layers)
    recompute = job.model.recompute if work.backward else "none"
    launches = bool(work.rows_below) * _operations(job, below)
    launches += _operations(job, above) * (3 if work.backward else 1) + _operations_again(job, above, recompute)
    busy = max(_compute_time(job, layout.tp * layout.cp, hardware, flops),
               work.batches * launches * hardware.operation_s)
    sends = 1 + work.backward  # a backward sends as much as a forward
    for own, rows, passes, gathers in ((below, work.rows_below, 1, 1),
                                       (above, work.rows_above, sends + (recompute == "full"),
                                        sends + (recompute != "none"))):
        if rows:
            busy += _layers_collectives(job, layout, hardware, own, rows / layout.cp, work.batches, passes, gathers)
    if layout.pp > 1:
        near, rows = layout.world_size <= hardware.ranks_per_node, work.rows_above if above else work.rows_below
        stream = rows / layout.cp * job.spec.hidden_size * DTYPES[job.model.dtype].itemsize
        busy += (sends if above else 1) * layout.vp * (
            stream / hardware.bandwidth(near) + work.batches * hardware.latency_s(near))
    return busy


def _layers_collectives(job: Job, layout: Layout, hardware: Hardware, layers: list[int], rows: float, batches: int,
                        passes: int, gathers: int) -> float:
    """Seconds in which these layers' hidden states cross TP, keys and values CP, and rows reach MoE experts.

    Args:
        rows: of this context rank, in all microbatches.
        passes: how often hidden states cross, ``gathers``: keys and values.
    """
    item, seconds = DTYPES[job.model.dtype].itemsize, 0.0
    if layout.tp > 1:
        near = layout.tp <= hardware.ranks_per_node
        sent = 2 * (layout.tp - 1) / layout.tp * rows * job.spec.hidden_size * item
        seconds += 2 * passes * len(layers) * (sent / hardware.bandwidth(near) + batches * hardware.latency_s(near))
    if layout.cp > 1:
        near = layout.tp * layout.cp <= hardware.ranks_per_node
        heads = job.spec.kv_groups(layout.tp) // layout.tp
        kv = 2 * heads * job.spec.head_dim * item * rows * (layout.cp - 1)
        seconds += gathers * len(layers) * (kv / hardware.bandwidth(near) + batches * hardware.latency_s(near))
    return seconds + passes * _dispatch_time(job, layout, hardware, layers, rows, batches)


def _moe_layers(job: Job, layers: Sequence[int]) -> int:
    return sum(map(job.spec.is_moe, layers))


def _operations(job: Job, layers: Sequence[int]) -> int:
    """Launches of one forward of these layers."""
    return len(layers) * OPERATIONS_PER_LAYER + _moe_layers(job, layers) * OPERATIONS_PER_MOE


def _operations_again(job: Job, layers: Sequence[int], recompute: str) -> int:
    """Launches that a backward of these layers repeats; of MoE layers' own only with ``full``."""
    return _operations(job, layers) if recompute == "full" else len(layers) * OPERATIONS_AGAIN[recompute]


def _dispatch_time(job: Job, layout: Layout, hardware: Hardware, layers: Sequence[int], rows: float,
                   calls: int) -> float:
    """Seconds in which ``rows`` of the stream of TP ranks travel to MoE experts and back, in all of these layers."""
    ranks = layout.ep * layout.etp
    if job.spec.moe is None or ranks == 1:
        return 0.0
    near = ranks <= hardware.ranks_per_node
    routed = rows / layout.tp * job.spec.moe.top_k * job.spec.hidden_size * DTYPES[job.model.dtype].itemsize
    sent = 2 * routed * ((layout.ep - 1) / layout.ep + layout.etp - 1)
    messages = 3 * (layout.ep > 1) + 3 * (layout.etp > 1) + 1  # rows, weights, answers; and the sizes before them
    return _moe_layers(job, layers) * (sent / hardware.bandwidth(near) + calls * messages * hardware.latency_s(near))


def _rollout_time(job: Job, layout: Layout, hardware: Hardware, groups: list[Group], flops: Flops) -> float:
    """Waves of lanes; every step reads the weights once and the KV of all lanes, stage after stage."""
    spec, item = job.spec, DTYPES[job.model.dtype].itemsize
    lanes = sum(group.count for group in groups) * job.rollout.group_size / layout.cp
    waves = max(1, -(-int(lanes) // job.rollout.decode_lanes))
    parts = [backbone_bytes(spec, layout, stage, job.model.dtype, job.model.fp8) for stage in range(layout.pp)]
    weights = sum(v for stage in parts for part, v in stage.items()
                  if part != MOE_EXPERTS and (part != "embedding" or spec.tied_head))
    if spec.moe is not None:
        decoding = min(lanes, job.rollout.decode_lanes) * (layout.cp if layout.ep * layout.etp > 1 else 1)
        read = 1 - (1 - spec.moe.top_k / spec.moe.experts) ** decoding
        weights += read * sum(stage.get(MOE_EXPERTS, 0) for stage in parts)
    kv_row = 2 * spec.kv_groups(layout.tp) // layout.tp * spec.head_dim * spec.num_layers * item
    prefixes = sum(group.count * job.prompts[group.domain].tokens for group in groups) / layout.cp
    kv = (prefixes + lanes * job.completion_tokens / 2) * kv_row / waves
    steps = waves * job.completion_tokens
    memory = (weights + kv) / hardware.memory_bandwidth
    launching = _operations(job, range(spec.num_layers)) * hardware.operation_s
    compute = _compute_time(job, layout.tp * layout.cp, hardware, flops) / steps
    relay = 0.0
    if layout.tp > 1:
        relay += 2 * spec.num_layers * hardware.latency_s(layout.tp <= hardware.ranks_per_node)
    relay += _dispatch_time(job, layout, hardware, range(spec.num_layers), lanes / waves, 1)
    if layout.pp > 1:
        relay += layout.pp * layout.vp * hardware.latency_s(layout.world_size <= hardware.ranks_per_node)
    return steps * (max(memory, launching, compute) + relay)


def _exchange_time(job: Job, layout: Layout, placement: Placement, hardware: Hardware, transport: str) -> float:
    _, traffic = chosen(job, layout, placement, transport)
    if not traffic.step_bytes:
        return 0.0
    near = layout.world_size <= hardware.ranks_per_node
    return traffic.rank_bytes / hardware.bandwidth(near) + 4 * hardware.latency_s(near)


def _reduce_time(job: Job, layout: Layout, placement: Placement, hardware: Hardware) -> float:
    """All-reduce of each hosted expert's gradients over its replicas, in a ring."""
    most = max(len(hosts) for hosts in placement.hosts)
    if most == 1:
        return 0.0
    near = layout.world_size <= hardware.ranks_per_node
    size = max(adapter_bytes(job, layout, stage)["gradients"] for stage in range(layout.pp))
    return 2 * (most - 1) / most * size / hardware.bandwidth(near) + hardware.latency_s(near)
