"""The HTML around the content: one file, no external resource, light and dark, readable on a phone."""
from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.metrics.accuracy import Accuracies, Cell, domains_of, mean_accuracy
from copd_megatron.report.style import COLOURS, SCRIPT, STYLE


def page(title: str, body: str, anchors: Sequence[tuple[str, str]] = (), refresh_s: int | None = None) -> str:
    """A whole document. ``anchors``: (id, label) of the navigation; ``refresh_s``: reload that often."""
    def variables(column: int) -> str:
        return ";".join(f"--{name}:{pair[column]}" for name, pair in COLOURS.items())

    links = "".join(f"<a href='#{a}'>{text(label)}</a>" for a, label in anchors)
    reload = f"<meta http-equiv='refresh' content='{refresh_s}'>" if refresh_s else ""
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{text(title)}</title>"
            "<meta name='viewport' content='width=device-width,initial-scale=1'>"
            f"<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>{reload}<style>"
            ":root{--font:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;"
            "--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
            f"{variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}"
            f"{STYLE}</style></head>"
            f"<body>{f'<nav><div>{links}</div></nav>' if links else ''}<main>{body}</main>"
            f"<script>{SCRIPT}</script></body></html>\n")


def text(value: object) -> str:
    """Escaped for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def prose(value: str) -> str:
    """Escaped text in which `this` becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(value))


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Key numbers: (value, what it is)."""
    return "<div class='tiles'>" + "".join(f"<div class='tile'><b>{text(v)}</b><span>{text(k)}</span></div>"
                                           for v, k in facts) + "</div>"


def accuracy_html(table: Accuracies) -> str:
    """Policy x domain in percent with intervals and the gain over base; best of each column in bold."""
    domains = domains_of(table)
    heads = "".join(f"<th>{text(d)}</th>" for d in domains) + ("<th>mean</th>" if len(domains) > 1 else "")
    best = {d: max(row[d].avg for row in table.values() if d in row) for d in domains}
    means = {policy: mean_accuracy(row, domains) for policy, row in table.items()}
    best_mean = max((m for m in means.values() if m is not None), default=None)
    base, rows = table.get("base", {}), []
    for policy, row in table.items():
        against = base if policy != "base" else {}
        cells = [_accuracy_cell(row.get(d), best[d], against.get(d)) for d in domains]
        if len(domains) > 1:
            mean = None if means[policy] is None else Cell(means[policy])
            known = against and means["base"] is not None
            cells.append(_accuracy_cell(mean, best_mean, Cell(means["base"]) if known else None))
        rows.append(f"<tr><td>{text(policy)}</td>{''.join(cells)}</tr>")
    return (f"<div class='scroll'><table><thead><tr><th>policy</th>{heads}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def _accuracy_cell(cell: Cell | None, best: float | None, base: Cell | None) -> str:
    if cell is None:
        return "<td>–</td>"
    half = ""
    if cell.low is not None and cell.high is not None:
        half = f" <small class='half'>±{100 * max(cell.high - cell.avg, cell.avg - cell.low):.1f}</small>"
    gain = "" if base is None else " " + difference_html(cell.avg - base.avg)
    kind = " class='best'" if best is not None and cell.avg >= best else ""
    return f"<td{kind}>{100 * cell.avg:.1f}{half}{gain}</td>"


def difference_html(difference: float) -> str:
    """A signed difference of accuracies in points, coloured."""
    kind = "up" if difference > 0 else "down" if difference < 0 else ""
    return f"<small class='{kind}'>{100 * difference:+.1f}</small>"


def key_value_table(values: Mapping[str, Any], heads: tuple[str, str] = ("field", "value")) -> str:
    """A two-column table."""
    rows = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in values.items())
    top = "".join(f"<th>{text(head)}</th>" for head in heads)
    return (f"<div class='scroll'><table class='left'><thead><tr>{top}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optimizer": {"lr": 1}}`` as ``{"optimizer.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
