"""All layouts of so many ranks: which fit, the fastest of those, and why the others do not.

A layout is every TP x PP x CP whose product divides the number of ranks; the rest are replicas. It fits when the
trainer would accept it and the fullest rank's peak stays within the hardware's usable memory.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
    found = [_candidate(job, world_size, tp, pp, cp, hardware, transport)
             for tp in _divisors(world_size) if tp <= max(job.spec.num_heads, 1)
             for pp in _divisors(world_size // tp) if pp <= job.spec.num_layers
             for cp in _divisors(world_size // (tp * pp)) if cp <= MAX_CONTEXT]
    return sorted(found, key=lambda c: (not c.fits, c.time.total if c.time else 0.0, c.pp, c.tp, c.cp))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _candidate(job: Job, world_size: int, tp: int, pp: int, cp: int, hardware: Hardware,
               transport: str) -> Candidate:
    replicas = world_size // (tp * pp * cp)
    try:
        layout = Layout(tp=tp, pp=pp, cp=cp, replicas=replicas)
        job.spec.check_layout(layout)
        placement = job.place(replicas)
    except UserError as error:
        return Candidate(tp, pp, cp, replicas, reason=str(error))
    worst = fullest(rank_kinds(job, layout, placement))
    peak, limit = worst.memory.peak_bytes, hardware.usable_bytes
    if peak > limit:
        parts = worst.memory.parts()
        largest = max(parts, key=parts.get)
        return Candidate(tp, pp, cp, replicas, peak, reason=(
            f"needs {peak / 1e9:.1f} GB in {worst.memory.peak_phase} on stage {worst.stage}, {hardware.name} has "
            f"{limit / 1e9:.1f} GB to plan with; most is {largest}, {parts[largest] / 1e9:.1f} GB"))
    return Candidate(tp, pp, cp, replicas, peak, step_time(job, layout, placement, hardware, transport))
