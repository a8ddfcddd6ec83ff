"""The cross batches of an OPD step: students answer their teachers' prompts.

Student k, teacher j: prompts are those of j's own native batch of this step, so that their prefixes are
computed once per replica; completions come from k; only the teacher's signal teaches, no reward.
"""
from __future__ import annotations

from collections.abc import Sequence

from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.rollout import RolloutConfig
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


class CrossBatch:
    """Asks for each hosted student's share of its cross batches."""

    def __init__(self, source: PromptSource, groups: Groups, rollout: RolloutConfig, opd: OpdConfig,
                 native: NativeBatch, params: SamplingParams):
        self.source, self.groups, self.rollout, self.opd, self.params = source, groups, rollout, opd, params
        self.rounds = native.rounds

    def requests(self, step: int, edges: Sequence[Edge]) -> list[Asked]:
        """The hosted students' requests; none outside OPD steps."""
        native = self.rollout.prompts_per_step
        asked = []
        for student in self.groups.hosted:
            for edge, count in cross_counts(edges, student, native, self.opd.cross_ratio).items():
                for slot in self.groups.placement.share(student, self.groups.coords.replica, count):
                    prompt = self.prompt(edge.teacher, step, slot)
                    request = Request(prompt, student, self.rollout.group_size, self.params, (step,))
                    asked.append(Asked(request, slot, count, edge))
        return asked

    def prompt(self, teacher: str, step: int, slot: int) -> Prompt:
        """Prompt ``slot`` of the teacher's native batch; any rank can make it."""
        return self.source.train(teacher, step * self.rounds * self.rollout.prompts_per_step + slot)

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
