"""Rollouts sampled once and replayed under every layout, so that layouts are compared on the very same tokens."""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from copd_megatron.checkpoint.peft import full_factors
from copd_megatron.config.run import RunConfig
from copd_megatron.exchange.schedule import Measured
from copd_megatron.rollout.engine import EngineCounters, Request, RolloutEngine
from copd_megatron.trainer.trainer import Trainer
from copd_megatron.types import Completion
from support.toy_run import randomise, toy_trainer

Recording = dict[tuple, Completion]
"""(policy, prompt key, noise key, sample, earlier tokens) -> completion, before it is graded."""


def _key(request: Request, sample: int) -> tuple:
    return request.expert, request.prompt.key, request.noise_key, sample, request.prior_tokens


class RecordingEngine:
    """An engine that remembers what it was asked and answered."""

    def __init__(self, engine: RolloutEngine):
        self.engine, self.recording = engine, {}

    @property
    def counters(self) -> EngineCounters:
        """Of the engine that does the work."""
        return self.engine.counters

    def generate(self, requests: Sequence[Request], visual=None) -> list[list[Completion]]:
        """See ``RolloutEngine.generate``."""
        groups = self.engine.generate(requests, visual)
        self.recording |= {_key(r, c.sample): copy.copy(c) for r, group in zip(requests, groups) for c in group}
        return groups


class ReplayEngine:
    """An engine that answers from a recording; asked for anything else it raises KeyError."""

    def __init__(self, recording: Mapping[tuple, Completion]):
        self.recording, self.counters = recording, EngineCounters()

    def generate(self, requests: Sequence[Request], visual=None) -> list[list[Completion]]:
        """See ``RolloutEngine.generate``."""
        return [[copy.copy(self.recording[_key(r, s)])
                 for s in range(r.sample_offset, r.sample_offset + r.samples)] for r in requests]


def gradients_of(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Expert -> full gradients of its last update, of the experts and stages that this rank speaks for."""
    bank, found = trainer.runner.backbone.bank, {}
    for expert in trainer.groups.hosted:
        bank.put("gradients", {name: p.grad for name, p in bank.parameters_of(expert).items()}, 1.0)
        found[expert] = full_factors(bank, "gradients")
        bank.remove("gradients")
    return found


def one_step(config: RunConfig, run_dir: Path, step: int, recording: Recording | None = None,
             overlaps: Mapping[tuple[str, str], float] | None = None) -> dict:
    """One training step from random adapters, on replayed rollouts if there are any.

    Args:
        overlaps: what the step before measured, by pair of experts; topology ``adaptive`` reads it.

    Returns:
        What this rank knows: "gradients" and "adapters" (full, by expert), "metrics" and the "recording".
    """
    with toy_trainer(config, run_dir) as trainer:
        randomise(trainer)
        if overlaps:
            trainer.schedule.observe(step - 1, Measured(overlaps))
        collector = trainer.collector
        collector.engine = RecordingEngine(collector.engine) if recording is None else ReplayEngine(recording)
        metrics = trainer.train_step(step, trainer.schedule.phase(step))
        bank = trainer.runner.backbone.bank
        return {"gradients": gradients_of(trainer), "metrics": metrics, "recording": collector.engine.recording,
                "adapters": {e: full_factors(bank, e) for e in trainer.groups.hosted}}


def assert_same_step(ranks: Sequence[dict], want: dict) -> None:
    """What ``one_step`` returned on each rank is what it returned on one: gradients within 1e-9, adapters within 1e-8,
    and the metrics, on every rank."""
    for what, tolerance in (("gradients", 1e-9), ("adapters", 1e-8)):
        got = _whole(ranks, what)
        assert got.keys() == want[what].keys()
        for expert, factors in want[what].items():
            assert got[expert].keys() == factors.keys()
            for name, factor in factors.items():
                torch.testing.assert_close(got[expert][name], factor, rtol=0, atol=tolerance,
                                           msg=f"{what} {expert} {name}")
    for rank in ranks:
        assert rank["metrics"].keys() == ranks[0]["metrics"].keys()
        for name, value in want["metrics"].items():
            if not name.startswith(("time/", "tokens/", "memory/", "prefix/")) and "/idle/" not in name:
                assert rank["metrics"][name] == pytest.approx(value, rel=1e-7, abs=1e-9), name


def _whole(ranks: Sequence[dict], what: str) -> dict[str, dict[str, torch.Tensor]]:
    """Expert -> factors, from the ranks that speak for it; several must agree to the bit."""
    whole: dict[str, dict[str, torch.Tensor]] = {}
    for rank in ranks:
        for expert, factors in rank[what].items():
            if factors:
                assert expert not in whole or all(torch.equal(whole[expert][n], factors[n]) for n in factors)
                whole[expert] = factors
    return whole
