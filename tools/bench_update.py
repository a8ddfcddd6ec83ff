"""Times one update three ways, and says how much of the gain that operations promise was reached.

One update is N scorings (the G completions of one prompt under each of N experts) and one forward and backward of
one expert, without weight gradients of the backbone: `naive` (every lane carries its own prompt), `per_expert`
(completions share the prompt, one scoring pass per expert) and `shared` (all lanes of the group in one pass); with a
first layer above 0 also `kept` (`shared` from hidden states that the rollout kept where they enter that layer). All
run in this process on the same random backbone, through the trainer's packs, layers and head; their logits
and adapter gradients are compared before anything is timed.

    python tools/bench_update.py --prefix 256 --completion 32 --group 8 --experts 3 --scope completion
    python tools/bench_update.py --sweep --repeats 3 --json sweep.json

Runs are interleaved; the median counts. The prediction is `copd_megatron.simulate.flops`, attention, adapters and
head included.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_backbone import add_recompute_option, add_shape_options, describe, model_of, spec_of
from bench_group import Group, Lane, add_group_options, refuse_impossible_groups, shape_of
from bench_record import add_json_option, end, machine, now, refuse_below, save_json

import copd_megatron.platform  # noqa: F401  (before any of Megatron)
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.vocab_parallel import Head, shard_logits
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.flops import (
    WAYS,
    Stream,
    UpdateShape,
    pass_flops,
    pass_streams,
    recomputed_flops,
    update_flops,
)
from copd_megatron.types import UserError

KEPT = "kept"
SWEEP_LENGTHS = ((16384, 1024), (4096, 1024), (1024, 256), (1024, 1024), (1024, 4096), (1024, 8192))
"""Prefix and completion of the map, from a long video to long reasoning."""
TOLERANCE = {"float32": 1e-3, "float64": 1e-9, "bfloat16": 0.15}
"""Largest difference of logits and of gradients, relative to the largest of them."""


@dataclass(frozen=True)
class Outcome:
    """What a way computed, in the order of experts and completions."""

    hidden: torch.Tensor
    """[N x G x R, H] of the scoring passes, which the head takes to logits."""
    gradients: dict[str, torch.Tensor]
    """Of the updated expert's adapters."""


