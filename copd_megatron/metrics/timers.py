"""Where the time of a step goes: nested phases with exclusive times, and tokens per second.

Invariant: the ``time/{phase}_s`` of a step, ``other`` included, add up to ``time/step_s``.
"""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from copd_megatron.metrics.names import TIMED_PHASES


class Timers:
    """Phase timers of one rank.

    ``with timers("rollout"):`` measures a part of the step. A phase opened inside another pauses the
    outer one, so that a second is counted once. Times of several entries of a phase add up.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None,
                 on_phase: Callable[[str], None] | None = None,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        """``synchronize`` (``torch.cuda.synchronize`` on a GPU) runs at every border of a phase, so that
        kernels are charged to the phase that launched them; None measures without waiting.
        ``on_phase`` hears the name of each phase that begins (the progress display)."""
        self._synchronize = synchronize
        self._on_phase = on_phase
        self._clock = clock
        self._open: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: defaultdict[str, int] = defaultdict(int)
        self._border = self._step_start = clock()

    @property
    def phase(self) -> str | None:
        """The innermost open phase."""
        return self._open[-1] if self._open else None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the body to ``phase``, one of ``names.TIMED_PHASES``; ValueError for another word."""
        if phase not in TIMED_PHASES:
            raise ValueError(f"timer phase {phase!r}: phases are {', '.join(TIMED_PHASES)}")
        self._charge()
        self._open.append(phase)
        self._announce()
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self._announce()

    def seconds(self, phase: str) -> float:
        """Time charged to ``phase`` since the last ``collect``."""
        self._charge()
        return self._seconds.get(phase, 0.0)

    def add_tokens(self, phase: str, tokens: int) -> None:
        """Count tokens (of all ranks, if the rate is to be theirs) that went through ``phase``."""
        self._tokens[phase] += tokens

    def collect(self) -> dict[str, float]:
        """Metrics since the last call, and a fresh start: ``time/{phase}_s``, ``time/other_s``,
        ``time/step_s`` in seconds and ``tokens/{phase}_per_s`` of phases with counted tokens."""
        self._charge()
        step_s = self._border - self._step_start
        values = {f"time/{phase}_s": self._seconds[phase] for phase in TIMED_PHASES if phase in self._seconds}
        values["time/other_s"] = max(0.0, step_s - sum(values.values()))
        values["time/step_s"] = step_s
        for phase, tokens in self._tokens.items():
            if self._seconds.get(phase):
                values[f"tokens/{phase}_per_s"] = tokens / self._seconds[phase]
        self._seconds.clear()
        self._tokens.clear()
        self._step_start = self._border
        return values

    def _announce(self) -> None:
        if self._on_phase is not None and self._open:
            self._on_phase(self._open[-1])

    def _charge(self) -> None:
        """Give the time since the last border to the phase that is open now."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._border
        self._border = now
