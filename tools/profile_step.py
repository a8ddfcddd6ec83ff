"""Says where the time of a step goes: by phase, by operator or kernel, and how much of the peak is reached (MFU).

    python tools/profile_step.py examples/quickstart.py
    python tools/profile_step.py examples/quickstart.py --set adapter.scope=completion --json profile.json
    python tools/profile_step.py runs/quickstart --trace trace.json
    torchrun --nproc-per-node 8 tools/profile_step.py RECIPE --hardware h100

A recipe (or a run, with the adapters of its newest save) is built as `copd train` builds it and takes RLVR and OPD
steps in a temporary folder: some to warm up, some that are timed, and one of each under torch.profiler, which slows
steps down, so that its seconds only tell operators apart. Operations are counted (`tools/step_work.py`); MFU is
operations / (seconds x ranks x peak), the peak that of --hardware: built in, or hardware.json of `copd calibrate`.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

from copd_megatron.launch import environment  # noqa: E402

environment.set_defaults()  # before the libraries that read them

import torch  # noqa: E402
from bench_record import add_json_option, end, writable  # noqa: E402
from step_work import StepWork  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

import copd_megatron.platform  # noqa: E402,F401  (before any of Megatron)
from copd_megatron.checkpoint.manager import CheckpointManager, RunState  # noqa: E402
from copd_megatron.config.loading import apply_overrides, load_recipe, to_json  # noqa: E402
from copd_megatron.config.run import RunConfig  # noqa: E402
from copd_megatron.launch import run_folder  # noqa: E402
from copd_megatron.launch.calibrate import most_alike  # noqa: E402
from copd_megatron.launch.commands import leave, prepare  # noqa: E402
from copd_megatron.launch.table import format_table  # noqa: E402
from copd_megatron.metrics.names import TIMED_PHASES  # noqa: E402
from copd_megatron.metrics.sinks import replace_file  # noqa: E402
from copd_megatron.metrics.timers import RANGE  # noqa: E402
from copd_megatron.parallel.collectives import reduce_scalars  # noqa: E402
from copd_megatron.simulate.hardware import Hardware, load_hardware  # noqa: E402
from copd_megatron.trainer.build import build_trainer  # noqa: E402
from copd_megatron.trainer.trainer import Trainer  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

STEP = "step/"
"""Steps are ranges of this prefix in a profile."""
PHASES = (*TIMED_PHASES, "other")
OUTSIDE = "(Python, outside operators)"


@dataclass
class StepProfile:
    """One kind of step, over all ranks; seconds are rank 0's."""

    step_s: float
    seconds: dict[str, float]
    """Phase -> its part of the step; phases that did not occur are left out."""
    flops: dict[str, float]
    """Phase -> operations of all replicas."""
    tokens: float
    """Completion tokens that the updates saw."""
    peak_bytes: float
    operators: dict[str, Operator] = field(default_factory=dict)


@dataclass
class Operator:
    """An operator on the CPU, or a kernel on a GPU, in the profiled step of this rank."""

    calls: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Phase -> its own seconds, without what it calls."""

    @property
    def self_s(self) -> float:
        """In all phases."""
        return sum(self.seconds.values())


def timed_steps(trainer: Trainer, options: argparse.Namespace, kinds: Sequence[str]) -> dict[str, StepProfile]:
    """Time steps of each kind as the schedule has them (``configured``), then profile one of each."""
    work, each = StepWork(trainer), options.warmup + options.steps
    found: dict[str, StepProfile] = {}
    for number, kind in enumerate(kinds):
        rows = [_step(trainer, work, number * each + turn, kind, f"{turn + 1} of {each}") for turn in range(each)]
        # The one with the median duration: its phases add up.
        found[kind] = sorted(rows[options.warmup:], key=lambda row: row.step_s)[(options.steps - 1) // 2]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if torch.cuda.is_available()
                 else [ProfilerActivity.CPU]) as profiler:
        for number, kind in enumerate(kinds):
            with record_function(STEP + kind):
                _step(trainer, work, (2 + number) * each, kind, "under the profiler")
    if options.trace and trainer.groups.is_main:
        partial = options.trace.with_name(options.trace.name + ".tmp")
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, options.trace)
    for kind, operators in by_operator(profiler.events(), kinds).items():
        found[kind].operators = operators
    return found


def _step(trainer: Trainer, work: StepWork, step: int, kind: str, which: str) -> StepProfile:
    """One step as the trainer's loop takes it; says when it is done."""
    trainer.timers.collect()
    work.collect()
    metrics = trainer.train_step(step, kind)
    values = trainer.timers.collect()
    own = work.collect() if trainer.groups.is_replica_main else {}
    flops = reduce_scalars({p: own[p].total if p in own else 0.0 for p in PHASES}, trainer.groups.world, "sum")
    if trainer.groups.is_main:
        print(f"{kind} step {which}: {values['time/step_s']:.2f} s", file=sys.stderr, flush=True)
    seconds = {p: values[f"time/{p}_s"] for p in PHASES if f"time/{p}_s" in values}
    return StepProfile(values["time/step_s"], seconds, {p: flops[p] for p in seconds}, metrics["tokens/step"],
                       metrics["memory/peak_bytes"])


