"""The whole run: what a recipe returns."""
import difflib
import re
from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator

from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.metrics import MetricsConfig
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.parallel import ParallelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.config.section import Section
from copd_megatron.config.tasks import ExpertConfig
from copd_megatron.config.trainer import EvaluationConfig, MergeConfig, OptimizerConfig, ScheduleConfig

EXPERT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RESERVED_NAMES = frozenset({"base", "merged", "kl_reference", "backbone",
                            "edge", "pair", "exchange", "prefix", "time", "tokens", "memory", "eval", "record"})
"""Other policies, and first words of metrics that are not an expert's."""


class RunConfig(Section):
    """A complete run, as a recipe returns it."""

    model: ModelConfig
    experts: dict[str, ExpertConfig]
    """Expert name -> its task and rewards; the order fixes the placement."""
    seed: int = 0
    """Seeds adapters, prompts and sampling."""
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rlvr: RlvrConfig = Field(default_factory=RlvrConfig)
    opd: OpdConfig = Field(default_factory=OpdConfig)
    exchange: ExchangeConfig = Field(default_factory=ExchangeConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    merge: MergeConfig = Field(default_factory=MergeConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        conflict = self.conflict()
        if conflict:
            raise ValueError(conflict)
        return self

    def conflict(self) -> str | None:
        """The first thing in which sections do not fit together, as an error says it; None if all fit.

        Files and folders are not looked at: their paths may be relative to the recipe still.
        """
        return next((text for bad, text in (*self._expert_rules(), *self._fp8_rules(), *self._training_rules())
                     if bad), None)

    def _expert_rules(self) -> Iterator[tuple[bool, str]]:
        """(broken?, what to say) of the experts and who exchanges with whom."""
        yield not self.experts, "experts: empty; name at least one expert"
        for name in self.experts:
            yield (not EXPERT_NAME.fullmatch(name), f"experts: {name!r}; a name has letters, digits, _ and -, as it "
                   "becomes part of metric and folder names; rename it")
            yield name in RESERVED_NAMES, (f"experts: {name!r} means something else in metrics and run folders "
                                           f"({', '.join(sorted(RESERVED_NAMES))} do); rename it")
        hub = self.exchange.hub
        yield (hub is not None and hub not in self.experts,
               f"exchange.hub: {hub!r} is no expert; experts are {sorted(self.experts)}")
        for name in self.exchange.frozen_teachers:
            yield (not EXPERT_NAME.fullmatch(name) or name in RESERVED_NAMES or name in self.experts,
                   f"exchange.frozen_teachers: {name!r}; a name has letters, digits, _ and -, and is neither an "
                   f"expert's nor one of {', '.join(sorted(RESERVED_NAMES))}; rename it")

    def _fp8_rules(self) -> Iterator[tuple[bool, str]]:
        """(broken?, what to say) of FP8 by Transformer Engine."""
        model, store = self.model, self.rollout.prefix_store_bytes
        yield model.fp8 == "te_current" and store > 0, (
            f"rollout.prefix_store_bytes: {store} with model.fp8=te_current, whose scales are those of whole tensors, "
            "so that a prompt's states depend on the rows beside it and are never found as they would be computed; set "
            "rollout.prefix_store_bytes=0, or model.fp8=te_blockwise or frozen_rowwise")
        kept = self.rollout.lower_states_bytes
        yield model.fp8 == "te_current" and kept > 0, (
            f"rollout.lower_states_bytes: {kept} with model.fp8=te_current, whose scales are those of whole tensors, "
            "so that what decoding makes of a token is not what scoring would; set rollout.lower_states_bytes=0, or "
            "model.fp8=te_blockwise or frozen_rowwise")
        yield model.fp8.startswith("te_") and model.dtype != "bfloat16", (
            f"model.fp8: {model.fp8} with model.dtype={model.dtype}; bfloat16 is allowed; set model.dtype=bfloat16, or "
            "model.fp8=none")

    def _training_rules(self) -> Iterator[tuple[bool, str]]:
        """(broken?, what to say) of sampling, losses, schedule and evaluation."""
        rollout, rlvr, schedule = self.rollout, self.rlvr, self.schedule
        yield rollout.top_p != 1.0, (
            f"rollout.top_p: {rollout.top_p}; training requires 1.0, as log-probs must be those of the distribution "
            "sampled from; remove it")
        yield rollout.prefix_store_bytes > 0 and not self.model.prefix_sharing, (
            f"rollout.prefix_store_bytes: {rollout.prefix_store_bytes} with model.prefix_sharing=false, which evaluates"
            " prompts again for every completion; set one of the two")
        parallel = self.parallel
        yield (rollout.prefix_store_bytes > 0 and parallel.context > 1
               and parallel.moe_expert * parallel.moe_expert_tensor > 1), (
            f"rollout.prefix_store_bytes: {rollout.prefix_store_bytes} with MoE experts spread over parallel.context="
            f"{parallel.context} ranks, where a prompt is evaluated among the others' rows and never twice alike; set "
            "rollout.prefix_store_bytes=0 or parallel.context=1")
        yield rollout.lower_states_bytes > 0 and not self.model.prefix_sharing, (
            f"rollout.lower_states_bytes: {rollout.lower_states_bytes} with model.prefix_sharing=false, which evaluates"
            " every completion with its own prompt from the first layer on; set one of the two")
        yield rollout.lower_states_bytes > 0 and self.adapter.first_layer == 0, (
            f"rollout.lower_states_bytes: {rollout.lower_states_bytes} with adapter.first_layer=0, below which no "
            "layer is; set rollout.lower_states_bytes=0, or adapter.first_layer above 0")
        yield rlvr.dual_clip is not None and rlvr.loss == "cispo", (
            f"rlvr.dual_clip: {rlvr.dual_clip} with rlvr.loss=cispo, whose weight is bounded already; clip and gspo "
            "know it; set rlvr.dual_clip=None")
        yield rlvr.overlong_buffer_tokens > rollout.max_completion_tokens, (
            f"rlvr.overlong_buffer_tokens: {rlvr.overlong_buffer_tokens}; at most rollout.max_completion_tokens, "
            f"{rollout.max_completion_tokens}; lower it")
        yield rlvr.minibatches_per_rollout > rollout.prompts_per_step, (
            f"rlvr.minibatches_per_rollout: {rlvr.minibatches_per_rollout}; at most rollout.prompts_per_step, "
            f"{rollout.prompts_per_step}, as a minibatch is made of whole groups; lower it")
        for name in schedule.rl_steps_of:
            near = difflib.get_close_matches(name, self.experts, n=1)
            yield name not in self.experts, (
                f"schedule.rl_steps_of: {name!r} is no expert; experts are {', '.join(self.experts)}; "
                + (f"nearest: {near[0]}" if near else "correct it"))
        yield (schedule.kind == "adaptive" and not any(schedule.rl_steps_of.get(e, schedule.rl_steps)
                                                       for e in self.experts),
               "schedule.rl_steps: 0 with schedule.kind=adaptive, which begins with RLVR; 1 or more; raise it, or take "
               "schedule.kind=fixed")
        yield schedule.enter_overlap > schedule.leave_overlap, (
            f"schedule.enter_overlap: {schedule.enter_overlap}; at most schedule.leave_overlap, "
            f"{schedule.leave_overlap}, or the phases would never rest; lower it")
        for field in ("rl_length", "opd_length"):
            least, most = getattr(schedule, field)
            yield least > most, f"schedule.{field}: [{least}, {most}]; the least comes first; swap them"
        yield schedule.rl_steps + schedule.opd_steps == 0, (
            "schedule.rl_steps and schedule.opd_steps: both are 0; a cycle has at least one step; raise one")
        merge = self.merge
        yield merge.rule == "weighted" and set(merge.weights) != set(self.experts), (
            f"merge.weights: {merge.weights}; merge.rule=weighted needs one weight for each of the experts "
            f"{', '.join(self.experts)} and no other; correct it")
        yield self.evaluation.greedy and self.evaluation.samples != 1, (
            "evaluation.samples: more than 1 greedy sample is always the same; set evaluation.greedy=false")
