"""The loss of one microbatch on the last pipeline stage, and what the step records about it.

native (RLVR)         clipped surrogate with the group advantage, + kl_coef KL - entropy_coef entropy
cross, ``sampled``    the same surrogate with advantage beta (log pi_teacher - log pi_student), both detached
cross, others         beta x divergence from the teacher, on k ids (its own top-k or the student's) with a tail
                      bucket, or on the vocabulary
reused, ``sampled``   as cross, x min(pi_student / pi_sampler, importance_cap) of the token, detached; a divergence does
                      not depend on the token that was sampled, and is not weighted

(Gu et al. 2026, arXiv:2604.27083). loss = sum over tokens of weight x loss, see ``losses.reduction``: native
and cross samples of an expert are reduced together, as one batch.

Shape suffixes: N completion tokens of the microbatch, H hidden.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.losses.advantages import distillation_advantages
from copd_megatron.losses.importance import importance_weights, mismatch
from copd_megatron.losses.kl import kl_estimate
from copd_megatron.losses.policy_gradient import surrogate
from copd_megatron.metrics.names import edge_name
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.shared_prefix import Pack
from copd_megatron.trainer.batching import Microbatch
from copd_megatron.trainer.policy_scores import PolicyScorer
from copd_megatron.trainer.rows import Rows
from copd_megatron.trainer.step_metrics import Sums
from copd_megatron.types import Edge, UserError

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Who says what about the microbatch's tokens, [N] each."""

    native: Tensor
    """bool: driven by the reward; the others are cross."""
    policy: Tensor
    """Log-probs of the policy being updated; carries the gradient."""
    old: Tensor
    """Of the policy at the start of the step."""
    backbone: Tensor
    """Only read on native tokens."""
    delta: Tensor
    """log teacher - log student at the start of the step; 0 on native tokens."""
    beta: Tensor
    """0 on native tokens."""
    advantage: Tensor
    dropped: Tensor
    """bool: cross tokens that ``opd.delta_guard`` leaves out."""


