"""Who teaches whom in an OPD step: pure functions from expert names to edges."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.exchange.payload import Kind
from copd_megatron.types import Edge, UserError

Pairs = list[tuple[str, str]]
Resolve = Callable[[str, str], Any]
"""(reference, config field) -> object, e.g. ("my_lab.graphs:star", "exchange.topology")."""

FORMS = ('[teacher, student] or {"teacher": ..., "student": ..., "beta": ..., "signal": ...} with a finite '
         f"beta and a signal of {', '.join(get_args(Kind))}")


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


TOPOLOGIES: dict[str, Callable[[Sequence[str], str], Pairs]] = {
    "hub": hub, "full": full, "ring": ring, "none": none}
"""Named topologies: (experts, centre) -> (teacher, student) pairs."""


def edges(config: ExchangeConfig, opd: OpdConfig, experts: Sequence[str], opd_step: int,
          resolve: Resolve) -> list[Edge]:
    """The edges of one OPD step, by student, then teacher, in expert order: the same on every rank.

    Args:
        opd_step: counts OPD steps from 0; only callables read it.
        resolve: turns "pkg.module:name" into the object; raises UserError.

    Raises:
        UserError: an unknown topology, hub, expert or signal, an expert that teaches itself, an edge twice.
    """
    given = _given(config, experts, opd_step, resolve)
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise UserError(f"exchange.topology: {given!r}; allowed are {', '.join(TOPOLOGIES)}, a list of "
                        'edges, a callable that returns one, or its "pkg.module:name"; choose one')
    found = [_edge(entry, opd, experts) for entry in given]
    pairs = [(edge.teacher, edge.student) for edge in found]
    twice = [pair for pair in pairs if pairs.count(pair) > 1]
    if twice:
        raise UserError(f"exchange.topology: the edge {twice[0][0]} -> {twice[0][1]} is given twice; once is "
                        "allowed; keep one")
    order = {name: place for place, name in enumerate(experts)}
    return sorted(found, key=lambda edge: (order[edge.student], order[edge.teacher]))


def _given(config: ExchangeConfig, experts: Sequence[str], opd_step: int, resolve: Resolve) -> Any:
    """What the config says, named topologies written out and callables called."""
    topology = config.topology
    if isinstance(topology, str) and topology in TOPOLOGIES:
        centre = experts[0] if config.hub is None else config.hub
        if centre not in experts:
            raise UserError(f"exchange.hub: {centre!r}; experts are {', '.join(experts)}; correct it")
        return TOPOLOGIES[topology](experts, centre)
    if isinstance(topology, str) and ":" in topology:
        topology = resolve(topology, "exchange.topology")
    return topology(list(experts), opd_step) if callable(topology) else topology


def _edge(entry: Any, opd: OpdConfig, experts: Sequence[str]) -> Edge:
    """An edge from any form it may have, checked."""
    try:
        if isinstance(entry, Edge):
            edge = entry
        elif isinstance(entry, Mapping):
            edge = Edge(**{"beta": opd.beta, "signal": opd.signal, **entry})
        else:
            teacher, student = entry
            edge = Edge(teacher, student, opd.beta, opd.signal)
        valid = math.isfinite(edge.beta) and edge.signal in get_args(Kind)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"exchange.topology: {entry!r} is no edge; allowed is {FORMS}; correct it")
    for role, name in (("teacher", edge.teacher), ("student", edge.student)):
        if name not in experts:
            raise UserError(f"exchange.topology: {role} {name!r}; experts are {', '.join(experts)}; correct "
                            "it")
    if edge.teacher == edge.student:
        raise UserError(f"exchange.topology: {edge.teacher!r} teaches itself; an edge joins two experts; "
                        "drop it")
    return edge
