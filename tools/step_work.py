"""What one step of a trainer computes, counted as it happens: operations by phase.

Rollout engine and runner say what they are given; `copd_megatron.simulate.flops` says what that takes, with the true
length of every completion. Counted is what the model needs, as is usual for MFU (Chowdhery et al. 2022,
arXiv:2204.02311): neither layers that are recomputed in the backward, nor prompts that are found in the prefix store
(what it has evicted is evaluated, and counts, again), nor layers below states that the rollout kept; embedding, norms
and the vision tower are left out as well.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from copd_megatron.model.shared_prefix import Leaf, LeafGroup, StateKey
from copd_megatron.rollout.engine import Request, RolloutEngine, VisualSource
from copd_megatron.simulate.flops import Flops, group_streams, pass_flops
from copd_megatron.trainer.batching import Microbatch
from copd_megatron.trainer.trainer import Trainer
from copd_megatron.types import Completion


class _Prompts(NamedTuple):
    """Prompts of the present work, which a store may have."""

    phase: str
    flops: Flops
    """Of all of them."""
    tokens: int
    before: float
    """Prompt tokens that had been evaluated when the work began."""


class StepWork:
    """Counts a trainer's operations from now on."""

    def __init__(self, trainer: Trainer):
        self.backbone, self.timers, self.prefill = trainer.runner.backbone, trainer.timers, trainer.runner.prefill
        self._flops: defaultdict[str, Flops] = defaultdict(Flops)
        self._prompts: _Prompts | None = None
        trainer.collector.engine = _WatchedEngine(trainer.collector.engine, self)
        trainer.runner.on_run = self.runs

    def collect(self) -> dict[str, Flops]:
        """Phase -> operations of this replica since the last call."""
        self._settle()
        counted, self._flops = dict(self._flops), defaultdict(Flops)
        return counted

    def runs(self, microbatches: Sequence[Microbatch], differentiated: bool) -> None:
        """The runner begins; what it takes from the store is known when the next work begins."""
        self._settle()
        groups = [group for batch in microbatches for group in batch.groups]
        self._add(self.timers.phase, groups, differentiated, False, self.prefill.serves_training,
                  self.prefill.computed_tokens, self.prefill.lower_states.owners)

    def answered(self, requests: Sequence[Request], answers: Sequence[Sequence[Completion]], before: float) -> None:
        """The engine has sampled; ``before``: prompt tokens that had been evaluated when it began."""
        self._settle()
        by_prompt: dict[str, LeafGroup] = {}
        for request, group in zip(requests, answers):
            own = by_prompt.setdefault(request.prompt.content_hash, LeafGroup(request.prompt, []))
            own.leaves.extend(Leaf(request.expert, completion.token_ids) for completion in group)
        self._add("rollout", by_prompt.values(), False, True, self.prefill.store is not None, before)
        self._settle()

    def _add(self, phase: str, groups: Iterable[LeafGroup], backward: bool, decoded: bool, stored: bool,
             before: float, kept: Container[StateKey] = ()) -> None:
        groups = list(groups)
        self._flops[phase] += self._cost(groups, backward, decoded, stored, kept)
        if not stored:
            return
        rules, distinct = self.backbone.rules, list({g.prompt.content_hash: g for g in groups}.values())
        flops = self._cost(distinct, False, decoded, False) + self._cost(distinct, False, decoded, True) * -1
        owners = [len({leaf.lane for leaf in g.leaves}) if rules.scope == "sequence" else 1 for g in distinct]
        tokens = sum(n * (len(g.prompt.token_ids) - rules.forced(g.prompt)) for g, n in zip(distinct, owners))
        self._prompts = _Prompts(phase, flops, tokens, before)

    def _settle(self) -> None:
        """Add the prompts of the last work, as often as the store had to evaluate them."""
        if self._prompts is not None and self._prompts.tokens:
            phase, flops, tokens, before = self._prompts
            self._flops[phase] += flops * ((self.prefill.computed_tokens - before) / tokens)
        self._prompts = None

    def _cost(self, groups: Iterable[LeafGroup], backward: bool, decoded: bool, outside: bool,
              kept: Container[StateKey] = ()) -> Flops:
        spec, adapter, rules = self.backbone.spec, self.backbone.bank.config, self.backbone.rules
        return sum((pass_flops(spec, adapter, group_streams(group, rules, decoded, outside, kept), backward)
                    for group in groups), Flops())


class _WatchedEngine:
    """A rollout engine that reports what it was asked and what it answered."""

    def __init__(self, engine: RolloutEngine, work: StepWork):
        self.engine, self.work = engine, work

    @property
    def counters(self):
        """The engine's own."""
        return self.engine.counters

    def generate(self, requests: Sequence[Request], visual: VisualSource | None = None) -> list[list[Completion]]:
        """See ``RolloutEngine.generate``."""
        before = self.work.prefill.computed_tokens
        answers = self.engine.generate(requests, visual)
        self.work.answered(requests, answers, before)
        return answers