def by_operator(events: Iterable[Any], kinds: Sequence[str]) -> dict[str, dict[str, Operator]]:
    """Kind of step -> operator or kernel -> calls and its own seconds by phase.

    On a GPU the kernels are listed, each under the phase that launched it, otherwise the operators and what Python
    takes between them.
    """
    events = [e for e in events if e.device_type == DeviceType.CPU]
    steps = _Ranges((e.time_range.start, e.time_range.end, e.name[len(STEP):]) for e in events
                    if e.name.startswith(STEP))
    phases = _Ranges((e.time_range.start, e.time_range.end, e.name[len(RANGE):]) for e in events
                     if e.name.startswith(RANGE))
    found: dict[str, dict[str, Operator]] = {kind: defaultdict(Operator) for kind in kinds}
    for event in events:
        kind = steps.at(event.time_range.start)
        if kind is None:
            continue
        phase = phases.at(event.time_range.start) or "other"
        if torch.cuda.is_available():
            # Ranges may stand on the device's side, too; what runs in them has kernels of its own.
            own = [(kernel.name, kernel.duration) for kernel in event.kernels
                   if not kernel.name.startswith((STEP, RANGE))]
        else:
            is_range = event.name.startswith((STEP, RANGE))
            own = [(OUTSIDE if is_range else event.name, event.self_cpu_time_total)]
        for name, microseconds in own:
            operator = found[kind][name]
            operator.calls += 1
            operator.seconds[phase] += microseconds / 1e6
    return {kind: dict(operators) for kind, operators in found.items()}


class _Ranges:
    """Nested time ranges with names; the innermost counts."""

    def __init__(self, ranges: Iterable[tuple[float, float, str]]):
        self.starts: list[float] = []
        self.names: list[str | None] = []
        open_: list[tuple[float, str]] = []
        for start, until, name in sorted(ranges, key=lambda r: (r[0], -r[1])):
            self._close(open_, start)
            open_.append((until, name))
            self._border(start, name)
        self._close(open_, float("inf"))

    def at(self, moment: float) -> str | None:
        """The innermost range at a moment; None outside all."""
        place = bisect_right(self.starts, moment)
        return self.names[place - 1] if place else None

    def _close(self, open_: list[tuple[float, str]], until: float) -> None:
        while open_ and open_[-1][0] <= until:
            end, _ = open_.pop()
            self._border(end, open_[-1][1] if open_ else None)

    def _border(self, moment: float, name: str | None) -> None:
        self.starts.append(moment)
        self.names.append(name)


def as_json(found: dict[str, StepProfile], peak: float, top: int) -> dict[str, Any]:
    """Kind of step -> numbers, not rounded; every phase is there, 0 where it did not occur."""
    return {kind: {
        "step_s": own.step_s, "tokens": own.tokens, "tokens_per_s": own.tokens / own.step_s,
        "peak_bytes": own.peak_bytes, **_rates(sum(own.flops.values()), own.step_s, peak),
        "phases": {p: {"seconds": (s := own.seconds.get(p, 0.0)), "share": s / own.step_s,
                       **_rates(own.flops.get(p, 0.0), s, peak)} for p in PHASES},
        "profiled_s": (total := sum(o.self_s for o in own.operators.values())),
        "operators": [{"name": name, "calls": operator.calls, "self_s": operator.self_s,
                       "share": operator.self_s / total if total else 0.0,
                       "phases": {p: operator.seconds.get(p, 0.0) for p in PHASES}}
                      for name, operator in _busiest(own, top)],
    } for kind, own in found.items()}


def _rates(flops: float, seconds: float, peak: float) -> dict[str, float]:
    rate = flops / seconds if seconds else 0.0
    return {"flops": flops, "flops_per_s": rate, "mfu": rate / peak}


