"""All layouts of so many ranks: which fit, the fastest of those, and why the others do not.

A layout is every TP x PP x CP whose product divides the number of ranks; the rest are replicas. With MoE layers it is
also every way to spread MoE experts over TP x CP, or none, and TP brings sequence parallelism. It fits when the
trainer would accept it and the fullest rank's peak stays within the hardware's usable memory. One of three or more
stages that fits is also tried with every `parallel.virtual_pipeline` that divides a stage's layers; chunks keep more
activations, so that they never make a layout fit.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.cost import StepTime, step_time
from copd_megatron.simulate.hardware import Hardware
from copd_megatron.simulate.job import Job
from copd_megatron.simulate.memory import RankMemory, rank_memory
from copd_megatron.types import UserError

MAX_CONTEXT = 16
"""Largest CP that is looked at."""


@dataclass(frozen=True)
class RankKind:
    """Ranks that hold equally much: those of one stage on replicas with the same experts."""

    stage: int
    replica: int
    """One of the replicas."""
    replicas: int
    """How many there are."""
    memory: RankMemory


@dataclass(frozen=True)
class Candidate:
    """One layout and what became of it."""

    tp: int
    pp: int
    cp: int
    replicas: int
    ep: int = 1
    etp: int = 1
    vp: int = 1
    peak_bytes: float | None = None
    """Of the fullest rank; None where the layout is impossible anyway."""
    time: StepTime | None = None
    reason: str = ""
    """Why it does not fit; empty if it does."""

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return not self.reason


def rank_kinds(job: Job, layout: Layout, placement: Placement) -> list[RankKind]:
    """Memory of every kind of rank, stage by stage.

    Replicas of one kind host the same experts; where their shares of prompts differ the first has the largest.
    """
    hosted: dict[int, tuple[str, ...]] = dict.fromkeys(range(layout.replicas), ())
    for expert, replicas in zip(placement.experts, placement.hosts):
        for replica in replicas:
            hosted[replica] += (expert,)
    first: dict[tuple[str, ...], int] = {}
    for replica, kind in hosted.items():
        first.setdefault(kind, replica)
    count = Counter(hosted.values())
    return [RankKind(stage, replica, count[kind], rank_memory(job, layout, placement, replica, stage))
            for stage in range(layout.pp) for kind, replica in first.items()]


def fullest(kinds: Sequence[RankKind]) -> RankKind:
    """The kind whose peak is largest."""
    return max(kinds, key=lambda kind: kind.memory.peak_bytes)


def search(job: Job, world_size: int, hardware: Hardware, transport: str) -> list[Candidate]:
    """Every layout of ``world_size`` ranks: those that fit, fastest first, then the others."""
    tried = [found
             for tp in _divisors(world_size) if tp <= max(job.spec.num_heads, 1)
             for pp in _divisors(world_size // tp) if pp <= job.spec.num_layers
             for cp in _divisors(world_size // (tp * pp)) if cp <= MAX_CONTEXT
             for ep, etp in _moe_cuts(job, tp * cp)
             for found in _candidates(job, (tp, pp, cp, world_size // (tp * pp * cp), ep, etp), hardware, transport)]
    return sorted(tried, key=lambda c: (not c.fits, c.time.total if c.time else 0.0, c.pp, c.tp, c.cp, c.etp, c.vp))


def _moe_cuts(job: Job, ranks: int) -> list[tuple[int, int]]:
    """(EP, ETP) to look at: MoE experts whole on every rank, and spread over all of ``ranks``."""
    if job.spec.moe is None:
        return [(1, 1)]
    return list(dict.fromkeys([(1, 1), *((ep, ranks // ep) for ep in _divisors(ranks))]))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _candidates(job: Job, shape: tuple[int, ...], hardware: Hardware, transport: str) -> Iterator[Candidate]:
    """A layout, whole stages first. ``shape``: TP, PP, CP, replicas, EP, ETP."""
    whole = _candidate(job, (*shape, 1), hardware, transport)
    yield whole
    layers, rest = divmod(job.spec.num_layers, whole.pp)
    if whole.fits and whole.pp > 2 and not rest:
        for vp in _divisors(layers)[1:]:
            yield _candidate(job, (*shape, vp), hardware, transport)


def _candidate(job: Job, shape: tuple[int, ...], hardware: Hardware, transport: str) -> Candidate:
    """``shape``: TP, PP, CP, replicas, EP, ETP, VP."""
    tp, pp, cp, replicas, ep, etp, vp = shape
    try:
        layout = Layout(tp=tp, pp=pp, cp=cp, replicas=replicas, ep=ep, etp=etp, vp=vp,
                        sequence_parallel=job.spec.moe is not None and tp > 1)
        job.spec.check_layout(layout)
        placement = job.place(replicas)
    except UserError as error:
        return Candidate(*shape, reason=str(error))
    worst = fullest(rank_kinds(job, layout, placement))
    peak, limit = worst.memory.peak_bytes, hardware.usable_bytes
    if peak > limit:
        parts = worst.memory.parts()
        largest = max(parts, key=parts.get)
        return Candidate(*shape, peak, reason=(
            f"needs {peak / 1e9:.1f} GB in {worst.memory.peak_phase} on stage {worst.stage}, {hardware.name} has "
            f"{limit / 1e9:.1f} GB to plan with; most is {largest}, {parts[largest] / 1e9:.1f} GB"))
    return Candidate(*shape, peak, step_time(job, layout, placement, hardware, transport))
