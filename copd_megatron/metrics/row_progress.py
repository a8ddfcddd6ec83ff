"""How far a command is that works through the rows of a file: a line that is redrawn, or a line now and then."""
from __future__ import annotations

import sys
import time
from typing import TextIO

from copd_megatron.metrics.progress import duration

EVERY_S = {True: 0.5, False: 10.0}
"""Seconds between lines, on a terminal and elsewhere."""


class RowProgress:
    """Example of a line: ``score: 1,280 rows, 3 with errors, 41 %, 52 rows/s, 1m20s left``."""

    def __init__(self, what: str, done: float = 0.0, stream: TextIO | None = None):
        """``done``: share of the work that an earlier start did."""
        self.what, self.stream, self._first = what, stream or sys.stderr, done
        self._live = self.stream.isatty()
        self._start = self._shown = time.monotonic()
        self._rows, self._width = 0, 0

    def update(self, new_rows: int, rows: int, errors: int, done: float) -> None:
        """``new_rows`` more are answered: now ``rows``, ``errors`` of them with errors, ``done`` of 1 of the work."""
        self._rows += new_rows
        now = time.monotonic()
        if now - self._shown < EVERY_S[self._live] and done < 1:
            return
        self._shown, elapsed_s = now, max(1e-3, now - self._start)
        parts = [f"{self.what}: {rows:,} rows", f"{errors:,} with errors" if errors else "", f"{done:.0%}",
                 f"{self._rows / elapsed_s:.3g} rows/s"]
        if self._first < done < 1:
            parts.append(f"{duration(elapsed_s * (1 - done) / (done - self._first))} left")
        self.show(", ".join(part for part in parts if part))

    def show(self, line: str) -> None:
        """Redraw the line, or print it."""
        if self._live:
            self.stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line."""
        if self._live and self._width:
            self.stream.write("\n")
            self.stream.flush()
