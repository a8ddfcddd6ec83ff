"""``copd plan``: memory, traffic and time of a recipe on ranks that need not exist.

Built from the trainer's own layout, placement, topology and shapes; no weights are read and no process group is
made. Sizes are decimal: 1 GB = 1e9 bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import copd_megatron.platform  # noqa: F401  (before any of Megatron, whose notices it silences)
from copd_megatron.config.reference import resolve_object
from copd_megatron.config.run import RunConfig
from copd_megatron.exchange.topology import edges
from copd_megatron.launch.table import format_table
from copd_megatron.metrics.sinks import replace_file
from copd_megatron.model.backbone import layer_chunks
from copd_megatron.model.hf_config import read_spec
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.cost import StepTime, assumptions, step_time
from copd_megatron.simulate.hardware import Hardware
from copd_megatron.simulate.inputs import measured_lengths, vision_bytes
from copd_megatron.simulate.job import Job, PromptLengths
from copd_megatron.simulate.memory import PHASES
from copd_megatron.simulate.ranks import rank_records, rank_table
from copd_megatron.simulate.search import Candidate, RankKind, fullest, rank_kinds
from copd_megatron.simulate.traffic import Traffic, chosen, traffic_by_transport
from copd_megatron.trainer.build import place
from copd_megatron.types import UserError

FULL_TABLE_RANKS = 64
"""Up to so many ranks the layout has a row for each."""
BEST = 5
"""Layouts that the search prints."""
SHOWN_STAGES = 4
"""Columns of the memory table; further stages are left to --json."""


@dataclass(frozen=True)
class Plan:
    """A recipe on one layout."""

    job: Job
    layout: Layout
    placement: Placement
    hardware: Hardware
    transport: str
    kinds: list[RankKind]
    traffic: dict[str, Traffic]
    times: dict[str, StepTime]
    """"rlvr" and "opd" -> seconds of such a step."""

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's peak is within the usable memory."""
        return fullest(self.kinds).memory.peak_bytes <= self.hardware.usable_bytes


def layout_of(config: RunConfig, world_size: int) -> tuple[Layout, Placement]:
    """Layout and placement that ``copd train`` would make of so many ranks.

    Raises:
        UserError: the recipe's sizes do not divide the world size.
    """
    layout = Layout.of(config.parallel, world_size)
    return layout, place(config, layout.replicas)


def job_of(config: RunConfig, prompt_tokens: int | None = None, completion_tokens: int | None = None) -> Job:
    """The recipe's work; prompt lengths are measured from its tasks unless ``prompt_tokens`` is given.

    Raises:
        UserError: backbone, task, topology or lengths that do not fit.
    """
    spec = read_spec(config.model.path)
    limit = config.rollout.max_completion_tokens
    completion = limit if completion_tokens is None else completion_tokens
    if completion > limit:
        raise UserError(f"--completion-tokens: {completion}; at most rollout.max_completion_tokens, {limit}; "
                        "lower it")
    spec.check_adapter(config.adapter)
    if prompt_tokens is None:
        prompts = measured_lengths(config.model.path, config.experts)
    else:
        prompts = {name: PromptLengths(prompt_tokens, header_tokens=min(3, prompt_tokens)) for name in config.experts}
    experts, schedule = tuple(config.experts), config.schedule
    links = edges(config.exchange, config.opd, list(experts), 0, resolve_object) if schedule.opd_steps else []
    return Job(spec, config.model, config.adapter, config.rollout, config.rlvr, config.opd,
               config.optimizer.microbatch_tokens, experts, tuple(links), prompts, completion,
               vision_bytes(config.model.path, spec, config.model.dtype),
               schedule.cycles * (schedule.rl_steps + schedule.opd_steps),
               {name: expert.weight for name, expert in config.experts.items()}, tuple(config.exchange.frozen_teachers))


def make_plan(job: Job, layout: Layout, placement: Placement, hardware: Hardware, transport: str) -> Plan:
    """Memory, traffic and time under one layout.

    Raises:
        UserError: the backbone cannot be cut this way, or the hardware does not know its dtype.
    """
    job.spec.check_layout(layout)
    times = {phase: step_time(job, layout, placement, hardware, transport, opd=phase == "opd")
             for phase in ("rlvr", *(["opd"] if job.edges else []))}
    return Plan(job, layout, placement, hardware, transport, rank_kinds(job, layout, placement),
                traffic_by_transport(job, layout, placement), times)


