"""Times teacher scoring by N experts in one pass, relative to one expert's own pass.

The G completions of one prompt are scored as the trainer does it: forward without gradient, log-probs of their tokens
and the 64 likeliest ids, the prompt shared. `all` evaluates them under N experts in one pass, `one` under one expert.
The log-probs of `all` are compared with those of every expert alone before anything is timed. The ratio stands
beside the one that `copd_megatron.simulate.flops` predicts, attention, adapters and head included; three copies of a
model would pay 3.

    python tools/bench_scoring.py
    python tools/bench_scoring.py --layers 36 --hidden 2560 --heads 32 --kv-heads 8 --head-dim 128 --ffn 9728 \\
        --vocab 151936 --rank 32 --dtype bfloat16 --prefix 4096 --completion 1024 --json scoring.json

The two take turns; the median of `--repeats` runs counts. Shares are of the rate of matrix products, measured in the
same run as `copd calibrate` does unless `--hardware` names it.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels", "tools")]

import torch  # noqa: E402
from bench_backbone import (  # noqa: E402
    add_hardware_option,
    add_shape_options,
    describe,
    model_of,
    peaks,
    spec_of,
)
from bench_group import Group, add_group_options, free_memory, refuse_impossible_groups, shape_of  # noqa: E402
from bench_record import add_json_option, end, machine, now, peak_of, save_json  # noqa: E402

import copd_megatron.platform  # noqa: E402,F401  (before any of Megatron)
from copd_megatron.config.model import AdapterConfig  # noqa: E402
from copd_megatron.parallel.groups import Groups  # noqa: E402
from copd_megatron.parallel.layout import Layout  # noqa: E402
from copd_megatron.parallel.placement import Placement  # noqa: E402
from copd_megatron.simulate.flops import pass_flops, pass_streams  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

TOPK = 64
TOLERANCE = {"float32": 1e-3, "float64": 1e-9, "bfloat16": 0.3}
"""Largest mean difference of log-probs between one pass and an expert alone, as a share of that between experts:
1 if experts were mixed up."""
WANTED = 1.15
"""Most that the measured ratio should be, over the predicted one."""


def measure(group: Group, rate: float, repeats: int) -> dict:
    """One row. Raises ArithmeticError if an expert's log-probs depend on the others in its pass."""
    shape, adapter, spec = group.shape, group.adapter, group.backbone.spec
    row = {**asdict(shape), "scope": adapter.scope, "first_layer": adapter.first_layer}
    row |= compare(group)
    passes = {"one": group.experts[:1], "all": group.experts}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, experts in passes.items():
            start = now()
            group.score(experts, TOPK)
            times[name].append(now() - start)
    for name, experts in passes.items():
        seconds = statistics.median(times[name])
        flops = pass_flops(spec, adapter, pass_streams(shape, adapter, len(experts), sharing=True), backward=False)
        _, peak_bytes = peak_of(partial(group.score, experts, TOPK))
        row |= {f"{name}_s": seconds, f"{name}_flops": flops.total, f"{name}_flops_per_s": flops.total / seconds,
                f"{name}_share": flops.total / seconds / rate, f"{name}_peak_bytes": peak_bytes}
    row["ratio"] = row["all_s"] / row["one_s"]
    row["predicted_ratio"] = row["all_flops"] / row["one_flops"]
    row["over_prediction"] = row["ratio"] / row["predicted_ratio"]
    return row


def compare(group: Group) -> dict[str, float]:
    """Differences of log-probs between the one pass and every expert's own, which also warms everything up."""
    together = group.score(group.experts, TOPK)[1].logprobs_T.view(len(group.experts), -1)
    alone = torch.stack([group.score([expert], TOPK)[1].logprobs_T for expert in group.experts])
    apart = min((one - two).abs().mean().item() for n, one in enumerate(alone) for two in alone[n + 1:])
    mean, largest = ((together - alone).abs().mean(1).max().item(), (together - alone).abs().max().item())
    tolerance = TOLERANCE[str(group.backbone.dtype).removeprefix("torch.")]
    if not mean <= tolerance * apart:
        raise ArithmeticError(f"log-probs of one pass differ from an expert's own by {mean:.2e} in the mean, where two "
                              f"experts differ by {apart:.2e}; at most {tolerance:.0e} of that")
    return {"mean_logprob_diff": mean, "max_logprob_diff": largest, "mean_expert_diff": apart}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults are sized for two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_group_options(parser)
    add_shape_options(parser, first_layers=True)
    parser.add_argument("--scope", choices=("sequence", "completion"), default="completion",
                        help="adapter.scope (%(default)s)")
    add_hardware_option(parser)
    add_json_option(parser, "write the rows there, as they come")
    options = parser.parse_args(arguments)
    refuse_impossible_groups(parser, options)
    if options.experts < 2:
        parser.error(f"--experts: {options.experts}; at least 2, to be compared with one")
    return options


def show(row: dict) -> None:
    """One row as a table."""
    print(f"\nprefix {row['prefix']}, completion {row['completion']}, G {row['group']}, scope {row['scope']}, first "
          f"layer {row['first_layer']}")
    for name, count in (("one", 1), ("all", row["experts"])):
        print(f"  {count} expert{'s' * (count > 1):<2}{row[f'{name}_s']:>9.3f} s"
              f"{row[f'{name}_flops_per_s'] / 1e12:>9.3f} TFLOP/s, {row[f'{name}_share']:.0%} of the matrix rate, "
              f"{row[f'{name}_peak_bytes'] / 1e9:.2f} GB beyond the weights")
    print(f"  ratio {row['ratio']:.2f}, predicted {row['predicted_ratio']:.2f}, measured / predicted "
          f"{row['over_prediction']:.2f} (wanted: at most {WANTED})\n  log-probs differ by "
          f"{row['mean_logprob_diff']:.1e} in the mean, two experts' by {row['mean_expert_diff']:.1e}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0; 1 when passes disagree; 2 when something impossible was asked for."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    spec, rows, where = spec_of(options), [], machine()
    groups = Groups.create(Layout(), Placement.build(("expert0",), 1))
    try:
        rate = where["matrix_flops"] = peaks(options).flops(options.dtype)
        print(f"{where['device']}: {where['cpu']}, {where['threads']} threads, load {where['load']:.1f}, torch "
              f"{where['torch']}, {options.dtype}, {rate / 1e12:.3g} TFLOP/s\n{describe(spec, options.rank)}")
        for first_layer in options.first_layer:
            adapter = AdapterConfig(rank=options.rank, alpha=float(options.rank), scope=options.scope,
                                    first_layer=first_layer)
            start = now()
            group = Group(spec, shape_of(options), adapter, groups, model_of(options))
            print(f"built in {now() - start:.1f} s", file=sys.stderr, flush=True)
            rows.append(measure(group, rate, options.repeats))
            show(rows[-1])
            save_json(options.json, {"rows": rows}, where, options)
            del group
            free_memory()
    except (ArithmeticError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    finally:
        groups.destroy()
    return 0


if __name__ == "__main__":
    end(main)
