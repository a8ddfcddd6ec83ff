"""Times FP8 on the frozen backbone against none, and says how far log-probs and gradients move.

The forms of `model.fp8` hold the same random weights, one form at a time: `none`, `frozen_rowwise`, and Transformer
Engine's `te_current` and `te_blockwise` where they can run. Each scores the completions of one prompt by all experts in
one pass and makes one update (forward and backward of one expert), as the trainer does. Beside `none` stand

* `logprob_error`: mean absolute difference of the log-probs of the completions' tokens;
* `kl`: mean of KL(none || form) over the whole vocabulary, in nats per token;
* `gradient_cosine`: of all the updated expert's adapters.

    python tools/bench_fp8.py
    python tools/bench_fp8.py --layers 36 --hidden 2560 --heads 32 --kv-heads 8 --head-dim 128 --ffn 9728 \\
        --vocab 151936 --rank 32 --dtype bfloat16 --prefix 4096 --completion 1024 --json fp8.json

`weights_bytes` is what the backbone takes without adapters, peaks are beyond that and the adapters. Random weights
have no outliers, so a trained model's errors are larger.
"""
from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels", "tools")]

import torch  # noqa: E402
from bench_backbone import add_recompute_option, add_shape_options, describe, model_of, spec_of  # noqa: E402
from bench_group import Group, add_group_options, free_memory, refuse_impossible_groups, shape_of  # noqa: E402
from bench_record import add_json_option, end, machine, now, peak_of, save_json  # noqa: E402
from torch import Tensor  # noqa: E402

import copd_megatron.platform  # noqa: E402,F401  (before any of Megatron)
from copd_megatron.config.model import AdapterConfig, ModelConfig  # noqa: E402
from copd_megatron.model.backbone import DTYPES  # noqa: E402
from copd_megatron.model.fp8 import check_fp8  # noqa: E402
from copd_megatron.model.te import RECIPES  # noqa: E402
from copd_megatron.model.vocab_parallel import shard_logits  # noqa: E402
from copd_megatron.parallel.groups import Groups  # noqa: E402
from copd_megatron.parallel.layout import Layout  # noqa: E402
from copd_megatron.parallel.placement import Placement  # noqa: E402
from copd_megatron.platform import device  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

FORMS = get_args(ModelConfig.model_fields["fp8"].annotation)
TOPK = 64
LEAST_COSINE = 0.7
"""Of gradients to those of ``none``. Rounding of many layers leaves more; a wrong scale or layout, about 0."""


@dataclass(frozen=True)
class Outcome:
    """What a form computed, on the CPU: the next form needs the device's memory."""

    hidden: Tensor
    """[N x G x R, H] of the scoring pass; the head is the same in every form."""
    logprobs: Tensor
    """[N x G x R]."""
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, group: Group) -> Outcome:
        """Run once, which also warms everything up."""
        hidden, scores = group.score(group.experts, TOPK)
        group.update()
        return cls(hidden.cpu(), scores.logprobs_T.cpu(), {n: g.cpu() for n, g in group.gradients().items()})


def unavailable(form: str, dtype: str) -> str | None:
    """Why a form cannot run on this machine; None if it can."""
    try:
        check_fp8(form, DTYPES[dtype], device())
        if form in RECIPES:
            importlib.import_module("transformer_engine.pytorch")
    except UserError as error:
        return str(error)
    except (ImportError, OSError, RuntimeError) as error:
        return f"Transformer Engine cannot be imported: {' '.join(str(error).split())}"
    return None


def measure(form: str, group: Group, held_bytes: int, repeats: int) -> tuple[dict, Outcome]:
    """Times and memory of one form, and what it computed."""
    row = {"form": form, "weights_bytes": held_bytes - adapter_bytes(group)}
    outcome = Outcome.of(group)
    work: dict[str, Callable[[], object]] = {"score": partial(group.score, group.experts, TOPK),
                                             "update": group.update}
    for name, once in work.items():
        times = []
        for _ in range(repeats):
            start = now()
            once()
            times.append(now() - start)
        group.backbone.zero_grad()
        row |= {f"{name}_s": statistics.median(times), f"{name}_peak_bytes": peak_of(once)[1]}
    return row, outcome


def adapter_bytes(group: Group) -> int:
    """Of all experts."""
    return sum(p.nbytes for e in group.experts for p in group.backbone.bank.parameters_of(e).values())


