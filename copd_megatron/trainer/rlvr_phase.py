"""The native batch: every expert answers prompts of its own domain and learns from verified rewards."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from copd_megatron.config.losses import RlvrConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.losses.advantages import group_advantages, overlong_penalty
from copd_megatron.parallel.groups import Groups
from copd_megatron.rollout.collector import Collector
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.trainer.batching import Sample
from copd_megatron.trainer.prompts import PromptSource
from copd_megatron.types import Completion


class NativeBatch:
    """Asks for, and grades, each hosted expert's share of its native batch."""

    def __init__(self, source: PromptSource, groups: Groups, rollout: RolloutConfig, rlvr: RlvrConfig,
                 params: SamplingParams):
        self.source, self.groups, self.rollout, self.rlvr, self.params = source, groups, rollout, rlvr, params
        self.rounds = rlvr.dynamic_sampling_max_rounds if rlvr.dynamic_sampling else 1

    def requests(self, step: int, round_: int = 0, slots: Mapping[str, Sequence[int]] | None = None,
                 ) -> list[tuple[Request, Sample]]:
        """Requests with a blank sample each; ``slots`` limits them to the given places of the batch."""
        count = self.rollout.prompts_per_step
        asked = []
        for expert in self.groups.hosted:
            own = self.groups.placement.share(expert, self.groups.coords.replica, count)
            for slot in own if slots is None else slots[expert]:
                prompt = self.source.train(expert, (step * self.rounds + round_) * count + slot)
                request = Request(prompt, expert, self.rollout.group_size, self.params, (step,))
                asked.append((request, Sample(None, expert, slot=slot, slots=count)))
        return asked

    def resample(self, step: int, asked: list[tuple[Request, Sample]], groups: list[list[Completion]],
                 collector: Collector) -> dict[str, int]:
        """Dynamic sampling (DAPO, arXiv:2503.14476): replace groups of equal rewards by new prompts, in place.

        Returns:
            Groups replaced per expert.
        """
        replaced: dict[str, int] = defaultdict(int)
        for round_ in range(1, self.rounds):
            flat = [i for i, group in enumerate(groups) if len({c.reward for c in group}) == 1]
            if not flat:
                break
            slots = {e: [asked[i][1].slot for i in flat if asked[i][1].expert == e] for e in self.groups.hosted}
            again = self.requests(step, round_, slots)
            new = dict(zip([(s.expert, s.slot) for _, s in again],
                           zip(again, collector.collect([r for r, _ in again]))))
            for i in flat:
                asked[i], groups[i] = new[asked[i][1].expert, asked[i][1].slot]
                replaced[asked[i][1].expert] += 1
        return replaced

    def samples(self, asked: Sequence[tuple[Request, Sample]], groups: Sequence[Sequence[Completion]]) -> list[Sample]:
        """One sample per completion, with the group advantage."""
        samples = []
        for (_, blank), group in zip(asked, groups):
            rewards = torch.tensor([[c.reward for c in group]], dtype=torch.float64)
            if self.rlvr.overlong_buffer_tokens:
                lengths = torch.tensor([[len(c.token_ids) for c in group]])
                rewards = rewards + overlong_penalty(lengths, self.rollout.max_completion_tokens,
                                                     self.rlvr.overlong_buffer_tokens, self.rlvr.overlong_penalty)
            advantages = group_advantages(rewards, self.rlvr.advantage)[0].tolist()
            samples += [Sample(c, blank.expert, advantage=a, slot=blank.slot, slots=blank.slots)
                        for c, a in zip(group, advantages)]
        return samples


def native_metrics(samples: Sequence[Sample], groups: Sequence[Sequence[Completion]]) -> dict[str, tuple[float, float]]:
    """(sum, weight) per metric of the native batch at hand."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, value: float, weight: float = 1.0) -> None:
        sums[name][0] += value * weight
        sums[name][1] += weight

    for sample in samples:
        completion, expert = sample.completion, sample.expert
        add(f"{expert}/reward", completion.reward)
        for part, value in completion.reward_parts.items():
            add(f"{expert}/reward/{part}", value)
        add(f"{expert}/advantage_abs", abs(sample.advantage), sum(completion.loss_mask))
        add(f"{expert}/length", len(completion.token_ids))
        add(f"{expert}/truncated", completion.finish == "length")
        add(f"{expert}/parseable", completion.extracted is not None)
    for group in groups:
        add(f"{group[0].expert}/zero_std_groups", len({c.reward for c in group}) == 1)
    return {name: (value, weight) for name, (value, weight) in sums.items()}
