"""``copd filter``: a new data file without the questions that are too long, never solved or always solved.

``OUT.pass_rates.jsonl`` is written while it runs (first line: of what; then a line per question) and stays as the
record; an interrupted command reads it back and goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copd_megatron.launch import environment, local
from copd_megatron.launch.commands import configured, leave, prepare
from copd_megatron.metrics.row_progress import RowProgress
from copd_megatron.types import UserError


class RatesFile:
    """Pass rates of the rows of a file, appended as they become known."""

    def __init__(self, path: Path, about: Mapping[str, Any]):
        """Go on with ``path`` if there is one.

        Args:
            about: whatever the rates depend on; JSON values.

        Raises:
            UserError: the file there is about something else.
        """
        self.path, self._known = path, {}
        head = json.dumps(about, sort_keys=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole and json.loads(whole[0]) != json.loads(head):
            was, now = json.loads(whole[0]), json.loads(head)
            name = next(key for key in now if was.get(key) != now[key])
            raise UserError(f"--out: {path} was begun with {name} {was.get(name)}, now it is {now[name]}; give the "
                            "same again, another --out, or --overwrite to begin anew")
        for line in whole[1:]:
            row = json.loads(line)
            self._known[row["row"]] = row["pass_rate"]
        # A line that the end cut off is measured again.
        path.write_bytes(b"".join(whole) if whole else head.encode() + b"\n")
        self._file = path.open("ab")
        self.progress: RowProgress | None = None

    def known(self) -> Mapping[int, float]:
        """See ``trainer.difficulty.Rates``."""
        return self._known

    def add(self, rates: Mapping[int, float], total: int) -> None:
        """See ``trainer.difficulty.Rates``."""
        self.progress = self.progress or RowProgress("filter", len(self._known) / total)
        try:
            lines = [json.dumps({"row": row, "pass_rate": rate}) + "\n" for row, rate in rates.items()]
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"--out: {self.path} cannot be written ({error}); a disk with room is needed; free space "
                            "and give the same command again") from error
        self._known.update(rates)
        self.progress.update(len(rates), len(self._known), 0, len(self._known) / total)

    def close(self) -> None:
        """Leave the file as it is."""
        self._file.close()
        if self.progress:
            self.progress.close()


def filter(options: argparse.Namespace) -> int:
    """Write the questions of an expert's data file that are worth training on."""
    config = configured(options)
    if options.expert not in config.experts:
        raise UserError(f"--expert: {options.expert!r}; experts are {', '.join(config.experts)}; name one")
    if options.n < 0:
        raise UserError(f"-n: {options.n}; 0 or more; correct it")
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if ranks > 1 and not environment.started_as_rank():
        return local.run_ranks(ranks, options.arguments)
    out = Path(options.out)
    first = environment.is_first_rank()
    source = _source(config.experts[options.expert], options.expert, out, options.overwrite)
    prepare()
    from copd_megatron.tasks.rows import copy_rows
    from copd_megatron.trainer.difficulty import measure

    rates = RatesFile(_rates_path(out), _about(config, options, source)) if first else None
    adapter = Path(options.adapter) if options.adapter else None
    measured = measure(config, options.expert, options.n, adapter, rates)
    if first:
        rates.close()
        if measured.done:
            kept, never, always = _sorted(measured.rows, rates.known() if options.n else None)
            try:
                copy_rows(source, {*kept, *measured.kept_out}, out)
            except OSError as error:
                raise UserError(f"--out: {out} cannot be written ({error}); a folder with room is needed; free space "
                                "and give the same command again: all is measured") from error
            print(f"filter: of {len(measured.rows) + measured.long} training questions {measured.long} are longer "
                  f"than {config.rollout.max_prompt_tokens} tokens, {never} never solved, {always} always; "
                  f"{len(kept)} kept, and {len(measured.kept_out)} held-out ones as they are: {out}")
        else:
            print(f"filter: stopped after {len(rates.known())} questions; the same command goes on from there",
                  file=sys.stderr)
    leave()
    return 0 if measured.done else environment.INTERRUPTED


def _rates_path(out: Path) -> Path:
    return out.with_name(out.name + ".pass_rates.jsonl")


def _source(expert: Any, name: str, out: Path, overwrite: bool) -> Path:
    """The expert's data file, if it has one and the output may be written."""
    given = expert.task_args.get("path")
    if given is None:
        raise UserError(f"--expert: {name} has no data file (experts.{name}.task_args.path); only questions of a file "
                        "can be filtered; name another expert")
    source = Path(given)
    if out.suffix != source.suffix or not out.parent.is_dir() or (out.exists() and out.samefile(source)):
        raise UserError(f"--out: {out}; a new file that ends in {source.suffix} as {source} does, in an existing "
                        "folder; name one")
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} exists; a new file is needed; name another one, or --overwrite")
    if overwrite and environment.is_first_rank():
        _rates_path(out).unlink(missing_ok=True)
    return source


def _about(config: Any, options: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Whatever pass rates depend on."""
    from copd_megatron.config.loading import to_json
    from copd_megatron.launch.row_files import folder_stamp

    run = json.loads(to_json(config))
    with source.open("rb") as file:
        data = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    sampling = {key: run["rollout"][key] for key in ("temperature", "top_p", "max_completion_tokens")}
    return {"data": data, "expert": run["experts"][options.expert], "samples": options.n, "seed": config.seed,
            "model": folder_stamp(Path(config.model.path)), "dtype": config.model.dtype, "sampling": sampling,
            "adapter": folder_stamp(Path(options.adapter)) if options.adapter else None}


def _sorted(rows: tuple[int, ...], rates: Mapping[int, float] | None) -> tuple[list[int], int, int]:
    """Rows to keep, and how many are never and always solved."""
    if rates is None:
        return list(rows), 0, 0
    kept = [row for row in rows if 0 < rates[row] < 1]
    return kept, sum(rates[row] == 0 for row in rows), sum(rates[row] == 1 for row in rows)
