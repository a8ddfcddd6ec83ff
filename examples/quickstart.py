"""Text, image and video experts teach each other on a tiny vision-language backbone: minutes on two CPU cores.

    copd train examples/quickstart.py --run-dir runs/quickstart

The backbone (examples/tiny_backbone, made by tools/make_tiny_backbone.py: Qwen3-VL's architecture at 1.2 million
parameters) answers about half of each domain's held-out questions. Every expert gains on its own domain by
reinforcement learning and keeps the others by on-policy distillation from the hub, text; the merged policy gains on
all three.
"""
from copd_megatron.config.run import RunConfig


def recipe() -> RunConfig:
    """The run of ``bash tools/quickstart.sh``."""
    return RunConfig(
        model={"path": "tiny_backbone", "dtype": "float32"},
        experts={
            "text": {"task": "copd_megatron.tasks.text:TextTask",
                     "task_args": {"kinds": ["difference"], "levels": [1]}},
            "image": {"task": "copd_megatron.tasks.image:ImageTask", "task_args": {"kinds": ["compare"]}},
            "video": {"task": "copd_megatron.tasks.video:VideoTask", "task_args": {"kinds": ["direction"]}},
        },
        # A tiny model wants far larger steps than the defaults, which are for billions of parameters.
        adapter={"rank": 16, "alpha": 32.0},
        optimizer={"lr": 2e-3, "warmup_steps": 5, "betas": (0.9, 0.95)},
        rollout={"prompts_per_step": 32, "group_size": 8, "max_completion_tokens": 8},
        schedule={"cycles": 20, "rl_steps": 3, "opd_steps": 2},
        exchange={"topology": "hub", "hub": "text"},
        opd={"signal": "topk", "topk": 16},
        evaluation={"every": 20, "prompts": 128, "final_prompts": 1024},
        checkpoint={"every": 25},
        metrics={"overlap_tokens": 128},
    )
