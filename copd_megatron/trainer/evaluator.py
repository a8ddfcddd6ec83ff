"""Held-out accuracy of the backbone, every expert and the merged policy on every domain.

All replicas hold all policies for the time of an evaluation and share out the prompts, so that a prompt's
prefix serves every policy where the scope allows it. Noise is keyed, so results do not depend on the layout.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from copd_megatron.config.trainer import EvaluationConfig
from copd_megatron.metrics.accuracy import wilson
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import split_evenly
from copd_megatron.parallel.seeding import stable_hash
from copd_megatron.rollout.collector import Collector
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.trainer.prompts import PromptSource

BASE = "base"
"""Name of the backbone among policies."""
ACCURACY = "accuracy"


@dataclass
class Answers:
    """How one policy did on one domain."""

    correct: list[list[float]] = field(default_factory=list)
    """[prompts][samples] accuracy part of the reward."""
    parseable: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """avg@k, pass@k, 95 % interval of avg@k, share of parseable answers, mean length, number of prompts."""
        scores = np.asarray(self.correct, np.float64)
        average = float(scores.mean())
        low, high = wilson(average, effective_count(scores))
        return {"avg": average, "pass": float((scores >= 1).any(1).mean()), "n": len(scores), "low": low,
                "high": high, "parseable": float(np.mean(self.parseable)), "length": float(np.mean(self.lengths))}

    def per_prompt(self) -> list[float]:
        """[prompts] accuracy of each, mean over its samples."""
        return [sum(scores) / len(scores) for scores in self.correct]

    def gain(self, base: Answers) -> dict[str, float]:
        """Mean gain over ``base`` on the same prompts, and its paired bootstrap 95 % interval."""
        return dict(zip(("gain", "gain_low", "gain_high"), paired_bootstrap(self.per_prompt(), base.per_prompt())))


def effective_count(scores_PK: np.ndarray) -> float:
    """Independent answers that P prompts with K samples each are worth: between P and P K (Kish 1965).

    Samples of one prompt resemble each other, so that the variance of the mean is that of the prompts' means.
    """
    prompts, samples = scores_PK.shape
    average = scores_PK.mean()
    spread = scores_PK.mean(1).var(ddof=1) if prompts > 1 else 0.0
    worth = average * (1 - average) / spread if spread > 0 else 1.0
    return prompts * float(np.clip(worth, 1.0, samples))


def paired_bootstrap(after: Sequence[float], before: Sequence[float], seed: int = 0,
                     rounds: int = 2000) -> tuple[float, float, float]:
    """Mean gain of ``after`` over ``before``, accuracies of the same prompts, with the 95 % interval from
    resampling prompts (Efron 1979)."""
    gains = np.subtract(after, before)
    rng = np.random.default_rng(seed)
    # By rounds, not as one [rounds, prompts] array: an evaluation may have 100,000 prompts.
    means = [gains[rng.integers(0, len(gains), len(gains))].mean() for _ in range(rounds)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)


class Evaluator:
    """Evaluates policies that the bank holds on every replica (see ``merge.all_policies``)."""

    def __init__(self, collector: Collector, source: PromptSource, groups: Groups, config: EvaluationConfig,
                 max_tokens: int, stop_token_ids: Sequence[int]):
        self.collector, self.source, self.groups, self.config = collector, source, groups, config
        self.params = SamplingParams(temperature=config.temperature, top_p=config.top_p, greedy=config.greedy,
                                     max_tokens=max_tokens, stop_token_ids=tuple(stop_token_ids))

    def evaluate(self, policies: Sequence[str | None], domains: Sequence[str],
                 prompts: int) -> dict[str, dict[str, Answers]]:
        """policy -> domain -> answers on the first ``prompts`` held-out prompts; equal on every rank.

        None among ``policies`` is the backbone, reported as "base".
        """
        replica, replicas = self.groups.coords.replica, self.groups.layout.replicas
        requests = []
        for domain in domains:
            held_out = self.source.held_out(domain, prompts)
            for i in split_evenly(len(held_out), replicas)[replica]:
                # All policies on one prompt side by side: they share what the adapter scope lets them share.
                requests += [Request(held_out[i], policy, self.config.samples, self.params,
                                     (stable_hash("held_out"),)) for policy in policies]
        groups = self.collector.collect(requests)
        mine = [(r.expert, r.prompt.domain, [c.reward_parts.get(ACCURACY, c.reward) for c in group],
                 [float(c.extracted is not None) for c in group], [len(c.token_ids) for c in group])
                for r, group in zip(requests, groups)]
        table = {policy or BASE: {domain: Answers() for domain in domains} for policy in policies}
        for part in all_gather_objects(mine, self.groups.exchange) if replicas > 1 else [mine]:
            for policy, domain, correct, parseable, lengths in part:
                answers = table[policy or BASE][domain]
                answers.correct.append(correct)
                answers.parseable += parseable
                answers.lengths += lengths
        return table


def evaluation_rows(results: Mapping[str, Mapping[str, Answers]]) -> dict[str, dict[str, dict[str, float]]]:
    """policy -> domain -> row, with its gain unless it is the base, as evaluations.jsonl and the tables hold it."""
    return {policy: {domain: own.row() | ({} if policy == BASE else own.gain(results[BASE][domain]))
                     for domain, own in by_domain.items()}
            for policy, by_domain in results.items()}


def mode_of(config: EvaluationConfig) -> str:
    """``greedy`` or ``sampled``, as evaluations.jsonl says."""
    return "greedy" if config.greedy else "sampled"
