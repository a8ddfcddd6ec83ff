"""Who teaches whom, and how the signals travel."""
from typing import Any, Literal

from copd_megatron.config.section import Section


class ExchangeConfig(Section):
    """Topology and transport of the OPD exchange."""

    topology: Any = "hub"
    """``hub``, ``full``, ``ring``, ``none``; a list of edges [teacher, student] or
    {"teacher":, "student":, "beta":, "signal":}; a callable ``f(experts, opd_step) -> list[Edge]``
    or its "pkg.module:name"."""
    hub: str | None = None
    """Centre of the hub topology; None: the first expert."""
    transport: Literal["auto", "scatter", "gather_adapters"] = "auto"
    """scatter: the teacher's replica scores, and signals come back by all-to-all; gather_adapters: teachers'
    adapters travel and the student's replica scores; auto: in each step whichever moves fewer bytes (logged)."""
