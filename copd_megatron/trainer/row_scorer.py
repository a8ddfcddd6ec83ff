"""``copd score``: log-probs of given completions, rows that share a prompt in one pack.

    log p(y_t | prompt, y_<t)    natural log, temperature 1, float32 (float64 under a float64 backbone)
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from copd_megatron.model.shared_prefix import Pack
from copd_megatron.model.vocab_parallel import score
from copd_megatron.trainer.batching import Lane, Microbatch, Sample, make_microbatches
from copd_megatron.trainer.row_batches import encoded_batches
from copd_megatron.trainer.row_prompts import InputRow, RowPrompts
from copd_megatron.trainer.single_policy import ADAPTER, SinglePolicy
from copd_megatron.types import Completion, Segment, UserError

MICROBATCHES = 4
"""Of a batch of rows: enough for neighbours to meet, and for pipeline stages to be busy."""


class RowScorer:
    """Scores rows on this rank's replica."""

    def __init__(self, policy: SinglePolicy, prompts: RowPrompts, batch_tokens: int, top_k: int = 0):
        """
        Args:
            batch_tokens: of one microbatch, prompts that rows share counted once.
            top_k: also the k most likely tokens at every position of the completion.

        Raises:
            UserError: ``top_k`` above the size of the vocabulary.
        """
        if top_k > policy.backbone.spec.vocab_size:
            raise UserError(f"--top-k: {top_k}; the vocabulary has {policy.backbone.spec.vocab_size} tokens; lower it")
        self.policy, self.prompts, self.batch_tokens, self.top_k = policy, prompts, batch_tokens, top_k

    def __call__(self, rows: Sequence[InputRow]) -> dict[int, dict[str, Any]]:
        """Number -> output row. Every rank of the replica calls it; each row is in the answer of some rank."""
        found: dict[int, dict[str, Any]] = {}
        for batch in encoded_batches(rows, self.prompts, self.policy.groups, MICROBATCHES * self.batch_tokens,
                                     self.prompts.completion, lambda prompt, ids: len(ids), found):
            lanes = {}
            for number, prompt, token_ids in batch:
                if token_ids:
                    completion = Completion(prompt, self.policy.name, 0, [Segment(token_ids)])
                    lanes[Lane(Sample(completion, ADAPTER), self.policy.name)] = number
                elif self.policy.groups.is_replica_main:
                    empty = torch.zeros(0, self.top_k)
                    found[number] = self._row(torch.zeros(0), empty, empty, ())
            found |= {lanes[lane]: row for lane, row in self._score(list(lanes)).items()}
        return found

    def _score(self, lanes: Sequence[Lane]) -> dict[Lane, dict[str, Any]]:
        """Lane -> output row, on the last stage."""
        runner = self.policy.runner
        batches = make_microbatches(lanes, runner.backbone.rules, self.batch_tokens)

        def at_end(hidden: Tensor, pack: Pack, batch: Microbatch):
            scores = score(hidden, runner.backbone.head, pack.target_ids, topk=self.top_k)
            lengths = list(pack.leaf_lengths)
            ids, values = scores.topk_ids_TK, scores.topk_logprobs_TK
            empty = hidden.new_zeros(len(hidden), 0)
            parts = [column.cpu().split(lengths) for column in (
                scores.logprobs_T, empty if ids is None else ids, empty if values is None else values)]
            return None, {lane: self._row(*row, lane.sample.completion.token_ids)
                          for lane, row in zip(batch.lanes, zip(*parts))}

        return {lane: row for part in runner.score(batches, at_end) for lane, row in part.items()}

    def _row(self, logprobs_R: Tensor, topk_ids_RK: Tensor, topk_logprobs_RK: Tensor,
             token_ids: Sequence[int]) -> dict[str, Any]:
        if not bool(torch.isfinite(logprobs_R).all()):
            return {"error": "the model gives no finite log-probs here; its weights or its dtype are unfit"}
        row = {"token_ids": list(token_ids), "logprobs": rounded(logprobs_R),
               "sum_logprob": float(logprobs_R.double().sum())}
        if self.top_k:
            row |= {"topk_ids": topk_ids_RK.long().tolist(), "topk_logprobs": [rounded(r) for r in topk_logprobs_RK]}
        return row


def rounded(values: Tensor | Sequence[float]) -> list[float]:
    """Numbers with the 9 digits that tell float32 values apart; as JSON they are half as long."""
    return [float(f"{value:.9g}") for value in (values.tolist() if isinstance(values, Tensor) else values)]
