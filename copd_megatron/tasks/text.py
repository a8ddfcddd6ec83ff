"""Text questions: small sums and differences told as stories, letters counted in a string."""
from __future__ import annotations

import numpy as np

from copd_megatron.tasks.procedural import ProceduralTask, Question

NAMES = ("ann", "bob", "eva", "max", "tim", "zoe")
THINGS = ("cups", "hats", "keys", "pens", "nuts", "figs", "eggs", "toys")
LETTERS = "abcde"


def story_of_sum(rng: np.random.Generator, level: int) -> Question:
    """Two people's things together, at most 9; level - 1 other things are told, too."""
    total = int(rng.integers(0, 10))
    first = int(rng.integers(0, total + 1))
    return _story(rng, level, (first, total - first), "in all", total)


def story_of_difference(rng: np.random.Generator, level: int) -> Question:
    """How many more things the first person has; level - 1 other things are told, too."""
    more = int(rng.integers(0, 10))
    second = int(rng.integers(0, 10 - more))
    return _story(rng, level, (second + more, second), "more", more)


def count_letter(rng: np.random.Generator, level: int) -> Question:
    """How often a letter occurs among 2 * level + 4 letters; the count is uniform over 0 to 2 * level + 2."""
    length = 2 * level + 4
    wanted = LETTERS[rng.integers(len(LETTERS))]
    others = [letter for letter in LETTERS if letter != wanted]
    count = int(rng.integers(0, length - 1))
    letters = [wanted] * count + [others[i] for i in rng.integers(len(others), size=length - count)]
    rng.shuffle(letters)
    return Question(f"how many {wanted} in {' '.join(letters)}?", str(count))


def _story(rng: np.random.Generator, level: int, numbers: tuple[int, int], ending: str, answer: int) -> Question:
    """Two people and their things; ``level`` - 1 clauses about other things stand between or after them."""
    people = [NAMES[i] for i in rng.permutation(len(NAMES))]
    asked, *others = [THINGS[i] for i in rng.permutation(len(THINGS))]
    clauses = [f"{person} {number} {asked}" for person, number in zip(people, numbers)]
    for i in range(level - 1):
        clauses.insert(int(rng.integers(len(clauses) + 1)), f"{people[2 + i]} {rng.integers(10)} {others[i]}")
    return Question(f"{', '.join(clauses)}. how many {asked} {ending}?", str(answer))


class TextTask(ProceduralTask):
    """Word puzzles with one-digit answers; blind guessing scores about 12 %."""

    domain = "text"
    kinds = {"sum": story_of_sum, "difference": story_of_difference, "count": count_letter}

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple("0123456789")
