"""Which replica trains which expert, and which prompts of an expert each of its replicas takes.

With at least as many replicas as experts, each expert owns a block of neighbouring replicas (its
data-parallel ranks). With fewer, each replica hosts a block of neighbouring experts. Block sizes differ by at
most one.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from copd_megatron.types import UserError


def split_evenly(count: int, parts: int) -> list[range]:
    """Cut 0..count-1 into ``parts`` neighbouring ranges; lengths differ by at most one, longer ones first."""
    size, longer = divmod(count, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(start, end) for start, end in zip(starts, starts[1:])]


@dataclass(frozen=True)
class Placement:
    """Experts on replicas. Example: ``Placement.build(("text", "image", "video"), replicas=2)`` puts text and
    image on replica 0 and video on replica 1."""

    experts: tuple[str, ...]
    replicas: int
    hosts: tuple[tuple[int, ...], ...]
    """For each expert, in the order of ``experts``, the replicas that host it, ascending."""

    @classmethod
    def build(cls, experts: Sequence[str], replicas: int) -> Placement:
        """Place experts in their order; every expert is hosted and every replica hosts at least one expert.

        Raises:
            UserError: no experts, or a name twice.
        """
        names = tuple(experts)
        if not names or len(set(names)) != len(names):
            raise UserError(f"experts: {list(names)}; one or more with different names; rename or add one")
        if replicas < 1:
            raise UserError(f"parallel.replicas: {replicas}; 1 or more; start more ranks")
        if replicas >= len(names):
            hosts = tuple(tuple(block) for block in split_evenly(replicas, len(names)))
        else:
            blocks = split_evenly(len(names), replicas)
            hosts = tuple((replica,) for replica, block in enumerate(blocks) for _ in block)
        return cls(names, replicas, hosts)

    def experts_of(self, replica: int) -> tuple[str, ...]:
        """Experts that a replica hosts, in expert order."""
        if not 0 <= replica < self.replicas:
            raise IndexError(f"replica {replica} is not in 0..{self.replicas - 1}")
        return tuple(name for name, hosts in zip(self.experts, self.hosts) if replica in hosts)

    def replicas_of(self, expert: str) -> tuple[int, ...]:
        """Replicas that host an expert, ascending; KeyError for an unknown name."""
        if expert not in self.experts:
            raise KeyError(f"{expert!r} is no expert; experts are {list(self.experts)}")
        return self.hosts[self.experts.index(expert)]

    def share(self, expert: str, replica: int, count: int) -> range:
        """Which of the expert's ``count`` prompts this replica takes; empty when it does not host the expert.

        The shares of all replicas cover 0..count-1 once, in replica order, as evenly as possible.
        """
        hosts = self.replicas_of(expert)
        if replica not in hosts:
            return range(0)
        return split_evenly(count, len(hosts))[hosts.index(replica)]
