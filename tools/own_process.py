"""Work in an interpreter of its own, so that nothing of other work is in its memory, with a limit on its time.

The process is spawned, not forked: a forked one has the parent's pool of OpenMP threads without the threads, and
waits for them for ever. So it imports again what the work needs, a few seconds. Ctrl-C is this process's to answer: it
ends the other one.
"""
from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from copd_megatron.types import UserError  # noqa: E402


def in_a_process(work: Callable[..., Any], *given: Any, limit_s: float = 3600.0) -> Any:
    """``work(*given)`` in a process of its own; work, arguments and result are pickled.

    Raises:
        UserError: the work's own; or the process ended, as Linux ends it when memory is out; or it took longer than
            ``limit_s`` (then the stacks of all its threads are on stderr).
        ArithmeticError: the work's own.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, work, given))
    with _deaf_to_interrupts():
        process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            os.kill(process.pid, signal.SIGUSR1)
            process.join(2)
            raise UserError(f"{work.__name__}: nothing after {limit_s:.0f} s; its stacks are above: in a product, the "
                            "machine is too slow or too busy for this size; in a lock, threads wait for each other; "
                            "a smaller size or a longer limit")
        outcome = ours.recv()
    except EOFError:
        process.join()
        raise UserError(f"{work.__name__}: its process ended with {process.exitcode}; -9 means that memory was out; "
                        "a smaller size") from None
    finally:
        if sys.exc_info()[0]:
            process.kill()
        process.join()
    if isinstance(outcome, UserError | ArithmeticError):
        raise outcome
    return outcome


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside ignore SIGINT, while they import as well."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _child(connection: Connection, work: Callable[..., Any], given: Sequence[Any]) -> None:
    faulthandler.register(signal.SIGUSR1)
    try:
        connection.send(work(*given))
    except (UserError, ArithmeticError) as error:
        connection.send(error)
