"""Who teaches whom, and how the signals travel."""
from typing import Any, Literal

from pydantic import Field

from copd_megatron.config.section import Section


class ExchangeConfig(Section):
    """Topology and transport of the OPD exchange."""

    topology: Any = "hub"
    """``hub``, ``full``, ``ring``, ``none``; ``expander(d)``: d teachers and d students each, few hops between
    any two; ``gossip``: random pairs, anew in each OPD step; ``adaptive(d)``: the d teachers of largest behaviour
    gap up to ``gap_cap``; a list of edges [teacher, student] or {"teacher":, "student":, "beta":, "signal":,
    "prompts":}; a callable ``f(experts, opd_step) -> list[Edge]`` or its "pkg.module:name". In edges a teacher may
    also be ``backbone`` or one of ``frozen_teachers``. ``prompts`` is the expert whose prompts the student answers;
    if left out: the teacher's own, or the student's if the teacher is frozen."""
    hub: str | None = None
    """Centre of the hub topology; None: the first expert."""
    frozen_teachers: dict[str, str] = Field(default_factory=dict)
    """Name -> PEFT adapter folder of a policy that teaches and never changes; edges use the name. It is held by
    every replica, so that its signals never travel."""
    gap_cap: float = Field(0.5, gt=0, le=1)
    """Largest useful gap, 1 - overlap, of topology ``adaptive``; who is farther is not understood."""
    transport: Literal["auto", "scatter", "gather_adapters"] = "auto"
    """scatter: the teacher's replica scores, and signals come back by all-to-all; gather_adapters: teachers'
    adapters travel and the student's replica scores; auto: in each step whichever moves fewer bytes (logged)."""