def _busiest(own: StepProfile, top: int) -> list[tuple[str, Operator]]:
    return sorted(own.operators.items(), key=lambda item: -item[1].self_s)[:top]


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Two tables for each kind of step."""
    for kind, step in result["steps"].items():
        phases = {p: row for p, row in step["phases"].items() if row["seconds"]}
        yield (f"\n{kind} step: {step['step_s']:.3f} s, {step['tokens']:.0f} completion tokens, "
               f"{step['tokens_per_s']:.0f} tokens/s, {step['flops'] / 1e9:.4g} GFLOP, "
               f"{step['flops_per_s'] / 1e9:.4g} GFLOP/s, MFU {step['mfu']:.1%}, peak memory "
               f"{step['peak_bytes'] / 1e9:.3g} GB")
        yield format_table(["phase", "seconds", "share", "GFLOP", "GFLOP/s", "MFU"], [
            [p, f"{row['seconds']:.4f}", f"{row['share']:.1%}",
             *([f"{row['flops'] / 1e9:.4g}", f"{row['flops_per_s'] / 1e9:.4g}", f"{row['mfu']:.1%}"]
               if row["flops"] else ["", "", ""])] for p, row in phases.items()])
        yield ""
        yield format_table([f"{result['listed']} of rank 0", "calls", "seconds", "share", *phases], [
            [row["name"][:60], str(row["calls"]), f"{row['self_s']:.4f}", f"{row['share']:.1%}",
             *(f"{row['phases'][p]:.4f}" for p in phases)] for row in step["operators"]])


def configured(options: argparse.Namespace) -> tuple[RunConfig, Path | None]:
    """The recipe or run with the overrides, as many steps as needed, nothing written; and the run's folder."""
    target, run_dir = Path(options.target), None
    if target.suffix == ".py":
        config = load_recipe(target)
    else:
        run_dir = run_folder.existing_run(target)
        config = run_folder.config_of(run_dir)
    each = options.warmup + options.steps
    fixed = ["schedule.kind=fixed", "schedule.cycles=2", f"schedule.rl_steps={each}", f"schedule.opd_steps={each}",
             "schedule.rl_steps_of={}", "metrics.progress=off", "metrics.tensorboard=false", "metrics.wandb=off",
             "metrics.rollouts=false"]
    return apply_overrides(config, [*options.overrides, *fixed]), run_dir


def load_adapters(trainer: Trainer, config: RunConfig, run_dir: Path) -> None:
    """Those of the run's newest save, with their optimizers."""
    state = RunState(bank=trainer.runner.backbone.bank, optimizers=trainer.learner.optimizers,
                     config_json=to_json(config), loop={})
    encoder = trainer.native.source.encoder
    CheckpointManager(run_dir, config.checkpoint, trainer.groups, Path(config.model.path), encoder).load_latest(state)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="RECIPE|RUN", help="a recipe (.py), or the folder of a run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE",
                        help="as in copd train; may be repeated")
    parser.add_argument("--hardware", metavar="NAME|FILE", help="whose peak MFU is measured against: h100, h200, a100, "
                        "cpu, or what copd calibrate wrote (this device's kind)")
    for name, default, text in (("steps", 1, "timed steps of each kind; the median one counts"),
                                ("warmup", 1, "steps of each kind before them"), ("top", 15, "operators to list")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    add_json_option(parser, "write the numbers there")
    parser.add_argument("--trace", type=writable, metavar="FILE",
                        help="write a Chrome trace of the profiled steps there")
    options = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("warmup", 0), ("top", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: {getattr(options, name)}; at least {least}")
    return options


def run(options: argparse.Namespace) -> None:
    """Build, measure, print, write."""
    config, run_dir = configured(options)
    hardware = load_hardware(options.hardware) if options.hardware else most_alike()
    hardware.flops(config.model.dtype)  # refuses a dtype of which it knows nothing
    prepare()
    with tempfile.TemporaryDirectory(prefix="profile_step") as folder:
        trainer = build_trainer(config, Path(folder))
        if run_dir is not None:
            load_adapters(trainer, config, run_dir)
        kinds = ["rlvr", "opd"] if trainer.schedule.edges(options.warmup + options.steps) else ["rlvr"]
        with trainer.milestones:
            found = timed_steps(trainer, options, kinds)
        ranks, main = trainer.groups.layout.world_size, trainer.groups.is_main
        trainer.groups.destroy()
    if main:
        report(found, hardware, config, ranks, options)


def report(found: dict[str, StepProfile], hardware: Hardware, config: RunConfig, ranks: int,
           options: argparse.Namespace) -> None:
    """Print the tables and write the JSON."""
    peak = hardware.peak_flops[config.model.dtype] * ranks
    on_gpu = torch.cuda.is_available()
    result = {"target": str(options.target), "overrides": options.overrides, "dtype": config.model.dtype,
              "ranks": ranks, "device": torch.cuda.get_device_name() if on_gpu else "cpu",
              "threads": torch.get_num_threads(), "torch": torch.__version__, "hardware": hardware.name,
              "peak_flops": peak,
              "listed": "kernels" if on_gpu else "operators", "steps": as_json(found, peak, options.top)}
    print(f"{options.target} on {ranks} x {result['device']}, {config.model.dtype}; peak of {ranks} x {hardware.name}: "
          f"{peak / 1e12:.4g} TFLOP/s; torch {torch.__version__}")
    print("\n".join(tables(result)), flush=True)
    if options.json:
        replace_file(options.json, (json.dumps(result, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 for a mistake of the user's."""
    try:
        run(parse(arguments))
        leave()
        return 0
    except UserError as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end(main)
