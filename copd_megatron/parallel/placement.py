"""Which replica trains which expert, and which prompts of an expert each of its replicas takes.

With at least as many replicas as experts, each expert owns a block of neighbouring replicas (its data-parallel
ranks): one each, and every further replica goes to the expert with the most work per replica, which makes the
largest work per replica as small as it can be. With fewer, a replica hosts several experts: the heaviest first,
each on the replica with the least work so far (longest processing time first; Graham 1969: at most 4/3 of the
best). Where no weights are given, blocks differ in size by at most one. Placement changes the speed of a run,
never its result.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from copd_megatron.types import UserError


def split_evenly(count: int, parts: int) -> list[range]:
    """Cut 0..count-1 into ``parts`` neighbouring ranges; lengths differ by at most one, longer ones first."""
    size, longer = divmod(count, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(start, end) for start, end in zip(starts, starts[1:])]


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of ``costs`` in ``parts`` lists of about equal sums, each ascending.

    The dearest first, each to the list with the least so far (then the shortest, then the first): no sum
    exceeds 4/3 of the best possible largest one.
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(parts), key=lambda p: (sums[p], len(lists[p]), p))
        lists[least].append(index)
        sums[least] += costs[index]
    return [sorted(own) for own in lists]


@dataclass(frozen=True)
class Placement:
    """Experts on replicas. Example: ``Placement.build(("text", "image", "video"), replicas=2)`` puts text and
    image on replica 0 and video on replica 1."""

    experts: tuple[str, ...]
    replicas: int
    hosts: tuple[tuple[int, ...], ...]
    """For each expert, in the order of ``experts``, the replicas that host it, ascending."""
    frozen: tuple[str, ...] = ()
    """Teachers that never change: every replica holds them."""

    @classmethod
    def build(cls, experts: Sequence[str], replicas: int, weights: Mapping[str, float] | None = None,
              frozen: Sequence[str] = ()) -> Placement:
        """Place experts in their order; every expert is hosted and every replica hosts at least one expert.

        Args:
            weights: expert -> its share of the work, above 0; only ratios count. None: all alike.
            frozen: names of frozen teachers.

        Raises:
            UserError: no experts, a name twice, or a weight that is not above 0.
        """
        names = tuple(experts)
        if not names or len(set(names)) != len(names):
            raise UserError(f"experts: {list(names)}; one or more with different names; rename or add one")
        if replicas < 1:
            raise UserError(f"parallel.replicas: {replicas}; 1 or more; start more ranks")
        work = [1.0 if weights is None else weights[name] for name in names]
        for name, weight in zip(names, work):
            if not 0 < weight < float("inf"):
                raise UserError(f"experts.{name}.weight: {weight}; a finite number above 0; correct it")
        hosts = _blocks(work, replicas) if replicas >= len(names) else _shared(work, replicas)
        return cls(names, replicas, hosts, tuple(frozen))

    def experts_of(self, replica: int) -> tuple[str, ...]:
        """Experts that a replica hosts, in expert order."""
        if not 0 <= replica < self.replicas:
            raise IndexError(f"replica {replica} is not in 0..{self.replicas - 1}")
        return tuple(name for name, hosts in zip(self.experts, self.hosts) if replica in hosts)

    def replicas_of(self, policy: str) -> tuple[int, ...]:
        """Replicas that hold an expert or a frozen teacher, ascending; KeyError for an unknown name."""
        if policy in self.frozen:
            return tuple(range(self.replicas))
        if policy not in self.experts:
            raise KeyError(f"{policy!r} is no expert; experts are {list(self.experts)}")
        return self.hosts[self.experts.index(policy)]

    def share(self, expert: str, replica: int, count: int) -> range:
        """Which of the expert's ``count`` prompts this replica takes; empty when it does not host the expert.

        The shares of all replicas cover 0..count-1 once, in replica order, as evenly as possible.
        """
        hosts = self.replicas_of(expert)
        if replica not in hosts:
            return range(0)
        return split_evenly(count, len(hosts))[hosts.index(replica)]

    def balanced_share(self, expert: str, replica: int, costs: Sequence[float]) -> list[int]:
        """As ``share``, where prompt i is expected to cost ``costs[i]``: about equal sums instead of equal counts."""
        hosts = self.replicas_of(expert)
        return balanced(costs, len(hosts))[hosts.index(replica)] if replica in hosts else []


def _blocks(work: Sequence[float], replicas: int) -> tuple[tuple[int, ...], ...]:
    """A block of neighbouring replicas for each expert."""
    sizes = [1] * len(work)
    for _ in range(replicas - len(work)):
        busiest = max(range(len(work)), key=lambda e: (work[e] / sizes[e], -e))
        sizes[busiest] += 1
    ends = [sum(sizes[:e + 1]) for e in range(len(work))]
    return tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends))


def _shared(work: Sequence[float], replicas: int) -> tuple[tuple[int, ...], ...]:
    """One replica for each expert; replicas are numbered by their first experts. Equal work: neighbours together."""
    if len(set(work)) == 1:
        lists = [list(block) for block in split_evenly(len(work), replicas)]
    else:
        lists = sorted(balanced(work, replicas))
    host = {expert: replica for replica, own in enumerate(lists) for expert in own}
    return tuple((host[expert],) for expert in range(len(work)))
