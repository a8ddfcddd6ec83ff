"""Which prompts a step sees: a pure function of (expert, step, slot), the same on every rank.

Finite tasks are walked epoch by epoch in an order shuffled by (seed, expert, epoch). There is no
cursor to save: the step is the cursor. Prompts that are too long are refused, or left out before the first step.
"""
from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import split_evenly
from copd_megatron.parallel.seeding import permutation, stable_hash
from copd_megatron.tasks.base import Split, Task
from copd_megatron.types import Prompt, UserError

log = logging.getLogger(__name__)

CACHED_PROMPTS, CACHED_BYTES = 20_000, 2 << 30
"""Encoded prompts kept per run, and the bytes of their patches and pixels: evaluations ask for the same ones again
and again."""


class PromptSource:
    """Encoded prompts of every expert's task."""

    def __init__(self, tasks: Mapping[str, Task], encoder: PromptEncoder, seed: int, max_prompt_tokens: int):
        self.tasks, self.encoder, self.seed, self.max_prompt_tokens = tasks, encoder, seed, max_prompt_tokens
        self._cache: OrderedDict[tuple[str, Split, int], Prompt] = OrderedDict()
        self._cached_bytes = 0
        self._kept: dict[tuple[str, Split], np.ndarray] = {}
        self._order = lru_cache(maxsize=8)(self._permutation)

    def train(self, domain: str, position: int) -> Prompt:
        """The prompt at ``position`` >= 0 of the expert's endless training stream."""
        size = self.size(domain, "train")
        if size is None:
            return self._prompt(domain, "train", position)
        if size == 0:
            raise UserError(f"experts.{domain}.task: its train split is empty; at least one row is needed; "
                            "check the data file and its split")
        epoch, offset = divmod(position, size)
        return self._prompt(domain, "train", int(self._order(domain, size, epoch)[offset]))

    def size(self, domain: str, split: Split) -> int | None:
        """Questions of a split that are not left out; None where they never end."""
        kept = self._kept.get((domain, split))
        return self.tasks[domain].size(split) if kept is None else len(kept)

    def index(self, domain: str, split: Split, number: int) -> int:
        """The task's own index of the ``number``-th question that is not left out."""
        kept = self._kept.get((domain, split))
        return number if kept is None else int(kept[number])

    def drop_long(self, groups: Groups) -> dict[tuple[str, Split], int]:
        """Leave prompts that are too long out of both splits of finite tasks. Every rank calls it.

        Every rank encodes an even part of the questions, videos and all.

        Returns:
            (domain, split) -> how many were left out, the same on every rank.

        Raises:
            UserError: a split of which nothing is left.
        """
        dropped = {}
        for domain, task in self.tasks.items():
            for split in ("train", "held_out"):
                size = task.size(split)
                if size is None or task.size("train") is None:
                    continue
                fits = self._fitting(domain, split, size, groups)
                dropped[domain, split] = size - len(fits)
                if size > len(fits):
                    log.info("experts.%s.task: %d of the %d questions of %s are longer than rollout.max_prompt_tokens "
                             "(%d) and left out", domain, size - len(fits), size, split, self.max_prompt_tokens)
                if size and not len(fits):
                    raise UserError(f"rollout.max_prompt_tokens: all {size} questions of {split} of expert {domain} "
                                    f"are longer than {self.max_prompt_tokens}; at least one must fit; raise the "
                                    "limit")
                self._kept[domain, split] = fits
        return dropped

    def _fitting(self, domain: str, split: Split, size: int, groups: Groups) -> np.ndarray:
        """Indices of the questions that are not too long."""
        world = groups.world.size()
        mine = [index for index in split_evenly(size, world)[groups.rank]
                if len(self.encoder.encode(self.tasks[domain].item(split, index), domain).token_ids)
                <= self.max_prompt_tokens]
        return np.array([index for part in all_gather_objects(mine, groups.world) for index in part], np.int64)

    def question(self, domain: str, number: int) -> Prompt:
        """The ``number``-th training question in the task's own order."""
        return self._prompt(domain, "train", number)

    def held_out(self, domain: str, count: int) -> list[Prompt]:
        """The first ``count`` held-out prompts (all of them if the split is smaller)."""
        size = self.size(domain, "held_out")
        available = count if size is None else min(count, size)
        return [self._prompt(domain, "held_out", i) for i in range(available)]

    def _permutation(self, domain: str, size: int, epoch: int):
        return permutation(self.seed, size, stable_hash(domain), epoch)

    def _prompt(self, domain: str, split: Split, number: int) -> Prompt:
        index = self.index(domain, split, number)
        key = (domain, split, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        prompt = self.encoder.encode(self.tasks[domain].item(split, index), domain)
        if len(prompt.token_ids) > self.max_prompt_tokens:
            raise UserError(f"rollout.max_prompt_tokens: prompt {prompt.key!r} has {len(prompt.token_ids)} "
                            f"tokens; allowed is {self.max_prompt_tokens}; raise the limit, or set "
                            "rollout.long_prompts=drop")
        self._cache[key] = prompt
        self._cached_bytes += _bytes_of(prompt)
        while len(self._cache) > CACHED_PROMPTS or self._cached_bytes > CACHED_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= _bytes_of(dropped)
        return prompt


def _bytes_of(prompt: Prompt) -> int:
    """Bytes of what the vision tower reads and of the media it came from."""
    visual = prompt.visual
    patches = [] if visual is None else [visual.image_patches, visual.video_patches]
    pixels = [media.pixels for media in prompt.item.media] if prompt.item else []
    return sum(array.nbytes for array in (*patches, *pixels) if array is not None)
