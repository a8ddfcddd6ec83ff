"""Several runs side by side: accuracies with differences, config differences, curves in one chart.

The interval of a difference is the normal one for independent samples, 1.96 sqrt(se_a^2 + se_b^2): runs that
were evaluated on the same prompts have a narrower one, so a difference marked with * is safe to call one.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from copd_megatron.metrics.accuracy import Accuracies, Cell, accuracies, domains_of, mean_accuracy
from copd_megatron.metrics.progress import duration
from copd_megatron.metrics.sinks import replace_file
from copd_megatron.report.charts import PALETTE, Chart, Line, render
from copd_megatron.report.page import flatten, page, text
from copd_megatron.report.reader import RunData, read_run
from copd_megatron.types import UserError


@dataclass(frozen=True)
class Row:
    """One row of the comparison: an accuracy of every run and its difference to the first run."""

    policy: str
    domain: str
    """A domain, or ``mean``."""
    values: tuple[float | None, ...]
    differences: tuple[tuple[float, float | None] | None, ...]
    """(difference, half width of its 95 % interval or None), as fractions; None for the first run."""


def compare_runs(run_dirs: Sequence[Path], html_path: Path | None = None, width: int = 110) -> str:
    """Compare runs with the first of them; returns text for a terminal of ``width`` columns.

    ``html_path``: also write a self-contained page there. UserError for fewer than two runs or a folder that
    is no run.
    """
    if len(run_dirs) < 2:
        raise UserError(f"run_dirs: {len(run_dirs)} given; a comparison needs at least two run folders")
    runs = [read_run(Path(d)) for d in run_dirs]
    labels = run_labels([run.folder for run in runs])
    rows = accuracy_rows([_accuracies(run) for run in runs])
    differing = config_differences(runs)
    if html_path is not None:
        replace_file(Path(html_path), _document(runs, labels, rows, differing).encode())
    accuracy = _accuracy_table(labels, rows, intervals=True)
    if Console(width=10_000).measure(accuracy).maximum > width:
        accuracy = _accuracy_table(labels, rows, intervals=False)
    tables = (_runs_table(runs, labels), accuracy, _config_table(labels, differing))
    parts = [_print(table, width) for table in tables]
    return "\n\n".join(parts) + "\n\n" + _FOOTNOTE


_FOOTNOTE = "Accuracy in %; (difference to the first run ± 95 % interval), * where it leaves out 0."


def run_labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(p.parts) for p in paths) + 1):
        labels = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{i + 1}: {p.name}" for i, p in enumerate(paths)]


def accuracy_rows(tables: Sequence[Accuracies]) -> list[Row]:
    """A row per (policy, domain) that any run has, and one per policy for the mean over all domains."""
    merged: Accuracies = {}
    for table in tables:
        for policy, cells in table.items():
            merged.setdefault(policy, {}).update(cells)
    order = sorted(merged, key=lambda p: {"base": 0, "merged": 2}.get(p, 1))
    domains = domains_of(merged)
    rows = []
    for policy in order:
        for domain in domains:
            rows.append(_row(policy, domain, [t.get(policy, {}).get(domain) for t in tables]))
        if len(domains) > 1:
            rows.append(_row(policy, "mean", [_mean_cell(t.get(policy, {}), domains) for t in tables]))
    return [row for row in rows if any(v is not None for v in row.values)]


def config_differences(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Config fields that differ between the runs: field -> value of each run ("-" where it is missing)."""
    flat = [flatten(run.config) for run in runs]
    fields = list(dict.fromkeys(f for config in flat for f in config))
    shown = {f: [str(config.get(f, "-")) for config in flat] for f in fields}
    return {f: values for f, values in shown.items() if len(set(values)) > 1}


def _accuracies(run: RunData) -> Accuracies:
    source = run.latest_accuracies()
    return accuracies(source) if source is not None else {}


