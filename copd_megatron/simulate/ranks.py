"""Who stands where: every rank with its coordinates, the experts it trains, and the groups it is in.

Groups are those that ``parallel.groups.Groups`` creates from the same layout and placement; here they are only
listed, so that 4,096 ranks need no process but this one.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement

Members = dict[str, list[tuple[int, ...]]]


def groups_of(layout: Layout, placement: Placement) -> Members:
    """Kind of group ("tp", "cp", "pp", "replica", "exchange", "moe_expert", "adapter/EXPERT") -> global ranks of
    each."""
    replicas, stages = range(layout.replicas), range(layout.pp)
    contexts, tensors = range(layout.cp), range(layout.tp)
    at = layout.rank_of
    found: Members = {
        "tp": [tuple(at(r, p, c, t) for t in tensors) for p in stages for r in replicas for c in contexts],
        "cp": [tuple(at(r, p, c, t) for c in contexts) for p in stages for r in replicas for t in tensors],
        "pp": [tuple(at(r, p, c, t) for p in stages) for r in replicas for c in contexts for t in tensors],
        "replica": [layout.replica_ranks(r) for r in replicas],
        "exchange": [layout.peers(*cell) for cell in layout.cells()],
    }
    if layout.ep > 1:
        found["moe_expert"] = [layout.moe_expert_peers(r, p, t) for p in stages for r in replicas
                               for t in range(layout.etp)]
    for expert, hosts in zip(placement.experts, placement.hosts):
        found[f"adapter/{expert}"] = [layout.peers(*cell, hosts) for cell in layout.cells()]
    return found


def rank_records(layout: Layout, placement: Placement) -> dict[str, Any]:
    """All of it as JSON holds it: {"groups": {kind: [[ranks], ...]}, "ranks": [{rank, coordinates, experts, groups}]},
    where a rank's groups are numbers into the lists."""
    members = groups_of(layout, placement)
    mine: list[dict[str, int]] = [{} for _ in range(layout.world_size)]
    for kind, groups in members.items():
        for number, ranks in enumerate(groups):
            for rank in ranks:
                mine[rank][kind] = number
    hosted = _hosted(layout, placement)
    ranks = [{"rank": rank, **asdict(coords), "experts": list(hosted[coords.replica]), "groups": mine[rank]}
             for rank, coords in ((rank, layout.coordinates(rank)) for rank in range(layout.world_size))]
    return {"groups": {kind: [list(g) for g in groups] for kind, groups in members.items()}, "ranks": ranks}


def rank_table(layout: Layout, placement: Placement, full: bool) -> tuple[list[str], list[list[str]]]:
    """(header, rows) for people: a row per rank, or a row per stage and run of replicas with the same experts."""
    header = ["ranks", "replica", "pp", "cp", "tp", "experts", "tp group", "pp group", "exchange group",
              "adapter groups"]
    hosted = _hosted(layout, placement)
    if full:
        return header, [_row(layout, placement, hosted, rank) for rank in range(layout.world_size)]
    rows = []
    for stage in range(layout.pp):
        for run in _runs(hosted):
            first = _row(layout, placement, hosted, layout.rank_of(run.start, stage))
            last = layout.rank_of(run.stop - 1, stage, layout.cp - 1, layout.tp - 1)
            rows.append([_span(int(first[0]), last), _span(run.start, run.stop - 1), str(stage),
                         _span(0, layout.cp - 1), _span(0, layout.tp - 1), *first[5:]])
    header[6:] = [f"{name} of its first rank" for name in header[6:]]
    return header, rows


def _hosted(layout: Layout, placement: Placement) -> list[tuple[str, ...]]:
    hosted: list[tuple[str, ...]] = [()] * layout.replicas
    for expert, hosts in zip(placement.experts, placement.hosts):
        for replica in hosts:
            hosted[replica] += (expert,)
    return hosted


def _runs(hosted: Sequence[tuple[str, ...]]) -> Iterable[range]:
    """Neighbouring replicas with the same experts."""
    start = 0
    for replica in range(1, len(hosted) + 1):
        if replica == len(hosted) or hosted[replica] != hosted[start]:
            yield range(start, replica)
            start = replica


def _row(layout: Layout, placement: Placement, hosted: Sequence[tuple[str, ...]], rank: int) -> list[str]:
    c = layout.coordinates(rank)
    cell = (c.pp, c.cp, c.tp)
    adapters = dict.fromkeys(placement.replicas_of(expert) for expert in hosted[c.replica])
    return [str(rank), str(c.replica), str(c.pp), str(c.cp), str(c.tp), " ".join(hosted[c.replica]),
            members_text([layout.rank_of(c.replica, c.pp, c.cp, t) for t in range(layout.tp)]),
            members_text([layout.rank_of(c.replica, p, c.cp, c.tp) for p in range(layout.pp)]),
            members_text(layout.peers(*cell)), " ".join(members_text(layout.peers(*cell, hosts)) for hosts in adapters)]


def members_text(ranks: Sequence[int]) -> str:
    """Ranks in a few characters: "0", "0-7", "0,8,..,248" (steps are equal), else all of them."""
    steps = {b - a for a, b in zip(ranks, ranks[1:])}
    if len(ranks) < 3 or len(steps) > 1:
        return ",".join(map(str, ranks))
    if steps == {1}:
        return _span(ranks[0], ranks[-1])
    return ",".join(map(str, ranks)) if len(ranks) == 3 else f"{ranks[0]},{ranks[1]},..,{ranks[-1]}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
