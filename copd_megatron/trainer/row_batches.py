"""How rows of a file pass the model: dealt to replicas by prompt, encoded on one rank of each, in bounded batches.

Between two batches of a replica nothing crosses to another one, so that replicas need not wait for each other
within a window of rows.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from copd_megatron.parallel.collectives import broadcast_object
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import balanced
from copd_megatron.trainer.row_prompts import InputRow, RowPrompts, error_row
from copd_megatron.types import Prompt

T = TypeVar("T")
Encoded = tuple[int, Prompt, T]
"""Number of the row, its prompt, and what else is asked of it."""

BATCH_BYTES = 256 << 20
"""Patches of a batch: what is decoded at one time."""


def deal_rows(rows: Sequence[InputRow], replicas: int) -> list[list[InputRow]]:
    """Each replica's rows, about equal in length; rows of one prompt stay together. The same on every rank."""
    if replicas == 1:
        return [list(rows)]
    by_prompt: dict[str, list[InputRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_key(), []).append(row)
    groups = list(by_prompt.values())
    costs = [sum(len(json.dumps(row.content)) for row in group) for group in groups]
    return [[row for index in own for row in groups[index]] for own in balanced(costs, replicas)]


def encoded_batches(rows: Sequence[InputRow], prompts: RowPrompts, groups: Groups, budget: int,
                    ask: Callable[[InputRow, Prompt], T], size: Callable[[Prompt, T], int],
                    wrong: dict[int, dict]) -> Iterator[list[Encoded]]:
    """The replica's rows in batches, the same on every rank of it; all its ranks iterate together.

    Args:
        budget: tokens of a batch.
        ask: what is wanted of a row; an exception makes the row one of ``wrong``.
        size: tokens of a row beyond those of its prompt, which several rows may share.
        wrong: receives number -> error row, on the replica's main rank.
    """
    source = _encode(rows, prompts, budget, ask, size, wrong) if groups.is_replica_main else iter(())
    while True:
        batch = broadcast_object(next(source, None), groups.first_rank, groups.replica)
        if batch is None:
            return
        yield batch


def _encode(rows: Sequence[InputRow], prompts: RowPrompts, budget: int, ask: Callable[[InputRow, Prompt], T],
            size: Callable[[Prompt, T], int], wrong: dict[int, dict]) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    seen: set[str] = set()
    tokens = patches = 0
    for row in sorted(rows, key=lambda row: row.number):
        try:
            prompt = prompts.prompt(row)
            wanted = ask(row, prompt)
        except Exception as error:  # a row is the user's data, and templates are the user's code
            wrong[row.number] = error_row(error)
            continue
        if prompt.content_hash not in seen:
            seen.add(prompt.content_hash)
            tokens += len(prompt.token_ids)
            patches += _patch_bytes(prompt)
        tokens += size(prompt, wanted)
        batch.append((row.number, prompt, wanted))
        if tokens >= budget or patches >= BATCH_BYTES:
            yield batch
            batch, seen, tokens, patches = [], set(), 0, 0
            prompts.forget()
    prompts.forget()
    if batch:
        yield batch


def _patch_bytes(prompt: Prompt) -> int:
    visual = prompt.visual
    return 0 if visual is None else sum(p.nbytes for p in (visual.image_patches, visual.video_patches) if p is not None)
