"""Questions from a JSONL or Parquet file, every row checked when the task is made.

A row holds ``prompt`` (text) or ``messages`` (a chat), ``answer``, and if it has them ``images``, ``videos``
and ``verifier``. Every other column travels along in ``TaskItem.extra``. Split invariant: rows that show the
model the same question are in the same split.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from copd_megatron.tasks.answer import extract_answer, parse_verifier, score_answer
from copd_megatron.tasks.base import Split
from copd_megatron.tasks.frames import Budget, FrameRule, MediaRules
from copd_megatron.tasks.media import check
from copd_megatron.tasks.media_cache import MediaCache
from copd_megatron.tasks.row_format import FIELDS, FieldError, Medium, RowFormat
from copd_megatron.tasks.rows import Rows, read_rows
from copd_megatron.types import Media, TaskItem, UserError

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
"""Default of ``cache_bytes``: 5 videos of 64 frames of 1280 x 720, or 1,100 pictures of 640 x 480."""

CHECK_THREADS = 8
"""Media are checked in parallel: opening many small files waits for the file system."""


@dataclass(frozen=True)
class _File:
    """A data file and which of its rows are right."""

    path: Path
    rows: Rows
    good: np.ndarray
    """[n] indices of the rows that are questions."""
    digests: np.ndarray
    """[n] uint64 hash of the question in each of them."""


class DatasetTask:
    """Questions from a file; a ``Task``.

    Example: ``DatasetTask("geometry.jsonl", verifier="numeric", instruction="Give the answer in
    \\boxed{}.")``; files that verl reads: ``DatasetTask("train.parquet", columns={"answer":
    "reward_model.ground_truth"})``.
    """

    def __init__(self, path: str | Path, *, columns: Mapping[str, str | None] | None = None,
                 verifier: str | Mapping[str, Any] = "math", held_out: float | str | Path = 0.1,
                 seed: int = 0, name: str | None = None, instruction: str = "", check_media: bool = True,
                 bad_rows: Literal["refuse", "skip"] = "refuse", cache_bytes: int = CACHE_BYTES,
                 fps: float = 2.0, min_frames: int = 4, max_frames: int = 768, frame_rule: FrameRule = "qwen3_vl",
                 image_pixels: Budget = (None, None), video_pixels: Budget = (None, None)) -> None:
        """Read and check every row.

        Args:
            path: .jsonl or .parquet file; relative media paths start at its folder.
            columns: field -> column where they differ, "a.b" for a nested one, None to leave a column unread.
            verifier: of rows that name none: a key of ``answer.VERIFIERS``, or a dict with its options.
            held_out: share of the rows that is held out, or a file that holds the held-out questions.
            seed: of the split and of the order of the questions.
            name: first part of the keys; None: the file's stem.
            instruction: appended to the last user message of every row, on a line of its own.
            check_media: open every image and video now; False trusts them.
            bad_rows: refuse a file with a row that is wrong, or skip such rows and log how many there are.
            cache_bytes: of decoded images and frames that are kept for the next epoch; 0 keeps none.
            fps, min_frames, max_frames, frame_rule, image_pixels, video_pixels: see ``frames.MediaRules``.

        Raises:
            UserError: the file or a row is wrong (file, row and field are named), or a split would be empty.
        """
        unknown = set(columns or {}) - set(FIELDS)
        if unknown:
            raise UserError(f"task_args.columns: {sorted(unknown)} was given; allowed are the fields "
                            f"{list(FIELDS)}; write field: column")
        try:
            self._format = RowFormat(dict(columns or {}), parse_verifier(verifier), instruction)
        except ValueError as error:
            raise UserError(f"task_args.verifier: {error}; correct it") from error
        try:
            self._rules = MediaRules(fps, min(min_frames, max_frames), max_frames, frame_rule, tuple(image_pixels),
                                     tuple(video_pixels))
        except ValueError as error:
            raise UserError(f"task_args: {error}; correct it") from error
        if bad_rows not in ("refuse", "skip"):
            raise UserError(f"task_args.bad_rows: {bad_rows!r} was given; allowed are refuse and skip; choose one")
        self._skip, self._media = bad_rows == "skip", MediaCache(cache_bytes)
        self.name = Path(path).stem if name is None else name
        train = self._read(Path(path), "task_args.path", seed, check_media)
        if isinstance(held_out, (str, Path)):
            other = self._read(Path(held_out), "task_args.held_out", seed, check_media)
            _refuse_overlap(train, other)
            self._files = {"train": train, "held_out": other}
            chosen = {"train": train.good, "held_out": other.good}
        else:
            self._files = {"train": train, "held_out": train}
            chosen = _split(train, held_out)
        # A file may be sorted by source or difficulty; its order must not become a curriculum.
        self._order = {split: np.random.default_rng([seed, stream]).permutation(chosen[split])
                       for stream, split in enumerate(("train", "held_out"))}

    def size(self, split: Split) -> int | None:
        """Number of rows of the split."""
        return len(self._order[split])

    def source_row(self, split: Split, index: int) -> tuple[Path, int]:
        """The file and the number (from 1, as ``rows.copy_rows`` counts) of the row that question is."""
        file = self._files[split]
        return file.path, file.rows.number(int(self._order[split][index]))

    def item(self, split: Split, index: int) -> TaskItem:
        """The question at ``index`` with its media decoded; its key ends in the row's number in the file.

        Raises:
            IndexError: no such index.
            UserError: a medium that opened at the start does not decode.
        """
        if not 0 <= index < len(self._order[split]):
            raise IndexError(f"question {index} of {split}: it has {len(self._order[split])}")
        file, row = self._files[split], int(self._order[split][index])
        try:
            question = self._format.parse(file.rows[row])
            media = tuple(self._decode(medium, file.path.parent) for medium in question.media)
        except FieldError as error:
            raise UserError(self._row_error("task_args", file.path, file.rows.number(row), error)) from error
        verifier = {"name": question.verifier.name, **question.verifier.options}
        extra = {"data_source": self.name, **question.extra, "verifier": verifier}
        key = f"{self.name}/{split}/{file.rows.number(row)}"
        return TaskItem(key, question.messages, media, question.answer, extra)

    def verify(self, item: TaskItem, completion: str) -> dict[str, float]:
        """accuracy by the row's verifier; format: the answer is marked as such (``answer.score_answer``)."""
        return score_answer(parse_verifier(item.extra["verifier"]), completion, item.answer)

    def extract(self, completion: str) -> str | None:
        """The answer as ``answer.extract_answer`` reads it."""
        found = extract_answer(completion)
        return None if found is None else found.text

    def _read(self, path: Path, where: str, seed: int, check_media: bool) -> _File:
        """Open a file and check all its rows; error or warning name the first wrong one and count the others."""
        rows = read_rows(path, where, self._skip)

        def digest_or_error(index: int) -> int | FieldError:
            try:
                question = self._format.parse(rows[index])
                for medium in question.media if check_media else ():
                    _check_medium(medium, path.parent)
                return question.digest(seed)
            except FieldError as error:
                return error

        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            results = list(pool.map(digest_or_error, range(len(rows))))
        wrong = [(index, result) for index, result in enumerate(results) if isinstance(result, FieldError)]
        if wrong and not self._skip:
            others = f" ({len(wrong) - 1} more rows are wrong)" if len(wrong) > 1 else ""
            raise UserError(self._row_error(where, path, rows.number(wrong[0][0]), wrong[0][1]) + others)
        good = [index for index, result in enumerate(results) if not isinstance(result, FieldError)]
        skipped = len(wrong) + len(rows.skipped)
        if skipped:
            errors = [self._row_error(where, path, rows.number(row), error) for row, error in wrong[:1]]
            first = [*errors, *rows.skipped][0]
            if not good:
                raise UserError(f"{where}: all {skipped} rows of {path} are wrong, first {first}")
            log.warning("%s: %d of %d rows of %s are wrong and skipped; first %s", where, skipped, len(good) + skipped,
                        path, first)
        return _File(path, rows, np.array(good), np.array([results[index] for index in good], np.uint64))

    def _row_error(self, where: str, path: Path, number: int, error: FieldError) -> str:
        column = self._format.column(error.field)
        shown = f"'{error.field}'" if column == error.field else f"'{error.field}' (column {column!r})"
        return f"{where}: {path} row {number}, field {shown}: {error}; correct the row"

    def _decode(self, medium: Medium, folder: Path) -> Media:
        try:
            return self._media.load(medium.kind, medium.source, folder, self._rules)
        except ValueError as error:
            raise FieldError(medium.field, str(error)) from error


