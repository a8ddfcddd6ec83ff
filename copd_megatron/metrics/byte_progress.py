"""What a person sees while files are converted: a bar on a terminal, a line per tenth in a log file."""
from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from copd_megatron.metrics.progress import duration


class ByteProgress:
    """Counts bytes up to ``total``; a context manager. ``advance`` is given to whatever writes them."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None):
        """``stream``: standard error by default, so that standard output holds results only."""
        stream = stream or sys.stderr
        self.title, self.total, self.done, self._stream = title, max(1, total), 0, stream
        self._start, self._tenth = time.monotonic(), 0
        console = Console(file=stream)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                   TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, refresh_per_second=4) if console.is_terminal else None
        self._task = self._bar.add_task(title, total=self.total) if self._bar else None

    def __enter__(self) -> ByteProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """``count`` more bytes are written."""
        self.done += count
        if self._bar:
            self._bar.advance(self._task, count)
        elif (tenth := min(10, 10 * self.done // self.total)) > self._tenth:
            self._tenth = tenth
            elapsed_s = time.monotonic() - self._start
            left = duration(elapsed_s * max(0, self.total - self.done) / self.done)
            print(f"{self.title}: {10 * tenth} % of {self.total / 1e9:.3g} GB, "
                  + (f"{left} left" if tenth < 10 else f"took {duration(elapsed_s)}"), file=self._stream, flush=True)
