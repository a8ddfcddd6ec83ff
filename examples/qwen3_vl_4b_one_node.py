"""Text, image and video experts on Qwen3-VL-4B-Instruct on one node of 8 H100 GPUs: shorter answers, smaller batches.

    torchrun --nproc-per-node 8 -m copd_megatron train examples/qwen3_vl_4b_one_node.py --run-dir runs/qwen3_vl_node

Backbone and data as in ``qwen3_vl_4b_copd.py``. What is needed, checked without any of it:

    copd train examples/qwen3_vl_4b_one_node.py --dry-run --world-size 8 \\
        --set model.path=examples/configs/qwen3-vl-4b-instruct
"""
from qwen3_vl_4b_copd import experts

from copd_megatron.config.run import RunConfig


def recipe() -> RunConfig:
    """4,096 tokens in and 2,048 out, 64 prompts per step, the top-k signal; else as the paper."""
    return RunConfig(
        model={"path": "../backbones/qwen3-vl-4b-instruct", "recompute": "full"},
        experts=experts(),
        rollout={"prompts_per_step": 64, "group_size": 8, "max_prompt_tokens": 4096, "max_completion_tokens": 2048,
                 "decode_lanes": 128},
        schedule={"cycles": 20, "rl_steps": 3, "opd_steps": 2},
        exchange={"topology": "hub", "hub": "text"},
        opd={"signal": "topk"},
        evaluation={"every": 25, "prompts": 128, "final_prompts": 1000},
        checkpoint={"every": 5},
    )
