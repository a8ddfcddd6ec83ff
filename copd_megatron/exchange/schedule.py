"""Cycles of S_rl RLVR steps and S_opd OPD steps: a pure function of the step."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.trainer import ScheduleConfig
from copd_megatron.exchange.topology import Resolve, edges
from copd_megatron.types import Edge, UserError

Phase = Literal["rlvr", "opd"]


@dataclass(frozen=True)
class Schedule:
    """Phase and edges of every step; steps count from 0."""

    config: ScheduleConfig
    exchange: ExchangeConfig
    opd: OpdConfig
    experts: tuple[str, ...]
    resolve: Resolve
    """Turns "pkg.module:name" of a topology into the object."""

    @classmethod
    def build(cls, config: ScheduleConfig, exchange: ExchangeConfig, opd: OpdConfig, experts: Sequence[str],
              resolve: Resolve) -> Schedule:
        """A schedule whose every step is known to have valid edges.

        Raises:
            UserError: a cycle without steps, or edges that ``topology.edges`` refuses.
        """
        if config.rl_steps + config.opd_steps == 0:
            raise UserError("schedule.rl_steps and schedule.opd_steps: both are 0; a cycle has at least one "
                            "step; raise one")
        schedule = cls(config, exchange, opd, tuple(experts), resolve)
        for opd_step in range(max(1, config.cycles * config.opd_steps)):
            edges(exchange, opd, experts, opd_step, resolve)
        return schedule

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.cycles * (self.config.rl_steps + self.config.opd_steps)

    def phase(self, step: int) -> Phase:
        """RLVR first, then OPD, in every cycle."""
        offset = step % (self.config.rl_steps + self.config.opd_steps)
        return "rlvr" if offset < self.config.rl_steps else "opd"

    def edges(self, step: int) -> list[Edge]:
        """Edges of an OPD step; none in an RLVR step."""
        if self.phase(step) == "rlvr":
            return []
        cycle, offset = divmod(step, self.config.rl_steps + self.config.opd_steps)
        opd_step = cycle * self.config.opd_steps + offset - self.config.rl_steps
        return edges(self.exchange, self.opd, self.experts, opd_step, self.resolve)
