"""Cycles of S_rl RLVR steps and S_opd OPD steps: a pure function of the step."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.trainer import ScheduleConfig
from copd_megatron.exchange.topology import edges
from copd_megatron.types import Edge

Phase = Literal["rlvr", "opd"]


@dataclass(frozen=True)
class Schedule:
    """Phase and edges of every step."""

    config: ScheduleConfig
    exchange: ExchangeConfig
    opd: OpdConfig
    experts: tuple[str, ...]
    resolve: Callable[[str], Any]
    """Turns "pkg.module:name" of a topology into the object."""

    @classmethod
    def build(cls, config: ScheduleConfig, exchange: ExchangeConfig, opd: OpdConfig, experts: Sequence[str],
              resolve: Callable[[str], Any]) -> Schedule:
        """A schedule whose first OPD step has valid edges. Raises UserError as ``topology.edges``."""
        schedule = cls(config, exchange, opd, tuple(experts), resolve)
        edges(exchange, opd, experts, 0, resolve)
        return schedule

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.cycles * (self.config.rl_steps + self.config.opd_steps)

    def phase(self, step: int) -> Phase:
        """RLVR first, then OPD, in every cycle."""
        return "rlvr" if step % (self.config.rl_steps + self.config.opd_steps) < self.config.rl_steps else "opd"

    def edges(self, step: int) -> list[Edge]:
        """Edges of an OPD step; none in an RLVR step."""
        if self.phase(step) == "rlvr":
            return []
        cycle, offset = divmod(step, self.config.rl_steps + self.config.opd_steps)
        opd_step = cycle * self.config.opd_steps + offset - self.config.rl_steps
        return edges(self.exchange, self.opd, self.experts, opd_step, self.resolve)
