"""The native batch: every expert answers prompts of its own domain and learns from verified rewards."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from copd_megatron.config.losses import RlvrConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.schedule import Schedule
from copd_megatron.losses.advantages import group_advantages, overlong_penalty
from copd_megatron.parallel.groups import Groups
from copd_megatron.rollout.collector import Collector
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.trainer.batching import Asked, Sample
from copd_megatron.trainer.prompts import PromptSource
from copd_megatron.trainer.sharing import Shares
from copd_megatron.trainer.step_metrics import Sums, add_sums
from copd_megatron.types import Completion, UserError


class NativeBatch:
    """Asks for, and grades, each hosted expert's share of its native batch."""

    def __init__(self, source: PromptSource, groups: Groups, schedule: Schedule, rollout: RolloutConfig,
                 rlvr: RlvrConfig, params: SamplingParams,
                 advantage_function: Callable[[Tensor], Tensor] | None = None):
        """``advantage_function`` stands in for ``rlvr.advantage``, see ``RlvrConfig.advantage_function``."""
        self.source, self.groups, self.schedule = source, groups, schedule
        self.rollout, self.rlvr, self.params = rollout, rlvr, params
        self.shares = Shares(source, groups, schedule, rollout)
        self.advantages = advantage_function or (lambda rewards_BG: group_advantages(rewards_BG, rlvr.advantage))
        self.rounds = rlvr.dynamic_sampling_max_rounds if rlvr.dynamic_sampling else 1

    def requests(self, step: int, round_: int = 0, slots: Mapping[str, Sequence[int]] | None = None) -> list[Asked]:
        """Requests of the hosted experts that train in this step. All replicas of an expert call it together.

        Args:
            slots: expert -> places of the batch; None: this replica's share of all of them.
        """
        count = self.rollout.prompts_per_step
        training = self.schedule.training(step)
        asked = []
        for expert in (e for e in self.groups.hosted if e in training):
            places = [self.position(expert, step, slot, round_) for slot in range(count)]
            own = self.shares.own(expert, [(expert, place) for place in places]) if slots is None else slots[expert]
            for slot in own:
                prompt = self.source.train(expert, places[slot])
                request = Request(prompt, expert, self.rollout.group_size, self.params, (step,))
                asked.append(Asked(request, slot, count))
        return asked

    def position(self, expert: str, step: int, slot: int, round_: int = 0) -> int:
        """Where in the expert's training stream the prompt of a place in its batch is."""
        turn = self.schedule.turn(expert, step)
        return (turn * self.rounds + round_) * self.rollout.prompts_per_step + slot

    def resample(self, step: int, asked: list[Asked], groups: list[list[Completion]],
                 collector: Collector) -> dict[str, int]:
        """Dynamic sampling (DAPO, arXiv:2503.14476): new prompts in place of groups with equal rewards.

        Changes ``asked`` and ``groups``. After the last round the batch goes on as it is.

        Returns:
            Groups replaced per expert.
        """
        replaced: dict[str, int] = defaultdict(int)
        for round_ in range(1, self.rounds):
            flat = {(a.request.expert, a.slot): i for i, (a, group) in enumerate(zip(asked, groups))
                    if not _has_signal(group)}
            if not flat:
                break
            slots = {e: [slot for expert, slot in flat if expert == e] for e in self.groups.hosted}
            again = self.requests(step, round_, slots)
            for new, group in zip(again, collector.collect([a.request for a in again])):
                place = flat[new.request.expert, new.slot]
                asked[place], groups[place] = new, group
                replaced[new.request.expert] += 1
        return replaced

    def samples(self, asked: Sequence[Asked], groups: Sequence[Sequence[Completion]]) -> list[Sample]:
        """One sample per completion, with the group advantage."""
        samples = []
        for own, group in zip(asked, groups):
            rewards = torch.tensor([[c.reward for c in group]], dtype=torch.float64)
            if self.rlvr.overlong_buffer_tokens:
                lengths = torch.tensor([[len(c.token_ids) for c in group]])
                rewards = rewards + overlong_penalty(lengths, self.rollout.max_completion_tokens,
                                                     self.rlvr.overlong_buffer_tokens, self.rlvr.overlong_penalty)
            try:
                advantages = self.advantages(rewards)
            except Exception as error:
                raise UserError(f"rlvr.advantage_function: {type(error).__name__}: {error}; it must take rewards_BG, "
                                "[prompts, completions]; mend it (copd --traceback shows where)") from error
            if not isinstance(advantages, Tensor) or advantages.shape != rewards.shape:
                raise UserError("rlvr.advantage_function: it returned something else than a tensor of the rewards' "
                                f"shape, {tuple(rewards.shape)}; one advantage per completion is needed; mend it")
            samples += [own.sample(c, a) for c, a in zip(group, advantages[0].tolist())]
        return samples


def _has_signal(group: Sequence[Completion]) -> bool:
    return len({c.reward for c in group}) > 1


def native_metrics(samples: Sequence[Sample], groups: Sequence[Sequence[Completion]]) -> Sums:
    """What the native batch at hand looks like."""
    sums: Sums = {}

    def add(name: str, value: float, weight: float = 1.0) -> None:
        add_sums(sums, {name: (value * weight, weight)})

    for sample in samples:
        completion, expert = sample.completion, sample.expert
        add(f"{expert}/reward", completion.reward)
        for part, value in completion.reward_parts.items():
            add(f"{expert}/reward/{part}", value)
        add(f"{expert}/advantage_abs", abs(sample.advantage), float(sample.loss_mask.sum()))
        add(f"{expert}/length", sample.length)
        add(f"{expert}/truncated", completion.finish == "length")
        add(f"{expert}/parseable", completion.extracted is not None)
    for group in groups:
        add(f"{group[0].expert}/zero_std_groups", not _has_signal(group))
    return sums


def group_tokens(asked: Sequence[Asked], groups: Sequence[Sequence[Completion]]) -> Sums:
    """What the groups cost, by the expert that learns from them: each prompt once, and all completions."""
    sums: Sums = {}
    for own, group in zip(asked, groups):
        tokens = len(own.request.prompt.token_ids) + sum(len(c.token_ids) for c in group)
        add_sums(sums, {f"{own.request.expert}/tokens": (float(tokens), 0.0)})
    return sums
