"""Three text experts from JSONL files on Qwen3-0.6B or Qwen3-1.7B, on one 80 GB GPU.

    copd train examples/qwen3_text_experts.py --run-dir runs/qwen3
    copd train examples/qwen3_text_experts.py --set model.path=backbones/qwen3-1.7b --run-dir runs/qwen3_1.7b

The backbone is a local Hugging Face directory, ``backbones/qwen3-0.6b``. Each expert reads ``data/NAME.jsonl``, rows
{"prompt": "...", "answer": "..."}; a tenth of the rows is held out. What is needed, checked without any of it:

    copd train examples/qwen3_text_experts.py --dry-run --set model.path=examples/configs/qwen3-0.6b
"""
from pathlib import Path

from copd_megatron.config.run import RunConfig

DATA = Path(__file__).resolve().parents[1] / "data"
VERIFIERS = {"maths": "math", "science": "choice", "facts": "exact"}


def recipe() -> RunConfig:
    """Maths is the hub; the default LoRA and learning rate."""
    return RunConfig(
        model={"path": "../backbones/qwen3-0.6b"},
        experts={name: {"task": "copd_megatron.tasks.dataset:DatasetTask",
                        "task_args": {"path": str(DATA / f"{name}.jsonl"), "verifier": verifier,
                                      "instruction": "Put the final answer in \\boxed{}."}}
                 for name, verifier in VERIFIERS.items()},
        rollout={"prompts_per_step": 64, "group_size": 8, "max_prompt_tokens": 2048, "max_completion_tokens": 2048,
                 "decode_lanes": 256},
        schedule={"cycles": 20, "rl_steps": 3, "opd_steps": 2},
        exchange={"topology": "hub", "hub": "maths"},
        evaluation={"every": 20, "prompts": 128, "final_prompts": 500},
        checkpoint={"every": 10},
    )