def _row(policy: str, domain: str, cells: Sequence[Cell | None]) -> Row:
    differences: list[tuple[float, float | None] | None] = [None]
    first = cells[0]
    for cell in cells[1:]:
        if first is None or cell is None:
            differences.append(None)
            continue
        halves = [None if c.low is None or c.high is None else (c.high - c.low) / 2 for c in (first, cell)]
        half = None if None in halves else float(np.hypot(*halves))
        differences.append((cell.avg - first.avg, half))
    return Row(policy, domain, tuple(None if c is None else c.avg for c in cells), tuple(differences))


def _mean_cell(cells: dict[str, Cell], domains: list[str]) -> Cell | None:
    """Mean over domains; its interval treats the domains as independent."""
    mean = mean_accuracy(cells, domains)
    if mean is None:
        return None
    halves = [(cells[d].high - cells[d].low) / 2 for d in domains
              if cells[d].low is not None and cells[d].high is not None]
    if len(halves) < len(domains):
        return Cell(mean)
    half = float(np.sqrt(np.sum(np.square(halves)))) / len(domains)
    return Cell(mean, mean - half, mean + half)


def _cell_text(value: float | None, difference: tuple[float, float | None] | None, intervals: bool) -> str:
    if value is None:
        return "-"
    if difference is None:
        return f"{100 * value:.1f}"
    gain, half = difference
    interval = f" ± {100 * half:.1f}" if intervals and half is not None else ""
    return f"{100 * value:.1f} ({100 * gain:+.1f}{interval}){_mark(difference) or ' '}"


def _mark(difference: tuple[float, float | None]) -> str:
    gain, half = difference
    return "*" if half is not None and abs(gain) > half else ""


def _facts(run: RunData) -> dict[str, str]:
    train_s = run.summary.get("train_s")
    return {"state": run.state(), "steps": str(run.step), "training": duration(train_s) if train_s else "-",
            "seed": str(run.config.get("seed", run.summary.get("seed", "-")))}


def _runs_table(runs: Sequence[RunData], labels: Sequence[str]) -> Table:
    table = Table("run", "state", "steps", "training", "seed", box=box.SIMPLE_HEAD)
    for run, label in zip(runs, labels, strict=True):
        table.add_row(label, *_facts(run).values())
    return table


def _accuracy_table(labels: Sequence[str], rows: Sequence[Row], intervals: bool) -> Table:
    table = Table("policy", "domain", box=box.SIMPLE_HEAD)
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    for i, row in enumerate(rows):
        new = i == 0 or rows[i - 1].policy != row.policy
        cells = [_cell_text(v, d, intervals) for v, d in zip(row.values, row.differences, strict=True)]
        table.add_row(row.policy if new else "", row.domain, *cells,
                      end_section=i + 1 < len(rows) and rows[i + 1].policy != row.policy)
    if not rows:
        table.add_row("no evaluation yet", "", *[""] * len(labels))
    return table


def _config_table(labels: Sequence[str], differing: dict[str, list[str]]) -> Table:
    table = Table("config field" if differing else "The configs are equal.", *(labels if differing else ()),
                  box=box.SIMPLE_HEAD)
    for name, values in differing.items():
        table.add_row(name, *values)
    return table


