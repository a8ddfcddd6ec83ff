"""Ctrl-C and SIGTERM end the run after the step (or batch of rows) in progress, on all ranks alike."""
from __future__ import annotations

import logging
import signal
from types import FrameType

import torch
import torch.distributed as dist

from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device

log = logging.getLogger(__name__)


class StopRequest:
    """Within the block the first signal asks to stop, a second one interrupts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, groups: Groups, part: str = "step"):
        """``part``: what is finished first, as the message says it."""
        self.groups, self.part, self._asked, self._before = groups, part, False, {}

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if self.groups.is_main:
            log.warning("stopping after this %s; once more to stop at once", self.part)

    def requested(self) -> bool:
        """Whether any rank was asked; a collective, called at the end of each step."""
        flag = torch.tensor([self._asked], dtype=torch.int32, device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.groups.world)
        return bool(flag.item())
