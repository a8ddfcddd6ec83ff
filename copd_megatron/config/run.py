"""The whole run: what a recipe returns."""
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
        if not self.experts:
            raise ValueError("experts: empty; name at least one expert")
        if self.rollout.top_p != 1.0:
            raise ValueError(f"rollout.top_p: {self.rollout.top_p}; training requires 1.0")
        if self.evaluation.greedy and self.evaluation.samples != 1:
            raise ValueError("evaluation.samples: more than 1 greedy sample is always the same; "
                             "set evaluation.greedy=false")
        hub = self.exchange.hub
        if hub is not None and hub not in self.experts:
            raise ValueError(f"exchange.hub: {hub!r} is no expert; experts are {sorted(self.experts)}")
        return self
