"""Which charts a report shows: from the series of a run to captioned figures, section by section.

A figure whose series were never logged is left out; its title goes to the section's note instead.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from copd_megatron.metrics.accuracy import accuracies, domains_of
from copd_megatron.metrics.names import TIMED_PHASES, check_name, edge_name
from copd_megatron.report.charts import PALETTE, Chart, Line, render
from copd_megatron.report.reader import RunData, Series

_MOST_PANELS = 9
"""Charts of one kind (per domain, student or edge) in a page."""


@dataclass(frozen=True)
class Plot:
    """A chart with its words."""

    title: str
    unit: str
    caption: str
    body: str
    """HTML of ``charts.render``."""


@dataclass
class Section:
    """A heading of the report."""

    title: str
    anchor: str
    intro: str
    plots: list[Plot] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Titles of figures without data."""
    notes: list[str] = field(default_factory=list)


class Colours:
    """One colour per expert throughout a page; base is grey, merged is the text's colour."""

    def __init__(self, experts: Sequence[str]) -> None:
        self._of = {e: PALETTE[i % len(PALETTE)] for i, e in enumerate(experts)}

    def __getitem__(self, policy: str) -> str:
        return {"base": "muted", "merged": "ink"}.get(policy) or self._of.get(policy, "muted")


def build_sections(run: RunData) -> list[Section]:
    """All sections with charts, in reading order."""
    colours = Colours(run.experts)
    makers: tuple[Callable[[RunData, Colours], Section], ...] = (
        _accuracy, _learning, _agreement, _distillation, _work)
    return [make(run, colours) for make in makers]


def _x_range(run: RunData) -> tuple[float, float] | None:
    return (0.5, run.step + 0.5) if run.step else None


def _line(series: Series, label: str, colour: str, broken: bool = False) -> Line:
    return Line(label, series.steps.astype(float), series.values, colour, broken=broken)


def _shade_legend(run: RunData) -> list[tuple[str, str]]:
    return [("shade-key", "OPD steps")] if run.opd_spans() else []


def _expert_plot(run: RunData, colours: Colours, section: Section, what: str, title: str,
                 **options: object) -> None:
    """One line per expert of metric ``{expert}/what``."""
    lines = [_line(run.series[f"{e}/{what}"], e, colours[e]) for e in run.experts
             if f"{e}/{what}" in run.series]
    _add(run, section, title, f"{{expert}}/{what}", lines, **options)


