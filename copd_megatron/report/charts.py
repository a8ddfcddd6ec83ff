"""Small charts as inline SVG whose colours are CSS variables, so that one page serves light and dark.

Matplotlib draws with stand-in colours (``#0c00NN``), which are replaced by ``var(--NAME)`` in the SVG text;
legends are HTML. Each chart carries its points as JSON for the read-out under the pointer.
"""
from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, ScalarFormatter

PALETTE = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
"""CSS variables of series colours, in the order to use."""

_NAMES = (*PALETTE, "ink", "muted", "grid", "shade")
_STAND_IN = {name: f"#0c00{i:02x}" for i, name in enumerate(_NAMES, 16)}
_POINTS = 240
"""Points per drawn line; longer series are averaged in buckets of steps."""


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart: y over x, with an optional band."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: str = "ink"
    dash: bool = False
    broken: bool = False
    """Do not bridge gaps in x: the series lives in some phases only."""
    faint: bool = False
    """One of many: thin and grey, without a legend entry; the chart shows the median of all such lines."""
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    """Band (drawn as error bars when the chart marks its points)."""


@dataclass(frozen=True)
class Chart:
    """What is drawn and how."""

    lines: Sequence[Line]
    spans: Sequence[tuple[float, float]] = ()
    """Shaded ranges of x (OPD phases)."""
    percent: bool = False
    log: bool = False
    marked: bool = False
    """Few points: markers and error bars instead of plain lines and bands."""
    stacked: bool = False
    """Bars on top of each other instead of lines."""
    from_zero: bool = False
    x_range: tuple[float, float] | None = None
    large: bool = False
    """Numbers in the thousands and beyond: ticks like 14k."""
    height: float = 2.5
    legend_extra: Sequence[tuple[str, str]] = field(default=())
    """(colour, label) of legend entries beyond the lines."""


def render(chart: Chart, salt: str) -> str:
    """HTML of legend and SVG. ``salt`` makes the ids inside the SVG unique in the page."""
    lines = list(chart.lines)
    faint = [line for line in lines if line.faint]
    if faint:
        lines.append(_median(faint))
    named = [line for line in lines if not line.faint]
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9.5, "font.family": "DejaVu Sans",
                "axes.unicode_minus": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.7, chart.height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.12, 0.17, 0.865, 0.80))  # fixed: an automatic layout draws everything twice
        _style(axes, chart)
        axes.broken_barh([(a, b - a) for a, b in chart.spans], (0, 1), transform=axes.get_xaxis_transform(),
                         color=_STAND_IN["shade"], linewidth=0, zorder=0)
        if chart.stacked:
            _draw_stacked(axes, lines)
        else:
            for line in lines:
                _draw_line(axes, line, chart.marked)
        _limits(axes, chart, lines)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        readout = _readout(figure, axes, named, chart)
    return legend(named, chart.legend_extra, "block" if chart.stacked else "line") + (
        f"<div class='plot' data-readout='{readout}'>{_clean_svg(buffer.getvalue(), salt)}</div>")


def legend(lines: Sequence[Line], extra: Sequence[tuple[str, str]] = (), kind: str = "line") -> str:
    """HTML legend: a swatch and a label per line."""
    entries = [(line.colour, line.label, "dash" if line.dash else kind) for line in lines]
    entries += [(colour, label, "block") for colour, label in extra]
    items = [f"<li><i class='{kind}' style='--k:var(--{colour})'></i>{html.escape(label)}</li>"
             for colour, label, kind in entries if label]
    return f"<ul class='legend'>{''.join(items)}</ul>" if items else ""


