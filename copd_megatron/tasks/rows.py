"""Rows of a JSONL or Parquet file by index: Python values, read lazily where a row may hold pictures."""
from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from copd_megatron.types import UserError

Row = dict[str, Any]


class JsonLines(Sequence[Row]):
    """A JSONL file, one object a line; empty lines are skipped. Held in memory: its media are paths."""

    def __init__(self, path: Path, where: str, skip: bool = False) -> None:
        """``skip``: leave lines out that are no objects, see ``skipped``."""
        self._rows: list[Row] = []
        self._numbers: list[int] = []
        self.skipped: list[UserError] = []
        """Why lines were left out."""
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        self._rows.append(_parse_line(line, f"{where}: {path} row {number}"))
                    except UserError as error:
                        if not skip:
                            raise
                        self.skipped.append(error)
                    else:
                        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def number(self, index: int) -> int:
        """The row as an editor numbers it: 1-based, empty lines counted."""
        return self._numbers[index]


class ParquetRows(Sequence[Row]):
    """A Parquet file, memory-mapped through the cache of Hugging Face datasets (HF_DATASETS_CACHE), so that
    all ranks of a machine share one copy of its pictures."""

    def __init__(self, path: Path, where: str, skip: bool = False) -> None:
        """``skip`` changes nothing: Parquet has rows or is damaged as a whole."""
        import datasets
        import pyarrow

        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            loaded = datasets.Dataset.from_parquet(str(path))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{where}: {path} was given; it cannot be read as Parquet ({str(error)[:200]}); "
                            "write it again") from error
        finally:
            if shown:
                datasets.enable_progress_bars()
        self.skipped: list[UserError] = []
        self._table = loaded.with_format("arrow")  # raw values: an image column stays {"bytes":, "path":}

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        return self._table[index].to_pylist()[0]

    def number(self, index: int) -> int:
        """The row counted from 1."""
        return index + 1


Rows = JsonLines | ParquetRows

READERS = {".jsonl": JsonLines, ".parquet": ParquetRows}
"""Reader by file name ending."""


def read_rows(path: Path, where: str, skip: bool = False) -> Rows:
    """Open a data file; ``where`` begins every error, e.g. "task_args.path".

    Args:
        skip: leave lines out that are no JSON objects.

    Raises:
        UserError: no such file, an unknown ending, not one JSON object a line, damaged Parquet, or no rows.
    """
    if path.suffix not in READERS:
        raise UserError(f"{where}: {path} was given; allowed are files that end in {' or '.join(READERS)}; "
                        "convert it")
    if not path.is_file():
        raise UserError(f"{where}: {path} was given; there is no such file; correct the path")
    rows = READERS[path.suffix](path, where, skip)
    if not len(rows):
        raise UserError(f"{where}: {path} was given; it has no rows; at least one is needed")
    return rows


def copy_rows(path: Path, numbers: Collection[int], target: Path) -> None:
    """Write the rows of a data file with these numbers (see ``number``) to another one, as they are and in their
    order; the whole file or, where the disk refuses, nothing.

    Raises:
        OSError: the disk refuses.
    """
    partial = target.with_name(target.name + ".tmp")
    wanted = set(numbers)
    try:
        if path.suffix == ".parquet":
            _copy_parquet(path, wanted, partial)
        else:
            with path.open("rb") as source, partial.open("wb") as out:
                out.writelines(line.rstrip(b"\r\n") + b"\n" for number, line in enumerate(source, start=1)
                               if number in wanted)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _copy_parquet(path: Path, wanted: set[int], target: Path) -> None:
    """Batch by batch: a file may hold pictures."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as source, pq.ParquetWriter(target, source.schema_arrow) as out:
        number = 0
        for batch in source.iter_batches(1024):
            kept = [row for row in range(len(batch)) if number + row + 1 in wanted]
            number += len(batch)
            if kept:
                out.write_batch(batch.take(kept))


def _parse_line(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or nested without end
        raise UserError(f"{where}: no valid JSON ({str(error)[:120]}); allowed is one object a line; "
                        "correct it") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__} was given; allowed is one object a line; "
                        "correct it")
    return row
