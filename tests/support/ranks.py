"""Run a function on several gloo ranks inside a test: forked processes, results and tracebacks brought back.

The parent imports Megatron once; a fork then costs a fraction of a second where a fresh interpreter costs
ten. Forked children own one thread each, and are ended by their own process ids.
"""
from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import megatron.core.pipeline_parallel  # noqa: F401  (imported here once, so that no child has to)
import megatron.core.transformer.transformer_layer  # noqa: F401
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import copd_megatron.platform  # noqa: F401

INHERITED: list[Any] = []
"""Keeps the parent's groups alive in a child: their threads were not forked, so closing them would hang."""


class RankError(AssertionError):
    """A rank raised, died or hung; the message carries its traceback."""


def run_ranks(n: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0,
              disturb: Callable[[Sequence[BaseProcess]], None] | None = None, **kwargs: Any) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on ``n`` forked ranks with torch.distributed (gloo) running.

    ``fn`` learns its rank from ``torch.distributed.get_rank()`` or from `Groups`; it may be a closure. Torch,
    NumPy and Python generators are seeded alike on all ranks. ``disturb``, if given, is called with the processes,
    by rank, while they run; it may kill some.

    Returns:
        What each rank returned, by rank; must be picklable (tensors come back as copies).

    Raises:
        RankError: a rank raised (its traceback is in the message; the other ranks are ended), died, or did
            not return within ``timeout_s`` (the message shows where each hung).
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        children: dict[Connection, tuple[int, BaseProcess]] = {}
        try:
            for rank in range(n):
                receiver, sender = context.Pipe(duplex=False)
                child = context.Process(target=_child, args=(rank, n, Path(folder), sender, timeout_s,
                                                             fn, args, kwargs))
                with warnings.catch_warnings():  # "multi-threaded, use of fork() may lead to deadlocks"
                    warnings.simplefilter("ignore", DeprecationWarning)
                    child.start()
                sender.close()
                children[receiver] = rank, child
            if disturb is not None:
                disturb([child for _, child in children.values()])
            return _collect(children, Path(folder), time.monotonic() + timeout_s)
        finally:
            for receiver, (_, child) in children.items():
                child.join(timeout=0.0 if sys.exc_info()[0] else 5.0)
                if child.is_alive():
                    child.kill()
                    child.join()
                receiver.close()


def _collect(children: dict[Connection, tuple[int, BaseProcess]], folder: Path, deadline: float) -> list[Any]:
    """Wait for all ranks; raise on the first that fails."""
    results: dict[int, Any] = {}
    waiting = dict(children)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = [rank for rank, _ in waiting.values()]
            stacks = "\n".join(f"rank {rank}:\n{(folder / f'stack_{rank}').read_text()}" for rank in hung)
            raise RankError(f"ranks {hung} did not return in time; they are at\n{stacks}")
        for receiver in ready:
            rank, child = waiting.pop(receiver)
            try:
                failure, payload = receiver.recv()
            except EOFError:
                child.join(timeout=5.0)
                raise RankError(f"rank {rank} died with exit code {child.exitcode}") from None
            if failure:
                raise RankError(f"rank {rank} failed:\n{failure}")
            results[rank] = pickle.loads(payload)
    return [results[rank] for rank in range(len(results))]


def _child(rank: int, size: int, folder: Path, sender: Connection, timeout_s: float, fn: Callable[..., Any],
           args: tuple, kwargs: dict) -> None:
    """Body of one rank. Leaves by ``os._exit``: no exit handler of the parent may run here."""
    with (folder / f"stack_{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(0.9 * timeout_s, file=stack)
        try:
            _start(rank, size, folder, timeout_s)
            message = "", pickle.dumps(fn(*args, **kwargs))
            dist.barrier()  # nobody closes a connection that another rank still reads from
        except BaseException:
            message = traceback.format_exc(), b""
        faulthandler.cancel_dump_traceback_later()
    sender.send(message)
    for helper in multiprocessing.active_children():
        helper.kill()  # Megatron's checkpoint writer would wait for the next save for ever
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _start(rank: int, size: int, folder: Path, timeout_s: float) -> None:
    """Make this process rank ``rank``, whatever the parent had running."""
    torch.set_num_threads(1)
    _forget_parent_groups()
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank,
                            world_size=size, timeout=timedelta(seconds=timeout_s))


def _forget_parent_groups() -> None:
    """Let a child start afresh although its parent runs, or ran, torch.distributed (a world of one rank).

    Megatron keeps some groups in its globals even after ``destroy_model_parallel``.
    """
    gc.freeze()  # nothing of the parent's is collected here, for the reason given at INHERITED
    c10d = dist.distributed_c10d
    INHERITED.append((c10d._world, dict(c10d._world.pg_map), vars(parallel_state).copy()))
    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    torch._C._distributed_c10d._unregister_all_process_groups()
    c10d._world = c10d._World()
    c10d._update_default_pg(None)
