"""One update by this package's learner on given completions, scoring by the teacher included; nothing generated."""
from __future__ import annotations

import numpy as np
import torch
from fixed_update import LEARNING_RATE, STUDENT, TEACHER, UNCLIPPED, Work

from copd_megatron.checkpoint.peft import load_peft_adapter, read_peft_adapter
from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.config.trainer import OptimizerConfig
from copd_megatron.exchange.payload import Signal
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, Pack, pack_tokens
from copd_megatron.model.translate import check_backbone, load_backbone_weights
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.platform import device
from copd_megatron.trainer.batching import Lane, Microbatch, Sample, make_microbatches
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.learner import Learner
from copd_megatron.trainer.optimizer import ExpertOptimizer
from copd_megatron.types import Completion, Edge, Prompt, Segment


class OurUpdate:
    """Call it for an update; ``close`` it afterwards."""

    def __init__(self, work: Work):
        self.work, options = work, work.options
        spec = check_backbone(options.model)
        adapter = AdapterConfig(rank=options.rank, alpha=float(options.rank),
                                scope="completion" if work.row == "completion" else "sequence")
        self.groups = Groups.create(Layout(), Placement.build((STUDENT,), 1))
        self.backbone = Backbone(spec, self.groups, ModelConfig(path=str(options.model), dtype=options.dtype), adapter)
        load_backbone_weights(self.backbone, options.model)
        bank = self.backbone.bank
        factors = read_peft_adapter(work.adapters / STUDENT, spec).factors
        bank.put(STUDENT, {n: factors[n].to(device()) for n in bank.factor_names()}, 1.0, True)
        if work.row == "opd":
            load_peft_adapter(bank, TEACHER, work.adapters / TEACHER)
        self.runner = Runner(self.backbone, self.groups, lambda prompts: None)
        optimizer = ExpertOptimizer(STUDENT, bank, self.groups,
                                    OptimizerConfig(lr=LEARNING_RATE, max_grad_norm=UNCLIPPED))
        rollout = RolloutConfig(prompts_per_step=options.prompts, group_size=options.group,
                                max_completion_tokens=options.completion_tokens)
        self.learner = Learner(self.runner, self.groups, {STUDENT: optimizer}, RlvrConfig(),
                               OpdConfig(signal="full", divergence="reverse"), rollout, self._tokens_of_a_group())

    def __call__(self) -> None:
        samples = [sample for number in range(len(self.work.prompts)) for sample in self._group(number)]
        if self.work.row == "opd":
            self._ask_the_teacher(samples)
        self.learner.update(samples)

    def gradients(self) -> dict[str, torch.Tensor]:
        """By factor."""
        return {name: parameter.grad for name, parameter in self.backbone.bank.parameters_of(STUDENT).items()}

    def close(self) -> None:
        """End the process groups."""
        self.groups.destroy()

    def _group(self, number: int) -> list[Sample]:
        """One sample per completion of a prompt."""
        work, ids = self.work, self.work.prompts[number]
        places = np.broadcast_to(np.arange(len(ids)), (3, len(ids))).copy()
        prompt = Prompt(str(number), STUDENT, ids, places, len(ids), None, np.zeros(0, np.int64), len(work.header),
                        str(number))
        edge = Edge(TEACHER, STUDENT, signal="full") if work.row == "opd" else None
        samples = []
        for place, tokens in enumerate(work.completions[number].tolist()):
            zeros = [0.0] * len(tokens)
            completion = Completion(prompt, STUDENT, place, [Segment(tokens, "policy", zeros, zeros)])
            samples.append(Sample(completion, STUDENT, edge, float(work.advantages[number, place]), slot=number,
                                  slots=len(work.prompts)))
        return samples

    def _tokens_of_a_group(self) -> int:
        leaves = [Leaf(STUDENT, sample.completion.token_ids) for sample in self._group(0)]
        return pack_tokens([LeafGroup(self._group(0)[0].completion.prompt, leaves)], self.backbone.rules)

    def _ask_the_teacher(self, samples: list[Sample]) -> None:
        """Signal ``full`` as a co-hosted teacher gives it: hidden states."""
        def at_end(hidden: torch.Tensor, pack: Pack, batch: Microbatch) -> tuple[None, None]:
            for lane, states in zip(batch.lanes, hidden.split(pack.leaf_lengths)):
                lane.sample.signal = Signal("full", hidden_TH=states)
            return None, None

        lanes = [Lane(sample, TEACHER) for sample in samples]
        self.runner.score(make_microbatches(lanes, self.backbone.rules, self.learner.microbatch_tokens), at_end)
