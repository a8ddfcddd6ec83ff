"""Both sides of the same job in one table: GPU-hours to the same merged accuracy, tokens/s/GPU, peak memory.

    python benchmarks/peers/tabulate.py --ours runs/qwen3_vl_node --verl logs/verl --json peers.json

Ours is a run folder. A peer's is a folder with the logs of its stages, one after the other on the same GPUs: separate
experts, then MOPD (``--stages text image video mopd``). verl: ``STAGE.jsonl`` of ``trainer.logger=["file"]``. NeMo-RL:
the folder ``STAGE`` of ``logger.log_dir``, with TensorBoard events. A side that was not run is left out, and its column
says so.

    accuracy     mean over the domains of the held-out accuracy: ours of the merged policy, the peers' of the last stage
    target       --target, or the lowest of the best accuracies of all sides, so that every side has reached it
    GPU-hours    GPUs x seconds of steps until the first evaluation at the target; a peer's earlier stages count whole
    tokens/s/GPU completion tokens of all steps / seconds / GPUs, whole run
    peak memory  as each side measures it: what the trainer's process allocated (ours; verl, without its engine's), or
                 what the device reports (NeMo-RL)
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
NOT_MEASURED = "not yet measured"


class BadLog(ValueError):
    """A log that is missing, damaged, or lacks a column: file, what was found, what is needed."""


@dataclass(frozen=True)
class Step:
    """One training step of a side."""

    seconds: float
    tokens: float
    """Completion tokens."""
    peak_bytes: float
    accuracy: float | None = None
    """Held-out accuracy after it, where it was measured."""


@dataclass(frozen=True)
class Side:
    """One system's numbers."""

    gpu_hours: float | None
    """To the target; None: never reached."""
    gpu_hours_total: float
    tokens_per_s_per_gpu: float
    peak_bytes: float
    best_accuracy: float
    steps: int


def our_steps(run: Path) -> list[list[Step]]:
    """Our one stage: metrics.jsonl and evaluations.jsonl of a run folder, policy "merged"."""
    accuracies = {}
    for row in _objects(run / "evaluations.jsonl"):
        merged = _column(row, "policies", run / "evaluations.jsonl").get("merged")
        if merged:
            averages = [_number(domain, "avg", run / "evaluations.jsonl") for domain in merged.values()]
            accuracies[_column(row, "step", run / "evaluations.jsonl")] = sum(averages) / len(averages)
    if not accuracies:
        raise BadLog(f"{run / 'evaluations.jsonl'}: no evaluation of the merged policy; one is needed; "
                     "set evaluation.every, or let the run finish")
    file, names = run / "metrics.jsonl", ("time/step_s", "tokens/step", "memory/peak_bytes")
    steps = [Step(*(_number(row, name, file) for name in names), accuracies.get(row.get("step")))
             for row in _objects(file)]
    return [_with_evaluations(steps, file)]


def verl_steps(folder: Path, stages: Sequence[str], domains: Sequence[str]) -> list[list[Step]]:
    """Stages of verl, each from the JSONL of its file logger: {"step": n, "data": {name: number}}."""
    return [_with_evaluations([_verl_step(_column(row, "data", file), domains, last=stage == stages[-1], file=file)
                               for row in _objects(file) if "timing_s/step" in _column(row, "data", file)], file,
                              needed=stage == stages[-1])
            for stage, file in ((stage, folder / f"{stage}.jsonl") for stage in stages)]


def _verl_step(data: Mapping[str, Any], domains: Sequence[str], last: bool, file: Path) -> Step:
    prompt, response = (_number(data, f"{part}_length/mean", file) for part in ("prompt", "response"))
    tokens = _number(data, "perf/total_num_tokens", file) * response / max(1e-9, prompt + response)
    peak = _number(data, "perf/max_memory_allocated_gb", file) * GIB
    return Step(_number(data, "timing_s/step", file), tokens, peak,
                _verl_accuracy(data, domains, file) if last else None)


