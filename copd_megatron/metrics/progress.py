"""What a person sees while a run trains: a live display on a terminal, plain lines in a log file, or nothing.

The live display redraws in place and fits any window; the plain one prints one line per step and never a
control character, so that it reads well in a Slurm log.
"""
from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from copd_megatron.metrics.accuracy import policy_table, policy_table_text

SHOWN = (("reward", "reward", "{:.3f}"), ("length", "length", "{:.1f}"), ("entropy", "entropy", "{:.3f}"),
         ("kl_backbone", "KL", "{:.4f}"), ("grad_norm", "grad", "{:.3g}"))
"""Metric, heading and format per expert, the most important first: narrow windows drop the last ones."""

MIN_COLUMNS, MIN_LINES = 40, 8
"""A terminal smaller than this gets plain lines."""

_LISTED_EXPERTS = 4
"""Beyond this many experts a plain line shows their mean and range."""


class Progress:
    """The display that shows nothing; base of the others. Use as a context manager.

    ``phase``, ``step``, ``evaluation`` and ``note`` may be called on any rank and never raise for odd values.
    """

    def phase(self, name: str) -> None:
        """A part of the step begins, e.g. "rollout"."""

    def step(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """A step of ``phase`` rlvr or opd is done; ``values`` are its metrics."""

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """An evaluation is done: {"step", "policies", "mode", ...} as in evaluations.jsonl."""

    def note(self, text: str) -> None:
        """A line that stays, printed above a live display."""

    def close(self) -> None:
        """End the display and leave the terminal as it was."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def make_progress(mode: str, *, experts: Sequence[str], total_steps: int, first_step: int = 0,
                  stream: TextIO | None = None) -> Progress:
    """The display for ``metrics.progress``: auto, live, plain or off.

    ``auto`` is live where ``stream`` (default: standard output) is a terminal large enough, else plain.
    ``first_step``: steps already done (resume), so that the remaining time counts this session only.
    """
    stream = stream or sys.stdout
    if mode == "off":
        return Progress()
    if mode == "live" or (mode == "auto" and _fits_live(stream)):
        return LiveProgress(experts, total_steps, first_step, stream)
    return PlainProgress(experts, total_steps, first_step, stream)


def _fits_live(stream: TextIO) -> bool:
    console = Console(file=stream)
    size = shutil.get_terminal_size()
    return (stream.isatty() and console.is_terminal and not console.is_dumb_terminal
            and size.columns >= MIN_COLUMNS and size.lines >= MIN_LINES)


class _Clock:
    """Seconds per step and to the end, from the steps of this session."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total, self.first, self.done = total_steps, first_step, first_step
        self.start = time.monotonic()

    def text(self) -> str:
        """E.g. "1.2 s/step, 5m03s left"; at the end "1.2 s/step, took 6m"."""
        steps = self.done - self.first
        if steps <= 0:
            return ""
        elapsed_s = time.monotonic() - self.start
        per_step_s = elapsed_s / steps
        if self.done >= self.total:
            return f"{per_step_s:.2g} s/step, took {duration(elapsed_s)}"
        return f"{per_step_s:.2g} s/step, {duration(per_step_s * (self.total - self.done))} left"


def duration(seconds: float) -> str:
    """``duration(3723) == "1h02m"``, ``duration(63) == "1m03s"``, ``duration(7.2) == "7s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class PlainProgress(Progress):
    """One line per step; a table per evaluation."""

    def __init__(self, experts: Sequence[str], total_steps: int, first_step: int, stream: TextIO) -> None:
        self._experts = list(experts)
        self._clock = _Clock(total_steps, first_step)
        self._stream = stream

    def step(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        self._clock.done = step
        parts = [f"step {step}/{self._clock.total} {phase}"]
        if len(self._experts) <= _LISTED_EXPERTS:
            parts += [self._expert_text(e, values) for e in self._experts]
        else:
            parts.append(self._range_text(values))
        self.note(" | ".join(p for p in [*parts, self._clock.text()] if p))

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self.note(f"evaluation at step {evaluation.get('step')}\n{policy_table_text(evaluation)}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @staticmethod
    def _expert_text(expert: str, values: Mapping[str, float]) -> str:
        shown = [f"{heading} {form.format(values[f'{expert}/{name}'])}" for name, heading, form in SHOWN[:4]
                 if f"{expert}/{name}" in values]
        return f"{expert}: {' '.join(shown)}" if shown else ""

    def _range_text(self, values: Mapping[str, float]) -> str:
        texts = []
        for name, heading, form in SHOWN[:4]:
            known = [values[f"{e}/{name}"] for e in self._experts if f"{e}/{name}" in values]
            if known:
                low, mean, high = (form.format(v) for v in (min(known), sum(known) / len(known), max(known)))
                texts.append(f"{heading} {mean} ({low} to {high})")
        return f"{len(self._experts)} experts: {', '.join(texts)}" if texts else ""


class LiveProgress(Progress):
    """Bar with remaining time, current phase, one row per expert, the last accuracy table."""

    def __init__(self, experts: Sequence[str], total_steps: int, first_step: int, stream: TextIO) -> None:
        self._experts = list(experts)
        self._clock = _Clock(total_steps, first_step)
        self._phase = "starting"
        self._kind = ""
        self._values: dict[str, float] = {}
        self._evaluation: Mapping[str, Any] | None = None
        self._accuracy: tuple[int, Table] | None = None
        self._console = Console(file=stream, force_terminal=True)
        self._live = Live(self, console=self._console, refresh_per_second=2, transient=False)
        self._live.start()

    def phase(self, name: str) -> None:
        self._phase = name

    def step(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        self._clock.done, self._kind = step, phase
        self._values.update(values)
        self._live.refresh()

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self._evaluation, self._accuracy = evaluation, None
        self._live.refresh()

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        self._phase = ""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out for the window as it is now: what does not fit its height is left out from the bottom."""
        lines_left = console.size.height - 1
        yield self._header(options.max_width)
        lines_left -= 2
        for make in (self._expert_table, self._accuracy_table):
            table = make(options.max_width, lines_left)
            if table is not None:
                yield table
                lines_left -= table.row_count + 1

    def _header(self, width: int) -> Group:
        clock = self._clock
        state = Text(f"step {clock.done}/{clock.total}", style="bold")
        for text, style in ((self._kind, "cyan"), (self._phase, "magenta"), (clock.text(), "")):
            if text:
                state.append(f"  {text}", style=f"not bold {style}")
        state.truncate(width, overflow="ellipsis")
        bar = Table.grid()  # the bar itself ends without a line break
        bar.add_row(ProgressBar(total=max(1, clock.total), completed=clock.done, width=min(width, 100)))
        return Group(state, bar)

    def _expert_table(self, width: int, lines: int) -> Table | None:
        """One row per expert; the columns and rows that fit."""
        present = [s for s in SHOWN if any(f"{e}/{s[0]}" in self._values for e in self._experts)]
        if not present or lines < 3:
            return None
        experts = self._experts if len(self._experts) < lines else self._experts[:lines - 2]
        columns = [["expert", *experts]]
        for name, heading, form in present:
            values = [self._values.get(f"{expert}/{name}") for expert in experts]
            columns.append([heading, *("-" if v is None else form.format(v) for v in values)])
        while len(columns) > 2 and sum(max(map(len, column)) + 2 for column in columns) > width:
            columns.pop()
        table = Table(box=None, pad_edge=False, header_style="dim")
        for i, column in enumerate(columns):
            table.add_column(column[0], justify="right" if i else "left", no_wrap=True)
        for row in zip(*(column[1:] for column in columns), strict=True):
            table.add_row(*map(Text, row))
        if len(experts) < len(self._experts):
            table.add_row(Text(f"+ {len(self._experts) - len(experts)} more", style="dim"))
        return table

    def _accuracy_table(self, width: int, lines: int) -> Table | None:
        """The last evaluation if it fits; built once per width, as it is redrawn twice a second."""
        if self._evaluation is None:
            return None
        around = 7  # title, blank lines, headings, rule, caption of up to two lines
        if len(self._evaluation["policies"]) + around > lines:
            return None
        if self._accuracy is None or self._accuracy[0] != width:
            table = policy_table(self._evaluation, width=width)
            table.title = f"evaluation at step {self._evaluation.get('step')}"
            table.title_justify = "left"
            self._accuracy = (width, table)
        return self._accuracy[1]
