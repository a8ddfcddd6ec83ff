"""The saves of a run folder: which there are, which are whole, which may go.

A save is whole when state.json is what it says it is (it carries its own hash) and every file it lists has the
size and the SHA-256 it was written with.
"""
from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from copd_megatron.checkpoint import whole_folder
from copd_megatron.checkpoint.background import sha256
from copd_megatron.parallel.collectives import all_gather_objects, broadcast_object

log = logging.getLogger(__name__)
STATE, ADAPTERS = "state.json", "adapters"
FORMAT = 2
"""Of state.json; counted up when older saves can no longer be read."""

_NAME = re.compile(r"step_(\d{6,})")


def save_name(step: int) -> str:
    """Name of the folder of a step's save."""
    return f"step_{step:06d}"


def list_saves(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a save, newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(((int(m[1]), f) for f in entries if (m := _NAME.fullmatch(f.name))), reverse=True)


def prune(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Remove what crashes left behind and all but the newest ``keep_last`` saves up to ``step``.

    Saves of multiples of ``keep_every`` stay (0: none). Later saves neither count nor go: they can only be
    damaged ones that a resume skipped.
    """
    for leftover in folder.glob("step_*.tmp"):
        whole_folder.discard(leftover)
    older = [(s, path) for s, path in list_saves(folder) if s <= step][keep_last:]
    for at, path in older:
        if keep_every and at % keep_every == 0:
            continue
        try:
            whole_folder.remove(path)
        except OSError as error:
            log.warning("%s is no longer needed but cannot be removed (%s)", path, error)


def write_state(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write state.json, the last file of a save."""
    (folder / STATE).write_text(json.dumps({"sha256": _digest(meta), **meta}, indent=1) + "\n")


def newest_whole(folder: Path, world: ProcessGroup) -> tuple[Path, dict[str, Any]] | None:
    """The newest save whose every file is intact, with its state; None if there is none. Every rank calls it.

    Damaged ones are skipped with a warning that says what is wrong. Ranks share the reading.
    """
    is_main = world.rank() == 0
    for _, path in broadcast_object(list_saves(folder) if is_main else None, 0, world):
        meta, problem = broadcast_object(_read_state(path) if is_main else None, 0, world)
        if problem is None:
            mine = _damage(path, meta["files"], world.rank(), world.size())
            problem = next((p for p in all_gather_objects(mine, world) if p), None)
        if problem is None:
            return path, meta
        if is_main:
            log.warning("%s is damaged and was skipped (%s)", path, problem)
    return None


def whole_save(folder: Path, step: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """As ``newest_whole``, by a process alone; with ``step`` the save of that step or None."""
    for at, path in list_saves(folder):
        if step is None or at == step:
            meta, problem = _read_state(path)
            problem = problem or _damage(path, meta["files"], 0, 1)
            if problem is None:
                return path, meta
            log.warning("%s is damaged and was skipped (%s)", path, problem)
    return None


def _read_state(path: Path) -> tuple[dict[str, Any], str | None]:
    """state.json and what is wrong with it."""
    try:
        meta = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        return {}, str(error)
    if not isinstance(meta, dict) or meta.pop("sha256", None) != _digest(meta):
        return {}, f"{STATE} is corrupt"
    if meta.get("format") != FORMAT:
        return {}, f"{STATE} has format {meta.get('format')}; this version reads {FORMAT}"
    return meta, None


def _damage(path: Path, files: Mapping[str, list], rank: int, size: int) -> str | None:
    """What is wrong with this rank's share of the files."""
    for name, (length, digest) in sorted(files.items())[rank::size]:
        try:
            found = (path / name).stat().st_size
            if found != length:
                return f"{name} has {found} bytes instead of {length}"
            if sha256(path / name) != digest:
                return f"{name} is corrupt"
        except OSError as error:
            return str(error)
    return None


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
