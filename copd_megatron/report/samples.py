"""Sample completions as HTML: prompt, picture, answer, tokens coloured by what a teacher thinks of them.

A token is tinted by delta = log teacher - log student: one colour where the teacher would say it more often,
another where less often, stronger with |delta| up to ``FULL_DELTA`` nats.
"""
from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from copd_megatron.report.reader import RunData

FULL_DELTA = 3.0
"""Nats at which the tint is strongest."""

_MOST_CARDS = 14
_MOST_TOKENS = 300
_MOST_PROMPT_CHARACTERS = 1500
_STEPS_TRIED = 3
_COLUMNS = ("step", "phase", "expert", "domain", "prompt_key", "prompt_text", "answer", "extracted", "finish",
            "reward", "reward_parts", "advantage", "tokens", "loss_mask", "logprobs", "teachers", "deltas",
            "media_kind", "media_png")


@dataclass(frozen=True)
class SampleGroup:
    """Completions of one prompt by one expert: the best and the worst of the group."""

    step: int
    phase: str
    expert: str
    domain: str
    rows: tuple[dict[str, Any], ...]
    """Rows of a rollout file."""
    media: tuple[str, bytes] | None
    """("image" or "video", PNG)."""


def pick_samples(run: RunData) -> list[SampleGroup]:
    """One prompt per (expert, domain) of the newest step of each phase that has rollout files, cross batches
    first. Damaged files are left out with a note; the step before takes their place."""
    groups: list[SampleGroup] = []
    for phase in ("opd", "rlvr"):
        files: dict[int, list[Path]] = {}
        for path in run.rollout_files:
            step = int(path.name.split("_")[1][:6])
            if run.phases.get(step) == phase:
                files.setdefault(step, []).append(path)
        for step in sorted(files, reverse=True)[:_STEPS_TRIED]:
            found = [g for path in files[step] for g in _groups_of(path, run.notes)]
            if found:
                distinct = {(g.expert, g.domain): g for g in reversed(found)}
                groups += sorted(distinct.values(), key=lambda g: not _has_delta(g))
                break
    if len(groups) > _MOST_CARDS:
        run.notes.append(f"{len(groups)} kinds of batches have samples; {_MOST_CARDS} are shown.")
    return groups[:_MOST_CARDS]


def samples_html(groups: Sequence[SampleGroup]) -> str:
    """Cards of all sample groups; empty for none."""
    return "".join(_card(g) for g in groups)


def _has_delta(group: SampleGroup) -> bool:
    return any(row["teachers"] for row in group.rows)


def _groups_of(path: Path, notes: list[str]) -> list[SampleGroup]:
    """The first prompt of each (phase, expert, domain) in a file; reads only row groups that hold one."""
    try:
        with pq.ParquetFile(path) as file:
            rows_of: dict[tuple[str, str, str], list[int]] = {}
            prompt_of: dict[tuple[str, str, str], str] = {}
            for i, row in enumerate(file.read(["phase", "expert", "domain", "prompt_key"]).to_pylist()):
                kind = (row["phase"], row["expert"] or "base", row["domain"])
                if prompt_of.setdefault(kind, row["prompt_key"]) == row["prompt_key"]:
                    rows_of.setdefault(kind, []).append(i)
            return [_group(kind, _take(file, indices)) for kind, indices in rows_of.items()]
    except (pa.ArrowException, OSError) as error:
        notes.append(f"{path.name} could not be read ({type(error).__name__}) and was left out.")
        return []


def _take(file: pq.ParquetFile, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of a file by their index."""
    rows, start = [], 0
    for number in range(file.num_row_groups):
        count = file.metadata.row_group(number).num_rows
        wanted = [i - start for i in indices if start <= i < start + count]
        if wanted:
            rows += file.read_row_group(number, list(_COLUMNS)).take(wanted).to_pylist()
        start += count
    return rows


def _group(kind: tuple[str, str, str], rows: list[dict[str, Any]]) -> SampleGroup:
    media = next(((r["media_kind"], r["media_png"]) for r in rows if r["media_png"]), None)
    ranked = sorted(rows, key=lambda r: -(r["reward"] or 0.0))
    shown = (ranked[0], ranked[-1]) if len(ranked) > 1 else (ranked[0],)
    return SampleGroup(rows[0]["step"], *kind, shown, media)


def _card(group: SampleGroup) -> str:
    first = group.rows[0]
    title = f"<b>{_text(group.expert)}</b> on <b>{_text(group.domain)}</b>"
    teachers = ", ".join(dict.fromkeys(t for row in group.rows for t in row["teachers"] or ()))
    tags = f"<span class='tag'>step {group.step} {_text(group.phase)}</span>" + (
        f"<span class='tag'>teacher {_text(teachers)}</span>" if teachers else "")
    picture = ""
    if group.media is not None:
        data = base64.b64encode(group.media[1]).decode()
        picture = (f"<img class='{_text(group.media[0])}' alt='{_text(group.media[0])} of the prompt' "
                   f"src='data:image/png;base64,{data}'>")
    prompt = first["prompt_text"] or ""
    cut = prompt if len(prompt) <= _MOST_PROMPT_CHARACTERS else prompt[:_MOST_PROMPT_CHARACTERS] + " …"
    return (f"<article class='sample'><header>{title}{tags}</header>{picture}"
            f"<pre class='prompt'>{_text(cut.strip())}</pre>"
            f"{''.join(_completion(row) for row in group.rows)}</article>")


def _completion(row: dict[str, Any]) -> str:
    parts = " · ".join(f"{_text(name)} {value:.2g}" for name, value in row["reward_parts"] or ())
    if parts:
        facts = [f"reward {row['reward']:.2f} ({parts})",
                 f"read “{_short(row['extracted'])}”, truth “{_short(row['answer'])}”"]
    else:
        facts = ["no reward", f"truth “{_short(row['answer'])}”"]
    if row["advantage"] is not None:
        facts.append(f"A {row['advantage']:+.2f}")
    if row["finish"] == "length":
        facts.append("cut at the limit")
    streams = [f"<p class='tokens'>{_tokens(row, delta)}</p>"
               for delta in (row["deltas"] or [None])[:2]]
    return f"<div class='facts'>{' &nbsp; '.join(facts)}</div>{''.join(streams)}"


def _tokens(row: dict[str, Any], delta: Sequence[float] | None) -> str:
    tokens = row["tokens"] or []
    pieces = []
    for i, token in enumerate(tokens[:_MOST_TOKENS]):
        said = row["loss_mask"][i]
        notes = [f"log p {row['logprobs'][i]:.3f}"] if said else ["environment"]
        style = ""
        if said and delta is not None and delta[i] is not None and math.isfinite(delta[i]):
            share = min(1.0, abs(delta[i]) / FULL_DELTA)
            notes.append(f"delta {delta[i]:+.3f}")
            if share >= 0.02:
                tint = "more" if delta[i] > 0 else "less"
                style = f" style='background:rgb(var(--{tint})/{0.75 * share:.2f})'"
        kind = "" if said else " class='env'"
        shown = _text(token).replace("\n", "⏎<br>")
        pieces.append(f"<span{kind}{style} title='{', '.join(notes)}'>{shown}</span>")
    if len(tokens) > _MOST_TOKENS:
        pieces.append(f" <em>… {len(tokens) - _MOST_TOKENS:,} more tokens</em>")
    return "".join(pieces)


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    return _text(text if len(text) <= 60 else text[:60] + "…")


_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters, which HTML forbids, as their Unicode pictures."""


def _text(text: str) -> str:
    return html.escape(str(text).translate(_VISIBLE), quote=True)
