"""Hidden states handed from one pipeline stage to the next, outside Megatron's training schedules."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.model.backbone import Backbone
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device
from copd_megatron.rollout.lockstep import Lockstep


class StageRelay:
    """The stages of a replica take turns; all of those that take part make the call."""

    def __init__(self, backbone: Backbone, groups: Groups):
        self.backbone, self.groups = backbone, groups
        self.lockstep = Lockstep(backbone, groups)

    def run(self, rows: Sequence[int], stage: Callable[[range], Tensor], first: int = 0, last: int | None = None,
            entering: Tensor | None = None) -> Tensor:
        """What ``stage`` returns here for the last chunk of layers; its input lies in ``Backbone.set_input_tensor``.

        Args:
            rows: hidden states [rows, 1, H] that enter each of this stage's chunks.
            stage: evaluates one of ``Backbone.chunks``; what it returns is sent on.
            first, last: chunks of the backbone that take part; None: to the last one.
            entering: what enters the first of them; None: nothing, it embeds tokens.
        """
        backbone, group, stages = self.backbone, self.groups.pp, self.groups.layout.pp
        self.lockstep.turn()
        here, last = self.groups.coords.pp, stages * len(backbone.chunks) - 1 if last is None else last
        for chunk, layers, count in zip(range(here, last + 1, stages), backbone.chunks, rows):
            if chunk < first:
                continue
            if chunk > first:
                entering = torch.empty(count, 1, backbone.spec.hidden_size, dtype=backbone.dtype, device=device())
                dist.recv(entering, group=group, group_src=(here - 1) % stages)
            backbone.set_input_tensor(entering)
            hidden = stage(layers)
            if chunk < last:
                dist.send(hidden.contiguous(), group=group, group_dst=(here + 1) % stages)
        return hidden
