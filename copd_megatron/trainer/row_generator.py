"""``copd generate``: completions of given prompts through the embedded engine.

What is drawn depends on the seed and the number of the row alone, never on batches, layout or where a run was
interrupted.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.rollout.megatron_engine import MegatronEngine
from copd_megatron.tasks.row_format import FieldError
from copd_megatron.trainer.row_batches import encoded_batches
from copd_megatron.trainer.row_prompts import InputRow, RowPrompts
from copd_megatron.trainer.row_scorer import rounded
from copd_megatron.trainer.single_policy import SinglePolicy
from copd_megatron.types import Completion, Prompt


class RowGenerator:
    """Answers rows on this rank's replica."""

    def __init__(self, policy: SinglePolicy, prompts: RowPrompts, params: SamplingParams, samples: int, seed: int,
                 lanes: int, max_prompt_tokens: int):
        """
        Args:
            samples: completions of a row.
            lanes: completions that decode together.
            max_prompt_tokens: longer prompts are errors of their rows.
        """
        self.policy, self.prompts, self.params, self.samples = policy, prompts, params, samples
        self.lanes, self.max_prompt_tokens = lanes, max_prompt_tokens
        config = RolloutConfig(decode_lanes=lanes, max_prompt_tokens=max_prompt_tokens,
                               max_completion_tokens=params.max_tokens)
        self.engine = MegatronEngine(policy.backbone, policy.groups, config, seed)

    def __call__(self, rows: Sequence[InputRow]) -> dict[int, dict[str, Any]]:
        """Number -> output row. Every rank of the replica calls it; each row is in the answer of some rank."""
        found: dict[int, dict[str, Any]] = {}
        per_batch = max(1, self.lanes // self.samples)
        for start in range(0, len(rows), per_batch):
            for batch in encoded_batches(rows[start:start + per_batch], self.prompts, self.policy.groups,
                                         self.lanes * self.max_prompt_tokens, self._check, lambda *_: 0, found):
                requests = [Request(prompt, self.policy.name, self.samples, self.params, (number,))
                            for number, prompt, _ in batch]
                answers = self.engine.generate(requests, self.policy.visual)
                if self.policy.groups.is_replica_main:
                    found |= {number: {"completions": [self._completion(c) for c in group]}
                              for (number, _, _), group in zip(batch, answers)}
        return found

    def _check(self, row: InputRow, prompt: Prompt) -> None:
        if len(prompt.token_ids) > self.max_prompt_tokens:
            raise FieldError("prompt", f"{len(prompt.token_ids)} tokens; allowed are {self.max_prompt_tokens} "
                                       "(--max-prompt-tokens)")
        self.prompts.check_length(prompt, self.params.max_tokens)

    def _completion(self, completion: Completion) -> dict[str, Any]:
        return {"text": self.prompts.encoder.decode(completion.token_ids), "token_ids": completion.token_ids,
                "logprobs": rounded(completion.logprobs), "sum_logprob": sum(completion.logprobs),
                "finish": completion.finish}
