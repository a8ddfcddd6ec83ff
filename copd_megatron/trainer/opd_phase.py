"""The cross batches of an OPD step: students answer their teachers' prompts.

Student k, teacher j: prompts are those of j's own native batch of this step, so that their prefixes are
computed once per replica; completions come from k; only the teacher's signal teaches, no reward.
"""
from __future__ import annotations

from collections.abc import Sequence

from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import split_evenly
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.trainer.batching import Sample
from copd_megatron.trainer.prompts import PromptSource
from copd_megatron.trainer.rlvr_phase import NativeBatch
from copd_megatron.types import Completion, Edge


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

    def requests(self, step: int, edges: Sequence[Edge]) -> list[tuple[Request, Sample]]:
        """Requests with a blank sample each; none outside OPD steps."""
        native = self.rollout.prompts_per_step
        asked = []
        for student in self.groups.hosted:
            for edge, count in cross_counts(edges, student, native, self.opd.cross_ratio).items():
                for slot in self.groups.placement.share(student, self.groups.coords.replica, count):
                    prompt = self.prompt(edge.teacher, step, slot)
                    request = Request(prompt, student, self.rollout.group_size, self.params, (step,))
                    asked.append((request, Sample(None, student, edge=edge, slot=slot, slots=count)))
        return asked

    def prompt(self, teacher: str, step: int, slot: int):
        """Prompt ``slot`` of the teacher's native batch; any rank can make it."""
        return self.source.train(teacher, step * self.rounds * self.rollout.prompts_per_step + slot)

    @staticmethod
    def samples(asked: Sequence[tuple[Request, Sample]], groups: Sequence[Sequence[Completion]]) -> list[Sample]:
        """One sample per completion."""
        return [Sample(c, blank.expert, edge=blank.edge, slot=blank.slot, slots=blank.slots)
                for (_, blank), group in zip(asked, groups) for c in group]


def cross_metrics(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """(sum, weight) per metric of the cross batches at hand; weight 0: a plain sum."""
    sums: dict[str, tuple[float, float]] = {}
    for sample in samples:
        name = f"edge/{sample.edge.teacher}->{sample.edge.student}"
        length = len(sample.completion.token_ids)
        for metric, value, weight in (("length", length, 1.0), ("truncated", sample.completion.finish == "length", 1.0),
                                      ("tokens", length, 0.0)):
            old, total = sums.get(f"{name}/{metric}", (0.0, 0.0))
            sums[f"{name}/{metric}"] = (old + value, total + weight)
    return sums
