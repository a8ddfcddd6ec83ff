"""The cross batches of an OPD step: students answer their teachers' prompts.

Student k, teacher j: prompts are those of a native batch of this step (``opd.prompts``: j's, k's, or half of each),
so that their prefixes are computed once per replica; completions come from k, or with ``opd.rollouts=native`` from the
expert whose batch it is; only the teacher's signal teaches, no reward. A frozen teacher has no prompts of its own: the
student answers those of its own native batch, or of the expert that the edge names.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.completions import fetch_completions
from copd_megatron.exchange.topology import prompts_of
from copd_megatron.metrics.names import edge_name
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import split_evenly
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.trainer.batching import Asked, Sample
from copd_megatron.trainer.prompts import PromptSource
from copd_megatron.trainer.rlvr_phase import NativeBatch
from copd_megatron.trainer.step_metrics import Sums, add_sums
from copd_megatron.types import Completion, Edge, Prompt


def cross_counts(edges: Sequence[Edge], student: str, native: int, ratio: float) -> dict[Edge, int]:
    """Prompts per incoming edge of a student: ``ratio`` x the native prompts, split evenly over its teachers.

    At most ``native`` each: a teacher has no more prompts in its own batch.
    """
    incoming = [e for e in edges if e.student == student]
    parts = split_evenly(round(native * ratio), len(incoming)) if incoming else []
    return {edge: min(native, len(part)) for edge, part in zip(incoming, parts)}


@dataclass(frozen=True)
class CrossShare:
    """Prompts of one edge: ``count`` places of a native batch from ``first`` on, going round."""

    edge: Edge
    domain: str
    """The expert whose native batch it is."""
    first: int
    count: int
    before: int = 0
    """Prompts of the edge from other batches that come before these."""

    @property
    def slots(self) -> range:
        """Their places among all prompts of the edge."""
        return range(self.before, self.before + self.count)


def cross_shares(edges: Sequence[Edge], student: str, native: int, ratio: float, experts: Sequence[str],
                 whose: str = "teacher") -> list[CrossShare]:
    """As ``cross_counts``, with the prompts: edges that ask the same expert's prompts take different ones, as far
    as its batch goes.

    Args:
        whose: ``opd.prompts``. With "both" an odd prompt is the teacher's.
    """
    used: Counter[str] = Counter()
    shares = []
    for edge, count in cross_counts(edges, student, native, ratio).items():
        domains = prompts_of(edge, experts, whose)
        for domain, part in zip(domains, split_evenly(count, len(domains))):
            shares.append(CrossShare(edge, domain, used[domain], len(part), part.start))
            used[domain] += len(part)
    return shares


class CrossBatch:
    """Asks for each hosted student's share of its cross batches."""

    def __init__(self, source: PromptSource, groups: Groups, rollout: RolloutConfig, opd: OpdConfig,
                 native: NativeBatch, params: SamplingParams, checked: bool = False):
        """``checked``: ``parallel.debug_checks``."""
        self.source, self.groups, self.rollout, self.opd, self.params = source, groups, rollout, opd, params
        self.native, self.checked = native, checked
        self._places: tuple[Sequence[Edge], dict[tuple[str, str], list[tuple[str, int]]]] = ((), {})

    def shares(self, edges: Sequence[Edge], student: str) -> list[CrossShare]:
        """Which prompts each edge of a student asks; the same on every rank."""
        return cross_shares(edges, student, self.rollout.prompts_per_step, self.opd.cross_ratio,
                            self.groups.placement.experts, self.opd.prompts)

    def requests(self, step: int, edges: Sequence[Edge]) -> list[Asked]:
        """The hosted students' requests; none outside OPD steps. All replicas of a student call it together."""
        asked = []
        for student in self.groups.hosted:
            shares = self.shares(edges, student)
            slots = [(share, slot) for share in shares for slot in share.slots]
            places = [(share.domain, self.native.position(share.domain, step, self._place(share, slot)))
                      for share, slot in slots]
            totals = Counter(share.edge for share, _ in slots)
            for index in self.native.shares.own(student, places):
                share, slot = slots[index]
                # A student that answers a prompt again, its own for one, must not repeat itself.
                times = (share.first + slot - share.before) // self.rollout.prompts_per_step + (share.domain == student)
                request = Request(self.source.train(*places[index]), student, self.rollout.group_size, self.params,
                                  (step, times) if times else (step,))
                asked.append(Asked(request, slot, totals[share.edge], share.edge,
                                   (share.domain, self._place(share, slot))))
        return asked

    def reused(self, asked: Sequence[Asked], native: Sequence[Asked], groups: Sequence[Sequence[Completion]],
               ) -> list[list[Completion]]:
        """Native completions in the place of fresh ones (``opd.rollouts=native``), a group per cross request. All
        replicas call it together.

        Args:
            native, groups: this replica's native requests and their completions, before any are drawn again: a
                teacher's prompts are those of its first round.
        """
        wanted = {own.native: own.request.prompt for own in asked}
        sampled = {(own.request.expert, own.slot): group for own, group in zip(native, groups)}
        found = fetch_completions(wanted, sampled, self.groups, self.checked)
        for completion in (c for group in found.values() for c in group):
            completion.text = self.source.encoder.decode(completion.token_ids)
        return [found[own.native] for own in asked]

    def prompt(self, edges: Sequence[Edge], teacher: str, student: str, step: int, slot: int) -> Prompt:
        """Prompt ``slot`` of an edge in this step; any rank can make it."""
        if self._places[0] is not edges:  # a step asks thousands of times about the same edges
            found: dict[tuple[str, str], list[tuple[str, int]]] = {}
            for own in dict.fromkeys(edge.student for edge in edges):
                for share in self.shares(edges, own):
                    found.setdefault((share.edge.teacher, own), []).extend(
                        (share.domain, self._place(share, s)) for s in share.slots)
            self._places = edges, found
        domain, place = self._places[1][teacher, student][slot]
        return self.source.train(domain, self.native.position(domain, step, place))

    def _place(self, share: CrossShare, slot: int) -> int:
        """Of a prompt of the share in the native batch."""
        return (share.first + slot - share.before) % self.rollout.prompts_per_step

    @staticmethod
    def samples(asked: Sequence[Asked], groups: Sequence[Sequence[Completion]]) -> list[Sample]:
        """One sample per completion."""
        return [own.sample(c) for own, group in zip(asked, groups) for c in group]


def cross_metrics(samples: Sequence[Sample]) -> Sums:
    """What the cross batches at hand look like."""
    sums: Sums = {}
    for sample in samples:
        edge, length = sample.edge, float(sample.length)
        add_sums(sums, {edge_name(edge.teacher, edge.student, "length"): (length, 1.0),
                        edge_name(edge.teacher, edge.student, "truncated"):
                            (float(sample.completion.finish == "length"), 1.0),
                        edge_name(edge.teacher, edge.student, "tokens"): (length, 0.0)})
    return sums
