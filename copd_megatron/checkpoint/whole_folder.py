"""Folders that are whole or absent: written under a temporary name, flushed to disk, then renamed.

``NAME.tmp`` is never read by anything; a crash leaves at most such a folder, which the next attempt clears.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from copd_megatron.types import UserError

WRITE_ERRORS = (OSError, SafetensorError)
"""What a full disk or a missing permission raises; safetensors wraps the system's error in its own."""


def begin(final: Path) -> Path:
    """An empty folder to write into instead of ``final``; leftovers of an earlier attempt are removed."""
    partial = final.with_name(final.name + ".tmp")
    discard(partial)
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path, final: Path) -> None:
    """Let the written folder become ``final``, replacing an earlier one of that name."""
    for entry in [*partial.rglob("*"), partial]:
        _flush(entry)
    old = _put_aside(final) if final.exists() else None
    partial.rename(final)
    _flush(final.parent)
    if old:
        discard(old)


def remove(folder: Path) -> None:
    """Remove a whole folder so that an interruption cannot leave half of it under its name."""
    discard(_put_aside(folder))


def _put_aside(folder: Path) -> Path:
    """Rename a whole folder to a temporary name."""
    old = folder.with_name(folder.name + ".old.tmp")
    discard(old)
    return folder.rename(old)


def discard(partial: Path) -> None:
    """Remove a temporary folder, if there is one, as far as the disk lets us."""
    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(final: Path, what: str) -> Iterator[Path]:
    """A folder to write into: it becomes ``final`` when the block ends and vanishes when the block raises.

    Raises:
        UserError: the disk refuses; says that ``what`` could not be written.
    """
    partial = final.with_name(final.name + ".tmp")
    try:
        yield begin(final)
        finish(partial, final)
    except WRITE_ERRORS as error:
        discard(partial)
        raise cannot_write(final, what, error) from error
    except BaseException:
        discard(partial)
        raise


def cannot_write(path: Path, what: str, reason: object) -> UserError:
    """The one message for a disk that refuses."""
    return UserError(f"{path}: {what} could not be written ({reason}); a folder with room and write "
                     "permission is needed; free space or mend the disk (nothing was left half-written)")


def _flush(path: Path) -> None:
    """Push a file's or folder's content to the disk, so that no rename overtakes what it publishes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
