"""Bytes that one OPD step moves between replicas, by transport, as the collectives count them.

    scatter           cross tokens whose teacher lives elsewhere x payload per token, plus their token ids going out
    gather_adapters   teachers' adapters to replicas that host a student of theirs but not them, whatever the tokens

A payload is what ``exchange.payload.Codec`` packs; ``full_vocabulary`` stands for float32 log-probs of the whole
vocabulary, which nobody sends. Signals travel between last pipeline stages, on every tensor-parallel rank's own
exchange group; token ids travel on every rank. What co-hosted experts say to each other stays where it is.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

from copd_megatron.exchange.answers import ROUND_BYTES
from copd_megatron.exchange.gather import teacher_copies
from copd_megatron.exchange.payload import Codec, Kind
from copd_megatron.exchange.request import HEADER, ID_BYTES
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement, split_evenly
from copd_megatron.simulate.job import Job
from copd_megatron.simulate.memory import adapter_bytes
from copd_megatron.types import Edge

FULL_VOCABULARY = "full_vocabulary"
GATHER = "gather_adapters"


@dataclass(frozen=True)
class Traffic:
    """Bytes of one OPD step. Example: ``Traffic(step_bytes=3.1e9, rank_bytes=2.6e7)``."""

    step_bytes: float
    """Sent by all ranks together."""
    rank_bytes: float
    """Received by the rank that receives most."""


def payload_bytes(job: Job, kind: str) -> int:
    """Bytes of one completion token's signal."""
    if kind == FULL_VOCABULARY:
        return 4 * job.spec.vocab_size
    topk = min(job.opd.topk, job.spec.vocab_size)
    return Codec(kind, job.opd.wire_dtype, topk, job.spec.hidden_size,
                 exact=job.model.dtype == "float64").bytes_per_token()


def transfers(job: Job, placement: Placement) -> list[tuple[Edge, int, int, int]]:
    """(edge, student's replica, replica that scores, prompts) of one OPD step, co-hosted ones included."""
    key = ("transfers", placement)
    if key not in job.memo:
        job.memo[key] = list(_transfers(job, placement))
    return job.memo[key]


def _transfers(job: Job, placement: Placement) -> Iterator[tuple[Edge, int, int, int]]:
    for edge in job.edges:
        hosts, students = placement.replicas_of(edge.teacher), placement.replicas_of(edge.student)
        at_home = set(hosts)
        for replica, share in zip(students, split_evenly(job.cross_prompts(edge), len(students))):
            if replica in at_home:
                yield edge, replica, replica, len(share)
                continue
            for host, prompts in Counter(hosts[slot % len(hosts)] for slot in share).items():
                yield edge, replica, host, prompts


def scatter(job: Job, layout: Layout, placement: Placement, kind_of: Callable[[Edge], str]) -> Traffic:
    """Traffic of transport ``scatter`` if every edge sent the kind of signal that ``kind_of`` says.

    As ``exchange.transport`` counts: without the few integers in which peers tell each other sizes.
    """
    received: dict[int, float] = defaultdict(float)
    step = 0.0
    tokens = job.completion_tokens
    for edge, replica, host, prompts in transfers(job, placement):
        if replica != host:
            kind, completions = kind_of(edge), prompts * job.rollout.group_size
            asked = ID_BYTES * (HEADER + tokens)
            ids = ID_BYTES * min(job.opd.topk, job.spec.vocab_size) * tokens if kind == "student_topk" else 0
            answer = ROUND_BYTES + tokens * payload_bytes(job, kind)
            received[replica] += completions * answer
            received[host] += completions * (asked + ids)
            step += completions * layout.tp * layout.cp * (layout.pp * asked + ids + answer)
    return Traffic(step, max(received.values(), default=0.0))


def gather(job: Job, layout: Layout, placement: Placement) -> Traffic:
    """Traffic of transport ``gather_adapters``."""
    by_stage = [adapter_bytes(job, layout, stage)["adapters"] for stage in range(layout.pp)]
    copies = teacher_copies(job.edges, placement)
    arrivals = Counter(to for _, _, to in copies)
    return Traffic(float(len(copies) * sum(by_stage) * layout.tp * layout.cp),
                   float(max(arrivals.values(), default=0) * max(by_stage)))


def traffic_by_transport(job: Job, layout: Layout, placement: Placement) -> dict[str, Traffic]:
    """Every way the step's signals could travel: ``scatter/KIND`` for each kind, and ``gather_adapters``."""
    kinds = [*get_args(Kind), FULL_VOCABULARY]
    table = {f"scatter/{kind}": scatter(job, layout, placement, lambda edge, kind=kind: kind) for kind in kinds}
    return {**table, GATHER: gather(job, layout, placement)}


def chosen(job: Job, layout: Layout, placement: Placement, transport: str) -> tuple[str, Traffic]:
    """What the configured transport moves: (its name, traffic); ``auto`` takes the cheaper."""
    options = {"scatter": scatter(job, layout, placement, lambda edge: edge.signal),
               GATHER: gather(job, layout, placement)}
    name = min(options, key=lambda key: options[key].step_bytes) if transport == "auto" else transport
    return name, options[name]
