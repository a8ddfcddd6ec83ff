"""Every completion of a step as ``rollouts/step_000012.parquet``: tokens, log-probs, rewards, teacher deltas.

Files appear whole (written aside, then renamed). With several writing replicas each writes its own shard,
``step_000012-00003-of-00016.parquet``, so that no rank has to gather all completions.
"""
from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from copd_megatron.metrics.media_strip import strip_png
from copd_megatron.types import Completion, Prompt

log = logging.getLogger(__name__)

MEDIA_PROMPTS = 2
"""Prompts per (phase, expert, domain) and file whose first image or video is kept: what reports show."""

ROWS_PER_GROUP = 256
"""Small row groups let a report read a few rows of a large file."""

SCHEMA = pa.schema([
    ("step", pa.int32()),
    ("phase", pa.string()),
    ("expert", pa.string()),                        # the policy that sampled; null: the backbone
    ("domain", pa.string()),
    ("prompt_key", pa.string()),
    ("sample", pa.int32()),
    ("prompt_text", pa.string()),
    ("completion_text", pa.string()),
    ("answer", pa.string()),                        # the ground truth
    ("extracted", pa.string()),
    ("finish", pa.string()),
    ("reward", pa.float64()),
    ("reward_parts", pa.map_(pa.string(), pa.float64())),
    ("advantage", pa.float64()),                    # null on cross batches
    ("token_ids", pa.list_(pa.int32())),
    ("tokens", pa.list_(pa.string())),
    ("loss_mask", pa.list_(pa.bool_())),
    ("logprobs", pa.list_(pa.float32())),
    ("teachers", pa.list_(pa.string())),
    ("deltas", pa.list_(pa.list_(pa.float32()))),   # one list per teacher: log teacher - log student
    ("media_kind", pa.string()),
    ("media_png", pa.binary()),
])
"""Columns of a rollout file; one row per completion, lists are per completion token."""

_FILE = re.compile(r"step_(\d+)(-\d+-of-\d+)?\.parquet(\.tmp)?")


