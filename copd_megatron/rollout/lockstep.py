"""Decoding in step where MoE experts are spread over context ranks.

Context ranks have prompts of their own and take as many turns as their longest answer needs; each turn of a stage calls
every MoE layer once. Where those exchange rows with other context ranks, a rank that has finished goes on taking part
without rows until all have.
"""
from __future__ import annotations

import torch
import torch.distributed as dist

from copd_megatron.model.backbone import Backbone
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device


class Lockstep:
    """One stage's agreement with the same stage of the other context ranks, one small message per turn."""

    def __init__(self, backbone: Backbone, groups: Groups):
        layout = groups.layout
        self.backbone, self.group = backbone, groups.cp
        self.needed = backbone.spec.moe is not None and layout.cp > 1 and layout.ep * layout.etp > 1

    def turn(self) -> None:
        """Before each evaluation of this stage."""
        if self.needed:
            self._working(True)

    def finish(self) -> None:
        """After the last one: join the others' turns until nobody has any."""
        while self.needed and self._working(False):
            self.backbone.join()

    def _working(self, this_rank: bool) -> bool:
        """Whether any context rank takes a turn; a rank that does need not wait for the answer."""
        working = torch.full((1,), int(this_rank), device=device())
        dist.all_reduce(working, group=self.group)
        return this_rank or bool(working)
