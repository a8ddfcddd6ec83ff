"""``copd filter``: how often the backbone, or a policy on it, solves each training question of an expert.

A question that is always or never solved gives every completion of its group the same reward, and so no gradient
(dynamic sampling, Yu et al. 2025, arXiv:2503.14476, finds that out in every step anew).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from copd_megatron.checkpoint.peft import load_peft_adapter
from copd_megatron.config.run import RunConfig
from copd_megatron.parallel.collectives import all_gather_objects, broadcast_object
from copd_megatron.parallel.placement import split_evenly
from copd_megatron.parallel.seeding import stable_hash
from copd_megatron.rollout.collector import sampling_params
from copd_megatron.rollout.engine import Request
from copd_megatron.tasks.dataset import DatasetTask
from copd_megatron.trainer.build import Policies, build_policies
from copd_megatron.trainer.evaluator import ACCURACY
from copd_megatron.trainer.stop import StopRequest
from copd_megatron.types import UserError

ANSWERING = "filter"
"""The adapter's name in the bank."""


class Rates(Protocol):
    """Where rank 0 keeps what is known."""

    def known(self) -> Mapping[int, float]:
        """Row number -> pass rate, of this start and earlier ones."""

    def add(self, rates: Mapping[int, float], total: int) -> None:
        """More of them, of ``total`` in all; safe when the call returns."""


@dataclass(frozen=True)
class Measured:
    """What ``measure`` found."""

    done: bool
    """False where a signal asked to stop."""
    rows: tuple[int, ...]
    """Row numbers of all training questions that are short enough."""
    long: int
    """How many were too long."""
    kept_out: tuple[int, ...]
    """Row numbers of held-out questions in the same file: they are not filtered."""


def measure(config: RunConfig, expert: str, samples: int, adapter: Path | None, rates: Rates | None) -> Measured:
    """Sample and grade every training question that is not known. Every rank calls it.

    Args:
        samples: completions of a question; 0 measures lengths alone.
        adapter: of the policy that answers, a PEFT folder; None is the backbone.
        rates: on rank 0.
    """
    policies = build_policies(_alone(config, expert))
    groups, source, task = policies.groups, policies.source, policies.tasks[expert]
    if not isinstance(task, DatasetTask):
        raise UserError(f"experts.{expert}.task: a {type(task).__name__} was given; only rows of a data file can be "
                        "filtered; take copd_megatron.tasks.dataset:DatasetTask")
    if adapter:
        load_peft_adapter(policies.backbone.bank, ANSWERING, adapter)
    count = source.size(expert, "train")
    row_of = [task.source_row("train", source.index(expert, "train", i))[1] for i in range(count)]
    file = task.source_row("train", 0)[0]
    held_out = [task.source_row("held_out", i) for i in range(task.size("held_out"))]
    kept_out = tuple(row for path, row in held_out if path == file)
    known = broadcast_object(dict(rates.known()) if groups.is_main else None, 0, groups.world)
    todo = [i for i, row in enumerate(row_of) if row not in known] if samples else []
    window = max(1, config.rollout.decode_lanes // max(1, samples)) * groups.layout.replicas
    with StopRequest(groups, "batch") as stop:
        for start in range(0, len(todo), window):
            found = _pass_rates(policies, expert, todo[start:start + window], samples, ANSWERING if adapter else None)
            if groups.is_main:
                rates.add({row_of[i]: rate for i, rate in found.items()}, count)
            if stop.requested() and start + window < len(todo):
                return Measured(False, (), 0, ())
    long = task.size("train") - count
    groups.destroy()
    return Measured(True, tuple(row_of), long, kept_out)


def _alone(config: RunConfig, expert: str) -> RunConfig:
    """The run with this expert only, and without what training needs besides."""
    return config.model_copy(update={
        "experts": {expert: config.experts[expert]},
        "exchange": config.exchange.model_copy(update={"frozen_teachers": {}}),
        "rlvr": config.rlvr.model_copy(update={"kl_coef": 0.0}),
        "rollout": config.rollout.model_copy(update={"long_prompts": "drop"})})


def _pass_rates(policies: Policies, expert: str, questions: Sequence[int], samples: int,
                policy: str | None) -> dict[int, float]:
    """Question -> share of its completions that are right; the same on every rank."""
    groups, config = policies.groups, policies.collector.engine.config
    mine = [questions[i] for i in split_evenly(len(questions), groups.layout.replicas)[groups.coords.replica]]
    params = sampling_params(config, policies.encoder)
    requests = [Request(policies.source.question(expert, i), policy, samples, params, (stable_hash("filter"),))
                for i in mine]
    answers = policies.collector.collect(requests) if requests else []
    right = [[c.reward_parts.get(ACCURACY, c.reward) >= 1 for c in group] for group in answers]
    own = {i: sum(group) / len(group) for i, group in zip(mine, right)}
    return {i: rate for part in all_gather_objects(own, groups.exchange) for i, rate in part.items()}
