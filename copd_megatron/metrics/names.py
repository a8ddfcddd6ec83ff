"""Every metric of a run: its name, meaning, unit, healthy range and what to do outside of it.

Names are patterns with placeholders: ``{expert}/reward`` matches ``text/reward``. ``docs/metrics.md``
carries the table that ``markdown_table`` renders from here; a test keeps the two equal.
"""
from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache

Phase = str
"""``rlvr`` or ``opd`` (a training step of that phase), or ``eval`` (numbers of an evaluation)."""

PHASES: tuple[Phase, ...] = ("rlvr", "opd", "eval")

TIMED_PHASES = ("rollout", "vision", "verify", "score", "exchange", "update", "optimizer", "evaluation", "save")
"""What a step spends its time on, in the order of the loop; timers and report use these."""

RESERVED = frozenset({"edge", "pair", "exchange", "prefix", "time", "tokens", "memory", "eval", "record"})
"""First words of names that are not experts; no expert may be called so."""


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue.

    Example: ``Metric("{expert}/reward", "Mean reward ...", "reward", "rises", "Flat: ...")``.
    """

    pattern: str
    meaning: str
    unit: str
    healthy: str
    action: str
    """What to do when the value leaves the healthy range."""


_EXPERT = (
    Metric("{expert}/reward", "Mean reward over the native batch: weighted sum of its parts.", "reward",
           "rises, then levels off",
           "Flat from the start: see `zero_std_groups` and `reward/{part}`. Falls: lower `optimizer.lr`."),
    Metric("{expert}/reward/{part}", "Mean of one reward part before weighting.", "0 to 1",
           "accuracy rises after format is near 1",
           "Only format rises: the policy learns the form, not the task; lower that part's weight."),
    Metric("{expert}/advantage_abs", "Mean |A| over the native batch's tokens.", "advantage",
           "0.3 to 1 (grpo)", "Near 0: groups agree; take harder or easier prompts, or a larger group."),
    Metric("{expert}/zero_std_groups", "Share of groups whose rewards are all equal: they teach nothing.",
           "0 to 1", "below 0.6",
           "Near 1: the prompts are too easy or too hard; filter them or set `rlvr.dynamic_sampling`."),
    Metric("{expert}/resampled_groups", "Groups drawn again by dynamic sampling.", "count",
           "below the batch size", "High: the data has few prompts of middling difficulty."),
    Metric("{expert}/length", "Mean completion length, native batch.", "tokens", "steady or slowly rising",
           "Collapses or explodes: see `truncated`; consider `rlvr.reduction=token_mean`."),
    Metric("{expert}/tokens", "Tokens of the expert's step, all replicas: each prompt once and all completions, "
           "native and cross.", "tokens", "as `experts.{expert}.weight` says, beside the others'",
           "Far from the weights: set them to these numbers, or `schedule.rl_steps_of` lower for the dearest."),
    Metric("{expert}/idle/{phase}", "Share of rollout, score or update in which the expert's replicas wait for the "
           "busiest of all. Waiting for each other within an update counts as work.", "0 to 1", "below 0.2",
           "High: give the expert a lower `experts.{expert}.weight`, or the dearest one fewer "
           "`schedule.rl_steps_of`."),
    Metric("{expert}/truncated", "Share of completions cut at `rollout.max_completion_tokens`.", "0 to 1",
           "below 0.05", "Higher: raise the limit or set `rlvr.overlong_buffer_tokens`."),
    Metric("{expert}/parseable", "Share of completions from which an answer could be read.", "0 to 1",
           "above 0.95", "Low: the prompt does not state the answer's form, or completions are cut."),
    Metric("{expert}/entropy", "Mean entropy of the policy at its sampled tokens.", "nats per token",
           "falls slowly, stays above 0", "Collapses to 0: raise `rlvr.clip_high` or `rlvr.entropy_coef`."),
    Metric("{expert}/kl_backbone", "KL(policy || backbone), estimated on the policy's own tokens.",
           "nats per token", "grows slowly, below 1",
           "Jumps: lower `optimizer.lr` or set `rlvr.kl_coef`. Exactly 0 after step 1: nothing is trained."),
    Metric("{expert}/kl_penalty", "KL estimate that enters the loss, before `rlvr.kl_coef`.",
           "nats per token", "follows `kl_backbone`", "Dominates the loss: lower `rlvr.kl_coef`."),
    Metric("{expert}/loss", "The loss of the update, native and cross batches together.", "loss",
           "around 0 with one update per rollout", "Its gradient matters, not its level; not finite: stop."),
    Metric("{expert}/loss_rlvr", "Policy-gradient part of the loss.", "loss", "around 0", "As `loss`."),
    Metric("{expert}/loss_opd", "Distillation part of the loss.", "loss",
           "falls towards 0 (topk, full)", "Rises over cycles: the experts drift apart; raise `opd_steps`."),
    Metric("{expert}/ratio_mean", "Mean of policy / rollout probability per token.", "ratio",
           "0.99 to 1.01", "Off 1 in the first minibatch: engine and trainer disagree, see `mismatch_kl`."),
    Metric("{expert}/clip_fraction", "Share of tokens whose surrogate is clipped.", "0 to 1",
           "0 with one update per rollout, else below 0.2",
           "Higher: fewer `minibatches_per_rollout` or a lower `optimizer.lr`."),
    Metric("{expert}/mismatch_kl", "KL(engine || trainer) on sampled tokens (k3), same weights.",
           "nats per token", "below 1e-3 (bf16), 1e-8 (fp32)",
           "Higher: stale weights in the engine or another numeric path; see `rlvr.importance_correction`."),
    Metric("{expert}/importance_clipped", "Share of tokens whose importance weight was capped or dropped.",
           "0 to 1", "below 0.05", "Higher: find the cause in `mismatch_kl` first."),
    Metric("{expert}/grad_norm", "Global norm of the adapter gradients before clipping.", "norm",
           "steady, spikes are rare",
           "Spikes: look at `edge/*/delta_p05`, set `opd.delta_guard`. 0: no sequence carried an advantage."),
    Metric("{expert}/lr", "Learning rate of the update.", "1", "as scheduled", "Set `optimizer.lr`."),
    Metric("{expert}/adapter_norm", "Norm of the adapter's parameters.", "norm", "grows slowly",
           "Grows without bound: raise `optimizer.weight_decay` or lower `optimizer.lr`."),
)

_EDGE = (
    Metric("edge/{teacher}->{student}/delta_p05", "5th percentile of delta = log teacher - log student over "
           "the student's tokens on the teacher's prompts.", "nats", "above -5",
           "Far lower: a heavy tail drives the update; set `opd.delta_guard=10` or `opd.signal=topk`."),
    Metric("edge/{teacher}->{student}/delta_p50", "Median of delta.", "nats", "near 0",
           "Far from 0: the pair no longer understands each other; longer OPD phases."),
    Metric("edge/{teacher}->{student}/delta_p95", "95th percentile of delta.", "nats", "below 5",
           "As `delta_p05`."),
    Metric("edge/{teacher}->{student}/delta_mean", "Mean of delta; minus the k1 estimate of "
           "KL(student || teacher).", "nats", "at most 0 up to noise, towards 0 in an OPD phase",
           "Falls over cycles: the experts drift apart; more `schedule.opd_steps`."),
    Metric("edge/{teacher}->{student}/beta_delta_abs", "Mean |beta delta|: the distillation signal's size, "
           "to compare with the student's `advantage_abs`.", "advantage", "0.1 to 2 times |A|",
           "Above: the teacher drowns the reward, lower `opd.beta`. Below: the exchange does nothing."),
    Metric("edge/{teacher}->{student}/teacher_kl", "KL(student || teacher) on the student's states: exact "
           "with signal full, with the tail bucket for topk, the k3 estimate for sampled.", "nats per token",
           "falls within an OPD phase", "Does not fall: raise `opd.beta` or `opd.cross_ratio`."),
    Metric("edge/{teacher}->{student}/dropped", "Share of tokens dropped by `opd.delta_guard`.", "0 to 1",
           "below 0.01", "Higher: the guard hides a drift; look at the percentiles."),
    Metric("edge/{teacher}->{student}/length", "Mean length of the student's completions on the teacher's "
           "prompts.", "tokens", "near the teacher's own `length`",
           "Collapses: late tokens carry little signal; see `truncated`."),
    Metric("edge/{teacher}->{student}/truncated", "Share of those completions that were cut.", "0 to 1",
           "below 0.05", "As `{expert}/truncated`."),
    Metric("edge/{teacher}->{student}/tokens", "Cross tokens of this edge in the update.", "tokens",
           "native tokens x `opd.cross_ratio` / edges", "Far off: completions differ much in length."),
    Metric("edge/{teacher}->{student}/reuse_weight", "Mean importance weight min(pi_student / pi_sampler, "
           "`opd.importance_cap`) of tokens that another expert sampled (`opd.rollouts=native`).", "ratio",
           "0.8 to 1", "Far lower: the experts sample too differently for reuse; set `opd.rollouts=fresh`."),
    Metric("edge/{teacher}->{student}/reuse_clipped", "Share of these tokens whose weight is at the cap.", "0 to 1",
           "below 0.1", "Higher: the bias grows; raise `opd.importance_cap`, or `opd.rollouts=fresh`."),
)

_EXCHANGE = (
    Metric("exchange/scatter_bytes", "What the step's exchange moves between replicas, all ranks together, if teachers "
           "score at home and signals travel (`exchange.transport=scatter`).", "bytes",
           "as `edge/*/tokens` times the payload", "Large: `opd.wire_dtype=bfloat16`, a smaller `opd.topk`."),
    Metric("exchange/gather_adapters_bytes", "The same if the teachers' adapters travel "
           "(`exchange.transport=gather_adapters`).", "bytes", "constant",
           "Large: a lower `adapter.rank`, a sparser `exchange.topology`."),
    Metric("exchange/moved_bytes", "The one of the two that was taken.", "bytes", "the lower one",
           "The higher one: set `exchange.transport=auto`."),
)

_PREFIX = (
    Metric("prefix/computed_tokens", "Prompt tokens that were evaluated for rollout, before any completion, over all "
           "replicas and averaged over the layers; the evaluation before the step included. With "
           "`rollout.prefix_store_bytes` and scope `completion` also those for scoring and update.", "tokens",
           "each distinct prompt of the step once per replica, in scope `sequence` once per expert that answers it",
           "Higher with a store: see `recomputed_tokens`."),
    Metric("prefix/hit_rate", "Share of prompts (or, with `adapter.first_layer`, of their parts) that were found in "
           "the prefix store.", "0 to 1", "above 0.6 in scope `completion`",
           "Near 0 in scope `sequence` with answers of one turn: the store has no use there, set "
           "`rollout.prefix_store_bytes=0`."),
    Metric("prefix/saved_tokens", "Prompt tokens that were found instead, averaged over the layers.", "tokens",
           "above `computed_tokens`", "As `hit_rate`."),
    Metric("prefix/recomputed_tokens", "The part of `computed_tokens` that had been in the store and was evicted.",
           "tokens", "0", "Higher: raise `rollout.prefix_store_bytes`."),
    Metric("prefix/bytes", "What the prefix store holds at the end of the step, on the rank of a replica that holds "
           "most; mean over replicas.", "bytes", "below `rollout.prefix_store_bytes`",
           "At the budget with `recomputed_tokens` above 0: raise it."),
)

_PAIR = (
    Metric("pair/{a}~{b}/overlap", "Mean share of common top-k tokens of two experts on both experts' own "
           "states (k = `metrics.overlap_k`).", "0 to 1", "above 0.9: dips in RLVR, recovers in OPD",
           "Falls over cycles: more `opd_steps` per `rl_steps`, or a lower `optimizer.lr`."),
    Metric("pair/{a}~{b}/symmetric_kl", "Mean of KL(a || b) on a's states and KL(b || a) on b's states.",
           "nats per token", "bounded: rises in RLVR, falls in OPD", "As `overlap`."),
)

_WORK = (
    Metric("time/{phase}_s", "Time of one part of the step, without parts nested in it: "
           + ", ".join(TIMED_PHASES) + "; `other` is the rest.", "s", "rollout and update dominate",
           "See the stacked plot of the report for the part to speed up."),
    Metric("time/step_s", "Wall time of the whole step.", "s", "steady",
           "Grows: see `length` and `truncated`."),
    Metric("tokens/{phase}_per_s", "Tokens through one part (rollout, score, update) per second of it, all "
           "ranks together.", "tokens/s", "steady",
           "Falls: long stragglers in rollout; raise `rollout.decode_lanes`."),
    Metric("tokens/step", "Completion tokens that the step's updates saw.", "tokens", "steady",
           "See `length`."),
    Metric("tokens/reused", "Those of them that the students took from native batches instead of decoding them "
           "(`opd.rollouts=native`).", "tokens", "as `edge/*/tokens` together", "0 in OPD steps: there are no edges."),
    Metric("tokens/saved_share", "Share of token evaluations that prefix sharing made unnecessary.", "0 to 1",
           "above 0.5 with images or video",
           "Near 0: prompts are short against completions; nothing is wrong."),
    Metric("tokens/kept_share", "Share of the tokens of scoring and update (each as often as layers below "
           "`adapter.first_layer` would see it) that began at that layer, from states which the rollout kept.",
           "0 to 1",
           "1; lower where teachers of other replicas score",
           "Lower with one replica: raise `rollout.lower_states_bytes`."),
    Metric("memory/lower_states_bytes", "What `rollout.lower_states_bytes` holds after the step's rollout; mean over "
           "ranks that share out prompts.", "bytes", "below `rollout.lower_states_bytes`",
           "At the budget with `tokens/kept_share` below 1: raise it."),
    Metric("memory/peak_bytes", "Peak memory of the busiest rank: allocated on CUDA, resident on a CPU.",
           "bytes", "below the device's",
           "Near it: lower `optimizer.microbatch_tokens`, `rollout.decode_lanes`."),
)

_EVAL = (
    Metric("eval/{policy}/{domain}/avg", "Held-out accuracy, mean over prompts and samples (avg@k).",
           "0 to 1", "rises on the own domain, holds on the others",
           "Falls elsewhere: more OPD, see the overlap."),
    Metric("eval/{policy}/{domain}/pass", "Share of held-out prompts solved by at least one sample (pass@k).",
           "0 to 1", "at least avg", "Falls while avg rises: the policy loses diversity; see `entropy`."),
    Metric("eval/{policy}/{domain}/parseable", "Share of held-out completions with a readable answer.",
           "0 to 1", "above 0.95", "As `{expert}/parseable`."),
    Metric("eval/{policy}/{domain}/length", "Mean held-out completion length.", "tokens", "steady",
           "As `{expert}/length`."),
)

_RECORD = (
    Metric("record/failures", "Writes of TensorBoard, W&B or rollouts that failed so far.", "count", "absent",
           "Free disk space; the log says which file. `metrics.jsonl` is never skipped."),
)

GROUPS: dict[str, tuple[Metric, ...]] = {
    "Each expert": _EXPERT,
    "Each edge teacher -> student (OPD steps)": _EDGE,
    "The exchange (OPD steps, where experts live on several replicas)": _EXCHANGE,
    "Prompts that are evaluated once": _PREFIX,
    "Each pair of experts": _PAIR,
    "Time, tokens, memory": _WORK,
    "Evaluation (TensorBoard and W&B; the same numbers are in evaluations.jsonl)": _EVAL,
    "The record itself": _RECORD,
}
"""Heading -> metrics, in the order of the documentation."""

METRICS: tuple[Metric, ...] = tuple(m for group in GROUPS.values() for m in group)
"""The whole catalogue."""


@cache
def _matchers() -> tuple[tuple[re.Pattern[str], Metric], ...]:
    """Compiled patterns, those with the fewest placeholders first, so that a literal name wins."""
    def compiled(metric: Metric) -> re.Pattern[str]:
        parts = re.split(r"\{(\w+)\}", metric.pattern)
        # A reward part may be any text; every other placeholder is one word between separators.
        body = "".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>{'.+' if p == 'part' else r'[^/~>]+'})"
                       for i, p in enumerate(parts))
        return re.compile(body)

    ordered = sorted(METRICS, key=lambda m: m.pattern.count("{"))
    return tuple((compiled(m), m) for m in ordered)


def find(name: str) -> tuple[Metric, dict[str, str]] | None:
    """The metric a name belongs to and the values of its placeholders; None for an unknown name.

    Example: ``find("edge/text->image/delta_p50")[1] == {"teacher": "text", "student": "image"}``.
    """
    for matcher, metric in _matchers():
        match = matcher.fullmatch(name)
        if match and match.groupdict().get("expert") not in RESERVED:
            return metric, match.groupdict()
    return None


def check_name(name: str) -> Metric:
    """The metric a name belongs to; ValueError with the nearest pattern for an unknown one."""
    found = find(name)
    if found is None:
        near = difflib.get_close_matches(name, [m.pattern for m in METRICS], n=1, cutoff=0)
        raise ValueError(f"metric {name!r} is in no pattern of metrics/names.py; the nearest is {near[0]!r}")
    return found[0]


def edge_name(teacher: str, student: str, what: str) -> str:
    """``edge_name("text", "image", "delta_p50") == "edge/text->image/delta_p50"``."""
    return f"edge/{teacher}->{student}/{what}"


def pair_name(a: str, b: str, what: str) -> str:
    """``pair_name("text", "image", "overlap") == "pair/image~text/overlap"``: the pair is unordered."""
    first, second = sorted((a, b))
    return f"pair/{first}~{second}/{what}"


def markdown_table() -> str:
    """The catalogue as Markdown, one table a group; what ``docs/metrics.md`` must contain."""
    lines: list[str] = []
    for heading, metrics in GROUPS.items():
        lines += [f"### {heading}", "", "| name | meaning | unit | healthy | otherwise |",
                  "|---|---|---|---|---|"]
        for m in metrics:
            cells = [f"`{m.pattern}`", m.meaning, m.unit, m.healthy, m.action]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)
