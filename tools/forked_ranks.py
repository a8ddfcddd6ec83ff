"""Gloo ranks forked from this process, which has imported everything once: a rank costs a fraction of a second.

The parent must own no threads: call ``torch.set_num_threads(1)`` before anything is computed.
"""
from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def fork_ranks(ranks: int, body: Callable[..., Any], *arguments: Any) -> Any:
    """What ``body(*arguments)`` returned on rank 0, called on so many ranks of the default process group.

    Raises:
        ArithmeticError: with the traceback of a rank that failed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        started = []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_run, args=(rank, ranks, Path(folder), sender, body, arguments))
            with warnings.catch_warnings():  # "multi-threaded, use of fork() may lead to deadlocks"
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            sender.close()
            started.append((receiver, child))
        results: dict[int, Any] = {}
        try:
            while waiting := [receiver for receiver, _ in started if not receiver.closed]:
                for receiver in multiprocessing.connection.wait(waiting):
                    rank, failure, result = receiver.recv()
                    receiver.close()
                    if failure:
                        raise ArithmeticError(failure)
                    results[rank] = result
        finally:
            for _, child in started:
                if sys.exc_info()[0]:
                    child.kill()
                child.join()
    return results[0]


def _run(rank: int, ranks: int, folder: Path, sender: Connection, body: Callable[..., Any],
         arguments: tuple[Any, ...]) -> None:
    """One rank; leaves by ``os._exit``, as no exit handler of the parent may run here."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank,
                                world_size=ranks)
        message = rank, "", body(*arguments)
        dist.barrier()
    except BaseException:
        message = rank, traceback.format_exc(), None
    sender.send(message)
    sys.stdout.flush()
    os._exit(0)