@dataclass(frozen=True)
class RolloutRecord:
    """A completion with what training made of it.

    Example: ``RolloutRecord(completion, "opd", deltas={"text": [-0.1, 0.0, -2.3]})``.
    """

    completion: Completion
    phase: str
    advantage: float | None = None
    """Group advantage; None on cross batches."""
    deltas: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Teacher -> [R] log teacher - log student per completion token (NaN where there is none)."""


class RolloutWriter:
    """Writes the rollouts of each step. A write that fails costs that file, not the run: one warning per
    file, and ``on_failure`` is called (``Recorder.count_failure``)."""

    def __init__(self, run_dir: Path, decode: Callable[[list[int]], str], *, enabled: bool = True,
                 resume_step: int | None = None, shard: int = 0, shards: int = 1,
                 on_failure: Callable[[], None] | None = None) -> None:
        """``decode`` turns token ids into text and keeps special tokens. ``resume_step`` drops this shard's
        files of later steps. ``shard`` of ``shards``: this replica among those that write."""
        self._folder = run_dir / "rollouts"
        self._decode = decode
        self._enabled = enabled
        self._suffix = f"-{shard:05d}-of-{shards:05d}" if shards > 1 else ""
        self._on_failure = on_failure
        self._token_text: dict[int, str] = {}
        if enabled and resume_step is not None and self._folder.is_dir():
            self._drop_after(resume_step, first_shard=shard == 0)

    def write(self, step: int, records: Sequence[RolloutRecord]) -> Path | None:
        """Write the file of ``step``; None if writing is off or failed.

        ValueError if a delta has not one value per completion token.
        """
        if not self._enabled:
            return None
        table = self._table(step, records)
        path = self._folder / f"step_{step:06d}{self._suffix}.parquet"
        partial = path.with_name(path.name + ".tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, partial, compression="zstd", row_group_size=ROWS_PER_GROUP)
            os.replace(partial, path)
        except OSError as error:
            if partial.is_file():
                partial.unlink()
            log.warning("%s was not written (%s); training goes on", path, error)
            if self._on_failure is not None:
                self._on_failure()
            return None
        return path

    def _drop_after(self, step: int, first_shard: bool) -> None:
        """Remove this shard's later files; the first shard also removes those of other shard counts."""
        for path in self._folder.iterdir():
            match = _FILE.fullmatch(path.name)
            mine = match is not None and ((match[2] or "") == self._suffix or first_shard)
            if match and mine and (int(match[1]) > step or match[3]):
                path.unlink(missing_ok=True)

    def _table(self, step: int, records: Sequence[RolloutRecord]) -> pa.Table:
        completions = [r.completion for r in records]
        ids = [c.token_ids for c in completions]
        for record, row in zip(records, ids, strict=True):
            for teacher, delta in record.deltas.items():
                if len(delta) != len(row):
                    raise ValueError(f"delta of teacher {teacher!r}: {len(delta)} values for {len(row)} "
                                     f"tokens of {record.completion.prompt.key!r}")
        prompts = {id(c.prompt): c.prompt for c in completions}
        prompt_text = {key: self._prompt_text(prompt) for key, prompt in prompts.items()}
        media = self._media(records)
        items = [c.prompt.item for c in completions]
        columns = {
            "step": [step] * len(records),
            "phase": [r.phase for r in records],
            "expert": [c.expert for c in completions],
            "domain": [c.prompt.domain for c in completions],
            "prompt_key": [c.prompt.key for c in completions],
            "sample": [c.sample for c in completions],
            "prompt_text": [prompt_text[id(c.prompt)] for c in completions],
            "completion_text": [c.text for c in completions],
            "answer": [None if item is None else str(item.answer) for item in items],
            "extracted": [c.extracted for c in completions],
            "finish": [c.finish for c in completions],
            "reward": [c.reward for c in completions],
            "reward_parts": [list(c.reward_parts.items()) for c in completions],
            "advantage": [r.advantage for r in records],
            "token_ids": ids,
            "tokens": self._token_texts(ids),
            "loss_mask": [c.loss_mask for c in completions],
            "logprobs": [c.logprobs for c in completions],
            "teachers": [list(r.deltas) for r in records],
            "deltas": [[list(map(float, d)) for d in r.deltas.values()] for r in records],
            "media_kind": [kind for kind, _ in media],
            "media_png": [png for _, png in media],
        }
        return pa.table(columns, schema=SCHEMA)

    def _token_texts(self, ids: Sequence[Sequence[int]]) -> pa.Array:
        """[completions] lists of token texts; every distinct id is decoded once in the writer's life."""
        flat = np.fromiter((t for row in ids for t in row), np.int64)
        distinct, where = np.unique(flat, return_inverse=True)
        for token in distinct.tolist():
            if token not in self._token_text:
                self._token_text[token] = self._decode([token])
        texts = pa.array([self._token_text[t] for t in distinct.tolist()], pa.string())
        offsets = np.cumsum([0, *(len(row) for row in ids)], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), texts.take(pa.array(where.reshape(-1))))

    def _prompt_text(self, prompt: Prompt) -> str:
        """The prompt as the model sees it, a run of visual tokens shown as ``[9 visual tokens]``."""
        ids = np.asarray(prompt.token_ids)
        visual = np.zeros(len(ids), bool)
        visual[np.asarray(prompt.visual_index, np.int64)] = True
        borders = np.flatnonzero(np.diff(visual)) + 1
        runs = np.split(np.arange(len(ids)), borders)
        return "".join(f"[{len(run)} visual tokens]" if visual[run[0]] else self._decode(ids[run].tolist())
                       for run in runs if len(run))

    @staticmethod
    def _media(records: Sequence[RolloutRecord]) -> list[tuple[str | None, bytes | None]]:
        """Kind and PNG per row: at the first row of the first ``MEDIA_PROMPTS`` prompts of each batch."""
        seen: dict[tuple[str, str | None, str], set[str]] = {}
        rows: list[tuple[str | None, bytes | None]] = []
        for record in records:
            prompt = record.completion.prompt
            keys = seen.setdefault((record.phase, record.completion.expert, prompt.domain), set())
            shown = prompt.key not in keys and len(keys) < MEDIA_PROMPTS
            if shown:
                keys.add(prompt.key)
            if shown and prompt.item is not None and prompt.item.media:
                first = prompt.item.media[0]
                rows.append((first.kind, strip_png(first)))
            else:
                rows.append((None, None))
        return rows
