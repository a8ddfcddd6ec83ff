"""The loop of commands that turn rows into rows: rank 0 reads and writes, every replica answers its share."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from copd_megatron.parallel.collectives import all_gather_objects, broadcast_object
from copd_megatron.parallel.groups import Groups
from copd_megatron.trainer.row_batches import deal_rows
from copd_megatron.trainer.row_prompts import InputRow
from copd_megatron.trainer.stop import StopRequest

Answer = Callable[[Sequence[InputRow]], Mapping[int, Mapping[str, Any]]]
"""Rows of a replica -> number -> output row; called on all its ranks, and each row is in the answer of some rank."""


class RowFiles(Protocol):
    """What rank 0 reads from and writes to."""

    def next_window(self) -> list[InputRow]:
        """Rows to answer together; [] at the end."""

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Answers to the last window, in its order, safe when the call returns."""


def run_rows(answer: Answer, groups: Groups, files: RowFiles | None) -> bool:
    """Answer windows until there are none. Every rank calls it.

    Args:
        files: on rank 0.

    Returns:
        Whether all is done; False where a signal asked to stop, after the window in progress.
    """
    with StopRequest(groups, "batch") as stop:
        while True:
            window = broadcast_object(files.next_window() if groups.is_main else None, 0, groups.world)
            if not window:
                return True
            mine = deal_rows(window, groups.layout.replicas)[groups.coords.replica]
            answers: dict[int, Mapping[str, Any]] = {}
            for part in all_gather_objects(dict(answer(mine)), groups.world):
                answers |= part
            if groups.is_main:
                files.append([{**row.name(), **answers[row.number]} for row in window])
            if stop.requested():
                return False
