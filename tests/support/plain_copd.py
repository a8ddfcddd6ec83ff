"""CoPD's loss written down from the papers, sequence by sequence in float64: what the trainer's update must equal.

Imports no loss of the package. Advantages, ratios, divergences and reductions are computed one completion at a
time, each on its own forward of ``plain_model``.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from copd_megatron.config.run import RunConfig
from copd_megatron.trainer.batching import Sample
from support.plain_model import PlainModel

Factors = Mapping[str, Tensor]


class PlainCopd:
    """Gradients of one expert's update on samples that the trainer collected."""

    def __init__(self, config: RunConfig, model: PlainModel, start: Mapping[str, Factors], reference: Factors | None):
        """``start``: every expert's factors before the step; ``reference``: of the KL penalty (None: backbone)."""
        self.config, self.model, self.start, self.reference = config, model, start, reference
        self._frozen: dict[tuple[int, int], Tensor] = {}

    def gradient(self, samples: Sequence[Sample], everything: Sequence[Sample], factors: Factors) -> dict[str, Tensor]:
        """d loss / d factors of one expert's minibatch ``samples``; ``everything``: all samples of the step."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in factors.items()}
        losses = [self._token_losses(sample, everything, leaves) for sample in samples]
        kind, most = self.config.rlvr.reduction, self.config.rollout.max_completion_tokens
        total = sum(len(loss) for loss in losses)
        loss = sum({"seq_mean": own.mean() / len(losses), "token_mean": own.sum() / total,
                    "constant": own.sum() / (most * len(losses))}[kind] for own in losses)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)))

    def _token_losses(self, sample: Sample, everything: Sequence[Sample], factors: Factors) -> Tensor:
        """[R]."""
        tokens = torch.tensor(sample.completion.token_ids)
        every = self._logprobs(sample, factors)
        own = every.gather(1, tokens[:, None])[:, 0]
        with torch.no_grad():
            old = self._known(sample, self.start[sample.expert]).gather(1, tokens[:, None])[:, 0]
        if sample.edge is not None:
            return self._cross(sample, every, own, old, tokens)
        rlvr = self.config.rlvr
        loss = self._surrogate(own, old, torch.full_like(old, self._advantage(sample, everything)))
        loss = loss * self._correction(sample, old)
        if rlvr.kl_coef:
            with torch.no_grad():
                reference = self._known(sample, self.reference).gather(1, tokens[:, None])[:, 0]
            d = own - reference
            # As a loss, k1 has the gradient of k2 (see losses.kl).
            penalty = {"k1": d ** 2 / 2, "k2": d ** 2 / 2, "k3": torch.exp(-d) - 1 + d}[rlvr.kl_estimator]
            loss = loss + rlvr.kl_coef * penalty
        return loss - rlvr.entropy_coef * -(every.exp() * every).sum(1)

    def _cross(self, sample: Sample, every: Tensor, own: Tensor, old: Tensor, tokens: Tensor) -> Tensor:
        opd, beta = self.config.opd, sample.edge.beta
        with torch.no_grad():
            teacher = self._known(sample, self.start[sample.edge.teacher])
            delta = teacher.gather(1, tokens[:, None])[:, 0] - old
        kept = delta.abs() < (opd.delta_guard or float("inf"))
        if opd.signal == "sampled":
            weight = self._correction(sample, old)
            if sample.completion.expert != sample.expert:
                weight = self._reuse(sample, old, tokens)
            return kept * self._surrogate(own, old, beta * delta) * weight
        student = every
        if opd.signal in ("topk", "student_topk"):
            with torch.no_grad():
                asked = teacher if opd.signal == "topk" else self._known(sample, self.start[sample.expert])
            ids = asked.topk(opd.topk, 1).indices
            tails = [torch.log1p(-x.gather(1, ids).exp().sum(1, keepdim=True)) for x in (every, teacher)]
            student, teacher = (torch.cat([x.gather(1, ids), tail], 1) for x, tail in zip((every, teacher), tails))
        return kept * beta * divergence(student, teacher, opd.divergence, opd.jsd_weight)

    def _advantage(self, sample: Sample, everything: Sequence[Sample]) -> float:
        group = [s for s in everything if s.is_native and s.expert == sample.expert
                 and s.completion.prompt.key == sample.completion.prompt.key]
        rewards = torch.tensor([self._reward(s) for s in group], dtype=torch.float64)
        others = (rewards.sum() - self._reward(sample)) / (len(group) - 1)
        gain = self._reward(sample) - rewards.mean()
        return float({"grpo": gain / (rewards.std() + 1e-6), "dr_grpo": gain,
                      "rloo": self._reward(sample) - others}[self.config.rlvr.advantage])

    def _reward(self, sample: Sample) -> float:
        """With DAPO's soft punishment of long answers."""
        buffer, most = self.config.rlvr.overlong_buffer_tokens, self.config.rollout.max_completion_tokens
        over = len(sample.completion.token_ids) - (most - buffer)
        punished = self.config.rlvr.overlong_penalty * min(over / buffer, 1.0) if buffer and over > 0 else 0.0
        return sample.completion.reward - punished

    def _surrogate(self, own: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        rlvr = self.config.rlvr
        ratio = torch.exp(own - old)
        if rlvr.loss == "gspo":
            ratio = torch.exp((own - old).mean()).expand_as(own)
        bounded = ratio.clamp(1 - rlvr.clip_low, 1 + rlvr.clip_high)
        if rlvr.loss == "cispo":
            return -bounded.detach() * advantage * own
        objective = torch.minimum(ratio * advantage, bounded * advantage)
        if rlvr.dual_clip is not None:
            objective = torch.where(advantage < 0, torch.maximum(objective, rlvr.dual_clip * advantage), objective)
        return -objective

    def _correction(self, sample: Sample, old: Tensor) -> Tensor:
        kind, cap = self.config.rlvr.importance_correction, self.config.rlvr.importance_cap
        weight = torch.exp(old - torch.tensor(sample.completion.logprobs, dtype=torch.float64))
        inside = (weight >= 1 / cap) & (weight <= cap)
        return {"none": torch.ones_like(weight), "truncated": weight.clamp(max=cap), "masked": weight * inside}[kind]

    def _known(self, sample: Sample, factors: Factors | None) -> Tensor:
        """``_logprobs`` under factors that never change, evaluated once."""
        key = id(sample), id(factors)
        if key not in self._frozen:
            self._frozen[key] = self._logprobs(sample, factors)
        return self._frozen[key]

    def _reuse(self, sample: Sample, old: Tensor, tokens: Tensor) -> Tensor:
        """Truncated weights of tokens that another expert sampled."""
        with torch.no_grad():
            sampler = self._logprobs(sample, self.start[sample.completion.expert]).gather(1, tokens[:, None])[:, 0]
        return (old - sampler).exp().clamp(max=self.config.opd.importance_cap)

    def _logprobs(self, sample: Sample, factors: Factors | None) -> Tensor:
        prompt = sample.completion.prompt
        first = len(prompt.token_ids) - prompt.header_tokens if self.config.adapter.scope == "completion" else 0
        return self.model.logprobs(prompt.token_ids.tolist(), sample.completion.token_ids, factors,
                                   self.config.rollout.temperature, first)


def divergence(student: Tensor, teacher: Tensor, kind: str, weight: float) -> Tensor:
    """[R] divergence of [R, V] log-probs, as the papers define it."""
    kl = lambda p, q: (p.exp() * (p - q)).sum(1)  # noqa: E731
    if kind == "jsd":
        mixture = torch.log(weight * teacher.exp() + (1 - weight) * student.exp())
        return weight * kl(teacher, mixture) + (1 - weight) * kl(student, mixture)
    return kl(student, teacher) if kind == "reverse" else kl(teacher, student)
