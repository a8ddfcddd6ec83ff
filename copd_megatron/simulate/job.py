"""What one step of a run computes, wherever it runs: lengths, groups and the microbatches they fill.

A group is a prompt of P tokens with G completions of R; a leaf starts with f forced prompt tokens, so a group takes

    (P - f) + G (f + R - 1)     rows with prefix sharing,     G (P + R - 1)     without

as ``model.shared_prefix.pack_tokens`` counts. All prompts of a domain count as equally long, and every completion as
distinct and of ``completion_tokens`` tokens: for memory that is the worst that sampling can do.
"""
from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.topology import prompts_of
from copd_megatron.model.shared_prefix import PackRules
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.parallel.placement import Placement, split_evenly
from copd_megatron.types import BACKBONE, Edge


@dataclass(frozen=True)
class PromptLengths:
    """An average prompt of a domain. Example: ``PromptLengths(tokens=640, visual_tokens=576)``."""

    tokens: int
    """P, generation header and visual tokens included."""
    visual_tokens: int = 0
    header_tokens: int = 3


@dataclass(frozen=True)
class Group:
    """``count`` equal groups in one replica's step: completions of ``student`` on prompts of ``domain``."""

    student: str
    domain: str
    count: int
    edge: Edge | None = None
    """None: native."""


@dataclass(frozen=True)
class Rows:
    """Rows of one microbatch, or of several."""

    trunk: int = 0
    leaves: int = 0
    scored: int = 0
    """Rows whose hidden states pass the head."""
    visual: int = 0
    trunks: int = 0
    """How many trunks the trunk rows belong to."""

    @property
    def tokens(self) -> int:
        """All rows."""
        return self.trunk + self.leaves

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.trunk + other.trunk, self.leaves + other.leaves, self.scored + other.scored,
                    self.visual + other.visual, self.trunks + other.trunks)


@dataclass(frozen=True)
class Job:
    """A run's work, from its configuration and the lengths of its prompts and completions."""

    spec: BackboneSpec
    model: ModelConfig
    adapter: AdapterConfig
    rollout: RolloutConfig
    rlvr: RlvrConfig
    opd: OpdConfig
    microbatch_tokens: int
    experts: tuple[str, ...]
    edges: tuple[Edge, ...]
    """Of an OPD step."""
    prompts: Mapping[str, PromptLengths]
    """Expert -> its own domain's prompts."""
    completion_tokens: int
    """R; at most ``rollout.max_completion_tokens``."""
    vision_bytes: int = 0
    """Weights of the vision tower; it is whole on every rank that reads visual features."""
    steps: int = 1
    """Of the whole run; how many prompts it will have seen."""
    weights: Mapping[str, float] | None = None
    """Expert -> its share of the work; None: all alike."""
    frozen: tuple[str, ...] = ()
    """Frozen teachers, which every replica holds."""

    @cached_property
    def memo(self) -> dict[Hashable, Any]:
        """Answers about this job that are asked for again and again, by question."""
        return {}

    @cached_property
    def rules(self) -> PackRules:
        """Of packs, as the backbone makes them."""
        return PackRules(self.adapter.scope, self.adapter.first_layer, self.model.prefix_sharing)

    def place(self, replicas: int) -> Placement:
        """The experts on so many replicas, as ``trainer.build`` places them."""
        return Placement.build(self.experts, replicas, self.weights, (*self.frozen, BACKBONE))

    def forced(self, domain: str) -> int:
        """Prompt tokens that every leaf starts with."""
        return self.prompts[domain].header_tokens if self.adapter.scope == "completion" else 1

    @cached_property
    def _cross_counts(self) -> dict[Edge, int]:
        incoming: dict[str, list[Edge]] = {}
        for edge in self.edges:
            incoming.setdefault(edge.student, []).append(edge)
        native = self.rollout.prompts_per_step
        return {edge: min(native, len(part)) for edges in incoming.values()
                for edge, part in zip(edges, split_evenly(round(native * self.opd.cross_ratio), len(edges)))}

    def decoded(self, groups: Sequence[Group]) -> list[Group]:
        """Those of the groups whose completions are sampled, and not taken from native batches."""
        return [group for group in groups if group.edge is None or self.opd.rollouts == "fresh"]

    def cross_prompts(self, edge: Edge) -> int:
        """Prompts of an edge in one OPD step, over all replicas of its student, as ``trainer.opd_phase`` counts."""
        return self._cross_counts[edge]

    def cross_tokens(self, edge: Edge) -> int:
        """Completion tokens that an edge's teacher scores in one OPD step."""
        return self.cross_prompts(edge) * self.rollout.group_size * self.completion_tokens

    def groups(self, placement: Placement, replica: int, opd: bool = True) -> list[Group]:
        """The groups of one replica's step, as the trainer asks for them: native, then (in OPD steps) cross."""
        hosted = placement.experts_of(replica)

        def share(expert: str, count: int) -> int:
            return len(placement.share(expert, replica, count))

        native = [Group(e, e, share(e, self.rollout.prompts_per_step)) for e in hosted]
        cross = []
        for edge in self.edges if opd else ():
            domains = prompts_of(edge, self.experts, self.opd.prompts)
            parts = split_evenly(self.cross_prompts(edge), len(domains))
            if edge.student in hosted:
                cross += [Group(edge.student, domain, share(edge.student, len(part)), edge)
                          for domain, part in zip(domains, parts)]
        return [group for group in native + cross if group.count]

    def rows(self, domain: str, lanes: int) -> Rows:
        """Rows of one group, or of a part of one, with ``lanes`` completions."""
        lengths, forced, completion = self.prompts[domain], self.forced(domain), self.completion_tokens
        if not self.model.prefix_sharing:
            return Rows(0, lanes * (lengths.tokens + completion - 1), lanes * completion,
                        lanes * lengths.visual_tokens)
        trunk = lengths.tokens - forced
        return Rows(trunk, lanes * (forced + completion - 1), lanes * completion, lengths.visual_tokens,
                    int(trunk > 0))

    def microbatches(self, groups: Sequence[Group]) -> list[Rows]:
        """Microbatches of an update over these groups, filled as ``trainer.batching`` fills them."""
        key = ("microbatches", *groups)
        if key not in self.memo:
            self.memo[key] = self._microbatches(groups)
        return self.memo[key]

    def _microbatches(self, groups: Sequence[Group]) -> list[Rows]:
        batches: list[Rows] = []
        for group in groups:
            parts = [self.rows(group.domain, lanes) for lanes in self._parts(group.domain, self.rollout.group_size)]
            for part in parts * group.count:
                if not batches or batches[-1].tokens + part.tokens > self.microbatch_tokens:
                    batches.append(Rows())
                batches[-1] += part
        return batches

    def _parts(self, domain: str, lanes: int) -> Iterator[int]:
        """Lanes of the parts that a group is split into until each fits the budget, or has one."""
        if lanes == 1 or self.rows(domain, lanes).tokens <= self.microbatch_tokens:
            yield lanes
            return
        yield from self._parts(domain, lanes // 2)
        yield from self._parts(domain, lanes - lanes // 2)
