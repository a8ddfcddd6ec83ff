"""CoPD as the paper set it up: text, image and video experts on Qwen3-VL-4B-Instruct, on 32 H100 GPUs.

    copd train examples/qwen3_vl_4b_copd.py --run-dir runs/qwen3_vl       # by torchrun or srun: docs/recipes.md

Gu et al. 2026, arXiv:2604.27083: 16,384 tokens in and out, 256 prompts per step, G = 8, clip range 0.2 and 0.28,
rewards 0.9 accuracy + 0.1 format, three RLVR steps to two OPD steps, text as the hub, the sampled-token signal. Not the
paper's: LoRA instead of full parameters, its learning rate, and 20 cycles (the paper gives no number).

``data/text.jsonl``, ``data/image.jsonl`` and ``data/video.jsonl`` are yours: rows with "prompt" (or "messages"),
"images" or "videos" (paths) and "answer". What is needed, checked without any of it:

    copd train examples/qwen3_vl_4b_copd.py --dry-run --world-size 32 \\
        --set model.path=examples/configs/qwen3-vl-4b-instruct
"""
from pathlib import Path

from copd_megatron.config.run import RunConfig

DATA = Path(__file__).resolve().parents[1] / "data"
DOMAINS = ("text", "image", "video")


def experts() -> dict[str, dict]:
    """One per domain, each with its file."""
    return {name: {"task": "copd_megatron.tasks.dataset:DatasetTask",
                   "task_args": {"path": str(DATA / f"{name}.jsonl"), "verifier": "math",
                                 "instruction": "Put the final answer in \\boxed{}."}}
            for name in DOMAINS}


def recipe() -> RunConfig:
    """The paper's set-up, where it gives one."""
    return RunConfig(
        model={"path": "../backbones/qwen3-vl-4b-instruct", "recompute": "full"},
        experts=experts(),
        parallel={"tensor": 2, "sequence_parallel": True},
        rollout={"prompts_per_step": 256, "group_size": 8, "max_prompt_tokens": 16384,
                 "max_completion_tokens": 16384, "decode_lanes": 40},
        optimizer={"microbatch_tokens": 32768},
        schedule={"cycles": 20, "rl_steps": 3, "opd_steps": 2},
        exchange={"topology": "hub", "hub": "text"},
        evaluation={"every": 25, "prompts": 128, "final_prompts": 1000},
        checkpoint={"every": 5},
    )
