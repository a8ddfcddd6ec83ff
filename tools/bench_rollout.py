"""Times sampling by the embedded engine: tokens per second by batch, with and without reuse across experts.

All experts answer the same prompts, greedily and to full length, on a random backbone in this process:

    per_expert   one `generate` per expert
    shared       one `generate` for all experts: prompts evaluated once where no adapter acts on them, one decode batch
    store_new    `shared` with a prefix store (`rollout.prefix_store_bytes`) that has not seen the prompts
    store_seen   the same again, with new adapters; the store holds the prompts

the last two in scope completion. All answers are compared with those of `per_expert` before anything is timed: tokens
are the same, but for completions that part where two tokens are equally likely up to rounding (`same_tokens` is the
share of the others). Batch is the completions of one expert; every expert's decode together in `shared`.

    python tools/bench_rollout.py --json rollout.json
    python tools/bench_rollout.py --scope completion --prefix 1024 --batch 8 64 --experts 1 3 --hardware h100

Ways take turns; the median of `--repeats` runs counts. `sync_s` is what handing new adapters to the engine takes
(`AdapterBank.changed`, `Prefill.forget_old`): it decodes on the training shards, so nothing is copied. The ideal counts
the operations of `copd_megatron.simulate.flops` and, per decode step, the bytes of weights, adapters, keys and values
at the peaks of `--hardware`, by default measured as `copd calibrate` does. Caches that hold the weights may beat it.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_backbone import (
    add_hardware_option,
    add_shape_options,
    describe,
    model_of,
    peaks,
    random_backbone,
    random_prompt,
    refuse_impossible_shapes,
    spec_of,
)
from bench_record import add_json_option, end, machine, now, refuse_below, save_json

import copd_megatron.platform  # noqa: F401  (before any of Megatron)
from copd_megatron.config.model import AdapterConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.shared_prefix import Leaf, LeafGroup
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.rollout.megatron_engine import MegatronEngine
from copd_megatron.simulate.flops import group_streams, pass_flops
from copd_megatron.simulate.hardware import Hardware
from copd_megatron.simulate.memory import backbone_bytes
from copd_megatron.types import Completion, Prompt, UserError

SCOPES = ("completion", "sequence")
WAYS = {"completion": ("per_expert", "shared", "store_new", "store_seen"), "sequence": ("per_expert", "shared")}
TOLERANCE = {"float32": 1e-3, "float64": 1e-9, "bfloat16": 0.15}
"""Largest difference of log-probs."""


@dataclass(frozen=True)
class Case:
    """What is sampled at once."""

    experts: int
    batch: int
    """Completions of each expert."""


@dataclass(frozen=True)
class Sampled:
    """One way's work, done once."""

    completions: list[Completion]
    """Of expert after expert, prompt after prompt."""
    seconds: float
    cpu_s: float
    """Of all threads; tells how busy the machine was with other work."""
    sync_s: float
    prompt_tokens: float
    """As ``EngineCounters.prompt_tokens_computed``."""


