"""``report.html``: what happened in a run, on one page that may be rebuilt while the run lives."""
from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from copd_megatron.metrics.accuracy import accuracies, domains_of, mean_accuracy
from copd_megatron.metrics.progress import duration
from copd_megatron.report.figures import Section, build_sections
from copd_megatron.report.page import accuracy_html, flatten, key_value_table, page, prose, text, tiles
from copd_megatron.report.reader import RunData, State, read_run
from copd_megatron.report.samples import pick_samples, samples_html

_REFRESH_S = 60


def build_report(run_dir: Path, state: State | None = None) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Reads config.json, run.json, metrics.jsonl, evaluations.jsonl, summary.json and rollouts/; whatever is
    missing or damaged is left out with a note. ``state`` overrides what the folder tells. The page appears
    whole: it is written aside and renamed. UserError if ``run_dir`` holds no run.
    """
    run = read_run(Path(run_dir))
    state = state or run.state()
    path = run.folder / "report.html"
    partial = path.with_name(f"report.html.tmp{os.getpid()}")  # `copd report` may run beside the trainer
    partial.write_text(_document(run, state), encoding="utf-8")
    os.replace(partial, path)
    return path


def _document(run: RunData, state: State) -> str:
    sections = build_sections(run)
    samples = pick_samples(run)
    body = [_header(run, state), _final_table(run, state), *(_section_html(s) for s in sections)]
    anchors = [("table", "Table"), *((s.anchor, s.title) for s in sections if s.plots)]
    if samples:
        body.append(_samples_section(samples_html(samples)))
        anchors.append(("samples", "Samples"))
    body.append(_config_section(run))
    anchors.append(("config", "Config"))
    return page(f"{_name(run)}: {state}", "".join(body), anchors, _REFRESH_S if state == "running" else None)


def _name(run: RunData) -> str:
    return Path(run.info["recipe"]).stem if run.info.get("recipe") else run.folder.resolve().name


def _header(run: RunData, state: State) -> str:
    total = run.total_steps
    model = run.config.get("model")
    starts = run.info.get("starts") or [{}]
    recipe = run.info.get("recipe")
    facts = {"recipe": "/".join(Path(recipe).parts[-2:]) if recipe else None,
             "backbone": model.get("path") if isinstance(model, dict) else None,
             "experts": ", ".join(run.experts), "seed": run.config.get("seed", run.summary.get("seed")),
             "ranks": starts[-1].get("world_size"), "device": starts[-1].get("device"),
             "resumed at": ", ".join(f"step {s['step']}" for s in starts[1:]) or None}
    line = " · ".join(f"{k} {text(v)}" for k, v in facts.items() if v not in (None, ""))
    versions = " · ".join(f"{text(k)} {text(v)}" for k, v in run.info.get("versions", {}).items())
    lines = "<br>".join(part for part in (line, versions) if part)
    progress = f"step {run.step}" + (f" of {total}" if total else "")
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return (f"<h1>{text(_name(run))} <span class='state {state}'>{state}</span></h1>"
            f"<p class='quiet'>{lines}<br>{progress} · page written {written}</p>{tiles(_key_numbers(run))}")


def _key_numbers(run: RunData) -> list[tuple[str, str]]:
    numbers: list[tuple[str, str]] = []
    source = run.latest_accuracies()
    if source is not None:
        table = accuracies(source)
        domains = domains_of(table)
        means = {p: mean_accuracy(table[p], domains) for p in table}
        merged, base = means.get("merged"), means.get("base")
        if merged is not None:
            numbers.append((f"{100 * merged:.1f} %", "merged policy, mean accuracy"))
        if merged is not None and base is not None:
            numbers.append((f"{100 * (merged - base):+.1f}", "points over the backbone"))
    train_s = run.summary.get("train_s") or _sum_of(run, "time/step_s")
    if train_s:
        numbers.append((duration(train_s), "training time"))
    for name, form, what in (("time/step_s", "{:.2f} s", "median step"),
                             ("tokens/rollout_per_s", "{:,.0f}", "rollout tokens per s"),
                             ("tokens/saved_share", "{:.0%}", "token evaluations saved by sharing")):
        if name in run.series and np.isfinite(run.series[name].values).any():
            numbers.append((form.format(np.nanmedian(run.series[name].values)), what))
    return numbers


def _sum_of(run: RunData, name: str) -> float:
    return float(np.nansum(run.series[name].values)) if name in run.series else 0.0


def _final_table(run: RunData, state: State) -> str:
    source = run.latest_accuracies()
    if source is None:
        return "<h2 id='table'>Policies and domains</h2><p class='note'>No evaluation yet.</p>"
    table = accuracies(source)
    when = f"step {source['step']}" if "step" in source else "the end of the run"
    counts = sorted({c.n for row in table.values() for c in row.values() if c.n})
    facts = [f"Accuracy in % at {when}"]
    if source.get("mode"):
        samples = source.get("samples", 1)
        facts.append(str(source["mode"]) + (f", mean of {samples} samples" if samples > 1 else ""))
    if counts:
        most = f" to {counts[-1]:,}" if len(counts) > 1 else ""
        facts.append(f"{counts[0]:,}{most} held-out prompts per domain")
    facts += ["± is the 95 % interval", "coloured: points over base"]
    title = "Policies and domains" if state == "finished" else "Policies and domains, latest evaluation"
    return f"<h2 id='table'>{title}</h2><p class='quiet'>{text('; '.join(facts))}.</p>{accuracy_html(table)}"


def _section_html(section: Section) -> str:
    notes = [*section.notes, *([f"Not logged: {', '.join(section.missing)}."] if section.missing else [])]
    figures = "".join(f"<figure><h3>{text(p.title)} <small>{text(p.unit)}</small></h3>{p.body}"
                      f"<figcaption>{prose(p.caption)}</figcaption></figure>" for p in section.plots)
    return (f"<h2 id='{section.anchor}'>{text(section.title)}</h2><p class='quiet'>{text(section.intro)}</p>"
            f"<div class='grid'>{figures}</div>{''.join(f'<p class=note>{prose(n)}</p>' for n in notes)}")


def _samples_section(cards: str) -> str:
    return ("<h2 id='samples'>Sample completions</h2>"
            "<p class='quiet key'>The best and the worst completion of a prompt. Where a teacher scored "
            "them, tokens are tinted by delta: <span style='background:rgb(var(--more)/.5)'>the teacher "
            "says it more</span> <span style='background:rgb(var(--less)/.5)'>the teacher says it less"
            f"</span>; point at a token for its numbers.</p><div class='samples'>{cards}</div>")


def _config_section(run: RunData) -> str:
    notes = "".join(f"<p class='note'>{text(note)}</p>" for note in run.notes)
    config = key_value_table(flatten(run.config)) if run.config else "<p class='note'>No config.json.</p>"
    return f"<h2 id='config'>Config</h2>{notes}<details><summary>Resolved config</summary>{config}</details>"
