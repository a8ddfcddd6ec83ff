"""Three text skills for a small language model: adding numbers, reversing words, comparing numbers in words.

A prompt is one worked example and the question, as a conversation, so that even a small model knows what a reply looks
like. The reply may say more than the answer; what counts is the last thing in it that could be one.
"""
from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from copd_megatron.tasks.base import Split
from copd_megatron.tasks.procedural import ProceduralTask, Question
from copd_megatron.types import TaskItem

WORDS = ("apple", "bridge", "candle", "desk", "engine", "flower", "garden", "hammer", "island", "jacket", "kitchen",
         "ladder", "mirror", "needle", "orange", "pencil", "queen", "river", "silver", "table", "uncle", "violin",
         "window", "yellow", "zebra", "basket", "cheese", "doctor", "finger", "guitar", "honey", "insect", "jungle",
         "lemon", "market", "number", "ocean", "paper", "rabbit", "summer", "tiger", "valley", "winter")
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORD = "|".join(sorted([*ONES, *TENS, "hundred"], key=len, reverse=True))
"""An alternative for a pattern; longer words first, or "six" would stop "sixteen"."""


def in_words(number: int) -> str:
    """0 to 999 in English. Example: 342 -> "three hundred forty-two"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" {in_words(rest)}" if rest else "")


def addition(rng: np.random.Generator, level: int) -> Question:
    """Level 1: 1 to 49 and 1 to 9, in either order; 2: both of two digits; 3: three digits and two."""
    first, second = (((1, 50), (1, 10)), ((10, 100), (10, 100)), ((100, 1000), (10, 100)))[level - 1]
    numbers = [int(rng.integers(*first)), int(rng.integers(*second))]
    rng.shuffle(numbers)
    return Question(f"{numbers[0]} + {numbers[1]}", str(sum(numbers)))


def reversing(rng: np.random.Generator, level: int) -> Question:
    """``level`` + 1 different words."""
    words = [WORDS[i] for i in rng.choice(len(WORDS), size=level + 1, replace=False)]
    return Question(", ".join(words), ", ".join(reversed(words)))


def comparing(rng: np.random.Generator, level: int) -> Question:
    """Two different numbers below 20, 100 or 1000, written out."""
    first, second = rng.choice((20, 100, 1000)[level - 1], size=2, replace=False).tolist()
    return Question(f"{in_words(first)} or {in_words(second)}", in_words(max(first, second)))


class SkillTask(ProceduralTask):
    """One skill: what to do, one worked example, a question."""

    order: str
    """The system message."""
    example: tuple[str, str]
    pattern: re.Pattern[str]
    """What could be an answer."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Too many to list."""
        return ()

    def item(self, split: Split, index: int) -> TaskItem:
        """The question at ``index`` after the order and the example."""
        item = super().item(split, index)
        opening = [{"role": "system", "content": self.order}, {"role": "user", "content": self.example[0]},
                   {"role": "assistant", "content": self.example[1]}]
        return replace(item, messages=[*opening, *item.messages])

    def verify(self, item: TaskItem, completion: str) -> dict[str, float]:
        """accuracy: the last possible answer in the reply is the exact one; format: the reply is nothing else."""
        return {"accuracy": float(self.extract(completion) == item.answer),
                "format": float(self.pattern.fullmatch(completion.strip().lower()) is not None)}

    def extract(self, completion: str) -> str | None:
        """The last part of the reply that could be an answer."""
        found = self.pattern.findall(completion.lower())
        return found[-1] if found else None


class Addition(SkillTask):
    """Sums of two whole numbers in digits."""

    domain = "addition"
    kinds = {"addition": addition}
    order, example = "Add the numbers.", ("12 + 5", "17")
    pattern = re.compile(r"\d+")

    def verify(self, item: TaskItem, completion: str) -> dict[str, float]:
        """Also closeness: 1 for the exact answer, 0 from ten off; it tells wrong answers of one group apart."""
        found = self.extract(completion)
        error = abs(int(found) - int(item.answer)) if found and len(found) < 10 else 10
        return super().verify(item, completion) | {"closeness": max(0.0, 1 - error / 10)}


class Reversing(SkillTask):
    """Words from the last to the first."""

    domain = "reversing"
    kinds = {"reversing": reversing}
    order, example = "Write the words in reverse order.", ("hat, car, dog", "dog, car, hat")
    pattern = re.compile(r"[a-z]+(?:, [a-z]+)+")


class Comparing(SkillTask):
    """The larger of two numbers in words."""

    domain = "comparing"
    kinds = {"comparing": comparing}
    order, example = "Name the larger number.", ("three or eight", "eight")
    pattern = re.compile(rf"\b(?:{NUMBER_WORD})(?:[- ](?:{NUMBER_WORD}))*\b")