def plan_text(plan: Plan) -> str:
    """The whole plan for people."""
    job, layout = plan.job, plan.layout
    prompts = ", ".join(f"{name} {p.tokens}" for name, p in job.prompts.items())
    parts = [
        f"{layout.world_size} ranks of {plan.hardware.name}: TP {layout.tp} x PP {layout.pp} x CP {layout.cp} x "
        f"{layout.replicas} replicas" + (f" (MoE experts: EP {layout.ep} x ETP {layout.etp})" if job.spec.moe else "")
        + f"; {len(job.experts)} experts, {len(job.edges)} edges",
        *_stages_text(job, layout),
        f"prompt tokens: {prompts}; completion tokens: {job.completion_tokens}", "",
        _memory_text(plan), "", _traffic_text(plan), "", _time_text(plan), "", "assumptions",
        *(f"  {line}" for line in assumptions(plan.hardware, job.model.dtype))]
    return "\n".join(parts)


def _stages_text(job: Job, layout: Layout) -> list[str]:
    """Which layers each pipeline stage has."""
    if layout.pp == 1:
        return []
    chunks = layer_chunks(job.spec.num_layers, layout.pp * layout.vp)
    stages = [" and ".join(f"{own.start}-{own.stop - 1}" for own in chunks[stage::layout.pp])
              for stage in range(layout.pp)]
    return ["layers by stage: " + "; ".join(stages)]


def _memory_text(plan: Plan) -> str:
    worst = fullest(plan.kinds)
    shown = _shown_kinds(plan.kinds)
    rows = [[part, *(size_text(kind.memory.parts().get(part, 0)) for kind in shown)]
            for part in dict.fromkeys(part for kind in shown for part in kind.memory.parts())]
    rows += [[f"peak in {phase}", *(size_text(kind.memory.always_bytes + sum(kind.memory.phases[phase].values()))
                                    for kind in shown)] for phase in PHASES]
    header = ["memory per rank", *(f"stage {kind.stage}, {len(plan.placement.experts_of(kind.replica))} experts"
                                   for kind in shown)]
    left_out = len(plan.kinds) - len(shown)
    more = f"\n({left_out} more kinds of ranks, none fuller; --json FILE holds all)" if left_out else ""
    verdict = "fits" if plan.fits else "does NOT fit"
    return (format_table(header, rows) + more + f"\n{verdict}: the fullest rank needs "
            f"{size_text(worst.memory.peak_bytes)} (in {worst.memory.peak_phase}); {plan.hardware.name} has "
            f"{size_text(plan.hardware.usable_bytes)} to plan with ({plan.hardware.usable:.0%} of its memory)"
            + ("" if plan.fits else "; --search looks for layouts that fit"))


def _shown_kinds(kinds: Sequence[RankKind]) -> list[RankKind]:
    """The fullest of each stage; of many stages those that hold most."""
    by_stage: dict[int, RankKind] = {}
    for kind in kinds:
        best = by_stage.setdefault(kind.stage, kind)
        if kind.memory.peak_bytes > best.memory.peak_bytes:
            by_stage[kind.stage] = kind
    most = sorted(by_stage.values(), key=lambda kind: -kind.memory.peak_bytes)[:SHOWN_STAGES]
    return sorted(most, key=lambda kind: kind.stage)


def _traffic_text(plan: Plan) -> str:
    if not plan.job.edges:
        return "nothing is exchanged: no edges, or no OPD steps"
    rows = [[name, size_text(traffic.step_bytes), size_text(traffic.rank_bytes)]
            for name, traffic in plan.traffic.items()]
    name, traffic = chosen(plan.job, plan.layout, plan.placement, plan.transport)
    return (format_table(["exchanged per OPD step", "all ranks", "received by one rank"], rows)
            + f"\nthis recipe: {name}, {size_text(traffic.step_bytes)}")


