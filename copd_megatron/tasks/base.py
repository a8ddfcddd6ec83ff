"""What a task is: prompts by index, a verifier, and optionally an environment.

Anything with these members is a task; nothing needs to inherit. Recipes pass tasks as objects,
callables or "pkg.module:Name".
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from copd_megatron.types import Completion, TaskItem

Split = Literal["train", "held_out"]


@runtime_checkable
class Task(Protocol):
    """A source of questions with a verifier."""

    def size(self, split: Split) -> int | None:
        """Number of questions of a split; None when they never end (procedural tasks)."""

    def item(self, split: Split, index: int) -> TaskItem:
        """The question at ``index`` (0-based, wraps never: the caller keeps it below ``size``).

        Pure: the same (split, index) gives the same item on every rank and in every run.
        """

    def verify(self, item: TaskItem, completion: str) -> dict[str, float]:
        """Named reward parts in [0, 1], e.g. {"accuracy": 1.0, "format": 0.0}.

        Never raises on a malformed answer: it scores 0.
        """

    def extract(self, completion: str) -> str | None:
        """The answer as the verifier reads it, for people; None if there is none."""


@runtime_checkable
class Environment(Protocol):
    """A task whose completions have several turns (calculator, search, ...)."""

    def respond(self, item: TaskItem, turns: Sequence[str]) -> str | None:
        """The environment's text after the policy's last turn, or None when the episode is over.

        ``turns`` alternates policy, environment, policy, ...; the last one is the policy's.
        The returned text is tokenised as it is and carries no loss.
        """


class RewardFunction(Protocol):
    """A reward part given in a recipe; see ``config.tasks.RewardConfig``."""

    def __call__(self, item: TaskItem, completion: str) -> float: ...


def environment_of(task: Any) -> Environment | None:
    """The task itself if it answers turns, else None."""
    return task if isinstance(task, Environment) else None


__all__ = ["Completion", "Environment", "RewardFunction", "Split", "Task", "environment_of"]
