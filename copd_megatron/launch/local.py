"""Ranks on this machine, for commands that need several: started by the command itself where nobody else did.

The ranks find each other through a store in this process. Signals that it gets are handed on, the output of the ranks
is its own, and when one rank fails the others are ended. Several machines need torchrun.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from copd_megatron.launch import environment

GRACE_S = 5.0
"""Ranks that outlive the first have so long to end when they are asked, before they are killed."""
POLL_S = 0.05


def run_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run ``copd ARGUMENTS`` on ``count`` ranks of this machine. Returns the exit code of the first rank that failed,
    0 when all are done."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "copd_megatron", *arguments],
            env=environment.of_rank(rank, count, store.port),
            start_new_session=True,  # Ctrl-C reaches this process alone, which hands it on once
        )
        for rank in range(count)
    ]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    patience_s = 0.0
    try:
        code = _wait(ranks)
        # Ranks that were asked to stop end by themselves; what one rank failed at, the others repeat or wait for.
        patience_s = GRACE_S if code == environment.INTERRUPTED else 0.0
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end(ranks, patience_s)


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    """Until all are done, or one has failed."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_S)


def _end(ranks: Sequence[subprocess.Popen], patience_s: float) -> None:
    """End the ranks that still run."""
    for wait_s, ask in ((patience_s, subprocess.Popen.terminate), (GRACE_S, subprocess.Popen.kill)):
        deadline = time.monotonic() + wait_s
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for rank in ranks:
            if rank.poll() is None:
                ask(rank)
    for rank in ranks:
        rank.wait()
