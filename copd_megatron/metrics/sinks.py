"""Where the numbers go: an append-only JSON Lines file, TensorBoard, Weights & Biases.

``metrics.jsonl`` is the record and loses nothing silently; the other two are copies for other viewers.
"""
from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from copd_megatron.types import UserError

log = logging.getLogger(__name__)

HELD_LINES = 1000
"""Lines kept in memory while the disk refuses them; one more stops the run."""


class JsonLines:
    """Appends records to a file, one JSON object a line, each line in the file before ``append`` returns.

    A write that fails (disk full, quota) leaves no partial line: the line is held in memory and tried again
    with the next one. Beyond ``held_lines`` lines, or if ``close`` cannot write the rest, UserError is
    raised.
    """

    def __init__(self, path: Path, resume_step: int | None, held_lines: int = HELD_LINES) -> None:
        """``resume_step`` None starts a new file (UserError if there is one with content), else keeps the
        lines of steps up to and including it."""
        self.path = path
        self._held_lines = held_lines
        self._held: deque[bytes] = deque()
        self._failing = False
        if resume_step is not None:
            keep_lines_until(path, resume_step)
        elif path.exists() and path.stat().st_size > 0:
            raise UserError(f"run_dir: {path.parent} already holds {path.name}; a new run needs an empty "
                            "folder; pass --resume or another --run-dir")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the object
        self._size = path.stat().st_size

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Values must be strict JSON (no NaN)."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        self._held.append(line.encode() + b"\n")
        self._write_held()
        if len(self._held) > self._held_lines:
            raise UserError(f"run_dir: {self.path} cannot be written since {len(self._held)} lines; the run "
                            "stops before numbers are lost; free disk space and resume")

    def close(self) -> None:
        """Write what is held and close; UserError if lines would be lost."""
        if self._file.closed:
            return
        self._write_held()
        self._file.close()
        if self._held:
            raise UserError(f"run_dir: the last {len(self._held)} lines of {self.path} could not be written; "
                            "free disk space; the steps since then are missing in the record")

    def _write_held(self) -> None:
        try:
            while self._held:
                written = 0
                while written < len(self._held[0]):
                    written += self._file.write(self._held[0][written:])
                self._size += written
                self._held.popleft()
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)
            if not self._failing:
                log.warning("%s cannot be written (%s): lines are held in memory and tried again at every "
                            "step; free disk space", self.path, error)
            self._failing = True
            return
        if self._failing:
            log.warning("%s can be written again; nothing was lost", self.path)
            self._failing = False


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of later steps and a broken last line from a JSON Lines file, atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the process died inside a write
            continue
        if record["step"] <= step:
            kept.append(line + b"\n")
    replace_file(path, b"".join(kept))


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that a reader sees the old or the new content, never a part."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    os.replace(partial, path)


class Sink(Protocol):
    """A copy of the numbers for another viewer."""

    name: str

    def write(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Take the values of one step; may raise anything, the recorder then goes on without this sink."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoardSink:
    """TensorBoard events under ``<run>/tensorboard``; ``->`` and ``~`` of names become ``-to-`` and
    ``-vs-``."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        """On resume TensorBoard is told to hide the events of steps after ``resume_step``."""
        if not _installed("tensorboard"):
            raise UserError("metrics.tensorboard: true, but the package tensorboard is not installed; "
                            "pip install tensorboard, or set metrics.tensorboard=false")
        from torch.utils.tensorboard import SummaryWriter  # 2 s to import: only where it is used
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """One scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace("->", "-to-").replace("~", "-vs-"), value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id lives in ``<run>/wandb_id.txt``, so that a resumed run continues it.

    W&B's own step never goes back, ours does after a resume: values carry a ``step`` of their own, which is
    the x axis of every chart. Steps that were repeated show twice there; ``metrics.jsonl`` has them once.
    """

    name = "W&B"

    def __init__(self, run_dir: Path, project: str, mode: str, run_config: Mapping[str, Any] | None) -> None:
        """``mode`` is ``online`` or ``offline``; UserError if W&B does not start."""
        check_wandb(mode)
        import wandb

        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(project=project, id=id_file.read_text().strip(), name=run_dir.name,
                                   dir=str(run_dir), mode=mode, resume="allow" if mode == "online" else None,
                                   config=dict(run_config or {}))
        except Exception as error:  # wandb raises many kinds: no login, no network, bad project
            raise UserError(f"metrics.wandb: {mode!r} did not start ({error}); run `wandb login`, "
                            "or set metrics.wandb=offline or off") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """One W&B history row."""
        self._run.log({**values, "step": step, "phase": phase})

    def close(self) -> None:
        """Finish the run (waits for uploads when online)."""
        self._run.finish()


def check_wandb(mode: str) -> None:
    """UserError if W&B is asked for and its package is missing; cheap enough for every rank."""
    if mode != "off" and not _installed("wandb"):
        raise UserError(f"metrics.wandb: {mode!r} needs the package wandb, which is not installed; "
                        'pip install "copd_megatron[wandb]", or set metrics.wandb=off')


def _installed(package: str) -> bool:
    """Whether ``package`` can be imported; a mere folder of that name (W&B leaves ``wandb/`` behind) does not
    count, although Python takes it for a namespace package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
