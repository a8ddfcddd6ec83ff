"""What must not work in the quickstart, as callables for its recipe: blank pictures and shuffled rewards.

    copd eval runs/quickstart --set experts.image.task=quickstart_controls:blank_image ...
    copd train examples/quickstart.py --set experts.text.rewards.accuracy.function=quickstart_controls:shuffled_accuracy

``tools/quickstart_study.py`` runs them all.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from copd_megatron.tasks.image import ImageTask
from copd_megatron.tasks.text import TextTask
from copd_megatron.tasks.video import VideoTask
from copd_megatron.types import TaskItem


class _Blank:
    """A task whose pictures are black; everything else is the inner task's."""

    def __init__(self, inner):
        self._inner = inner

    def size(self, split):
        """As the inner task."""
        return self._inner.size(split)

    def item(self, split, index) -> TaskItem:
        """The inner task's question without its pictures."""
        item = self._inner.item(split, index)
        return replace(item, media=tuple(replace(m, pixels=np.zeros_like(m.pixels)) for m in item.media))

    def verify(self, item, completion):
        """As the inner task."""
        return self._inner.verify(item, completion)

    def extract(self, completion):
        """As the inner task."""
        return self._inner.extract(completion)


def blank_image(**arguments) -> _Blank:
    """The image task with black pictures."""
    return _Blank(ImageTask(**arguments))


def blank_video(**arguments) -> _Blank:
    """The video task with black frames."""
    return _Blank(VideoTask(**arguments))


def shuffled_accuracy(items: Sequence[TaskItem], completions: Sequence[str]) -> list[float]:
    """The batch's true accuracies, each given to another completion at random: a reward that says nothing."""
    task = TextTask()  # all procedural families verify alike
    scores = [task.verify(item, completion)["accuracy"] for item, completion in zip(items, completions)]
    random.Random("".join(completions)).shuffle(scores)
    return scores