def _add(run: RunData, section: Section, title: str, pattern: str, lines: Sequence[Line],
         caption: str = "", keep: Sequence[str] = (), **options: object) -> None:
    """Render a chart over training steps into ``section``, or note that its series are missing."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        section.missing.append(title)
        return
    lines = _thinned(lines, keep)
    metric = check_name(pattern.format(expert="x", teacher="x", student="y", a="x", b="y", phase="x"))
    chart = Chart(lines, spans=run.opd_spans(), x_range=_x_range(run), large=_large(lines),
                  legend_extra=_shade_legend(run), **options)
    caption = caption or f"{metric.meaning} Healthy: {metric.healthy}."
    obvious = options.get("percent") or metric.unit in ("0 to 1", "1", "norm", "advantage", title.lower())
    unit = "" if obvious else metric.unit
    section.plots.append(Plot(title, unit, caption, render(chart, f"{section.anchor}{len(section.plots)}")))


def _thinned(lines: Sequence[Line], keep: Sequence[str] = ()) -> list[Line]:
    """The lines, and where they are too many all but those labelled ``keep`` faint."""
    if len(lines) <= len(PALETTE):
        return list(lines)
    return [line if line.label in keep else replace(line, faint=True) for line in lines]


def _large(lines: Sequence[Line]) -> bool:
    return max(float(np.nanmax(np.abs(line.y))) for line in lines) >= 1e4


def _capped(section: Section, items: Iterable, what: str) -> list:
    """At most ``_MOST_PANELS`` of the items, with a note about the rest."""
    items = list(items)
    if len(items) > _MOST_PANELS:
        section.notes.append(f"{len(items)} {what}: the first {_MOST_PANELS} are drawn, the record has all.")
    return items[:_MOST_PANELS]


def _accuracy(run: RunData, colours: Colours) -> Section:
    section = Section("Held-out accuracy over steps", "accuracy",
                      "Every policy on every domain; bars are 95 % intervals.")
    tables = [(e["step"], accuracies(e)) for e in run.evaluations]
    if len(tables) < 2:
        section.missing.append("accuracy over steps (needs two evaluations; set evaluation.every)")
        return section
    domains = domains_of(tables[-1][1])
    for i, domain in enumerate(_capped(section, domains, "domains")):
        lines = []
        for policy in tables[-1][1]:
            known = [(step, t[policy][domain]) for step, t in tables if domain in t.get(policy, {})]
            bounds = [(c.low, c.high) for _, c in known]
            whole = all(low is not None and high is not None for low, high in bounds)
            low, high = np.array(bounds, float).T if whole and bounds else (None, None)
            if known:
                lines.append(Line(policy, np.array([s for s, _ in known], float),
                                  np.array([c.avg for _, c in known]), colours[policy],
                                  dash=policy == "base", low=low, high=high))
        lines = _thinned(lines, ("base", domain, "merged"))
        chart = Chart(lines, spans=run.opd_spans(), percent=True, marked=True,
                      x_range=(-0.5, max(s for s, _ in tables) + 0.5), legend_extra=_shade_legend(run))
        section.plots.append(Plot(f"Accuracy on {domain}", "", "", render(chart, f"accuracy{i}")))
    return section


def _learning(run: RunData, colours: Colours) -> Section:
    section = Section("Learning", "learning", "The native batches of every expert.")
    _expert_plot(run, colours, section, "reward", "Reward")
    _expert_plot(run, colours, section, "length", "Completion length")
    _expert_plot(run, colours, section, "entropy", "Entropy")
    _expert_plot(run, colours, section, "kl_backbone", "KL to the backbone")
    _expert_plot(run, colours, section, "zero_std_groups", "Groups that teach nothing", percent=True)
    _expert_plot(run, colours, section, "truncated", "Truncated completions", percent=True)
    _expert_plot(run, colours, section, "grad_norm", "Gradient norm before clipping")
    return section


def _agreement(run: RunData, colours: Colours) -> Section:
    section = Section("Agreement between experts", "agreement",
                      "The paper's figure: experts drift apart in RLVR and come together in OPD (shaded). "
                      "Overlap above 0.9 keeps them able to teach each other.")
    pairs = run.pairs
    # Pairs take the palette from its end, so that no pair looks like an expert while there are few.
    shades = {pair: PALETTE[-1 - i % len(PALETTE)] for i, pair in enumerate(pairs)}
    for what, title in (("overlap", f"Pairwise top-{_overlap_k(run)} overlap"),
                        ("symmetric_kl", "Symmetric KL")):
        lines = [_line(run.series[f"pair/{a}~{b}/{what}"], f"{a} ~ {b}", shades[a, b]) for a, b in pairs
                 if f"pair/{a}~{b}/{what}" in run.series]
        _add(run, section, title, "pair/{a}~{b}/" + what, lines)
    return section


def _overlap_k(run: RunData) -> int:
    metrics = run.config.get("metrics")
    return metrics.get("overlap_k", 10) if isinstance(metrics, dict) else 10


def _distillation(run: RunData, colours: Colours) -> Section:
    section = Section("Distillation signal", "distillation",
                      "delta = log teacher - log student at the student's tokens on the teacher's prompts.")
    students = list(dict.fromkeys(s for _, s in run.edges))
    for student in _capped(section, students, "students"):
        lines = [_line(run.series[n], f"|A| of {student}", "ink") for n in [f"{student}/advantage_abs"]
                 if n in run.series]
        for teacher in (t for t, s in run.edges if s == student):
            series = run.series.get(edge_name(teacher, student, "beta_delta_abs"))
            if series is not None:
                lines.append(_line(series, f"|β delta| from {teacher}", colours[teacher], broken=True))
        _add(run, section, f"|β delta| against |A|, student {student}",
             "edge/{teacher}->{student}/beta_delta_abs", lines, keep=(f"|A| of {student}",), log=_wide(lines),
             from_zero=True,
             caption="Size of the distillation signal against the reward's. Healthy: 0.1 to 2 times |A|.")
    for teacher, student in _capped(section, run.edges, "edges"):
        parts = [run.series.get(edge_name(teacher, student, f"delta_{p}")) for p in ("p05", "p50", "p95")]
        known = [p for p in parts if p is not None]
        if len(known) < 3 or len({len(p.steps) for p in known}) > 1:
            section.missing.append(f"delta percentiles {teacher} → {student}")
            continue
        low, median, high = known
        line = Line("median, band 5 % to 95 %", median.steps.astype(float), median.values, colours[teacher],
                    broken=True, low=low.values, high=high.values)
        _add(run, section, f"Delta {teacher} → {student}", "edge/{teacher}->{student}/delta_p50", [line],
             caption="Percentiles of delta. Healthy: median near 0, band within -5 and 5.")
    if not run.edges:
        section.missing.append("|β delta| against |A|, delta percentiles (no OPD step yet)")
    return section


def _wide(lines: Sequence[Line]) -> bool:
    """A log axis wants positive values that span more than a decade."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines] or [np.zeros(0)])
    return len(values) > 0 and values.min() > 0 and values.max() > 10 * values.min()


def _work(run: RunData, colours: Colours) -> Section:
    section = Section("Time and tokens", "work", "Where the time of a step goes, and what sharing saves.")
    phases = [p for p in (*TIMED_PHASES, "other") if f"time/{p}_s" in run.series]
    steps = np.array(list(run.phases), float)
    lines = []
    for i, phase in enumerate(phases):
        series = run.series[f"time/{phase}_s"]
        by_step = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        colour = "muted" if phase == "other" else PALETTE[i % len(PALETTE)]
        lines.append(Line(phase, steps, np.array([by_step.get(int(s), 0.0) for s in steps]), colour))
    _add(run, section, "Time per step", "time/{phase}_s", lines if len(steps) else [], stacked=True,
         caption="Stacked; parts inside others are not counted twice.")
    rates = [(p, f"tokens/{p}_per_s") for p in ("rollout", "score", "update")]
    _add(run, section, "Tokens per second", "tokens/{phase}_per_s",
         [_line(run.series[n], p, PALETTE[i]) for i, (p, n) in enumerate(rates) if n in run.series])
    for name, title, options in (("tokens/saved_share", "Token evaluations saved by prefix sharing",
                                  {"percent": True}),
                                 ("memory/peak_bytes", "Peak memory", {})):
        lines = [_line(run.series[name], "", "c1")] if name in run.series else []
        _add(run, section, title, name, lines, **options)
    if "prefix/hit_rate" in run.series:
        _add(run, section, "Prompts found in the prefix store", "prefix/hit_rate",
             [_line(run.series["prefix/hit_rate"], "", "c1")], percent=True)
    return section
