"""Where the time of a step goes: nested phases with exclusive times, and tokens per second.

Invariant: the ``time/{phase}_s`` of a step, ``other`` included, add up to ``time/step_s``.

On a GPU a border of a phase is a mark in the stream of kernels, so that kernels are charged to the phase that launched
them and nobody waits for the device: a wait at a border would also wait for messages that are to travel meanwhile.
"""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from copd_megatron.metrics.names import TIMED_PHASES

RANGE = "phase/"
"""Phases are ranges of this prefix in a profile (torch.profiler)."""
UNREAD = 1024
"""Marks that may wait to be read; the older half of them is long past when there are more."""


class Clock(Protocol):
    """Marks moments; what lies between two is read later."""

    def mark(self) -> Any:
        """Now."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits until the later one has passed."""


class HostClock:
    """The time at which this process gets somewhere."""

    mark = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(start: float, end: float) -> float:
        """See ``Clock``."""
        return end - start


class StreamClock:
    """The time at which a GPU's current stream gets there."""

    @staticmethod
    def mark() -> torch.cuda.Event:
        """See ``Clock``."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See ``Clock``."""
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Timers:
    """Phase timers of one rank.

    ``with timers("rollout"):`` measures a part of the step. A phase opened inside another pauses the
    outer one, so that a second is counted once. Times of several entries of a phase add up.
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None, clock: Clock | None = None) -> None:
        """``on_phase`` hears the name of each phase that begins (the progress display). ``clock``: None for the
        device's."""
        self.on_phase = on_phase
        self._clock = clock or (StreamClock() if torch.cuda.is_available() else HostClock())
        self._open: list[str] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens: defaultdict[str, int] = defaultdict(int)
        self._unread: list[tuple[str, Any, Any]] = []
        self._border = self._step_start = self._clock.mark()

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
            with record_function(RANGE + phase):
                yield
        finally:
            self._charge()
            self._open.pop()
            self._announce()

    def seconds(self, phase: str) -> float:
        """Time charged to ``phase`` since the last ``collect``; waits until the device has got here."""
        self._charge()
        self._read(len(self._unread))
        return self._seconds.get(phase, 0.0)

    def add_tokens(self, phase: str, tokens: int) -> None:
        """Count tokens (of all ranks, if the rate is to be theirs) that went through ``phase``."""
        self._tokens[phase] += tokens

    def collect(self) -> dict[str, float]:
        """Metrics since the last call, and a fresh start: ``time/{phase}_s``, ``time/other_s``,
        ``time/step_s`` in seconds and ``tokens/{phase}_per_s`` of phases with counted tokens."""
        self._charge()
        self._read(len(self._unread))
        step_s = self._clock.seconds(self._step_start, self._border)
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
        if self.on_phase is not None and self._open:
            self.on_phase(self._open[-1])

    def _charge(self) -> None:
        """Give the time since the last border to the phase that is open now."""
        now = self._clock.mark()
        if self._open:
            self._unread.append((self._open[-1], self._border, now))
            if len(self._unread) > UNREAD:
                self._read(UNREAD // 2)
        self._border = now

    def _read(self, count: int) -> None:
        """Turn the oldest marks into seconds."""
        for phase, start, end in self._unread[:count]:
            self._seconds[phase] += self._clock.seconds(start, end)
        del self._unread[:count]