class Embedded:
    """The engine that decodes on the training shards. Another one would have the same three parts."""

    name = "embedded"

    def __init__(self, backbone: Backbone, groups: Groups, lanes: int, prefix: int, store_bytes: int = 0):
        self.bank = backbone.bank
        self.engine = MegatronEngine(backbone, groups, RolloutConfig(
            decode_lanes=lanes, max_prompt_tokens=max(prefix, RolloutConfig().max_prompt_tokens),
            prefix_store_bytes=store_bytes), seed=0)

    @torch.no_grad()
    def sync(self, experts: Sequence[str]) -> float:
        """Seconds to hand over what was just written to all adapters (the same numbers, so that answers stay)."""
        for expert in experts:
            for parameter in self.bank.parameters_of(expert).values():
                parameter.mul_(1.0)
        start = now()
        for expert in experts:
            self.bank.changed(expert)
        self.engine.prefill.forget_old()
        return now() - start

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All completions, in the order of the requests."""
        return [completion for group in self.engine.generate(requests) for completion in group]


class Rollout:
    """All cases on one backbone."""

    def __init__(self, adapter: AdapterConfig, groups: Groups, hardware: Hardware, options: argparse.Namespace):
        self.adapter, self.groups, self.hardware, self.options = adapter, groups, hardware, options
        self.spec = spec_of(options)
        self.experts = [f"expert{n}" for n in range(max(options.experts))]
        self.backbone = random_backbone(self.spec, adapter, groups, model_of(options), self.experts)
        rng = np.random.default_rng(0)
        self.prompts = [random_prompt(rng, options.prefix, options.header, self.spec.vocab_size, f"prompt{n}")
                        for n in range(max(options.batch) // options.group)]

    def measure(self, case: Case) -> list[dict]:
        """A row for each way. Raises ArithmeticError if their answers disagree."""
        ways, lanes = WAYS[self.adapter.scope], case.experts * case.batch
        plain = Embedded(self.backbone, self.groups, lanes, self.options.prefix)
        store_bytes = sum(map(plain.engine.prefill.bytes_of, self._prompts(case)))
        first = self._turn(case, plain, store_bytes)
        same = {way: compare(first["per_expert"].completions, first[way].completions, TOLERANCE[self.options.dtype])
                for way in ways}
        runs = [self._turn(case, plain, store_bytes) for _ in range(self.options.repeats)]
        return [self._row(case, way, [run[way] for run in runs], store_bytes, same[way]) for way in ways]

    def _turn(self, case: Case, plain: Embedded, store_bytes: int) -> dict[str, Sampled]:
        """Every way once."""
        found = {way: self._run(case, plain, way) for way in ("per_expert", "shared")}
        if self.adapter.scope == "completion":
            stored = Embedded(self.backbone, self.groups, case.experts * case.batch, self.options.prefix, store_bytes)
            found |= {way: self._run(case, stored, way) for way in ("store_new", "store_seen")}
        return found

    def _run(self, case: Case, engine: Embedded, way: str) -> Sampled:
        sync_s = engine.sync(self.experts[:case.experts])
        counters = engine.engine.counters
        before, start, used = counters.prompt_tokens_computed, now(), time.process_time()
        completions: list[Completion] = []
        for experts in self._calls(case, way):
            completions += engine.generate(self._requests(case, experts))
        return Sampled(completions, now() - start, time.process_time() - used, sync_s,
                       counters.prompt_tokens_computed - before)

    def _calls(self, case: Case, way: str) -> list[list[str]]:
        """The experts of each `generate`."""
        experts = self.experts[:case.experts]
        return [[expert] for expert in experts] if way == "per_expert" else [experts]

    def _prompts(self, case: Case) -> list[Prompt]:
        return self.prompts[:case.batch // self.options.group]

    def _requests(self, case: Case, experts: Sequence[str]) -> list[Request]:
        params = SamplingParams(max_tokens=self.options.completion, stop_token_ids=(), greedy=True)
        return [Request(prompt, expert, self.options.group, params, (0,))
                for expert in experts for prompt in self._prompts(case)]

    def _row(self, case: Case, way: str, runs: Sequence[Sampled], store_bytes: int, same: float) -> dict:
        options, lanes = self.options, case.experts * case.batch
        seconds = statistics.median(run.seconds for run in runs)
        tokens, prompt_tokens = lanes * options.completion, runs[-1].prompt_tokens
        calls = [self._ideal(case, experts, found=way == "store_seen") for experts in self._calls(case, way)]
        ideal_s = sum(ideal for ideal, _ in calls)
        return {
            "engine": Embedded.name, "scope": self.adapter.scope, "experts": case.experts, "batch": case.batch,
            "way": way, "tokens_per_s": tokens / seconds, "prompt_tokens_computed": prompt_tokens,
            "sync_s": statistics.median(run.sync_s for run in runs), "seconds": seconds,
            "cpu_s": statistics.median(run.cpu_s for run in runs),
            "prefix_tokens_computed": prompt_tokens - lanes * self.backbone.rules.forced(self.prompts[0]),
            "first_layer": self.adapter.first_layer, "prefix": options.prefix, "completion": options.completion,
            "group": options.group, "store_bytes": store_bytes if way.startswith("store") else 0, "same_tokens": same,
            "ideal_tokens_per_s": tokens / ideal_s, "reached": ideal_s / seconds, "decode_bound": calls[0][1]}

    def _ideal(self, case: Case, experts: Sequence[str], found: bool) -> tuple[float, str]:
        """Least seconds of one `generate`, and what bounds its decode steps: "memory" or "compute".

        Args:
            found: the prompts' keys and values are there already.
        """
        options, spec, rules = self.options, self.spec, self.backbone.rules
        leaves = [Leaf(expert, (0,) * options.completion) for expert in experts for _ in range(options.group)]
        group = LeafGroup(self.prompts[0], leaves)
        prompts, forced = len(self._prompts(case)), rules.forced(group.prompt)
        whole, decoding = (prompts * pass_flops(spec, self.adapter, group_streams(
            group, rules, decoded=True, outside=outside), backward=False).total for outside in (False, True))
        parts = backbone_bytes(spec, Layout(), 0, options.dtype)
        weights = parts["layers"] + parts["head"] + sum(
            parameter.nbytes for expert in experts for parameter in self.backbone.bank.parameters_of(expert).values())
        owners = len(experts) if self.adapter.scope == "sequence" else 1
        trunk_rows = prompts * (options.prefix - forced) * (
            self.adapter.first_layer + owners * (spec.num_layers - self.adapter.first_layer))
        own_rows = prompts * len(leaves) * (forced + (options.completion - 1) / 2) * spec.num_layers
        kv = (trunk_rows + own_rows) * 2 * spec.num_kv_heads * spec.head_dim * self.backbone.dtype.itemsize
        peak, bandwidth = self.hardware.peak_flops[options.dtype], self.hardware.memory_bandwidth
        memory_s, compute_s = options.completion * (weights + kv) / bandwidth, decoding / peak
        prefill_s = 0.0 if found else max((whole - decoding) / peak, weights / bandwidth)
        return prefill_s + max(memory_s, compute_s), "memory" if memory_s > compute_s else "compute"


def compare(reference: Sequence[Completion], other: Sequence[Completion], tolerance: float) -> float:
    """Share of completions with the same tokens.

    Raises:
        ArithmeticError: one differs where its log-probs do, not between equally likely tokens.
    """
    same = 0
    for one, two in zip(reference, other, strict=True):
        ids, logprobs = (np.array([getattr(c, name) for c in (one, two)]) for name in ("token_ids", "logprobs"))
        differ = np.flatnonzero(ids[0] != ids[1])
        same += not len(differ)
        known = slice(0, differ[0] + 1 if len(differ) else None)  # from there on the contexts are different ones
        largest = np.abs(logprobs[0, known] - logprobs[1, known]).max()
        if not largest <= tolerance:
            raise ArithmeticError(f"log-probs of {one.expert} on {one.prompt.key}, sample {one.sample}, differ by "
                                  f"{largest:.2e} between two ways; at most {tolerance:.0e}")
    return same / len(reference)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults are sized for two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=list(SCOPES), help="scopes (both)")
    parser.add_argument("--experts", type=int, nargs="+", default=[3], metavar="N", help="experts (3)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128], metavar="N",
                        help="completions of each expert (8 32 128)")
    for name, default, text in (
            ("prefix", 256, "tokens of a prompt"), ("completion", 32, "tokens of each completion"),
            ("group", 8, "completions of a prompt and expert"),
            ("header", 3, "prompt tokens that scope completion adapts"),
            ("threads", 0, "CPU threads; 0: all cores"), ("repeats", 3, "timed runs of each way")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    add_shape_options(parser)
    add_hardware_option(parser)
    add_json_option(parser, "write the rows there, as they come")
    options = parser.parse_args(arguments)
    refuse_below(parser, options, experts=1, batch=1, prefix=1, completion=1, group=1, header=1, threads=0, repeats=1)
    refuse_impossible_shapes(parser, options)
    if options.header >= options.prefix:
        parser.error(f"--header: {options.header}; less than the prefix's {options.prefix}")
    for batch in options.batch:
        if batch % options.group:
            parser.error(f"--batch: {batch}; a multiple of the {options.group} completions of a --group")
    return options


def rows_of(options: argparse.Namespace, groups: Groups, hardware: Hardware) -> Iterator[list[dict]]:
    """The rows of one case after the other."""
    cases = [Case(experts, batch) for experts in options.experts for batch in options.batch]
    for number, scope in enumerate(options.scope):
        rollout = Rollout(AdapterConfig(rank=options.rank, alpha=float(options.rank), scope=scope,
                                        first_layer=options.first_layer), groups, hardware, options)
        for place, case in enumerate(cases, number * len(cases) + 1):
            print(f"{place}/{len(options.scope) * len(cases)}: scope {scope}, {case.experts} experts, batch "
                  f"{case.batch} ...", file=sys.stderr, flush=True)
            yield rollout.measure(case)
        del rollout  # before the next backbone is made


HEADINGS = (f"{'scope':<11}{'experts':>7}{'batch':>7} {'way':<11}{'tokens/s':>9}{'gain':>7}{'ideal':>10}{'reached':>9} "
            f"{'bound':<8}{'prompt tokens':>13}{'sync ms':>9}{'same':>7}")


def show(rows: Sequence[dict]) -> None:
    """Lines of the table; the gain is over `per_expert`."""
    for row in rows:
        print(f"{row['scope']:<11}{row['experts']:>7}{row['batch']:>7} {row['way']:<11}{row['tokens_per_s']:>9.0f}"
              f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:>6.2f}x{row['ideal_tokens_per_s']:>10.0f}"
              f"{row['reached']:>9.1%} {row['decode_bound']:<8}{row['prompt_tokens_computed']:>13.0f}"
              f"{1e3 * row['sync_s']:>9.3f}{row['same_tokens']:>7.1%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0; 1 when the ways disagree; 2 when something impossible was asked for."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    groups, rows, where = Groups.create(Layout(), Placement.build(("expert0",), 1)), [], machine()
    try:
        hardware = peaks(options)
        where["peaks"] = {"hardware": hardware.name, "flops": hardware.peak_flops[options.dtype],
                          "memory_bandwidth": hardware.memory_bandwidth}
        print(f"{where['device']}: {where['cpu']}, {where['threads']} threads, load {where['load']:.1f}, torch "
              f"{where['torch']}, {options.dtype}; {hardware.name}: {where['peaks']['flops'] / 1e12:.3g} TFLOP/s, "
              f"{hardware.memory_bandwidth / 1e9:.3g} GB/s\n{describe(spec_of(options), options.rank)}; prompts of "
              f"{options.prefix}, completions of {options.completion} tokens\n{HEADINGS}", flush=True)
        for found in rows_of(options, groups, hardware):
            rows += found
            show(found)
            save_json(options.json, {"rows": rows}, where, options)
    except (ArithmeticError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    finally:
        groups.destroy()
    return 0


if __name__ == "__main__":
    end(main)
