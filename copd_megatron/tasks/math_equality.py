"""Whether two mathematical answers are equal, by math-verify in a worker process that is killed when it
hangs.

math-verify's own timeouts use SIGALRM: they work in the main thread only and cannot stop sympy inside C code.
Here any thread may ask, every process of a run has its own worker, and an answer that takes too long is not
equal.
"""
from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

from copd_megatron.types import UserError

START_LIMIT_S = 120.0
"""Importing sympy takes a second; much more on a cold network file system."""
ANSWER_LIMIT_S = 10.0
"""Wall-clock limit; the worker gives up by itself after 2 s of processor time unless it is stuck in C
code."""
CACHED_PAIRS = 1 << 16


@lru_cache(CACHED_PAIRS)
def mathematically_equal(reference: str, given: str) -> bool:
    """True if math-verify finds the two LaTeX (or plain) expressions equal; False if it cannot tell in time.

    Thread-safe and safe after fork. Both texts should be short: the caller bounds them.

    Raises:
        UserError: math-verify is not installed.
    """
    return _worker.ask(reference, given)


class _Worker:
    """A lazily started ``math_worker`` process; restarted after it had to be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, reference: str, given: str) -> bool:
        with self._lock:
            process = self._process = self._process or _start()
            try:
                process.stdin.write(json.dumps([reference, given]).encode() + b"\n")
                return bool(json.loads(_read_line(process, ANSWER_LIMIT_S)))
            except (TimeoutError, EOFError, BrokenPipeError):  # hung, or ended by its memory limit
                self._stop()
                return False

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def _start() -> subprocess.Popen[bytes]:
    # -P: the script's own folder stays off sys.path, where our module names could shadow others.
    command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, bufsize=0)
    try:
        hello = json.loads(_read_line(process, START_LIMIT_S))
    except (TimeoutError, EOFError) as error:
        process.kill()
        process.wait()
        raise RuntimeError(f"the math-verify worker did not start: {error}") from error
    if "error" in hello:
        process.wait()
        raise UserError(f"tasks.verifier: 'math' was given; it needs math-verify, which cannot be imported "
                        f"({hello['error']}); pip install 'math-verify>=0.9'")
    return process


def _read_line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """One line of the worker's output; raises TimeoutError or EOFError."""
    end = time.monotonic() + limit_s
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError(f"the math worker was silent for {limit_s} s")
        received = os.read(process.stdout.fileno(), 4096)
        if not received:
            raise EOFError("the math worker ended")
        line += received
    return line


_worker = _Worker()


def _forget_worker() -> None:
    """A forked child must not share its parent's worker: their questions and answers would mix."""
    global _worker
    _worker = _Worker()


os.register_at_fork(after_in_child=_forget_worker)
atexit.register(lambda: _worker.close())
