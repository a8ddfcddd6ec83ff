"""From prompts to graded completions: the engine samples, environments answer, verifiers grade.

Environments and graders run on one rank of a replica, and what they say is broadcast: they may be slow, random or
remote.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.metrics.timers import Timers
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.parallel.collectives import broadcast_object
from copd_megatron.parallel.groups import Groups
from copd_megatron.rollout.engine import Request, RolloutEngine, SamplingParams, VisualSource
from copd_megatron.tasks.base import Task, environment_of
from copd_megatron.tasks.rewards import Scorer
from copd_megatron.types import Completion, Segment

MAX_TURNS = 16
"""Turns of the policy in one episode."""


class Collector:
    """Samples and grades completions; the same result on every rank of a replica."""

    def __init__(self, engine: RolloutEngine, encoder: PromptEncoder, tasks: Mapping[str, Task],
                 scorers: Mapping[str, Scorer], visual: VisualSource, groups: Groups,
                 timers: Timers | None = None):
        """``timers``: a run's, for phase "verify"."""
        self.engine, self.encoder, self.tasks, self.scorers = engine, encoder, tasks, scorers
        self.visual, self.groups, self.timers = visual, groups, timers or Timers()

    def collect(self, requests: Sequence[Request], graded: int | None = None) -> list[list[Completion]]:
        """One group of completions per request, in order, with text; the first ``graded`` groups (None: all)
        with reward."""
        groups = self.engine.generate(requests, self.visual)
        self._continue_episodes(requests, groups)
        for group in groups:
            for completion in group:
                completion.text = self.encoder.decode(completion.token_ids)
        with self.timers("verify"):
            self._grade([completion for group in groups[:graded] for completion in group])
        return groups

    def _continue_episodes(self, requests: Sequence[Request], groups: list[list[Completion]]) -> None:
        """Let environments answer and the policy go on, until every episode is over or out of tokens."""
        running = [(request, group, place) for request, group in zip(requests, groups)
                   if environment_of(self.tasks[request.prompt.domain]) is not None for place in range(len(group))]
        for _ in range(MAX_TURNS - 1 if running else 0):
            replies = self._replies([group[place] for _, group, place in running])
            turns = [self._next_turn(request, group[place], reply)
                     for (request, group, place), reply in zip(running, replies)]
            running = [own for own, turn in zip(running, turns) if turn is not None]
            if not running:
                return
            answers = self.engine.generate([turn for turn in turns if turn is not None], self.visual)
            for (_, group, place), (longer,) in zip(running, answers):
                group[place] = longer

    def _replies(self, completions: Sequence[Completion]) -> list[str | None]:
        """What the environments say; asked on one rank, as graders are. None: the episode is over."""
        replies = None
        if self.groups.is_replica_main:
            replies = []
            for completion in completions:
                environment = environment_of(self.tasks[completion.prompt.domain])
                turns = [self.encoder.decode(s.token_ids) for s in completion.segments]
                cut = completion.finish != "stop"
                replies.append(None if cut else environment.respond(completion.prompt.item, turns))
        return broadcast_object(replies, self.groups.first_rank, self.groups.replica)

    def _next_turn(self, request: Request, completion: Completion, reply: str | None) -> Request | None:
        """The request that continues an episode, or None when it is over or no token is left for an answer."""
        if reply is None:
            return None
        prior = (*completion.segments, Segment(self.encoder.tokenize(reply), "environment"))
        left = request.params.max_tokens - sum(len(s.token_ids) for s in prior)
        if left < 1:
            return None
        return dataclasses.replace(request, samples=1, sample_offset=completion.sample, prior=prior,
                                   params=dataclasses.replace(request.params, max_tokens=left))

    def _grade(self, completions: Sequence[Completion]) -> None:
        grades = None
        if self.groups.is_replica_main:
            grades = [None] * len(completions)
            domains: dict[str, list[int]] = {}
            for place, completion in enumerate(completions):
                domains.setdefault(completion.prompt.domain, []).append(place)
            for domain, places in domains.items():
                results = self.scorers[domain].score([completions[i].prompt.item for i in places],
                                                     [completions[i].text for i in places])
                for place, result in zip(places, results):
                    grades[place] = result
        grades = broadcast_object(grades, self.groups.first_rank, self.groups.replica)
        for completion, (reward, parts, extracted) in zip(completions, grades):
            completion.reward, completion.reward_parts, completion.extracted = reward, dict(parts), extracted


def sampling_params(config: RolloutConfig, encoder: PromptEncoder) -> SamplingParams:
    """Training's sampling settings."""
    return SamplingParams(temperature=config.temperature, top_p=config.top_p, greedy=False,
                          max_tokens=config.max_completion_tokens, stop_token_ids=encoder.stop_token_ids)
