"""What the three drawn-up question families share: endless training questions, a finite held-out set, one verifier.

Split invariant: which split a question belongs to is a function of what the model sees (its wording and its pixels)
and of nothing else. Equal prompts are therefore always in the same split, whatever the seed, level or index, so that
no training question of any run can appear among the held-out questions of any run.
"""
from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from copd_megatron.tasks.base import Split
from copd_megatron.types import Media, TaskItem, UserError

HELD_OUT_ONE_IN = 4
"""One question in this many is held out."""

MOST_REPEATS = 500
"""So many repeated questions in a row mean that a family is exhausted."""

LEVELS = (1, 2, 3)
"""Difficulty levels every family knows, easiest first."""

_ANSWER = re.compile(r"answer: ([a-z0-9]+)")
_STREAM = {"train": 0, "held_out": 1}


@dataclass(frozen=True, eq=False)
class Question:
    """A question with its answer. Example: ``Question("last digit of 47 + 35?", "2")``."""

    text: str
    answer: str
    media: tuple[Media, ...] = ()


QuestionKind = Callable[[np.random.Generator, int], Question]
"""Draws one question at a level (1, 2 or 3) from a random generator."""


def content_hash(question: Question) -> bytes:
    """SHA-256 over what the model sees: equal prompts have equal hashes."""
    digest = hashlib.sha256(question.text.encode())
    for media in question.media:
        digest.update(f"{media.kind}{media.pixels.shape}".encode())
        digest.update(np.ascontiguousarray(media.pixels).tobytes())
    return digest.digest()


def split_of(question: Question) -> Split:
    """The split a question belongs to; one in ``HELD_OUT_ONE_IN`` is held out."""
    return "held_out" if int.from_bytes(content_hash(question)[:8]) % HELD_OUT_ONE_IN == 0 else "train"


class ProceduralTask(ABC):
    """A family of questions made by rule; subclasses name their ``kinds``.

    Training questions never end and may repeat; held-out questions are ``held_out_size`` different ones.
    ``seed`` picks which questions are drawn and in which order, never the split of a question.
    """

    domain: str
    kinds: Mapping[str, QuestionKind]

    def __init__(self, *, levels: Sequence[int] = LEVELS, kinds: Sequence[str] | None = None, seed: int = 0,
                 held_out_size: int = 1024, instruction: str = "") -> None:
        """``levels`` and ``kinds`` are drawn with equal shares (None: every kind of the family); ``instruction`` is
        appended to each question, for backbones that have not learnt the answer format."""
        chosen = tuple(self.kinds) if kinds is None else tuple(kinds)
        _check_members("kinds", chosen, tuple(self.kinds))
        _check_members("levels", levels, LEVELS)
        if held_out_size < 1:
            raise UserError(f"task_args.held_out_size: {held_out_size} was given; at least 1 is allowed; raise it")
        self.levels = tuple(levels)
        self.chosen_kinds = chosen
        self.seed = seed
        self.held_out_size = held_out_size
        self.instruction = instruction

    @property
    @abstractmethod
    def answers(self) -> tuple[str, ...]:
        """Every answer that a question of this family can have."""

    def size(self, split: Split) -> int | None:
        """Training questions never end; held-out ones are ``held_out_size``."""
        return None if split == "train" else self.held_out_size

    def item(self, split: Split, index: int) -> TaskItem:
        """The question at ``index``; raises IndexError past the held-out set."""
        if index < 0:
            raise IndexError(f"question {index} of {split}: the first one is 0")
        if split == "held_out":
            kind, level, question = self._held_out[index]
        else:
            kind, level, question = next(self._candidates(split, index))
        return self._to_item(split, index, kind, level, question)

    def verify(self, item: TaskItem, completion: str) -> dict[str, float]:
        """accuracy: the last ``answer: X`` in the completion names the right answer; format: the completion is that
        phrase and nothing else."""
        return {"accuracy": float(self.extract(completion) == item.answer),
                "format": float(_ANSWER.fullmatch(completion.strip()) is not None)}

    def extract(self, completion: str) -> str | None:
        """The X of the last ``answer: X``."""
        found = _ANSWER.findall(completion)
        return found[-1] if found else None

    def _candidates(self, split: Split, index: int) -> Iterator[tuple[str, int, Question]]:
        """Questions of ``split`` from the random stream of ``index``."""
        rng = np.random.default_rng([self.seed, _STREAM[split], index])
        while True:
            kind = self.chosen_kinds[rng.integers(len(self.chosen_kinds))]
            level = int(self.levels[rng.integers(len(self.levels))])
            question = self.kinds[kind](rng, level)
            if split_of(question) == split:
                yield kind, level, question

    @cached_property
    def _held_out(self) -> list[tuple[str, int, Question]]:
        """The first ``held_out_size`` different questions of the held-out stream."""
        seen: dict[bytes, tuple[str, int, Question]] = {}
        repeats = 0
        for candidate in self._candidates("held_out", 0):
            known = len(seen)
            seen.setdefault(content_hash(candidate[2]), candidate)
            if len(seen) == self.held_out_size:
                break
            repeats = repeats + 1 if len(seen) == known else 0
            if repeats == MOST_REPEATS:
                raise UserError(f"task_args.held_out_size: {self.held_out_size} was given; only about {known} "
                                "different questions of these kinds and levels exist; lower it, or add kinds or levels")
        return list(seen.values())

    def _to_item(self, split: Split, index: int, kind: str, level: int, question: Question) -> TaskItem:
        text = f"{question.text} {self.instruction}".strip()
        content = [{"type": media.kind} for media in question.media] + [{"type": "text", "text": text}]
        return TaskItem(
            key=f"{self.domain}/{split}/{self.seed}/{index}",
            messages=[{"role": "user", "content": content if question.media else text}],
            media=question.media,
            answer=question.answer,
            extra={"kind": kind, "level": level, "data_source": self.domain})


def _check_members(name: str, given: Sequence, allowed: Sequence) -> None:
    wrong = [value for value in given if value not in allowed]
    if wrong or not given:
        raise UserError(f"task_args.{name}: {list(given)} was given; allowed are some of {list(allowed)}; "
                        f"{f'remove {wrong}' if wrong else 'name at least one'}")
