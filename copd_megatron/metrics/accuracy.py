"""The table policy x domain: accuracies with 95 % intervals, for terminals, log files and reports.

Intervals that an evaluation does not bring are Wilson's (1927) score interval on n prompts.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Accuracies = dict[str, dict[str, "Cell"]]
"""Policy -> domain -> accuracy, policies and domains in the order to show."""


@dataclass(frozen=True)
class Cell:
    """One accuracy. Example: ``Cell(0.523, 0.492, 0.554, 1000)``."""

    avg: float
    """Fraction in [0, 1]."""
    low: float | None = None
    high: float | None = None
    """95 % interval; None where the number of prompts is unknown."""
    n: int | None = None


def wilson(avg: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion ``avg`` seen on ``n`` > 0 prompts."""
    centre = (avg + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(avg * (1 - avg) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracies(source: Mapping[str, Any]) -> Accuracies:
    """Cells of a summary ({"policies": {policy: {domain: accuracy}}, "held_out": {domain: n}}) or of an
    evaluation line ({"policies": {policy: {domain: {"avg", "n", "low", "high", ...}}}})."""
    held_out = source.get("held_out") or {}
    table: Accuracies = {}
    for policy, domains in source["policies"].items():
        table[policy] = {}
        for domain, value in domains.items():
            fields = value if isinstance(value, Mapping) else {"avg": value, "n": held_out.get(domain)}
            if fields.get("avg") is not None:
                table[policy][domain] = _cell(fields)
    return {policy: table[policy] for policy in sorted(table, key=_rank)}


def domains_of(table: Accuracies) -> list[str]:
    """All domains in order of appearance."""
    return list(dict.fromkeys(d for cells in table.values() for d in cells))


def mean_accuracy(cells: Mapping[str, Cell], domains: list[str]) -> float | None:
    """Mean over ``domains``; None unless every domain was evaluated."""
    if not domains or any(d not in cells for d in domains):
        return None
    return sum(cells[d].avg for d in domains) / len(domains)


def policy_table(source: Mapping[str, Any], *, width: int = 110, plain: bool = False) -> Table:
    """A rich table of ``accuracies(source)`` in percent, the best of each column in bold.

    Cells show the accuracy, the 95 % interval and the difference to ``base`` in points; on less than
    ``width`` columns the interval goes first, then the difference, then the single domains. ``plain`` draws
    with ASCII only.
    """
    cells = accuracies(source)
    for detail in ("interval", "gain", "bare", "brief"):
        rows = _rows(cells, detail)
        widths = [max(len(text.plain) + text.plain.count("±") for text in column) for column in zip(*rows)]
        if sum(widths) + 3 * len(widths) + 1 <= width:
            break
    table = Table(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    for i, head in enumerate(rows[0]):
        table.add_column(head.plain, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows[1:]:
        table.add_row(*((text.plain.replace("±", "+-") for text in row) if plain else row))
    caption = _caption(source, cells, detail)
    table.caption = caption.replace("±", "+-") if plain else caption
    table.caption_justify = "left"
    return table


def policy_table_text(source: Mapping[str, Any], width: int = 110) -> str:
    """The same table as plain ASCII lines without trailing space, for log files."""
    console = Console(width=width, no_color=True, force_terminal=False, color_system=None,
                      legacy_windows=False)
    with console.capture() as capture:
        console.print(policy_table(source, width=width, plain=True))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _rows(cells: Accuracies, detail: str) -> list[list[Text]]:
    """The table's texts, headings first."""
    columns = _columns(cells, brief=detail == "brief")
    rows = [[Text("policy"), *map(Text, columns)]]
    for policy, row in cells.items():
        rows.append([Text(policy), *(_cell_text(policy, values, row.get(column), detail)
                                     for column, values in columns.items())])
    return rows


def _columns(cells: Accuracies, brief: bool) -> dict[str, dict[str, float]]:
    """Column -> policy -> accuracy: a column per domain and the mean; brief: own domain and mean."""
    domains = domains_of(cells)
    columns = {d: {p: row[d].avg for p, row in cells.items() if d in row} for d in domains}
    if brief:
        columns = {"own domain": {p: row[p].avg for p, row in cells.items() if p in row}}
    if len(domains) > 1:
        means = {p: mean_accuracy(row, domains) for p, row in cells.items()}
        columns["mean"] = {p: m for p, m in means.items() if m is not None}
    return columns


def _cell(fields: Mapping[str, Any]) -> Cell:
    avg, n, low, high = (fields.get(k) for k in ("avg", "n", "low", "high"))
    if (low is None or high is None) and n:
        low, high = wilson(avg, n)
    return Cell(float(avg), low, high, n)


def _rank(policy: str) -> int:
    """Base first, merged last, experts between in their own order (sorting is stable)."""
    return {"base": 0, "merged": 2}.get(policy, 1)


def _cell_text(policy: str, column: Mapping[str, float], cell: Cell | None, detail: str) -> Text:
    value = column.get(policy)
    if value is None:
        return Text("-", style="dim")
    text = Text(f"{100 * value:.1f}", style="bold" if value >= max(column.values()) else "")
    if detail == "interval" and cell is not None and cell.low is not None and cell.high is not None:
        half = max(cell.high - value, value - cell.low)
        text.append(f" ±{100 * half:.1f}", style="not bold dim")
    if detail in ("interval", "gain") and "base" in column and policy != "base":
        gain = 100 * (value - column["base"])
        colour = "green" if gain > 0 else "red" if gain < 0 else "dim"
        text.append(f" ({gain:+.1f})".rjust(8), style=f"not bold {colour}")
    elif detail in ("interval", "gain") and "base" in column:
        text.append(" " * 8)
    return text


def _caption(source: Mapping[str, Any], cells: Accuracies, detail: str) -> str:
    counts = {d: next((row[d].n for row in cells.values() if d in row), None) for d in domains_of(cells)}
    known = sorted({n for n in counts.values() if n})
    parts = ["accuracy in %"]
    if source.get("mode"):
        parts.append(str(source["mode"]))
    if known:
        prompts = f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"
        parts.append(f"{prompts} held-out prompts per domain")
    if detail == "interval" and any(c.low is not None for row in cells.values() for c in row.values()):
        parts.append("± 95 % interval")
    if detail in ("interval", "gain") and "base" in cells and len(cells) > 1:
        parts.append("points over base in ( )")
    return ", ".join(parts)