def _print(table: Table, width: int) -> str:
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _document(runs: Sequence[RunData], labels: Sequence[str], rows: Sequence[Row],
              differing: dict[str, list[str]]) -> str:
    heads = "".join(f"<th>{text(label)}</th>" for label in labels)
    facts = "".join(_cells_html((label, *_facts(run).values()))
                    for run, label in zip(runs, labels, strict=True))
    accuracy = "".join(f"<tr><td>{text(row.policy)}</td><td class='word'>{text(row.domain)}</td>"
                       + "".join(map(_cell_html, row.values, row.differences)) + "</tr>" for row in rows)
    config = "".join(_cells_html((name, *values)) for name, values in differing.items())
    body = [f"<h1>{len(runs)} runs compared</h1>",
            _table_html("".join(f"<th>{h}</th>" for h in ("run", *_facts(runs[0]))), facts, "left"),
            "<h2 id='accuracy'>Accuracy</h2>", f"<p class='quiet'>{text(_FOOTNOTE)}</p>",
            _table_html(f"<th>policy</th><th class='word'>domain</th>{heads}", accuracy),
            "<h2 id='curves'>Curves</h2>", f"<div class='grid'>{''.join(_figures(runs, labels))}</div>",
            "<h2 id='config'>Config differences</h2>",
            _table_html(f"<th>field</th>{heads}", config, "left") if differing
            else "<p>The configs are equal.</p>"]
    return page("Comparison of runs", "".join(body),
                [("accuracy", "Accuracy"), ("curves", "Curves"), ("config", "Config")])


def _cells_html(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{text(c)}</td>' for c in cells)}</tr>"


def _cells_html(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{text(c)}</td>' for c in cells)}</tr>"


def _table_html(heads: str, rows: str, kind: str = "") -> str:
    return (f"<div class='scroll'><table class='{kind}'><thead><tr>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>")


def _cell_html(value: float | None, difference: tuple[float, float | None] | None) -> str:
    if value is None:
        return "<td>–</td>"
    if difference is None:
        return f"<td>{100 * value:.1f}</td>"
    gain, half = difference
    kind = "" if not _mark(difference) else "up" if gain > 0 else "down"
    interval = "" if half is None else f" ± {100 * half:.1f}"
    note = f"<small class='{kind}'>{100 * gain:+.1f}{interval}{_mark(difference)}</small>"
    return f"<td>{100 * value:.1f} {note}</td>"


def _figures(runs: Sequence[RunData], labels: Sequence[str]) -> list[str]:
    """Merged accuracy per domain, median pairwise overlap and symmetric KL, one line per run."""
    domains = list(dict.fromkeys(d for run in runs for d in domains_of(_accuracies(run))))
    charts = [(f"Merged policy on {domain}", [_merged_line(run, domain) for run in runs], True)
              for domain in domains[:9]]
    charts += [(title, [_pair_line(run, what) for run in runs], False)
               for what, title in (("overlap", "Median pairwise overlap"),
                                   ("symmetric_kl", "Median symmetric KL"))]
    figures = []
    for number, (title, points, marked) in enumerate(charts):
        lines = [Line(label, *xy, colour=PALETTE[i % len(PALETTE)])
                 for i, (label, xy) in enumerate(zip(labels, points, strict=True)) if xy is not None]
        if lines and max(len(line.x) for line in lines) > 1:
            chart = render(Chart(lines, percent=marked, marked=marked), f"compare{number}")
            figures.append(f"<figure><h3>{text(title)}</h3>{chart}</figure>")
    return figures


def _merged_line(run: RunData, domain: str) -> tuple[np.ndarray, np.ndarray] | None:
    known = [(e["step"], accuracies(e).get("merged", {}).get(domain)) for e in run.evaluations]
    points = [(step, cell.avg) for step, cell in known if cell is not None]
    return (np.array([s for s, _ in points], float), np.array([v for _, v in points])) if points else None


def _pair_line(run: RunData, what: str) -> tuple[np.ndarray, np.ndarray] | None:
    series = [run.series[f"pair/{a}~{b}/{what}"] for a, b in run.pairs
              if f"pair/{a}~{b}/{what}" in run.series]
    if not series:
        return None
    steps = np.unique(np.concatenate([s.steps for s in series]))
    grid = np.full((len(series), len(steps)), np.nan)
    for row, one in zip(grid, series, strict=True):
        row[np.searchsorted(steps, one.steps)] = one.values
    known = np.isfinite(grid).any(0)
    return (steps[known].astype(float), np.nanmedian(grid[:, known], 0)) if known.any() else None
