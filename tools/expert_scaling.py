"""How the cost of one OPD step grows with the number of experts: bytes between replicas and operations, N = 2 to 32.

    python tools/expert_scaling.py --out results [--json results/scaling.json] [--measure 2 4 8 16 32]

Every topology (full, hub, ring, expander(3)) is counted under two rules for how much experts ask each other:

    per_edge      every edge carries the same number of cross completions, however many edges there are
    per_student   every student makes the same number, split over its teachers (`opd.cross_ratio`, the default)

and two placements: one replica per expert, and a fixed number of replicas that host N / replicas experts each.
Counted are bytes and operations of a 4B backbone, by `copd_megatron.simulate`, the same functions as `copd plan`.
Measured (`--measure`, `expert_step.py`) are those of a tiny backbone's step on as many gloo ranks as replicas, beside
what the same functions count for it. Exponents are the slopes of straight lines through log2(cost) over log2(N) for
the larger half of the N, where lower-order terms have faded.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_record import add_json_option, end, machine, refuse_below, save_json, writable
from expert_step import TINY, run_jobs
from forked_ranks import fork_ranks

import copd_megatron.platform  # noqa: F401  (before any of Megatron)
from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.reference import resolve_object
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.exchange.topology import edges
from copd_megatron.launch.table import format_table
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.parallel.layout import Layout
from copd_megatron.simulate.cost import step_flops
from copd_megatron.simulate.job import Job, PromptLengths
from copd_megatron.simulate.traffic import gather, scatter
from copd_megatron.types import UserError

COUNTS = (2, 4, 8, 16, 32)
TOPOLOGIES = ("full", "hub", "ring", "expander(3)")
RULES = ("per_edge", "per_student")
COSTS = ("scatter_bytes", "gather_bytes", "gather_rank_bytes", "score_flops", "step_flops")
MEASURED = ("scatter_bytes", "gather_bytes", "score_flops", "update_flops")
SMALL = {"prompts": 2, "prompt_tokens": 16, "completion_tokens": 16, "topk": 64, "rank": 8}
"""Of the step that is measured, in groups of 8, by a backbone of 2 layers of 64."""
QWEN3_VL_4B = BackboneSpec("qwen3_vl", 36, 2560, 9728, 32, 8, 128, 151936, 1e-6, RopeSpec(5e6, None, (24, 20, 20)),
                           True, False, False, False, True, 3, 151655, 151656)
"""What is counted unless --backbone names a directory."""


@dataclass(frozen=True)
class Row:
    """One point of the study; bytes and operations of one OPD step, all ranks together unless said otherwise."""

    topology: str
    rule: str
    replicas: str
    """"experts" (one each) or the fixed number."""
    experts: int
    edges: int
    scatter_bytes: float
    gather_bytes: float
    gather_rank_bytes: float
    """Of ``gather_adapters``, received by one rank."""
    score_flops: float
    """Of teachers scoring cross completions, and of the KL to the backbone."""
    step_flops: float
    """Of rollout, scoring and update."""


@dataclass(frozen=True)
class Measurement:
    """One point that was measured, and what is counted for it; all ranks together."""

    topology: str
    rule: str
    replicas: str
    experts: int
    edges: int
    scatter_bytes: float
    """Control words included."""
    gather_bytes: float
    score_flops: float
    update_flops: float
    counted_scatter_bytes: float
    counted_gather_bytes: float
    counted_score_flops: float
    """Every student's request evaluates its prompt anew, which co-hosted ones share."""
    counted_update_flops: float


