"""Which prompts a step sees: a pure function of (expert, step, slot), the same on every rank.

Finite tasks are walked epoch by epoch in an order shuffled by (seed, expert, epoch). There is no
cursor to save: the step is the cursor.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache

from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.parallel.seeding import permutation, stable_hash
from copd_megatron.tasks.base import Split, Task
from copd_megatron.types import Prompt, UserError

CACHED_PROMPTS = 20_000
"""Encoded prompts kept per run: evaluations ask for the same ones again and again."""


class PromptSource:
    """Encoded prompts of every expert's task."""

    def __init__(self, tasks: Mapping[str, Task], encoder: PromptEncoder, seed: int, max_prompt_tokens: int):
        self.tasks, self.encoder, self.seed, self.max_prompt_tokens = tasks, encoder, seed, max_prompt_tokens
        self._cache: OrderedDict[tuple[str, Split, int], Prompt] = OrderedDict()
        self._order = lru_cache(maxsize=8)(self._permutation)

    def train(self, domain: str, position: int) -> Prompt:
        """The prompt at ``position`` >= 0 of the expert's endless training stream."""
        size = self.tasks[domain].size("train")
        if size is None:
            return self._prompt(domain, "train", position)
        if size == 0:
            raise UserError(f"experts.{domain}.task: its train split is empty; at least one row is needed; "
                            "check the data file and its split")
        epoch, offset = divmod(position, size)
        return self._prompt(domain, "train", int(self._order(domain, size, epoch)[offset]))

    def held_out(self, domain: str, count: int) -> list[Prompt]:
        """The first ``count`` held-out prompts (all of them if the split is smaller)."""
        size = self.tasks[domain].size("held_out")
        available = count if size is None else min(count, size)
        return [self._prompt(domain, "held_out", i) for i in range(available)]

    def _permutation(self, domain: str, size: int, epoch: int):
        return permutation(self.seed, size, stable_hash(domain), epoch)

    def _prompt(self, domain: str, split: Split, index: int) -> Prompt:
        key = (domain, split, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        prompt = self.encoder.encode(self.tasks[domain].item(split, index), domain)
        if len(prompt.token_ids) > self.max_prompt_tokens:
            raise UserError(f"rollout.max_prompt_tokens: prompt {prompt.key!r} has {len(prompt.token_ids)} "
                            f"tokens; allowed is {self.max_prompt_tokens}; raise the limit or filter the data")
        self._cache[key] = prompt
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return prompt