class Objective:
    """Callable for ``Runner.train``: (hidden states, pack, microbatch) -> (loss, sums of metrics)."""

    def __init__(self, backbone: Backbone, rlvr: RlvrConfig, opd: OpdConfig, temperature: float,
                 loss_function: LossFunction | None = None):
        """``loss_function`` stands in for ``rlvr.loss``, see ``RlvrConfig.loss_function``."""
        self.rlvr, self.opd, self.loss_function = rlvr, opd, loss_function
        self.scores = PolicyScorer(backbone, opd, temperature, entropy_gradient=rlvr.entropy_coef != 0)

    def __call__(self, hidden_NH: Tensor, pack: Pack, batch: Microbatch) -> tuple[Tensor, Sums]:
        """Nothing here waits for the device: sums stay tensors until the end of the step."""
        rows = Rows.of(batch, hidden_NH)
        scores = self.scores(rows, hidden_NH, pack.target_ids)
        tokens = self._tokens(rows, scores.logprobs_N, scores.teacher_logprobs_N)
        losses, columns, weights = self._policy_gradient(rows, tokens)
        distance = kl_estimate(tokens.policy, tokens.old + tokens.delta, "k3").detach()
        if any(dense := [s.signal is not None and s.signal.kind != "sampled" for s in rows.samples]):
            is_dense = rows.marked(dense)
            losses = torch.where(is_dense, tokens.beta * scores.divergence_N, losses)
            distance = torch.where(is_dense, scores.divergence_N, distance)
        losses, regulariser = self._regularise(rows, tokens, losses, scores.entropy_N)
        weighted = losses * rows.weights_N.masked_fill(tokens.dropped, 0)
        sums = self._expert_sums(rows, columns | regulariser, weighted)
        sums |= self._edge_sums(rows, tokens, distance, weights)
        return weighted.sum(), sums

    def _tokens(self, rows: Rows, policy: Tensor, teacher: Tensor) -> _Tokens:
        detached = policy.detach()
        old = rows.joined([s.old_logprobs for s in rows.samples], detached)
        backbone = rows.joined([s.backbone_logprobs for s in rows.samples], detached)
        native = rows.marked([s.is_native for s in rows.samples])
        teacher = torch.where(native, old, teacher)
        beta = rows.spread([0.0 if s.edge is None else s.edge.beta for s in rows.samples])
        crossing, kept = distillation_advantages(teacher, old, beta, self.opd.delta_guard)
        advantage = torch.where(native, rows.spread([s.advantage for s in rows.samples]), crossing)
        for sample, delta in zip(rows.samples, (teacher - old).split(rows.lengths)):
            sample.delta = None if sample.is_native else delta
        return _Tokens(native, policy, old, backbone, teacher - old, beta, advantage, ~kept)

    def _policy_gradient(self, rows: Rows, tokens: _Tokens) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Surrogate losses [N] with their importance correction, columns to record, and the weights [N] of tokens that
        another policy sampled (None where there are none)."""
        config = self.rlvr
        gap = mismatch(tokens.old, rows.engine_logprobs_N)
        columns = {"mismatch_kl": gap["kl"]}
        if self.loss_function is None:
            losses, clip = surrogate(config.loss, tokens.policy, tokens.old, tokens.advantage, rows.sample_N,
                                     config.clip_low, config.clip_high, config.dual_clip, loss_mask_T=rows.mask_N)
            columns |= {"ratio_mean": clip["ratio"], "clip_fraction": clip["clipped"] + clip["dual_clipped"]}
        else:
            losses = self._own_loss(rows, tokens)
            columns["ratio_mean"] = torch.exp(tokens.policy.detach() - tokens.old)
        corrections, reused = None, None
        if config.importance_correction != "none":
            corrections = importance_weights(tokens.old, rows.engine_logprobs_N, config.importance_correction,
                                             config.importance_cap)
            columns["importance_clipped"] = corrections != gap["weight"]
        off_policy = [s.is_off_policy for s in rows.samples]
        if any(off_policy):
            reused = importance_weights(tokens.old, rows.engine_logprobs_N, "truncated", self.opd.importance_cap)
            others = torch.ones_like(reused) if corrections is None else corrections
            corrections = torch.where(rows.marked(off_policy), reused, others)
        return losses if corrections is None else losses * corrections, columns, reused

    def _own_loss(self, rows: Rows, tokens: _Tokens) -> Tensor:
        try:
            losses = self.loss_function(tokens.policy, tokens.old, tokens.advantage, rows.sample_N, rows.mask_N)
        except Exception as error:
            raise UserError(f"rlvr.loss_function: {type(error).__name__}: {error}; it must take (policy_logprobs_T, "
                            "old_logprobs_T, advantages_T, sequence_ids_T, loss_mask_T); mend it (copd --traceback "
                            "shows where)") from error
        if not isinstance(losses, Tensor) or losses.shape != tokens.policy.shape:
            given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(f"rlvr.loss_function: it returned {given} for {len(tokens.policy)} tokens; a tensor with "
                            "one loss per token is needed; leave masking and reduction to the trainer")
        return losses.masked_fill(~rows.mask_N, 0)

    def _regularise(self, rows: Rows, tokens: _Tokens, losses: Tensor,
                    entropy_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the KL penalty and the entropy bonus to native tokens; columns to record."""
        columns = {"entropy": entropy_N, "kl_backbone": kl_estimate(tokens.policy, tokens.backbone, "k3")}
        if self.rlvr.kl_coef:
            reference = tokens.backbone
            if self.rlvr.kl_reference != "backbone":
                reference = rows.joined([s.reference_logprobs for s in rows.samples], tokens.policy.detach())
            penalty = kl_estimate(tokens.policy, reference, self.rlvr.kl_estimator)
            losses = losses + self.rlvr.kl_coef * penalty * tokens.native
            columns["kl_penalty"] = penalty
        if self.rlvr.entropy_coef:
            losses = losses - self.rlvr.entropy_coef * entropy_N * tokens.native
        return losses, columns

    def _expert_sums(self, rows: Rows, columns: Mapping[str, Tensor], weighted: Tensor) -> Sums:
        """Means over each expert's native tokens, and its loss, which only adds up (weight 0)."""
        experts = list(dict.fromkeys(s.expert for s in rows.samples))
        native = [experts.index(s.expert) if s.is_native else None for s in rows.samples]
        crossing = [None if s.is_native else experts.index(s.expert) for s in rows.samples]
        means = rows.sums(columns, native, len(experts))
        rlvr = rows.sums({"loss": weighted}, native, len(experts))["loss"]
        opd = rows.sums({"loss": weighted}, crossing, len(experts))["loss"]
        updates = self.rlvr.minibatches_per_rollout * self.rlvr.epochs
        sums: Sums = {}
        counts = _tokens_per_group(rows, native, len(experts))
        for place, expert in enumerate(experts):
            sums |= {f"{expert}/{name}": (column[place], counts[place]) for name, column in means.items()}
            sums[f"{expert}/loss"] = ((rlvr[place] + opd[place]) / updates, 0.0)
            sums[f"{expert}/loss_rlvr"] = (rlvr[place] / updates, 0.0)
            if place in crossing:
                sums[f"{expert}/loss_opd"] = (opd[place] / updates, 0.0)
        return sums

    def _edge_sums(self, rows: Rows, tokens: _Tokens, distance: Tensor, reused: Tensor | None) -> Sums:
        """Means over the tokens of each edge; ``distance`` [N] estimates KL(student || teacher), ``reused`` [N] weighs
        tokens that another policy sampled."""
        edges = list(dict.fromkeys(s.edge for s in rows.samples if s.edge is not None))
        if not edges:
            return {}
        of = [None if s.edge is None else edges.index(s.edge) for s in rows.samples]
        columns = {"delta_mean": tokens.delta, "dropped": tokens.dropped,
                   "beta_delta_abs": (tokens.beta * tokens.delta).abs(), "teacher_kl": distance}
        sums = _edge_means(rows, columns, edges, of)
        if reused is not None:
            of = [number if s.is_off_policy else None for s, number in zip(rows.samples, of)]
            columns = {"reuse_weight": reused, "reuse_clipped": reused >= self.opd.importance_cap}
            sums |= {name: own for name, own in _edge_means(rows, columns, edges, of).items() if own[1]}
        return sums


def _edge_means(rows: Rows, columns: Mapping[str, Tensor], edges: Sequence[Edge],
                edge_of: Sequence[int | None]) -> Sums:
    """Sums and numbers of tokens of each column over the samples of each edge."""
    sums, counts = rows.sums(columns, edge_of, len(edges)), _tokens_per_group(rows, edge_of, len(edges))
    return {edge_name(edge.teacher, edge.student, name): (column[place], counts[place])
            for name, column in sums.items() for place, edge in enumerate(edges)}


def _tokens_per_group(rows: Rows, group_of: Sequence[int | None], groups: int) -> list[float]:
    """Loss tokens of the samples in each group, counted on the host."""
    counts = [0.0] * groups
    for sample, group in zip(rows.samples, group_of):
        if group is not None:
            counts[group] += float(sample.loss_mask.sum())
    return counts