def _verl_accuracy(data: Mapping[str, Any], domains: Sequence[str], file: Path) -> float | None:
    """Mean over the domains of val-core/{data_source}/{acc|reward}/mean@{n}; None without a validation."""
    found = {}
    for name, value in data.items():
        parts = name.split("/")
        if parts[0] == "val-core" and parts[-1].startswith("mean@"):
            found["/".join(parts[1:-2])] = float(value)
    if not found:
        return None
    missing = [domain for domain in domains if domain not in found]
    if missing:
        raise BadLog(f"{file}: validated {', '.join(sorted(found))}; all of {', '.join(domains)} are needed; check "
                     "data.val_files, or --domains")
    return sum(found[domain] for domain in domains) / len(domains)


def nemo_rl_steps(folder: Path, stages: Sequence[str], gpus: int) -> list[list[Step]]:
    """Stages of NeMo-RL, each from the TensorBoard events of its log folder."""
    return [_nemo_rl_stage(folder / stage, gpus, needed=stage == stages[-1]) for stage in stages]


def _nemo_rl_stage(folder: Path, gpus: int, needed: bool) -> list[Step]:
    scalars = read_scalars(folder)
    names = {"seconds": "timing/train/total_step_time", "rate": "performance/samples_per_sec_per_gpu",
             "tokens": "train/mean_gen_tokens_per_sample"}
    for name in names.values():
        if name not in scalars:
            raise BadLog(f"{folder}: no scalar {name!r}; NeMo-RL's GRPO writes it with "
                         "logger.tensorboard_enabled=true; check the folder")
    memory = [max(values.values()) for name, values in scalars.items() if name.endswith(".mem_gb")]
    if not memory:
        raise BadLog(f"{folder}: no scalar ray/node.N.gpu.N.mem_gb; set logger.monitor_gpus=true")
    seconds, rate, tokens = (scalars[name] for name in names.values())
    accuracy = scalars.get("validation/accuracy", {}) if needed else {}
    peak = max(memory) * GIB
    steps = [Step(seconds[step], rate[step] * gpus * seconds[step] * tokens[step], peak, accuracy.get(step))
             for step in sorted(seconds) if step in rate and step in tokens]
    return _with_evaluations(steps, folder, needed)


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value of all TensorBoard events below a folder; later files overwrite earlier ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise BadLog(f"{folder}: no TensorBoard events; the log_dir of a run with logger.tensorboard_enabled=true is "
                     "needed; check the path")
    scalars: dict[str, dict[int, float]] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    return scalars


def _with_evaluations(steps: list[Step], file: Path, needed: bool = True) -> list[Step]:
    if not steps:
        raise BadLog(f"{file}: no training step; at least one is needed; check the path")
    if needed and all(step.accuracy is None for step in steps):
        raise BadLog(f"{file}: no held-out accuracy at any step; validate during the last stage")
    return steps


def summarise(stages: Sequence[Sequence[Step]], gpus: int, target: float) -> Side:
    """A side's row of the table."""
    before = sum(step.seconds for stage in stages[:-1] for step in stage)
    until, reached = before, None
    for step in stages[-1]:
        until += step.seconds
        if step.accuracy is not None and step.accuracy >= target and reached is None:
            reached = until * gpus / 3600
    steps = [step for stage in stages for step in stage]
    seconds = sum(step.seconds for step in steps)
    return Side(reached, seconds * gpus / 3600, sum(step.tokens for step in steps) / seconds / gpus,
                max(step.peak_bytes for step in steps), best(stages), len(steps))


def best(stages: Sequence[Sequence[Step]]) -> float:
    """Highest held-out accuracy of the last stage."""
    return max(step.accuracy for step in stages[-1] if step.accuracy is not None)


