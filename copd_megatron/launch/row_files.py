"""A file of rows becomes another one, and an interrupted command goes on where it stopped.

``OUT.partial`` grows by whole windows of rows; ``OUT.partial.json`` says how many are safe, of which input (SHA-256 of
the bytes read so far) and under which arguments. What was written after it is cut off and done again; another input
or other arguments are refused. At the end the partial file is renamed to ``OUT``.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from copd_megatron.metrics.row_progress import RowProgress
from copd_megatron.metrics.sinks import replace_file
from copd_megatron.trainer.row_prompts import InputRow
from copd_megatron.types import UserError

WINDOW_CHARS = 200_000
"""Length of a window's rows, about 50,000 tokens; media count as below."""
WINDOW_ROWS = 1024
MEDIUM_CHARS = 8_000
"""What an image or video counts for in a window."""
PROBED_ROWS = 16
"""A file none of whose first rows is an object is no file of rows."""
FORMAT = 1


class JsonlFiles:
    """Reads rows from one JSONL file and appends answers to another."""

    def __init__(self, what: str, source: Path, target: Path, arguments: Mapping[str, Any], overwrite: bool = False):
        """Open both, going on with a partial output if there is one.

        Args:
            what: name of the command, for progress.
            arguments: whatever the answers depend on; JSON values.
            overwrite: begin anew, whatever there is.

        Raises:
            UserError: no readable rows, an output that exists, or a partial one of another input or other arguments.
        """
        check_input(source)
        self.source, self.target = source, target
        self.partial, self.state_file = (target.with_name(target.name + end) for end in (".partial", ".partial.json"))
        self.arguments = json.loads(json.dumps(arguments))
        self.replicas = 1
        """Windows are so many times as large."""
        check_output(target, overwrite)
        if target.exists() and target.samefile(source):
            raise UserError(f"--output: {target} is the input, too; another file is needed; name one")
        self._digest = hashlib.sha256()
        self._read = self._written = self.rows = self.errors = 0
        self._input: BinaryIO = source.open("rb")
        self._size = max(1, source.stat().st_size)
        if overwrite:
            self.state_file.unlink(missing_ok=True)
        self._resume()
        self._output: BinaryIO | None = None  # opened with the first answers: a mistake found before leaves nothing
        self.progress = RowProgress(what, self._read / self._size)

    def next_window(self) -> list[InputRow]:
        """The next rows; [] at the end."""
        window, chars = [], 0
        while chars < WINDOW_CHARS * self.replicas and len(window) < WINDOW_ROWS * self.replicas:
            line = self._input.readline()
            if not line:
                break
            self._digest.update(line)
            self._read += len(line)
            if line.strip():
                row = _parse(line, self.rows + len(window))
                window.append(row)
                chars += len(line) + MEDIUM_CHARS * _media(row.content)
        return window

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write answers and note that they are safe.

        Raises:
            UserError: the disk refuses; the rows before stay.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        text = lines.encode("utf-8", "backslashreplace")  # lone surrogates, which JSON can escape
        try:
            self._output = self._output or self.partial.open("ab")
            self._output.write(text)
            self._output.flush()
            os.fsync(self._output.fileno())
            self._written += len(text)
            self.rows += len(rows)
            self.errors += sum("error" in row for row in rows)
            state = {"format": FORMAT, "arguments": self.arguments, "rows": self.rows, "errors": self.errors,
                     "input_bytes": self._read, "input_sha256": self._digest.hexdigest(),
                     "output_bytes": self._written}
            replace_file(self.state_file, json.dumps(state, indent=1).encode())
        except OSError as error:
            raise UserError(f"--output: {self.partial} cannot be written ({error}); a disk with room is needed; free "
                            f"space and give the same command again: it goes on after row {self.rows}") from error
        self.progress.update(len(rows), self.rows, self.errors, self._read / self._size)

    def finish(self) -> None:
        """The output is whole: give it its name."""
        self.close()
        self.partial.replace(self.target)
        self.state_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the partial output for the next start."""
        self.progress.close()
        self._input.close()
        if self._output:
            self._output.close()

    def _resume(self) -> None:
        """Go to where the state says, or begin anew without one."""
        if not self.state_file.exists():
            self.partial.unlink(missing_ok=True)  # nothing in it is known to be safe
            return
        anew = f"give the same again, another --output, or --overwrite to begin {self.target} anew"
        try:
            state = json.loads(self.state_file.read_text())
            known = state["format"] == FORMAT and self.partial.stat().st_size >= state["output_bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(f"--output: {self.state_file} and {self.partial} do not belong together; both were left "
                            f"by an interrupted command; {anew}")
        for name in sorted(self.arguments.keys() | state["arguments"].keys()):
            now, then = self.arguments.get(name), state["arguments"].get(name)
            if now != then:
                raise UserError(f"--output: {self.partial} was begun with {name} {_shown(then)}, now it is "
                                f"{_shown(now)}; {anew}")
        left = state["input_bytes"]
        while left and (block := self._input.read(min(left, 1 << 20))):
            self._digest.update(block)
            left -= len(block)
        if left or self._digest.hexdigest() != state["input_sha256"]:
            raise UserError(f"--input: {self.source} has changed since {self.partial} was begun; the {state['rows']} "
                            f"rows that are answered must be the same; {anew}")
        os.truncate(self.partial, state["output_bytes"])
        self._read, self._written = state["input_bytes"], state["output_bytes"]
        self.rows, self.errors = state["rows"], state["errors"]


def check_input(source: Path) -> None:
    """Raise UserError unless the file has rows."""
    if not source.is_file():
        given = "is a folder" if source.is_dir() else "does not exist"
        raise UserError(f"--input: {source} {given}; a JSONL file with one object a line is needed; correct the path")
    with source.open("rb") as file:
        first = [row for line in (file.readline() for _ in range(PROBED_ROWS)) if line.strip()
                 for row in [_parse(line, 0)]]
    if not first and source.stat().st_size < 1 << 20 and not source.read_bytes().strip():
        raise UserError(f"--input: {source} has no rows; at least one is needed; write one object a line")
    if first and not any(isinstance(row.content, dict) for row in first):
        raise UserError(f"--input: {source} is no JSONL file (row 1: {first[0].error or 'no object'}); one object a "
                        "line is needed; convert it")


def check_output(target: Path, overwrite: bool) -> None:
    """Raise UserError if the output may not be written."""
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--output: {target} {'is a folder' if target.is_dir() else 'is in no folder that exists'}; a "
                        "file name in an existing folder is needed; correct the path")
    if target.exists() and not overwrite:
        raise UserError(f"--output: {target} exists; a new file is needed; name another one, or --overwrite")


def folder_stamp(folder: Path) -> str:
    """Hash of the names, sizes and times of a folder's files: equal for what has not been touched."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    facts = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _parse(line: bytes, number: int) -> InputRow:
    try:
        return InputRow(number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return InputRow(number, None, f"no valid JSON ({str(error)[:120]}); allowed is one object a line")


def _media(content: Any) -> int:
    """About how many images and videos a row has."""
    if not isinstance(content, dict):
        return 0
    fields = [content.get("images"), content.get("videos")]
    listed = sum(len(field) if isinstance(field, list) else field is not None for field in fields)
    parts = [part for message in _list(content.get("messages")) if isinstance(message, dict)
             for part in _list(message.get("content"))]
    return max(listed, sum(isinstance(part, dict) and part.get("type") != "text" for part in parts))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
