"""Hidden states handed from one pipeline stage to the next, outside Megatron's training schedules."""
from __future__ import annotations

from collections.abc import Callable

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

    def run(self, rows: int, stage: Callable[[], Tensor], first: int = 0, last: int | None = None,
            entering: Tensor | None = None) -> Tensor:
        """What ``stage`` returns here, after it has been sent on; its input lies in ``Backbone.set_input_tensor``.

        Args:
            rows: hidden states [rows, 1, H] that enter this stage.
            first, last: stages that take part; None: to the last one.
            entering: what enters the first of them; None: nothing, it embeds tokens.
        """
        groups, backbone = self.groups, self.backbone
        self.lockstep.turn()
        here, last = groups.coords.pp, groups.layout.pp - 1 if last is None else last
        if here > first:
            entering = torch.empty(rows, 1, backbone.spec.hidden_size, dtype=backbone.dtype, device=device())
            dist.recv(entering, group=groups.pp, group_src=here - 1)
        backbone.set_input_tensor(entering)
        hidden = stage()
        if here < last:
            dist.send(hidden.contiguous(), group=groups.pp, group_dst=here + 1)
        return hidden
