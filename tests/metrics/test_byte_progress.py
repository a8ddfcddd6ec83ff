"""Progress of conversions: a line per tenth where there is no terminal, a bar where there is one."""
from __future__ import annotations

import io

from copd_megatron.metrics.byte_progress import ByteProgress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_per_tenth():
    stream = io.StringIO()
    with ByteProgress("merge", 2_000_000_000, stream) as progress:
        for _ in range(100):
            progress.advance(20_000_000)
        progress.advance(5)  # headers are not counted beforehand
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10 and lines[0].startswith("merge: 10 % of 2 GB, ") and lines[0].endswith(" left")
    assert "100 % of 2 GB, took " in lines[-1] and "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar():
    stream = _Terminal()
    with ByteProgress("merge", 100, stream) as progress:
        progress.advance(100)
    assert "merge" in stream.getvalue() and "100" in stream.getvalue()