def _check_medium(medium: Medium, folder: Path) -> None:
    try:
        check(medium.kind, medium.source, folder)
    except ValueError as error:
        raise FieldError(medium.field, str(error)) from error


def _split(file: _File, held_out: float) -> dict[Split, np.ndarray]:
    """Row indices by split: a row is held out if its digest, as a fraction of 2^64, is below ``held_out``."""
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise UserError(f"task_args.held_out: {held_out!r} was given; allowed is a share between 0 and 1, or "
                        "a file; 0.1 holds out a tenth")
    is_held_out = file.digests < np.uint64(int(held_out * 2**64))
    split: dict[Split, np.ndarray] = {"train": file.good[~is_held_out], "held_out": file.good[is_held_out]}
    for name, rows in split.items():
        if not len(rows):
            raise UserError(f"task_args.held_out: {held_out} was given; of the {len(file.good)} rows of "
                            f"{file.path} it leaves none in {name}; give another share or seed, or a file")
    return split


def _refuse_overlap(train: _File, held_out: _File) -> None:
    """A question that is trained on says nothing when it is asked again."""
    rows_of = dict(zip(train.digests.tolist(), train.good.tolist()))
    shared = [(row, rows_of[digest]) for row, digest in zip(held_out.good.tolist(), held_out.digests.tolist())
              if digest in rows_of]
    if shared:
        held_row, train_row = shared[0]
        raise UserError(
            f"task_args.held_out: {len(shared)} questions of {held_out.path} are also in {train.path} "
            f"(row {held_out.rows.number(held_row)} is row {train.rows.number(train_row)} there); "
            "the files must differ; remove them from one")
