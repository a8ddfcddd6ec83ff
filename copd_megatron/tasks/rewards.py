"""The reward of a completion: the weighted sum of named parts, from the task's verifier or from functions.

    reward = sum over parts p of weight_p * value_p          default: 0.9 accuracy + 0.1 format
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from copd_megatron.config.tasks import RewardConfig
from copd_megatron.tasks.base import Task
from copd_megatron.tasks.reward_function import RewardCall, failure, finite_number
from copd_megatron.types import TaskItem, UserError


class Scored(NamedTuple):
    """Example: ``Scored(0.9, {"accuracy": 1.0, "format": 0.0}, "42")``."""

    reward: float
    """The weighted sum."""
    parts: dict[str, float]
    """Unweighted, by name; other numbers in a dict that the function of part ``p`` returned are "p/key"."""
    extracted: str | None
    """The answer as the task reads it."""


class Scorer:
    """Scores completions of one task."""

    def __init__(self, task: Task, rewards: Mapping[str, RewardConfig], where: str = "rewards") -> None:
        """``where`` begins every error, e.g. "experts.text.rewards".

        Raises:
            UserError: no part, a weight that is not finite, a function that is not found or whose parameters
                are of no known form, or a part that the task's verifier does not have.
        """
        if not rewards:
            raise UserError(f"{where}: no part was given; at least one is needed; leave the field out for "
                            "the default")
        for name, part in rewards.items():
            if not math.isfinite(part.weight):
                raise UserError(f"{where}.{name}.weight: {part.weight} was given; allowed is a finite "
                                "number; correct it")
        self._task = task
        self._where = where
        self._weights = {name: part.weight for name, part in rewards.items()}
        self._functions = {name: RewardCall.build(part.function, f"{where}.{name}.function")
                           for name, part in rewards.items() if part.function is not None}
        self._verified = [name for name in rewards if name not in self._functions]
        if self._verified:
            self._verify(task.item("train", 0), "")

    def score(self, items: Sequence[TaskItem], completions: Sequence[str]) -> list[Scored]:
        """Reward, parts and extracted answer of each completion; ``items[i]`` asked for ``completions[i]``.

        Raises:
            UserError: a function raised, or a value is no finite number; function and item are named.
        """
        if len(items) != len(completions):
            raise ValueError(f"{len(items)} items for {len(completions)} completions")
        parts = [dict.fromkeys(self._weights, 0.0) for _ in items]
        if self._verified:
            for values, item, completion in zip(parts, items, completions):
                values.update(self._verify(item, completion))
        for name, function in self._functions.items():
            for values, (value, others) in zip(parts, function(items, completions)):
                values[name] = value
                values.update({f"{name}/{key}": other for key, other in others.items()})
        return [Scored(sum(weight * values[name] for name, weight in self._weights.items()), values,
                       self._task.extract(completion))
                for values, completion in zip(parts, completions)]

    def _verify(self, item: TaskItem, completion: str) -> dict[str, float]:
        """The parts that come from the task's verifier."""
        name = f"{self._where} ({type(self._task).__name__}.verify)"
        try:
            offered = self._task.verify(item, completion)
        except Exception as error:
            raise failure(name, item.key, error) from error
        unknown = [part for part in self._verified if part not in offered]
        if unknown:
            raise UserError(f"{self._where}: {unknown} was given without a function; the task's verifier has "
                            f"{sorted(offered)}; rename it, or set {self._where}.{unknown[0]}.function")
        return {part: finite_number(offered[part], name, item.key) for part in self._verified}