ROWS = (("GPU-hours to the target", lambda s: "not reached" if s.gpu_hours is None else f"{s.gpu_hours:.2f}"),
        ("GPU-hours, whole run", lambda s: f"{s.gpu_hours_total:.2f}"),
        ("completion tokens/s/GPU", lambda s: f"{s.tokens_per_s_per_gpu:.0f}"),
        ("peak memory, GiB", lambda s: f"{s.peak_bytes / GIB:.1f}"),
        ("best accuracy", lambda s: f"{s.best_accuracy:.1%}"), ("steps", lambda s: str(s.steps)))


def table(sides: Mapping[str, Side | None], target: float) -> str:
    """Markdown; a column per side."""
    lines = [f"| at {target:.1%} | " + " | ".join(sides) + " |", "|---" * (1 + len(sides)) + "|"]
    lines += [f"| {name} | " + " | ".join(NOT_MEASURED if side is None else show(side) for side in sides.values())
              + " |" for name, show in ROWS]
    return "\n".join(lines)


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; a last line that is cut off is left out, as a run may still write."""
    if not file.is_file():
        raise BadLog(f"{file}: there is no such file; a finished run's is needed; check the path")
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise BadLog(f"{file} line {number}: no JSON ({error}); one object a line; check the file") from error
        if not isinstance(row, dict):
            raise BadLog(f"{file} line {number}: a JSON {type(row).__name__}; one object a line; check the file")
        yield row


def _column(row: Mapping[str, Any], name: str, file: Path) -> Any:
    if name not in row:
        raise BadLog(f"{file}: no column {name!r} among {', '.join(sorted(row)[:8])}; check that the side and its log "
                     "belong together")
    return row[name]


def _number(row: Mapping[str, Any], name: str, file: Path) -> float:
    value = _column(row, name, file)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadLog(f"{file}: {name} is {value!r}; a number is needed; check the file")
    return float(value)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, metavar="RUN", help="our run folder")
    parser.add_argument("--verl", type=Path, metavar="DIR", help="folder with STAGE.jsonl")
    parser.add_argument("--nemo-rl", type=Path, metavar="DIR", help="folder with a log folder per stage")
    parser.add_argument("--stages", nargs="+", default=["text", "image", "video", "mopd"], metavar="STAGE",
                        help="the peers' stages in order (text image video mopd)")
    parser.add_argument("--domains", nargs="+", default=["text", "image", "video"], metavar="NAME",
                        help="data sources of the peers' validation (text image video)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of every side (%(default)s)")
    parser.add_argument("--target", type=float, metavar="A", help="accuracy, 0 to 1 (the lowest of the sides' best)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(arguments)
    if options.gpus < 1:
        parser.error(f"--gpus: {options.gpus}; at least 1")
    if options.target is not None and not 0 < options.target <= 1:
        parser.error(f"--target: {options.target}; above 0, at most 1")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        parser.error(f"--json: {options.json}; a file in a folder that is there; make the folder first")
    if not (options.ours or options.verl or options.nemo_rl):
        parser.error("--ours, --verl, --nemo-rl: none was given; at least one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, print, write. 0; 2 for a log that does not serve."""
    options = parse(arguments)
    try:
        stages = {"ours": options.ours and our_steps(options.ours),
                  "verl": options.verl and verl_steps(options.verl, options.stages, options.domains),
                  "NeMo-RL": options.nemo_rl and nemo_rl_steps(options.nemo_rl, options.stages, options.gpus)}
    except BadLog as error:
        print(f"tabulate: {error}", file=sys.stderr)
        return 2
    target = options.target or min(best(own) for own in stages.values() if own)
    sides = {name: summarise(own, options.gpus, target) if own else None for name, own in stages.items()}
    print(table(sides, target))
    if options.json:
        result = {"target": target, "gpus": options.gpus,
                  "sides": {name: None if side is None else asdict(side) for name, side in sides.items()}}
        partial = options.json.with_name(options.json.name + ".tmp")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
