"""Which phase a step belongs to, who trains in it and who teaches whom: pure functions of the step and plain state.

``fixed``: cycles of S_rl RLVR and S_opd OPD steps (Gu et al. 2026, arXiv:2604.27083). ``adaptive``: a thermostat
with hysteresis on the mean overlap, see ``next_phase``. What was measured, and all that follows from it, is one
``ScheduleState``, a plain dict in a checkpoint: equal states go on equally, on every rank and after every resume.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.trainer import ScheduleConfig
from copd_megatron.exchange.topology import Moment, Resolve, edges
from copd_megatron.types import Edge, UserError

Phase = Literal["rlvr", "opd"]
DIGITS = 9
"""Measurements are rounded to this many decimals, so that the order of a sum over ranks cannot decide a phase."""


@dataclass(frozen=True)
class ScheduleState:
    """What a schedule remembers between two steps; JSON holds it as it is."""

    step: int = 0
    """Steps done."""
    phase: Phase = "rlvr"
    """Of the next step; schedule ``adaptive`` only, as are the next three."""
    length: int = 0
    """Steps done in this phase."""
    rl_steps: int = 0
    """RLVR steps done."""
    opd_steps: int = 0
    """OPD steps done."""
    turns: dict[str, int] = field(default_factory=dict)
    """Expert -> steps in which it has trained."""
    slots: dict[str, list[int]] = field(default_factory=dict)
    """Expert -> in which steps of the current round (as many RLVR steps as the busiest expert makes per cycle)
    it trains; absent: all."""
    overlaps: dict[str, float] = field(default_factory=dict)
    """"a~b" -> last measured top-k overlap of two experts."""
    tokens: dict[str, float] = field(default_factory=dict)
    """Expert -> tokens of its last RLVR step."""
    lengths: dict[str, float] = field(default_factory=dict)
    """Expert -> mean completion length when it last trained."""


@dataclass(frozen=True)
class Measured:
    """What a step has shown, the same on every rank."""

    overlaps: Mapping[tuple[str, str], float] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)
    lengths: Mapping[str, float] = field(default_factory=dict)


def next_phase(config: ScheduleConfig, phase: Phase, length: int, overlap: float | None) -> Phase:
    """The phase after ``length`` steps of ``phase`` (an adaptive schedule).

    OPD begins when the overlap is below ``enter_overlap`` and ends when it is at least ``leave_overlap``; between
    the two, or without a fresh measurement (None), the phase goes on; never shorter or longer than allowed.
    """
    other: Phase = "opd" if phase == "rlvr" else "rlvr"
    least, most = config.rl_length if phase == "rlvr" else config.opd_length
    if length >= most:
        return other
    if length < least or overlap is None:
        return phase
    wants = overlap < config.enter_overlap if phase == "rlvr" else overlap >= config.leave_overlap
    return other if wants else phase


def spread_steps(counts: Mapping[str, int], length: int, tokens: Mapping[str, float]) -> dict[str, list[int]]:
    """For each expert, which of ``length`` steps it trains in, evenly spaced, so that all steps cost alike.

    The most expensive experts choose first; each takes the start that keeps the dearest step cheapest.

    Args:
        counts: expert -> number of its steps, 0 <= count <= length.
        tokens: expert -> what one of its steps costs.
    """
    load = [0.0] * length
    chosen: dict[str, list[int]] = {}
    for expert in sorted(counts, key=lambda e: (-tokens.get(e, 1.0) * counts[e], list(counts).index(e))):
        count, cost = counts[expert], tokens.get(expert, 1.0)
        starts = [sorted({(start + i * length // count) % length for i in range(count)})
                  for start in range(length)] if count else [[]]
        chosen[expert] = min(starts, key=lambda steps: sorted(
            (load[i] + cost * (i in steps) for i in range(length)), reverse=True))
        for i in chosen[expert]:
            load[i] += cost
    return {expert: chosen[expert] for expert in counts}


class Schedule:
    """Phase, edges and training experts of every step; steps count from 0.

    A fixed schedule may be asked about any step. Of an adaptive one only the next step is known, and a graph
    that changes with the overlap is that of the next step, whichever is asked for.
    """

    def __init__(self, config: ScheduleConfig, exchange: ExchangeConfig, opd: OpdConfig, experts: Sequence[str],
                 resolve: Resolve, seed: int = 0):
        """``resolve`` turns "pkg.module:name" of a topology into the object; ``seed`` is the run's."""
        self.config, self.exchange, self.opd, self.experts = config, exchange, opd, tuple(experts)
        self.resolve, self.seed = resolve, seed
        self._counts = {e: config.rl_steps_of.get(e, config.rl_steps) for e in self.experts}
        self._longest = max(self._counts.values())
        self._state = self._planned(ScheduleState(turns=dict.fromkeys(self.experts, 0)))

    @classmethod
    def build(cls, config: ScheduleConfig, exchange: ExchangeConfig, opd: OpdConfig, experts: Sequence[str],
              resolve: Resolve, seed: int = 0) -> Schedule:
        """A schedule whose every step is known to have valid edges.

        Raises:
            UserError: a cycle without steps, or edges that ``topology.edges`` refuses.
        """
        schedule = cls(config, exchange, opd, experts, resolve, seed)
        if schedule.cycle == 0:
            raise UserError("schedule.rl_steps and schedule.opd_steps: both are 0; a cycle has at least one "
                            "step; raise one")
        steps = schedule.total_steps if schedule.adaptive else config.cycles * config.opd_steps
        for opd_step in range(max(1, steps)):
            edges(exchange, opd, experts, Moment(opd_step, seed), resolve)
        return schedule

    @property
    def adaptive(self) -> bool:
        """Whether measurements decide the phases."""
        return self.config.kind == "adaptive"

    @property
    def cycle(self) -> int:
        """Steps of one cycle of a fixed schedule."""
        return self._longest + self.config.opd_steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.cycles * self.cycle

    def phase(self, step: int) -> Phase:
        """RLVR first, then OPD, in every cycle."""
        if self.adaptive:
            return self._now(step).phase
        return "rlvr" if step % self.cycle < self._longest else "opd"

    def edges(self, step: int) -> list[Edge]:
        """Edges of an OPD step; none in an RLVR step."""
        if self.phase(step) == "rlvr":
            return []
        number, offset = divmod(step, self.cycle)
        opd_step = number * self.config.opd_steps + offset - self._longest
        if self.adaptive:
            opd_step = self._state.opd_steps
        overlaps = {tuple(pair.split("~")): value for pair, value in self._state.overlaps.items()}
        return edges(self.exchange, self.opd, self.experts, Moment(opd_step, self.seed, overlaps), self.resolve)

    def training(self, step: int) -> tuple[str, ...]:
        """Experts that train in a step: all in OPD; in RLVR those whose turn it is."""
        if self.phase(step) == "opd":
            return self.experts
        place = self._place(step)
        return tuple(e for e in self.experts if place in self._state.slots.get(e, [place]))

    def turn(self, expert: str, step: int) -> int:
        """Steps before ``step`` in which the expert trained: its place in its own data."""
        if self.adaptive:
            return self._now(step).turns[expert]
        if not self.config.rl_steps_of:
            return step
        number, offset = divmod(step, self.cycle)
        alone = sum(place < offset for place in self._state.slots.get(expert, ()))  # no slots: a cycle without RLVR
        return number * (self._counts[expert] + self.config.opd_steps) + alone + max(0, offset - self._longest)

    def length_of(self, expert: str, default: float) -> float:
        """Mean completion length of an expert when it last trained, in tokens; ``default`` before that."""
        return self._state.lengths.get(expert, default)

    def ends_phase(self, step: int) -> bool:
        """Whether a fixed schedule's phase ends with this step; of an adaptive one nobody knows before it is done."""
        if self.adaptive:
            return False
        return step + 1 == self.total_steps or self.phase(step) != self.phase(step + 1)

    def observe(self, step: int, measured: Measured) -> None:
        """Take in what a finished step has shown. Every rank calls it with the same numbers."""
        state, phase, trained = self._state, self.phase(step), self.training(step)
        tokens = {e: round(float(n), DIGITS) for e, n in measured.tokens.items() if phase == "rlvr"}
        fresh = {"~".join(sorted(pair)): round(float(value), DIGITS) for pair, value in measured.overlaps.items()}
        state = replace(
            state, step=step + 1, overlaps={**state.overlaps, **fresh}, tokens={**state.tokens, **tokens},
            lengths={**state.lengths, **{e: round(float(n), DIGITS) for e, n in measured.lengths.items()}},
            turns={e: self.turn(e, step) + (e in trained) for e in self.experts})
        if phase == "rlvr" and self._place(step) + 1 == self._longest:
            state = self._planned(state)  # never within a round, or an expert could miss its turn
        if self.adaptive:
            overlap = sum(fresh.values()) / len(fresh) if fresh else None
            after = next_phase(self.config, phase, state.length + 1, overlap)
            state = replace(state, phase=after, length=state.length + 1 if after == phase else 0,
                            rl_steps=state.rl_steps + (phase == "rlvr"), opd_steps=state.opd_steps + (phase == "opd"))
        self._state = state

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain data."""
        return asdict(self._state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()`` of an equal schedule; what it says of experts that are no more is dropped."""
        loaded = ScheduleState(**{name: state[name] for name in asdict(self._state) if name in state})
        own = set(self.experts)
        loaded = replace(
            loaded, turns={e: loaded.turns.get(e, 0) for e in self.experts},
            tokens={e: n for e, n in loaded.tokens.items() if e in own},
            lengths={e: n for e, n in loaded.lengths.items() if e in own},
            overlaps={pair: n for pair, n in loaded.overlaps.items() if own.issuperset(pair.split("~"))})
        self._state = loaded if loaded.slots.keys() == self._state.slots.keys() else self._planned(loaded)

    def _now(self, step: int) -> ScheduleState:
        if step != self._state.step:
            raise ValueError(f"step {step} of an adaptive schedule; only step {self._state.step} is known")
        return self._state

    def _place(self, step: int) -> int:
        """Of an RLVR step in its round."""
        return self._now(step).rl_steps % self._longest if self.adaptive else step % self.cycle

    def _planned(self, state: ScheduleState) -> ScheduleState:
        """With the steps of the next round shared out by the tokens known now."""
        if not self.config.rl_steps_of or not self._longest:
            return state
        return replace(state, slots=spread_steps(self._counts, self._longest, state.tokens))