def bucket(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Average a series in at most ``points`` equal ranges of x; NaNs are left out of the means."""
    if len(x) <= points:
        return x, y
    edges = np.linspace(x[0], x[-1], points + 1)
    where = np.clip(np.searchsorted(edges, x, "right") - 1, 0, points - 1)
    good = np.isfinite(y)
    counts = np.bincount(where[good], minlength=points)
    sums_x = np.bincount(where[good], x[good], points)
    sums_y = np.bincount(where[good], y[good], points)
    used = counts > 0
    return sums_x[used] / counts[used], sums_y[used] / counts[used]


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the series without NaNs; short ones stay as they are."""
    width = len(y) // 20
    if width < 2:
        return y
    kernel = np.ones(2 * (width // 2) + 1)
    good = np.isfinite(y)
    total = np.convolve(np.where(good, y, 0.0), kernel, "same")
    count = np.convolve(good.astype(float), kernel, "same")
    return np.divide(total, count, out=np.full_like(y, np.nan), where=count > 0)


def _style(axes: Axes, chart: Chart) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_STAND_IN["grid"])
    axes.tick_params(colors=_STAND_IN["muted"], length=0, pad=4)
    axes.grid(axis="y", color=_STAND_IN["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step", color=_STAND_IN["muted"], labelpad=2)
    if chart.log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if chart.large else ScalarFormatter())
    if chart.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _draw_line(axes: Axes, line: Line, marked: bool) -> None:
    colour, style = _STAND_IN[line.colour], "--" if line.dash else "-"
    if marked and not line.faint:
        axes.plot(line.x, line.y, color=colour, linestyle=style, linewidth=1.6, marker="o", markersize=3.4)
        if line.low is not None and line.high is not None:
            axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1.0, alpha=0.45)
        return
    for part in _unbroken(line) if line.broken else ():
        _draw_line(axes, part, marked)
    if line.broken:
        return
    x, y = bucket(line.x, line.y, _POINTS)
    if line.faint:
        axes.plot(x, smooth(y), color=_STAND_IN["muted"], linewidth=0.7, alpha=0.5)
        return
    if line.low is not None and line.high is not None:
        axes.fill_between(x, bucket(line.x, line.low, _POINTS)[1], bucket(line.x, line.high, _POINTS)[1],
                          color=colour, alpha=0.18, linewidth=0)
    if len(x) == 1 and line.low is not None and line.high is not None:
        axes.vlines(x, line.low, line.high, color=colour, linewidth=4, alpha=0.25)
    smoothed = smooth(y)
    if smoothed is not y:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
    axes.plot(x, smoothed, color=colour, linestyle=style, linewidth=1.7, solid_capstyle="round",
              marker="o" if len(x) == 1 else None, markersize=4)


def _unbroken(line: Line) -> list[Line]:
    """The pieces of a line between gaps in x; in one piece if pieces were single points or very many."""
    cuts = np.flatnonzero(np.diff(line.x) > 1.5 * np.min(np.diff(line.x), initial=np.inf)) + 1
    pieces = np.split(np.arange(len(line.x)), cuts)
    if len(pieces) > _POINTS // 4 or min(len(p) for p in pieces) < 2:
        pieces = [np.arange(len(line.x))]
    return [replace(line, broken=False, x=line.x[p], y=line.y[p],
                    low=None if line.low is None else line.low[p],
                    high=None if line.high is None else line.high[p]) for p in pieces]


def _draw_stacked(axes: Axes, lines: Sequence[Line]) -> None:
    """Steps of at most 120 buckets, the first line at the bottom."""
    bottom = 0.0
    for line in lines:
        x, y = bucket(line.x, np.nan_to_num(line.y), 120)
        half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
        edges = np.concatenate([[x[0] - half], (x[1:] + x[:-1]) / 2, [x[-1] + half]])
        axes.stairs(bottom + y, edges, baseline=bottom, fill=True, color=_STAND_IN[line.colour], linewidth=0)
        bottom = bottom + y


def _limits(axes: Axes, chart: Chart, lines: Sequence[Line]) -> None:
    if chart.x_range is not None:
        low, high = chart.x_range
        axes.set_xlim(low, high if high > low else low + 1)
    if chart.stacked or (chart.from_zero and not chart.log):
        axes.set_ylim(bottom=0)
        return
    finite = np.concatenate([line.y[np.isfinite(line.y)] for line in lines]) if lines else np.zeros(0)
    if len(finite) and not chart.log and not chart.marked and np.ptp(finite) < 1e-12:
        centre = float(finite[0])  # matplotlib would zoom into the rounding noise of a constant
        axes.set_ylim(centre - max(0.5 * abs(centre), 0.5), centre + max(0.5 * abs(centre), 0.5))


def _median(lines: Sequence[Line]) -> Line:
    x = np.unique(np.concatenate([line.x for line in lines]))
    grid = np.full((len(lines), len(x)), np.nan)
    for row, line in zip(grid, lines, strict=True):
        row[np.searchsorted(x, line.x)] = line.y
    known = np.isfinite(grid).any(0)
    return Line(f"median of {len(lines)} in grey", x[known], np.nanmedian(grid[:, known], 0), "c8", dash=True,
                broken=lines[0].broken)


def _readout(figure: Figure, axes: Axes, lines: Sequence[Line], chart: Chart) -> str:
    """JSON for the pointer read-out: axes box as fractions of the picture, x range, points of each line."""
    box = axes.get_window_extent().transformed(figure.transFigure.inverted())
    low, high = axes.get_xlim()
    points = []
    for line in lines:
        x, y = bucket(line.x, line.y, 120)
        kept = np.isfinite(y)
        points.append({"label": line.label, "colour": line.colour, "x": [round(float(v), 1) for v in x[kept]],
                       "y": [float(f"{v:.4g}") for v in y[kept]]})
    data = {"box": [round(float(v), 4) for v in (box.x0, box.x1)], "range": [float(low), float(high)],
            "percent": chart.percent, "lines": points}
    return html.escape(json.dumps(data, separators=(",", ":")), quote=True)


def _clean_svg(svg: str, salt: str) -> str:
    """Only the <svg> element, themed, scalable, without unused ids and with the page's font."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    for old in used:  # hashes are salted, marker ids are not
        svg = re.sub(rf'(id="|href="#|url\(#){re.escape(old)}(?=["\)])', rf"\g<1>{salt}-{old}", svg)
    for name, colour in _STAND_IN.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg", '<svg role="img"', 1).strip()
