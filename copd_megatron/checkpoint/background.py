"""A save in progress: every rank's thread writes its part, the main rank's thread makes the whole of them.

The threads speak through the folder alone, never through a collective: training keeps the network, and a save
becomes complete even while ranks compute, wait for each other, or leave.

    each writing rank   its shards, then .part_RANK (what it wrote, with sizes and SHA-256)
    main rank           awaits all .part files, writes index and PEFT folders, calls ``complete``, which renames
"""
from __future__ import annotations

import hashlib
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from copd_megatron.checkpoint.sharded import Part, Snapshot, write_index, write_part
from copd_megatron.checkpoint.whole_folder import WRITE_ERRORS, cannot_write
from copd_megatron.platform import device
from copd_megatron.types import UserError

SHARDED = "sharded"
LOOK_EVERY_S = 0.01
PART_TIMEOUT_S = 1800.0
"""A rank that has not written its part after this long is taken for lost."""

Files = dict[str, list]
"""Path within the save -> [bytes, SHA-256]."""


class Cancelled(Exception):
    """The save was given up."""


class BackgroundSave:
    """One save, on one rank. Made and asked on the training thread; works on its own."""

    def __init__(self, partial: Path, final: Path, snapshot: Snapshot, writers: Sequence[int],
                 complete: Callable[[Files], None] | None):
        """
        Args:
            writers: the ranks that have something to write.
            complete: on the main rank, given the files with their sizes and hashes, what is left to do.
        """
        self.partial, self.final, self.snapshot = partial, final, snapshot
        self.writers, self.complete = writers, complete
        self.problem: UserError | RuntimeError | None = None
        self._cancelled, self._device = threading.Event(), device()
        self._thread = threading.Thread(target=self._run, name=f"save {final.name}")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank has nothing left to do for the save."""
        return not self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for this rank's thread; False if it goes on after ``timeout_s``."""
        self._thread.join(timeout_s)
        return self.done

    def cancel(self) -> None:
        """Give the save up: the main rank awaits no more parts."""
        self._cancelled.set()

    def _run(self) -> None:
        if self._device.type == "cuda":  # a thread begins on the first GPU, where torch's writer would make a context
            torch.cuda.set_device(self._device)
        try:
            if not self.snapshot.is_empty:
                self._write_own()
            if self.complete is not None:
                self._make_whole(self.complete)
        except Cancelled:
            pass
        except WRITE_ERRORS as error:
            self.problem = cannot_write(self.final, "the save", f"rank {self.snapshot.rank}: {error}")
        except UserError as error:
            self.problem = error
        except Exception:  # noqa: BLE001 - raised again on the training thread
            self.problem = RuntimeError(f"rank {self.snapshot.rank}: saving failed\n{traceback.format_exc()}")

    def _write_own(self) -> None:
        part = write_part(self.partial / SHARDED, self.snapshot)
        files = describe(self.partial, [f"{SHARDED}/{name}" for name in part.files])
        name = self._part_file(self.snapshot.rank)
        partial = name.with_suffix(".tmp")
        partial.write_bytes(pickle.dumps((part, files)))
        partial.rename(name)

    def _make_whole(self, complete: Callable[[Files], None]) -> None:
        files: Files = {}
        parts: list[Part] = []
        deadline = time.monotonic() + PART_TIMEOUT_S
        for rank in self.writers:
            name = self._part_file(rank)
            while not name.exists():
                if self._cancelled.wait(LOOK_EVERY_S):
                    raise Cancelled
                if time.monotonic() > deadline:
                    raise RuntimeError(f"rank {rank} did not write its part of {self.final}")
            part, written = pickle.loads(name.read_bytes())
            parts.append(part)
            files |= written
            name.unlink()
        files |= describe(self.partial, [f"{SHARDED}/{name}" for name in
                                         write_index(self.partial / SHARDED, parts)])
        complete(files)

    def _part_file(self, rank: int) -> Path:
        return self.partial / f".part_{rank:05d}"


def describe(folder: Path, names: Sequence[str]) -> Files:
    """Size and SHA-256 of files that are on disk."""
    return {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in names}


def sha256(file: Path) -> str:
    """Hex hash of a file's content, read as a stream."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
