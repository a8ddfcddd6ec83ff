"""Which prompts of an expert's batch each of its replicas takes: about equal numbers of tokens, not of prompts.

Expected cost of a prompt: its own tokens once, and G completions of the expert's mean length when it last
trained. A pure function of prompts and that mean, so that every rank comes to the same shares. What is sampled
does not depend on them: noise is keyed by prompt and sample, never by rank.
"""
from __future__ import annotations

from collections.abc import Sequence

from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.schedule import Schedule
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import split_evenly
from copd_megatron.trainer.prompts import PromptSource


class Shares:
    """Shares out the prompts of a batch among the replicas of an expert."""

    def __init__(self, source: PromptSource, groups: Groups, schedule: Schedule, rollout: RolloutConfig):
        self.source, self.groups, self.schedule, self.rollout = source, groups, schedule, rollout

    def own(self, expert: str, prompts: Sequence[tuple[str, int]]) -> list[int]:
        """Places in ``prompts`` that this replica takes, ascending.

        Every replica of the expert calls it together. Each encodes an even part of the prompts to learn their
        lengths, so that a large batch of videos is not decoded everywhere.

        Args:
            prompts: (domain, position in its training stream), the same on all replicas of the expert.
        """
        hosts = self.groups.placement.replicas_of(expert)
        if len(hosts) == 1 or not prompts:
            return list(range(len(prompts)))
        part = split_evenly(len(prompts), len(hosts))[hosts.index(self.groups.coords.replica)]
        mine = [len(self.source.train(*prompts[i]).token_ids) for i in part]
        lengths = [n for theirs in all_gather_objects(mine, self.groups.adapter[expert]) for n in theirs]
        answer = self.schedule.length_of(expert, self.rollout.max_completion_tokens)
        costs = [length + self.rollout.group_size * answer for length in lengths]
        return self.groups.placement.balanced_share(expert, self.groups.coords.replica, costs)
