"""Who teaches whom in an OPD step: from what the configuration says to edges that are known to be valid.

A pure function of the configuration, the OPD step, the seed and measured gaps: the same on every rank.
"""
from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.exchange import graphs
from copd_megatron.exchange.payload import Kind
from copd_megatron.types import BACKBONE, Edge, UserError

Resolve = Callable[[str, str], Any]
"""(reference, config field) -> object, e.g. ("my_lab.graphs:star", "exchange.topology")."""

FORMS = ('[teacher, student] or {"teacher": ..., "student": ..., "beta": ..., "signal": ..., "prompts": ...} with a '
         f"finite beta and a signal of {', '.join(get_args(Kind))}")
CALL = re.compile(r"(\w+)\s*(?:\(\s*(\w*)\s*\))?")
"""A named topology, with its degree if it has one: "expander(3)"."""


@dataclass(frozen=True)
class Moment:
    """What the graph of one OPD step may depend on besides the configuration."""

    opd_step: int = 0
    """Counts OPD steps from 0."""
    seed: int = 0
    overlaps: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Two experts, in either order -> their last measured top-k overlap, 0 to 1."""


@dataclass(frozen=True)
class _Graph:
    """What a named topology is drawn from."""

    count: int
    centre: int
    degree: int
    cap: float
    moment: Moment
    gaps: graphs.Gaps


TOPOLOGIES: dict[str, Callable[[_Graph], graphs.Arrows]] = {
    "hub": lambda g: graphs.hub(g.count, g.centre),
    "full": lambda g: graphs.full(g.count),
    "ring": lambda g: graphs.ring(g.count),
    "none": lambda g: [],
    "gossip": lambda g: graphs.gossip(g.count, g.moment.seed, g.moment.opd_step),
    "expander": lambda g: graphs.expander(g.count, g.degree),
    "adaptive": lambda g: graphs.adaptive(g.count, g.degree, g.gaps, g.cap)}
"""Named topologies."""

LEAST_DEGREE = {"expander": 2, "adaptive": 1}
"""Named topologies that take a degree, and the least they take."""
NAMES = ", ".join(f"{name}(d)" if name in LEAST_DEGREE else name for name in TOPOLOGIES)


def edges(config: ExchangeConfig, opd: OpdConfig, experts: Sequence[str], moment: Moment | int,
          resolve: Resolve) -> list[Edge]:
    """The edges of one OPD step, by student, then teacher, in expert order, frozen teachers last.

    Args:
        moment: the OPD step and what else a graph may depend on; a number stands for ``Moment(opd_step)``.
        resolve: turns "pkg.module:name" into the object; raises UserError.

    Raises:
        UserError: an unknown topology, hub, policy or signal, a degree that is missing or too small, an
            expert that teaches itself, a frozen student, an edge twice.
    """
    given = _given(config, experts, Moment(moment) if isinstance(moment, int) else moment, resolve)
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise UserError(f"exchange.topology: {given!r}; allowed are {NAMES}, a list of edges, a callable that "
                        f'returns one, or its "pkg.module:name"; {_advice(given)}')
    frozen = (*config.frozen_teachers, BACKBONE)
    found = [_edge(entry, opd, experts, frozen) for entry in given]
    pairs = [(edge.teacher, edge.student) for edge in found]
    twice = [pair for pair in pairs if pairs.count(pair) > 1]
    if twice:
        raise UserError(f"exchange.topology: the edge {twice[0][0]} -> {twice[0][1]} is given twice; once is "
                        "allowed; keep one")
    order = {name: place for place, name in enumerate((*experts, *frozen))}
    return sorted(found, key=lambda edge: (order[edge.student], order[edge.teacher]))


def prompts_of(edge: Edge, experts: Sequence[str], whose: str = "teacher") -> tuple[str, ...]:
    """The experts whose prompts the student answers, as many of each: whom the edge names, else by ``opd.prompts``.

    Args:
        whose: "teacher", "student" or "both". A frozen teacher has no prompts: the student's stand in for them.
    """
    if edge.prompts:
        return (edge.prompts,)
    teacher = edge.teacher if edge.teacher in experts else edge.student
    asked = {"teacher": (teacher,), "student": (edge.student,), "both": (teacher, edge.student)}[whose]
    return tuple(dict.fromkeys(asked))


def _given(config: ExchangeConfig, experts: Sequence[str], moment: Moment, resolve: Resolve) -> Any:
    """What the config says, named topologies written out and callables called."""
    topology = config.topology
    name, degree = _named(topology) if isinstance(topology, str) else (None, None)
    if name is not None:
        centre = experts[0] if config.hub is None else config.hub
        if centre not in experts:
            raise UserError(f"exchange.hub: {centre!r}; experts are {', '.join(experts)}; correct it")
        place = {expert: number for number, expert in enumerate(experts)}
        gaps = {tuple(sorted((place[a], place[b]))): 1 - overlap for (a, b), overlap in moment.overlaps.items()}
        graph = _Graph(len(experts), place[centre], degree, config.gap_cap, moment, gaps)
        return [(experts[teacher], experts[student]) for teacher, student in TOPOLOGIES[name](graph)]
    if isinstance(topology, str) and ":" in topology:
        topology = resolve(topology, "exchange.topology")
    return topology(list(experts), moment.opd_step) if callable(topology) else topology


def _named(text: str) -> tuple[str | None, int]:
    """Name and degree (0 where it has none) of a named topology; (None, 0) for another text.

    Raises:
        UserError: a degree where none belongs, none where one does, or one that is no number or too small.
    """
    match = CALL.fullmatch(text.strip())
    if match is None or match[1] not in TOPOLOGIES:
        return None, 0
    name, argument = match.groups()
    if name not in LEAST_DEGREE:
        if argument is not None:
            raise UserError(f"exchange.topology: {text!r}; {name} takes no degree; write {name}")
        return name, 0
    least = LEAST_DEGREE[name]
    if not argument or not argument.isdecimal() or int(argument) < least:
        hint = "; ring has one teacher each" if name == "expander" else ""
        raise UserError(f"exchange.topology: {text!r}; {name} takes its number of teachers per student, {least} or "
                        f"more{hint}; write {name}(3)")
    return name, int(argument)


def _advice(given: Any) -> str:
    """What to do about something that is no topology."""
    word = re.split(r"\W", given.strip(), maxsplit=1)[0] if isinstance(given, str) else ""
    near = difflib.get_close_matches(word, TOPOLOGIES, n=1)
    return f"nearest: {near[0]}" if near else "choose one"


def _edge(entry: Any, opd: OpdConfig, experts: Sequence[str], frozen: Sequence[str]) -> Edge:
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
    _check_names(edge, experts, frozen)
    return edge


def _check_names(edge: Edge, experts: Sequence[str], frozen: Sequence[str]) -> None:
    """Teacher, student and prompts are known, and may be what they are."""
    allowed = {"teacher": [*experts, *frozen], "student": list(experts), "prompts": [*experts, None]}
    for role, names in allowed.items():
        name = getattr(edge, role)
        if name in names:
            continue
        near = difflib.get_close_matches(str(name), [n for n in names if n], n=1)
        hint = f"nearest: {near[0]}" if near else "correct it"
        if role == "teacher":
            hint += "; an adapter folder gets a name in exchange.frozen_teachers"
        elif role == "student" and name in frozen:
            hint = "a frozen teacher learns nothing; turn the edge round or drop it"
        raise UserError(f"exchange.topology: {role} {name!r}; experts are {', '.join(experts)}; {hint}")
    if edge.teacher == edge.student:
        raise UserError(f"exchange.topology: {edge.teacher!r} teaches itself; an edge joins two experts; "
                        "drop it")