def allocated() -> int:
    """Bytes of tensors on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def built_bytes(group: Group, before: int) -> int:
    """What the backbone takes with its adapters."""
    if torch.cuda.is_available():
        return allocated() - before
    return sum(t.nbytes for t in (*group.backbone.parameters(), *group.backbone.buffers()))


@torch.no_grad()
def errors(group: Group, plain: Outcome, own: Outcome) -> dict[str, float]:
    """How far a form is from ``none``."""
    head, divergence, where = group.backbone.own_head, 0.0, device()
    for rows in head.chunks(own.hidden):
        log_q, log_p = (shard_logits(o.hidden[rows].to(where), head).log_softmax(1) for o in (plain, own))
        divergence += (log_q.exp() * (log_q - log_p)).sum().item()
    dot = {pair: 0.0 for pair in ("ab", "aa", "bb")}
    for name, gradient in plain.gradients.items():
        sides = {"a": gradient.to(where).double().flatten(), "b": own.gradients[name].to(where).double().flatten()}
        for pair in dot:
            dot[pair] += torch.dot(sides[pair[0]], sides[pair[1]]).item()
    return {"logprob_error": (plain.logprobs - own.logprobs).abs().mean().item(), "kl": divergence / len(own.hidden),
            "gradient_cosine": dot["ab"] / (dot["aa"] * dot["bb"]) ** 0.5}


def rows_of(options: argparse.Namespace, groups: Groups, found: Callable[[dict], None]) -> None:
    """Hand over the row of each form as it comes. Raises ArithmeticError if one computes something else."""
    spec, plain, first = spec_of(options), None, None
    adapter = AdapterConfig(rank=options.rank, alpha=float(options.rank), scope=options.scope,
                            first_layer=options.first_layer)
    for form in options.forms:
        if reason := unavailable(form, options.dtype):
            found({"form": form, "unavailable": reason})
            continue
        start, before = now(), allocated()
        group = Group(spec, shape_of(options), adapter, groups,
                      model_of(options, fp8=form, recompute=options.recompute))
        held = built_bytes(group, before)
        print(f"{form} built in {now() - start:.1f} s", file=sys.stderr, flush=True)
        row, outcome = measure(form, group, held, options.repeats)
        if plain is None:
            plain, first = outcome, row
        row |= errors(group, plain, outcome)
        if not row["gradient_cosine"] >= LEAST_COSINE:
            raise ArithmeticError(f"{form}: gradients have a cosine of {row['gradient_cosine']:.2f} to those without "
                                  f"FP8; at least {LEAST_COSINE}; it computes something else")
        row |= {f"{name}_ratio": row[name] / first[name] for name in ("score_s", "update_s", "weights_bytes")}
        found(row)
        del group, outcome
        free_memory()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults are sized for two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_group_options(parser)
    add_shape_options(parser)
    add_recompute_option(parser)
    parser.add_argument("--scope", choices=("sequence", "completion"), default="completion",
                        help="adapter.scope (%(default)s)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms; none comes first (all)")
    add_json_option(parser, "write the rows there, as they come")
    options = parser.parse_args(arguments)
    refuse_impossible_groups(parser, options)
    options.forms = ["none", *(form for form in dict.fromkeys(options.forms) if form != "none")]
    return options


def show(row: dict) -> None:
    """One form's line."""
    if "unavailable" in row:
        print(f"{row['form']:<15} not available: {row['unavailable']}", flush=True)
        return
    print(f"{row['form']:<15}{row['score_s']:>9.3f} s{row['score_s_ratio']:>6.2f}x{row['update_s']:>9.3f} s"
          f"{row['update_s_ratio']:>6.2f}x{row['weights_bytes'] / 1e9:>9.3f} GB{row['score_peak_bytes'] / 1e9:>8.2f} GB"
          f"{row['update_peak_bytes'] / 1e9:>8.2f} GB{row['logprob_error']:>10.4f}{row['kl']:>10.5f}"
          f"{row['gradient_cosine']:>8.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0; 1 when a form computes something else; 2 when something impossible was asked for."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    where, rows = machine(), []
    print(f"{where['device']}: {where['cpu']}, {where['threads']} threads, load {where['load']:.1f}, torch "
          f"{where['torch']}, {options.dtype}\n{describe(spec_of(options), options.rank)}; prefix {options.prefix}, "
          f"completion {options.completion}, G {options.group}, {options.experts} experts, scope {options.scope}\n"
          f"{'form':<15}{'scoring':>18}{'update':>18}{'weights':>12}{'score +':>11}{'update +':>11}{'log-prob':>10}"
          f"{'KL':>10}{'cosine':>8}", flush=True)
    groups = Groups.create(Layout(), Placement.build(("expert0",), 1))

    def found(row: dict) -> None:
        rows.append(row)
        show(row)
        save_json(options.json, {"rows": rows}, where, options)

    try:
        rows_of(options, groups, found)
    except (ArithmeticError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    finally:
        groups.destroy()
    return 0


if __name__ == "__main__":
    end(main)
