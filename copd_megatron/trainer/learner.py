"""The update: losses of native and cross samples on the last stage, one optimizer step per expert.

Native (RLVR): clipped surrogate with the group advantage. Cross (OPD, ``sampled``): the same surrogate with
advantage beta (log pi_teacher - log pi_student), both detached (Gu et al. 2026, arXiv:2604.27083); ``topk`` and
``full``: beta times the divergence. Both make ONE update: all samples of an expert are reduced together.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.losses import OpdConfig, RlvrConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.losses.importance import importance_weights, mismatch
from copd_megatron.losses.kl import kl_estimate
from copd_megatron.losses.policy_gradient import surrogate
from copd_megatron.losses.reduction import token_weights
from copd_megatron.losses.topk_kl import topk_divergence
from copd_megatron.model.shared_prefix import Pack
from copd_megatron.model.vocab_parallel import full_divergence, score
from copd_megatron.parallel.collectives import reduce_scalars
from copd_megatron.parallel.groups import Groups
from copd_megatron.trainer.batching import Lane, Microbatch, Sample, make_microbatches
from copd_megatron.trainer.forward import Runner
from copd_megatron.trainer.optimizer import ExpertOptimizer

Sums = dict[str, tuple[Tensor | float, float]]
"""Metric name -> (sum, weight); the metric is the ratio of both, added up over microbatches and ranks."""


@dataclass
class _Rows:
    """The token rows of one microbatch, [N] each, aligned with the pack's scored rows."""

    samples: Sequence[Sample]
    lengths: Tensor
    sample_of: Tensor
    weights: Tensor
    engine_logprobs: Tensor
    mask: Tensor

    @classmethod
    def of(cls, batch: Microbatch, like: Tensor) -> _Rows:
        samples = [lane.sample for lane in batch.lanes]
        lengths = torch.tensor([len(s.completion.token_ids) for s in samples], device=like.device)
        flat = lambda parts, dtype: torch.tensor([x for p in parts for x in p], dtype=dtype, device=like.device)  # noqa: E731
        return cls(samples, lengths, torch.arange(len(samples), device=like.device).repeat_interleave(lengths),
                   flat([s.weights.tolist() for s in samples], like.dtype),
                   flat([s.completion.logprobs for s in samples], like.dtype),
                   flat([s.completion.loss_mask for s in samples], torch.bool))

    def per_sample(self, values: Sequence[float], like: Tensor) -> Tensor:
        """One value per sample, spread over its rows."""
        return torch.tensor(values, dtype=like.dtype, device=like.device)[self.sample_of]

    def gather(self, tensors: Sequence[Tensor | None], default: Tensor) -> Tensor:
        """Per-sample [R] tensors joined; ``default``'s rows where there is none."""
        pieces = default.split(self.lengths.tolist())
        return torch.cat([p if t is None else t.to(p.dtype) for t, p in zip(tensors, pieces)])