def _time_text(plan: Plan) -> str:
    fields = [f.name for f in dataclasses.fields(StepTime)]
    rows = [[name, *(f"{getattr(time, name):.3g}" for time in plan.times.values())] for name in [*fields, "total"]]
    return format_table(["seconds (estimate)", *(f"{phase} step" for phase in plan.times)], rows)


def layout_text(layout: Layout, placement: Placement) -> str:
    """rank -> coordinates -> experts -> groups; a row per rank, or per run of ranks where there are many."""
    full = layout.world_size <= FULL_TABLE_RANKS
    return f"{layout.key}\n" + format_table(*rank_table(layout, placement, full))


def search_text(found: Sequence[Candidate], hardware: Hardware) -> str:
    """The fastest layouts that fit, and why the others do not."""
    fitting = [c for c in found if c.fits]
    names = [name for name in _SIZES if name in _SIZES[:3] or any(getattr(c, name.lower()) > 1 for c in found)]
    rows = [[*_sizes(c, names), str(c.replicas), size_text(c.peak_bytes), f"{c.time.total:.3g}",
             f"{c.time.rollout:.3g}", f"{c.time.score:.3g}", f"{c.time.exchange:.3g}", f"{c.time.update:.3g}"]
            for c in fitting[:BEST]]
    parts = [f"{len(found)} layouts, {len(fitting)} fit {hardware.name}; the fastest by estimated seconds of a step"]
    if rows:
        header = [*names, "replicas", "peak", "step", "rollout", "score", "exchange", "update"]
        parts.append(format_table(header, rows))
    rest = found[len(fitting):]
    if rest:
        parts += ["", "why the others do not fit"]
        parts.append(format_table([*names, "reason"], [[*_sizes(c, names), c.reason] for c in rest]))
    return "\n".join(parts)


_SIZES = ("TP", "PP", "CP", "EP", "ETP", "VP")
"""The last three stand in tables where some layout has them."""


def _sizes(candidate: Candidate, names: Sequence[str]) -> list[str]:
    return [str(getattr(candidate, name.lower())) for name in names]


def plan_json(plan: Plan | None, found: Sequence[Candidate] | None, ranks: bool) -> dict[str, Any]:
    """What --json writes: the plan, or what the search found; bytes and seconds, not rounded.

    Args:
        ranks: add every rank's coordinates, experts and groups to the plan.
    """
    if plan is None:
        return {"search": [dataclasses.asdict(c) | {"fits": c.fits, "total_s": c.time.total if c.time else None}
                           for c in found or ()]}
    layout, job = plan.layout, plan.job
    memory = [{"stage": k.stage, "replica": k.replica, "replicas": k.replicas,
               "experts": list(plan.placement.experts_of(k.replica)), "peak_bytes": k.memory.peak_bytes,
               "peak_phase": k.memory.peak_phase, "always": dict(k.memory.always),
               "phases": {name: dict(parts) for name, parts in k.memory.phases.items()}} for k in plan.kinds]
    return {
        "layout": dataclasses.asdict(layout) | {"key": layout.key, "world_size": layout.world_size},
        "hardware": dataclasses.asdict(plan.hardware), "fits": plan.fits,
        "usable_bytes": plan.hardware.usable_bytes,
        "prompts": {name: dataclasses.asdict(p) for name, p in job.prompts.items()},
        "completion_tokens": job.completion_tokens, "memory": memory,
        "traffic": {name: dataclasses.asdict(traffic) for name, traffic in plan.traffic.items()},
        "transport": chosen(job, layout, plan.placement, plan.transport)[0],
        "seconds": {phase: dataclasses.asdict(time) | {"total": time.total} for phase, time in plan.times.items()},
        "assumptions": assumptions(plan.hardware, job.model.dtype),
        **(rank_records(layout, plan.placement) if ranks else {}),
    }


def write_json(file: str, content: dict[str, Any]) -> None:
    """Write the plan whole or not at all."""
    replace_file(Path(file), (json.dumps(content) + "\n").encode())


def size_text(size: float) -> str:
    """Bytes for people: "0", "512 B", "1.23 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B" if size else "0"
