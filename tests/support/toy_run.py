"""A tiny CoPD run on a random model, the same under every layout: what trainer tests compare."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import parallel_state

from copd_megatron.checkpoint.peft import full_factors
from copd_megatron.config.run import RunConfig
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.seeding import generator_for
from copd_megatron.trainer.build import build_trainer
from copd_megatron.trainer.trainer import Trainer
from support.tiny_models import VISUAL_FAMILIES, tiny_model
from support.toy_tasks import LetterTask

LETTERS = {"text": ("a", None), "image": ("b", "image"), "video": ("c", "video"), "audio": ("d", None),
           "chess": ("e", None)}


def toy_config(family: str = "qwen3_vl", experts=("text", "image", "video"), task=LetterTask, **sections) -> RunConfig:
    """One RLVR and one OPD step of a float64 run; ``sections`` override, e.g. ``adapter={"scope": "completion"}``.

    ``task``: a subclass of LetterTask that every expert gets. Experts of a text family all read text.
    """
    visual = family in VISUAL_FAMILIES
    defaults = {
        "model": {"path": str(tiny_model(family)), "dtype": "float64"},
        "experts": {e: {"task": task, "task_args": {"letter": LETTERS[e][0],
                                                          "media": LETTERS[e][1] if visual else None}}
                    for e in experts},
        "adapter": {"rank": 3, "alpha": 6.0},
        "rollout": {"prompts_per_step": 3, "group_size": 3, "max_completion_tokens": 4},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2, "microbatch_tokens": 200},
        "schedule": {"cycles": 1, "rl_steps": 1, "opd_steps": 1},
        "evaluation": {"prompts": 3, "final_prompts": 3},
        "metrics": {"progress": "off", "tensorboard": False, "overlap_tokens": 20},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} if isinstance(defaults.get(name, {}), dict)
              else sections.get(name, defaults.get(name)) for name in {**defaults, **sections}}
    return RunConfig(**merged)


@contextmanager
def toy_trainer(config: RunConfig, run_dir: Path, resume: bool = False) -> Iterator[Trainer]:
    """A trainer of one rank in this process; its groups are gone afterwards."""
    try:
        trainer = build_trainer(config, run_dir, resume)
    except BaseException:
        parallel_state.destroy_model_parallel()  # a build that failed halfway leaves its groups behind
        raise
    try:
        yield trainer
    finally:
        trainer.groups.destroy()


@torch.no_grad()
def randomise(trainer: Trainer, scale: float = 0.2, alike: bool = False) -> None:
    """Give every expert random adapters, a function of their names: fresh ones are all the backbone.

    ``alike``: the same for all experts.
    """
    bank = trainer.runner.backbone.bank
    for expert in trainer.groups.hosted:
        for name, parameter in bank.parameters_of(expert).items():
            generator = generator_for(7, "all" if alike else expert, name)
            noise = torch.randn(*bank.full_shape(name, bank.config.rank), generator=generator, dtype=torch.float64)
            parameter.copy_(scale * bank.shard(name, noise))
        bank.changed(expert)


def adapters_of(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Full factors of every expert, the same on every rank."""
    groups, bank = trainer.groups, trainer.runner.backbone.bank
    mine = {e: full_factors(bank, e) for e in groups.hosted}
    return {e: f for part in all_gather_objects(mine, groups.world) for e, f in part.items() if f}


def run_steps(config: RunConfig, run_dir: Path, steps: int | None = None) -> dict:
    """Train ``steps`` steps (default: the schedule); adapters, tokens of every rollout, and metrics per step."""
    with toy_trainer(config, run_dir) as trainer:
        return _run_steps(trainer, steps)


def _run_steps(trainer: Trainer, steps: int | None) -> dict:
    tokens, metrics = [], []
    record = trainer.milestones.record_rollouts

    def remember(step, phase, samples):
        tokens.append({(s.expert, s.edge.teacher if s.edge else None, s.completion.prompt.key, s.completion.sample):
                       s.completion.token_ids for s in samples})
        record(step, phase, samples)

    trainer.milestones.record_rollouts = remember
    for step in range(trainer.step, trainer.schedule.total_steps if steps is None else steps):
        metrics.append(trainer.train_step(step, trainer.schedule.phase(step)))
    everyone = all_gather_objects(tokens, trainer.groups.world)
    merged = [{k: v for rank in everyone for k, v in rank[i].items()} for i in range(len(tokens))]
    return {"adapters": adapters_of(trainer), "tokens": merged, "metrics": metrics}