class Update(Group):
    """One update of a random backbone, ready to be run any way."""

    def __init__(self, spec: BackboneSpec, shape: UpdateShape, adapter: AdapterConfig, groups: Groups,
                 model: ModelConfig, max_tokens: int):
        super().__init__(spec, shape, adapter, groups, model)
        self.max_tokens = max_tokens
        self.ways: tuple[str, ...] = WAYS
        if adapter.first_layer:
            self.ways += (KEPT,)
            self.keep_states()

    def run(self, way: str) -> list[torch.Tensor]:
        """Do it once; gradients are left in the adapters. Returns the hidden states of the scoring passes."""
        self.backbone.zero_grad()
        scored = []
        for lanes in self._passes(way, scoring=True):
            with torch.no_grad():
                hidden, _ = self.evaluate(lanes, way != "naive", begins_above=way == KEPT)
            scored.append(hidden)
        start = 0
        for lanes in self._passes(way, scoring=False):
            logprobs = self.evaluate(lanes, way != "naive", begins_above=way == KEPT)[1].logprobs_T
            (self.weights[start:start + len(logprobs)] * logprobs).sum().backward()
            start += len(logprobs)
        return scored

    def outcome(self, way: str) -> Outcome:
        """Run once and keep what the ways must agree on."""
        hidden = torch.cat(self.run(way))
        return Outcome(hidden, {name: gradient.clone() for name, gradient in self.gradients().items()})

    def _passes(self, way: str, scoring: bool) -> Iterator[list[Lane]]:
        """Lanes that pass together. Only naive lanes, which share nothing, are split by ``max_tokens``."""
        experts = self.experts if scoring else self.experts[:1]
        together = [experts] if way in ("shared", KEPT) else [[e] for e in experts]
        for some in together:
            lanes = self.lanes(some)
            longest = self.shape.prefix + self.shape.completion - 1
            size = max(1, self.max_tokens // longest) if way == "naive" else len(lanes)
            yield from (lanes[i:i + size] for i in range(0, len(lanes), size))


def measure(spec: BackboneSpec, shape: UpdateShape, adapter: AdapterConfig, groups: Groups, model: ModelConfig,
            max_tokens: int, repeats: int) -> dict:
    """One row: differences, times, ratios and the prediction. Raises ArithmeticError if the ways disagree."""
    update = Update(spec, shape, adapter, groups, model, max_tokens)
    row = {**asdict(shape), "scope": adapter.scope, "first_layer": adapter.first_layer}
    row |= compare(update, TOLERANCE[model.dtype])
    wall: dict[str, list[float]] = {way: [] for way in update.ways}
    busy: dict[str, list[float]] = {way: [] for way in update.ways}
    for turn in range(1, repeats + 1):
        for way in update.ways:
            start, used = now(), time.process_time()
            update.run(way)
            wall[way].append(now() - start)
            busy[way].append(time.process_time() - used)
            print(f"    {way}: update {turn} of {repeats}, {wall[way][-1]:.2f} s", file=sys.stderr, flush=True)
    flops = {way: flops_of(way, shape, spec, adapter, model) for way in update.ways}
    for way in update.ways:
        row |= {f"{way}_s": statistics.median(wall[way]), f"{way}_cpu_s": statistics.median(busy[way]),
                f"{way}_flops": flops[way]}
    row["ratio"] = row["naive_s"] / row["shared_s"]
    row["cpu_ratio"] = row["naive_cpu_s"] / row["shared_cpu_s"]
    row["predicted_ratio"] = flops["naive"] / flops["shared"]
    row["share_of_prediction"] = row["ratio"] / row["predicted_ratio"]
    for way in update.ways:
        if way not in ("naive", "shared"):
            row[f"{way}_ratio"] = row["naive_s"] / row[f"{way}_s"]
            row[f"{way}_predicted_ratio"] = flops["naive"] / flops[way]
    return row


def flops_of(way: str, shape: UpdateShape, spec: BackboneSpec, adapter: AdapterConfig, model: ModelConfig) -> float:
    """Of the update and of what its backward computes again."""
    again = recomputed_flops(spec, adapter, pass_streams(shape, adapter, 1, way != "naive"), model.recompute)
    if way != KEPT:
        return (update_flops(way, shape, spec, adapter) + again).total
    scoring, updated = (pass_flops(spec, adapter, replace(pass_streams(shape, adapter, experts, True), below=Stream()),
                                   backward) for experts, backward in ((shape.experts, False), (1, True)))
    return (scoring + updated + again).total


def compare(update: Update, tolerance: float) -> dict[str, float]:
    """Largest absolute differences from naive, which also warms everything up."""
    print("    compared: naive", end="", file=sys.stderr, flush=True)
    naive = update.outcome("naive")
    largest = {"logit": 0.0, "grad": max(g.abs().max().item() for g in naive.gradients.values())}
    differ = {"logit": 0.0, "grad": 0.0}
    for way in update.ways[1:]:
        print(f", {way}", end="", file=sys.stderr, flush=True)
        other = update.outcome(way)
        largest["logit"], apart = compare_logits(naive.hidden, other.hidden, update.backbone.own_head)
        differ["logit"] = max(differ["logit"], apart)
        differ["grad"] = max(differ["grad"], *((g - other.gradients[name]).abs().max().item()
                                               for name, g in naive.gradients.items()))
    print(file=sys.stderr, flush=True)
    for what, value in differ.items():
        if not value <= tolerance * largest[what]:
            raise ArithmeticError(f"{what}s differ by {value:.2e} where the largest is {largest[what]:.2e}")
    return {f"max_{what}_diff": value for what, value in differ.items()} | {
        f"max_{what}": value for what, value in largest.items()}


def compare_logits(naive: torch.Tensor, other: torch.Tensor, head: Head) -> tuple[float, float]:
    """The largest logit and the largest difference; logits exist for a chunk of rows at a time."""
    largest, apart = torch.zeros((2,), dtype=torch.float64, device=naive.device)
    for rows in head.chunks(naive):
        logits = shard_logits(naive[rows], head)
        largest = torch.maximum(largest, logits.abs().max())
        apart = torch.maximum(apart, (logits - shard_logits(other[rows], head)).abs().max())
    return largest.item(), apart.item()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults are sized for two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_group_options(parser)
    for name, default, text in (("max-tokens", 4096, "tokens of one naive pass"),
                                ("scale", 16, "divides the lengths of --sweep")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    add_shape_options(parser)
    add_recompute_option(parser)
    parser.add_argument("--scope", choices=("sequence", "completion"), default="sequence",
                        help="adapter.scope (%(default)s)")
    parser.add_argument("--sweep", action="store_true",
                        help="the map from 16k/1k to 1k/8k, both scopes, first layer 0 and half depth")
    add_json_option(parser, "write the results there, rows of --sweep as they come")
    options = parser.parse_args(arguments)
    refuse_below(parser, options, max_tokens=1, scale=1)
    refuse_impossible_groups(parser, options)
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[UpdateShape, AdapterConfig]]:
    """What to measure."""
    rest = {"group": options.group, "experts": options.experts, "header": options.header}
    adapters = {"rank": options.rank, "alpha": float(options.rank)}
    if not options.sweep:
        yield (shape_of(options),
               AdapterConfig(scope=options.scope, first_layer=options.first_layer, **adapters))
        return
    for prefix, completion in SWEEP_LENGTHS:
        shape = UpdateShape(max(options.header, prefix // options.scale), max(1, completion // options.scale), **rest)
        for scope in ("completion", "sequence"):
            for first_layer in (0, options.layers // 2):
                yield shape, AdapterConfig(scope=scope, first_layer=first_layer, **adapters)


def show(row: dict) -> None:
    """One row as a table."""
    print(f"\nprefix {row['prefix']}, completion {row['completion']}, G {row['group']}, {row['experts']} experts, "
          f"scope {row['scope']}, first layer {row['first_layer']}")
    print(f"  {'way':<12}{'seconds':>9}{'TFLOP':>9}{'GFLOP/s':>9}{'ratio':>8}{'predicted':>11}{'reached':>9}")
    for way in (*WAYS, *([KEPT] if f"{KEPT}_s" in row else [])):
        seconds, flops = row[f"{way}_s"], row[f"{way}_flops"]
        ratio, predicted = row["naive_s"] / seconds, row["naive_flops"] / flops
        print(f"  {way:<12}{seconds:>9.3f}{flops / 1e12:>9.3f}{flops / seconds / 1e9:>9.1f}{ratio:>8.2f}"
              f"{predicted:>11.2f}{ratio / predicted:>9.0%}")
    print(f"  largest difference: logits {row['max_logit_diff']:.1e} of {row['max_logit']:.1f}, adapter gradients "
          f"{row['max_grad_diff']:.1e} of {row['max_grad']:.1e}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0; 1 when the ways disagree; 2 when the shape is impossible."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    spec = spec_of(options)
    where = machine()
    print(f"{where['device']}: {where['cpu']}, {where['threads']} threads, load {where['load']:.1f}, torch "
          f"{where['torch']}, {options.dtype}\n{describe(spec, options.rank)}", flush=True)
    if options.sweep:
        print(f"lengths are {', '.join(f'{p}/{r}' for p, r in SWEEP_LENGTHS)} divided by {options.scale}")
    model = model_of(options, recompute=options.recompute)
    groups = Groups.create(Layout(), Placement.build(("expert0",), 1))
    rows = []
    try:
        for shape, adapter in cases(options):
            rows.append(measure(spec, shape, adapter, groups, model, options.max_tokens, options.repeats))
            show(rows[-1])
            save_json(options.json, {"rows": rows} if options.sweep else rows[0], where, options)
    except (ArithmeticError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    finally:
        groups.destroy()
    return 0


if __name__ == "__main__":
    end(main)
