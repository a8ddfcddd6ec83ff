"""Who teaches whom in an OPD step: pure functions from expert names to edges."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.types import Edge, UserError

Pairs = list[tuple[str, str]]


def hub(experts: Sequence[str], centre: str) -> Pairs:
    """The centre exchanges with every spoke, spokes not with each other (the paper; text is its centre)."""
    spokes = [e for e in experts if e != centre]
    return [(centre, s) for s in spokes] + [(s, centre) for s in spokes]


def full(experts: Sequence[str], centre: str) -> Pairs:
    """Everyone teaches everyone."""
    return [(t, s) for s in experts for t in experts if t != s]


def ring(experts: Sequence[str], centre: str) -> Pairs:
    """Each expert teaches the next one."""
    pairs = [(experts[i - 1], experts[i]) for i in range(len(experts))]
    return [(t, s) for t, s in pairs if t != s]


def none(experts: Sequence[str], centre: str) -> Pairs:
    """Nobody teaches: independent experts."""
    return []


TOPOLOGIES: dict[str, Callable[[Sequence[str], str], Pairs]] = {"hub": hub, "full": full, "ring": ring, "none": none}
"""Named topologies: (experts, centre) -> (teacher, student) pairs."""


def edges(config: ExchangeConfig, opd: OpdConfig, experts: Sequence[str], opd_step: int,
          resolve: Callable[[str], Any]) -> list[Edge]:
    """The edges of one OPD step.

    Args:
        opd_step: counts OPD steps from 0; only callables read it.
        resolve: turns "pkg.module:name" into the object.

    Raises:
        UserError: an unknown topology or expert, an expert that teaches itself, an edge given twice.
    """
    topology = config.topology
    if isinstance(topology, str) and topology in TOPOLOGIES:
        given: Sequence[Any] = TOPOLOGIES[topology](experts, config.hub or experts[0])
    elif callable(topology) or (isinstance(topology, str) and ":" in topology):
        function = resolve(topology) if isinstance(topology, str) else topology
        given = function(list(experts), opd_step)
    elif isinstance(topology, str):
        raise UserError(f"exchange.topology: {topology!r}; allowed are {', '.join(TOPOLOGIES)}, a list of edges or "
                        "\"pkg.module:name\"; choose one")
    else:
        given = topology
    found = [_edge(entry, opd) for entry in given]
    for edge in found:
        for role, name in (("teacher", edge.teacher), ("student", edge.student)):
            if name not in experts:
                raise UserError(f"exchange.topology: {role} {name!r}; experts are {', '.join(experts)}; correct it")
        if edge.teacher == edge.student:
            raise UserError(f"exchange.topology: {edge.teacher!r} teaches itself; an edge joins two experts; drop it")
    pairs = [(e.teacher, e.student) for e in found]
    twice = [p for p in pairs if pairs.count(p) > 1]
    if twice:
        raise UserError(f"exchange.topology: the edge {twice[0][0]} -> {twice[0][1]} is given twice; keep one")
    return found


def _edge(entry: Any, opd: OpdConfig) -> Edge:
    if isinstance(entry, Edge):
        return entry
    try:
        if isinstance(entry, Mapping):
            return Edge(**{"beta": opd.beta, "signal": opd.signal, **entry})
        teacher, student = entry
        return Edge(teacher, student, opd.beta, opd.signal)
    except (TypeError, ValueError) as error:
        raise UserError(f"exchange.topology: {entry!r} is no edge ({error}); an edge is [teacher, student] or "
                        '{"teacher": ..., "student": ..., "beta": ..., "signal": ...}; correct it') from error
