"""verl's ``custom_reward_function`` for our job: 0.9 accuracy + 0.1 format, graded by our verifiers."""
from __future__ import annotations

import json
from typing import Any

from copd_megatron.tasks.answer import parse_verifier, score_answer


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None,
                  **_: Any) -> dict[str, float]:
    """{"score", "acc"} of one answer; "acc" is what ``val-core/{data_source}/acc/mean@n`` averages."""
    parts = score_answer(parse_verifier(json.loads(extra_info["verifier"])), solution_str, json.loads(ground_truth))
    return {"score": 0.9 * parts["accuracy"] + 0.1 * parts["format"], "acc": parts["accuracy"]}