def study(spec: BackboneSpec, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """All points, and the topologies that this version does not know or that N experts cannot have."""
    rows, missing = [], []
    for count in options.experts:
        jobs, unknown = _jobs(spec, options, count)
        missing += unknown
        for (topology, rule), job in jobs.items():
            rows.append(_row(job, topology, rule, "experts", count))
            rows.append(_row(job, topology, rule, str(options.replicas), min(count, options.replicas)))
    return rows, missing


def measurements(options: argparse.Namespace, run: Callable[..., list[dict]] = fork_ranks) -> Iterator[Measurement]:
    """All points that are measured: the same experts, topologies and rules, a smaller step; ``run`` as `fork_ranks`."""
    small = argparse.Namespace(**vars(options) | SMALL)
    for count in options.measure:
        jobs, _ = _jobs(TINY, small, count)
        for label, replicas in (("experts", count), (str(options.replicas), min(count, options.replicas))):
            found = run(replicas, run_jobs, list(jobs.values()))
            for ((topology, rule), job), measured in zip(jobs.items(), found, strict=True):
                layout, placement = Layout(replicas=replicas), job.place(replicas)
                flops = [step_flops(job, placement, replica) for replica in range(replicas)]
                counted = {
                    "scatter_bytes": scatter(job, layout, placement, lambda edge: edge.signal).step_bytes,
                    "gather_bytes": gather(job, layout, placement).step_bytes,
                    "score_flops": sum(part["score"].total for part in flops),
                    "update_flops": sum(part["update"].total for part in flops)}
                yield Measurement(topology, rule, label, count, len(job.edges), **measured,
                                  **{f"counted_{name}": value for name, value in counted.items()})


def _jobs(spec: BackboneSpec, options: argparse.Namespace, count: int) -> tuple[dict[tuple[str, str], Job], list[str]]:
    """(topology, rule) -> the step of so many experts; and the topologies that they cannot have."""
    names, jobs, missing = tuple(f"e{n}" for n in range(count)), {}, []
    for topology in options.topologies:
        try:
            links = edges(ExchangeConfig(topology=topology), OpdConfig(signal=options.signal), names, 0, resolve_object)
        except UserError as error:
            missing.append(f"{topology} with {count} experts: {error}")
            continue
        jobs |= {(topology, rule): _job(spec, options, names, tuple(links), rule) for rule in RULES}
    return jobs, missing


def _job(spec: BackboneSpec, options: argparse.Namespace, names: tuple[str, ...], links: tuple, rule: str) -> Job:
    """One run. An edge never asks more than the teacher's native prompts, so a ratio as large as the largest number
    of teachers that a student has gives every edge just those."""
    teachers = max((sum(edge.student == name for edge in links) for name in names), default=1)
    opd = OpdConfig(signal=options.signal, topk=options.topk, cross_ratio=teachers if rule == "per_edge" else 1.0)
    rollout = RolloutConfig(prompts_per_step=options.prompts, group_size=8,
                            max_completion_tokens=options.completion_tokens)
    return Job(spec, ModelConfig(path="-"), AdapterConfig(rank=options.rank), rollout, RlvrConfig(), opd, 16384, names,
               links, dict.fromkeys(names, PromptLengths(options.prompt_tokens)), options.completion_tokens)


def _row(job: Job, topology: str, rule: str, label: str, replicas: int) -> Row:
    layout, placement = Layout(replicas=replicas), job.place(replicas)
    gathered = gather(job, layout, placement)
    per_replica = [step_flops(job, placement, replica) for replica in range(replicas)]
    return Row(topology, rule, label, len(job.experts), len(job.edges),
               scatter(job, layout, placement, lambda edge: edge.signal).step_bytes, gathered.step_bytes,
               gathered.rank_bytes, sum(flops["score"].total for flops in per_replica),
               sum(part.total for flops in per_replica for part in flops.values()))


def exponents(rows: Sequence[Row | Measurement], costs: Sequence[str] = COSTS) -> Iterator[dict]:
    """The slope of log(cost) over log(N) for every topology, rule, placement and cost."""
    def key_of(row: Row | Measurement) -> tuple[str, str, str]:
        return row.topology, row.rule, row.replicas if row.replicas == "experts" else "fixed"

    for key in dict.fromkeys(map(key_of, rows)):
        own = [row for row in rows if key_of(row) == key]
        own = own[-max(2, (len(own) + 1) // 2):]
        counts = np.log2([row.experts for row in own])
        slopes = {}
        for cost in costs:
            values = np.array([getattr(row, cost) for row in own])
            known = len(own) > 1 and bool((values > 0).all())
            slopes[cost] = float(np.polyfit(counts, np.log2(values), 1)[0]) if known else None
        yield {"topology": key[0], "rule": key[1], "replicas": key[2], **slopes}


def text(rows: Sequence[Row | Measurement], fits: Sequence[dict], costs: Sequence[str] = COSTS) -> str:
    """Both tables for people."""
    shown = [*costs, *(f"counted_{cost}" for cost in costs if hasattr(rows[0], f"counted_{cost}"))]
    cells = [[r.topology, r.rule, r.replicas, str(r.experts), str(r.edges),
              *(f"{getattr(r, cost):.3g}" for cost in shown)] for r in rows]
    fitted = [[f["topology"], f["rule"], f["replicas"],
               *("-" if f[cost] is None else f"N^{f[cost]:.2f}" for cost in costs)] for f in fits]
    return (format_table(["topology", "rule", "replicas", "experts", "edges", *shown], cells) + "\n\n"
            + format_table(["topology", "rule", "replicas", *costs], fitted))


def plot(rows: Sequence[Row | Measurement], out: Path, name: str, flops: str) -> list[Path]:
    """Bytes and operations over N, one replica per expert, log-log: name.png and name.svg. Thin lines: counted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True)
    own = [r for r in rows if r.replicas == "experts"]
    for column, rule in enumerate(RULES):
        for line, (cost, unit) in enumerate((("scatter_bytes", "bytes per OPD step"), (flops, "FLOP per step"))):
            axis = axes[line][column]
            for topology in dict.fromkeys(r.topology for r in own):
                points = [(r.experts, getattr(r, cost)) for r in own if (r.topology, r.rule) == (topology, rule)]
                drawn, = axis.loglog(*zip(*points), marker="o", base=2,
                                     label=f"scatter, {topology}" if line == 0 else topology)
                counted = [(r.experts, getattr(r, f"counted_{cost}")) for r in own
                           if (r.topology, r.rule) == (topology, rule) and hasattr(r, f"counted_{cost}")]
                if counted:
                    axis.loglog(*zip(*counted), base=2, linewidth=0.7, color=drawn.get_color(), linestyle=":")
            if line == 0:
                points = [(r.experts, r.gather_bytes) for r in own if (r.topology, r.rule) == (own[0].topology, rule)]
                axis.loglog(*zip(*points), marker="s", base=2, linestyle="--", label="gather_adapters")
            axis.set(title=f"{rule.replace('_', ' ')}: {cost.replace('_', ' ')}", xlabel="experts", ylabel=unit)
            axis.grid(True, which="both", alpha=0.3)
            axis.legend()
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for file in files:
        figure.savefig(file)
    pyplot.close(figure)
    return files


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda name: writable(f"{name}/scaling.png").parent, default=Path("results"),
                        metavar="DIR", help="folder of the plots (%(default)s)")
    add_json_option(parser, "also write rows and exponents there; what is measured as it comes")
    parser.add_argument("--backbone", metavar="DIR", help="Hugging Face directory; only config.json is read")
    parser.add_argument("--experts", type=int, nargs="+", default=list(COUNTS), metavar="N",
                        help="numbers of experts (2 4 8 16 32)")
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), metavar="NAME",
                        help="as exchange.topology (full hub ring expander(3))")
    parser.add_argument("--measure", type=int, nargs="*", default=[], metavar="N", help="also measure with N experts")
    parser.add_argument("--replicas", type=int, default=2, help="of the placement with a fixed number (default: 2)")
    parser.add_argument("--prompts", type=int, default=256, help="native prompts per expert and step")
    for name, default, text in (("prompt-tokens", 512, "tokens of a prompt"),
                                ("completion-tokens", 1024, "tokens of a completion"),
                                ("topk", 64, "ids per token of signal topk"), ("rank", 32, "rank of the adapters")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--signal", default="topk", choices=["sampled", "topk", "full"], help="(%(default)s)")
    options = parser.parse_args(arguments)
    refuse_below(parser, options, experts=2, measure=2, replicas=1, prompts=1, prompt_tokens=1, completion_tokens=1,
                 topk=1, rank=1)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a rank fails; 2 when something impossible was asked for."""
    options = parse(arguments)
    try:
        run(options)
    except (ArithmeticError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Count, measure, print, plot, write."""
    torch.set_num_threads(1)  # ranks are forked: the parent must own no other threads
    spec, where = read_spec(options.backbone) if options.backbone else QWEN3_VL_4B, machine()
    rows, missing = study(spec, options)
    if not rows:
        raise UserError("; ".join(missing))
    measured: list[Measurement] = []

    def save() -> None:
        fits, measured_fits = list(exponents(rows)), list(exponents(measured, MEASURED))
        save_json(options.json, {"rows": [asdict(r) for r in rows], "exponents": fits,
                                 "measured": [asdict(m) for m in measured], "measured_exponents": measured_fits,
                                 "left_out": missing}, where, options)

    for point in measurements(options):
        print(f"measured: {point.topology}, {point.rule}, {point.experts} experts, replicas: {point.replicas}",
              flush=True)
        measured.append(point)
        save()
    print(text(rows, list(exponents(rows))))
    files = plot(rows, options.out, "scaling", "step_flops")
    if measured:
        print(text(measured, list(exponents(measured, MEASURED)), MEASURED))
        files += plot(measured, options.out, "measured", "score_flops")
    for reason in missing:
        print(f"left out: {reason}")
    for file in files:
        print(f"written: {file}")
    save()


if __name__ == "__main__":
    end(main)
