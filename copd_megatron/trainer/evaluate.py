"""``copd eval``: the policies of a finished or running run, or a recipe's backbone, on held-out prompts."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from copd_megatron.config.run import RunConfig
from copd_megatron.trainer.build import build_policies, run_state
from copd_megatron.trainer.evaluator import evaluation_rows, mode_of
from copd_megatron.trainer.merge import all_policies


def evaluate_run(config: RunConfig, run_dir: Path | None) -> dict[str, Any]:
    """Evaluate the newest save of a run: backbone, every expert, merged; without a run the backbone alone.

    Asks ``evaluation.final_prompts`` per domain. Every rank calls it and gets the same.

    Returns:
        {"step", "mode", "samples", "policies": policy -> domain -> row} as a line of evaluations.jsonl.

    Raises:
        UserError: what ``build_policies`` refuses, or the run has no complete save that fits ``config``.
    """
    policies = build_policies(config)
    evaluator, experts = policies.evaluator(config), list(config.experts)
    prompts, step = config.evaluation.final_prompts, 0
    if run_dir is not None:
        state, checkpoints = run_state(config, run_dir, policies)
        checkpoints.load_latest(state)
        step = state.step
    answers = evaluator.evaluate([None], experts, prompts)
    if run_dir is not None:
        with all_policies(policies.backbone.bank, policies.groups, experts, config.merge) as names:
            answers |= evaluator.evaluate(names, experts, prompts)
    policies.groups.destroy()
    return {"step": step, "mode": mode_of(config.evaluation), "samples": config.evaluation.samples,
            "policies": evaluation_rows(answers)}