class Learner:
    """Turns samples into one update (or several, with minibatches and epochs) of every hosted expert."""

    def __init__(self, runner: Runner, groups: Groups, optimizers: Mapping[str, ExpertOptimizer],
                 rlvr: RlvrConfig, opd: OpdConfig, rollout: RolloutConfig, microbatch_tokens: int):
        self.runner, self.groups, self.optimizers = runner, groups, optimizers
        self.rlvr, self.opd, self.rollout = rlvr, opd, rollout
        self.microbatch_tokens = microbatch_tokens

    @property
    def one_update(self) -> bool:
        """Whether the old policy is the one being differentiated, so that every ratio is exactly 1."""
        return self.rlvr.minibatches_per_rollout * self.rlvr.epochs == 1

    def update(self, samples: Sequence[Sample]) -> Sums:
        """All updates of one step. Every rank of every replica that hosts the experts calls it."""
        sums: Sums = {}
        count = self.rlvr.minibatches_per_rollout
        for _ in range(self.rlvr.epochs):
            for number in range(count):
                part = [s for s in samples if s.slot * count // max(1, s.slots) == number]
                add_sums(sums, self._one_update(part))
        return sums

    def _one_update(self, samples: Sequence[Sample]) -> Sums:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self._weigh(samples)
        batches = make_microbatches([Lane(s, s.expert) for s in samples], self.runner.backbone.rules,
                                    self.microbatch_tokens)
        sums: Sums = {}
        for result in self.runner.train(batches, self._at_end):
            add_sums(sums, result)
        for expert, optimizer in self.optimizers.items():
            for name, value in optimizer.step().items():
                sums[f"{expert}/{name}"] = (value, 1.0)
        return sums

    def _weigh(self, samples: Sequence[Sample]) -> None:
        """Token weights from the totals over all of an expert's replicas."""
        by_expert = defaultdict(list)
        for sample in samples:
            by_expert[sample.expert].append(sample)
        for expert in self.optimizers:
            own = by_expert[expert]
            masks = [torch.tensor(s.completion.loss_mask, dtype=torch.bool) for s in own]
            totals = reduce_scalars({"sequences": len(own), "tokens": sum(int(m.sum()) for m in masks)},
                                    self.groups.adapter[expert])
            if not own:
                continue
            lengths = torch.tensor([len(m) for m in masks])
            weights = token_weights(lengths, self.rlvr.reduction, int(totals["sequences"]), int(totals["tokens"]),
                                    self.rollout.max_completion_tokens, loss_mask_T=torch.cat(masks),
                                    dtype=torch.float64)
            for sample, part in zip(own, weights.split(lengths.tolist())):
                sample.weights = part.numpy()

    def _at_end(self, hidden: Tensor, pack: Pack, batch: Microbatch) -> tuple[Tensor | None, Sums]:
        rows = _Rows.of(batch, hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32)))
        at_ids = _teacher_ids(rows, hidden)
        head, temperature = self.runner.backbone.head, self.rollout.temperature
        scores = score(hidden, head, pack.target_ids, temperature=temperature, entropy=True, at_ids_TK=at_ids)
        logprobs = scores.logprobs_T
        old = rows.gather([s.old_logprobs for s in rows.samples], logprobs.detach())
        delta = rows.gather([None if s.signal is None else s.signal.logprobs_T for s in rows.samples], old) - old
        native = rows.per_sample([s.is_native for s in rows.samples], logprobs).bool()
        beta = rows.per_sample([0.0 if s.edge is None else s.edge.beta for s in rows.samples], logprobs)
        advantage = torch.where(native, rows.per_sample([s.advantage for s in rows.samples], logprobs), beta * delta)
        losses, clip = surrogate(self.rlvr.loss, logprobs, old, advantage, rows.sample_of, self.rlvr.clip_low,
                                 self.rlvr.clip_high, self.rlvr.dual_clip, loss_mask_T=rows.mask)
        correction = importance_weights(old, rows.engine_logprobs, self.rlvr.importance_correction,
                                        self.rlvr.importance_cap)
        losses = losses * correction
        distance = self._dense_divergence(rows, hidden, scores.at_logprobs_TK)
        dense = rows.per_sample([s.signal is not None and s.signal.kind != "sampled" for s in rows.samples],
                                logprobs).bool()
        if distance is not None:
            losses = torch.where(dense, beta * distance, losses)
        weights = rows.weights
        dropped = torch.zeros_like(native)
        if self.opd.delta_guard is not None:
            dropped = ~native & (delta.abs() >= self.opd.delta_guard)
            weights = weights.masked_fill(dropped, 0)
        backbone = rows.gather([s.backbone_logprobs for s in rows.samples], logprobs.detach())
        losses, penalty = self._regularise(losses, rows, native, logprobs, scores.entropy_T, backbone)
        loss = (weights * losses).sum()
        gap = mismatch(old, rows.engine_logprobs)["kl"]
        columns = {"entropy": scores.entropy_T, "ratio_mean": clip["ratio"], "clip_fraction": clip["clipped"],
                   "mismatch_kl": gap, "kl_backbone": kl_estimate(logprobs, backbone, "k3"),
                   "importance_clipped": (correction != mismatch(old, rows.engine_logprobs)["weight"]).to(gap.dtype)
                   if self.rlvr.importance_correction != "none" else None, "kl_penalty": penalty}
        sums = _expert_sums(rows, native, columns, weights * losses)
        _edge_sums(sums, rows, delta, dropped, distance, logprobs)
        return loss, sums

    def _regularise(self, losses: Tensor, rows: _Rows, native: Tensor, logprobs: Tensor, entropy: Tensor,
                    backbone: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the KL penalty and the entropy bonus to native rows."""
        penalty = None
        if self.rlvr.kl_coef:
            reference = backbone if self.rlvr.kl_reference == "backbone" else rows.gather(
                [s.reference_logprobs for s in rows.samples], logprobs.detach())
            penalty = kl_estimate(logprobs, reference, self.rlvr.kl_estimator)
            losses = losses + native * self.rlvr.kl_coef * penalty
        if self.rlvr.entropy_coef:
            losses = losses - native * self.rlvr.entropy_coef * entropy
        return losses, penalty

    def _dense_divergence(self, rows: _Rows, hidden: Tensor, at_logprobs: Tensor | None) -> Tensor | None:
        """[N] divergence from the teacher for top-k and full signals, 0 on other rows; None without any."""
        kinds = {s.signal.kind for s in rows.samples if s.signal is not None} - {"sampled"}
        if not kinds:
            return None
        out = hidden.new_zeros(len(hidden), dtype=rows.weights.dtype)
        pieces = torch.arange(len(hidden), device=hidden.device).split(rows.lengths.tolist())
        for kind in sorted(kinds):
            chosen = [(s, i) for s, i in zip(rows.samples, pieces) if s.signal is not None and s.signal.kind == kind]
            index = torch.cat([i for _, i in chosen])
            if kind == "topk":
                value = topk_divergence(at_logprobs[index], torch.cat([s.signal.topk_logprobs_TK for s, _ in chosen]),
                                        torch.cat([s.signal.log_tail_T for s, _ in chosen]),
                                        self.opd.divergence, self.opd.jsd_weight)
            else:
                value = full_divergence(hidden[index], torch.cat([s.signal.hidden_TH for s, _ in chosen]),
                                        self.runner.backbone.head, self.opd.divergence,
                                        temperature=self.rollout.temperature, jsd_weight=self.opd.jsd_weight)
            out = out.index_add(0, index, value.to(out.dtype))
        return out


def _teacher_ids(rows: _Rows, hidden: Tensor) -> Tensor | None:
    """[N, K] ids at which the student is scored; rows without a top-k signal repeat id 0, unused."""
    widths = {s.signal.topk_ids_TK.shape[1] for s in rows.samples
              if s.signal is not None and s.signal.kind == "topk"}
    if not widths:
        return None
    pieces = [s.signal.topk_ids_TK.long() if s.signal is not None and s.signal.kind == "topk"
              else torch.zeros(n, max(widths), dtype=torch.int64, device=hidden.device)
              for s, n in zip(rows.samples, rows.lengths.tolist())]
    return torch.cat(pieces)


def _expert_sums(rows: _Rows, native: Tensor, columns: Mapping[str, Tensor | None], weighted: Tensor) -> Sums:
    """Sums over each expert's native tokens, and its loss."""
    sums: Sums = {}
    for expert in dict.fromkeys(s.expert for s in rows.samples):
        own = rows.per_sample([s.expert == expert for s in rows.samples], weighted).bool()
        counted = own & native & rows.mask
        weight = float(sum(sum(s.completion.loss_mask) for s in rows.samples if s.expert == expert and s.is_native))
        for name, column in columns.items():
            if column is not None:
                sums[f"{expert}/{name}"] = ((column.detach() * counted).sum(), weight)
        # A sum, not a mean: weight 0 marks metrics that only add up.
        sums[f"{expert}/loss"] = ((weighted.detach() * own).sum(), 0.0)
        sums[f"{expert}/loss_rlvr"] = ((weighted.detach() * (own & native)).sum(), 0.0)
        if any(not s.is_native for s in rows.samples if s.expert == expert):
            sums[f"{expert}/loss_opd"] = ((weighted.detach() * (own & ~native)).sum(), 0.0)
    return sums


def _edge_sums(sums: Sums, rows: _Rows, delta: Tensor, dropped: Tensor, distance: Tensor | None,
               logprobs: Tensor) -> None:
    """Sums per edge, and each cross sample's delta for the record."""
    lengths = rows.lengths.tolist()
    estimate = distance if distance is not None else kl_estimate(logprobs, logprobs.detach() + delta, "k3")
    for sample, own, drop, kl in zip(rows.samples, delta.detach().split(lengths), dropped.split(lengths),
                                     estimate.detach().split(lengths)):
        if sample.edge is None:
            continue
        sample.delta = own
        name = f"edge/{sample.edge.teacher}->{sample.edge.student}"
        count = float(len(own))
        add_sums(sums, {f"{name}/delta_mean": (own.sum(), count), f"{name}/dropped": (drop.sum(), count),
                    f"{name}/beta_delta_abs": ((sample.edge.beta * own).abs().sum(), count),
                    f"{name}/teacher_kl": (kl.sum(), count)})


def add_sums(sums: Sums, more: Mapping[str, tuple[Tensor | float, float]]) -> None:
    """Add ``more`` to ``sums`` in place."""
    for name, (value, weight) in more.items():
        old, total = sums.get(name, (0.0, 0.0))
        sums[name] = (old + value, total + weight)
