"""One OPD step of random experts, with all that went into it and came out."""
from __future__ import annotations

from pathlib import Path

from copd_megatron.config.run import RunConfig
from support.toy_run import randomise, toy_trainer


def one_step(config: RunConfig, run_dir: Path) -> tuple[dict, list, dict, dict]:
    """(metrics, samples, start factors, gradients) of one OPD step of random experts."""
    with toy_trainer(config, run_dir) as trainer:
        randomise(trainer)
        start = {e: {n: p.detach().clone() for n, p in o.parameters.items()}
                 for e, o in trainer.learner.optimizers.items()}
        samples, gradients, update = [], {}, trainer.learner.update

        def remember(given, *others):
            samples.extend(given)
            return update(given, *others)

        trainer.learner.update = remember
        for expert, optimizer in trainer.learner.optimizers.items():
            def step(expert=expert, optimizer=optimizer, step=optimizer.step):
                gradients[expert] = {n: p.grad.clone() for n, p in optimizer.parameters.items()}
                return step()

            optimizer.step = step
        return trainer.train_step(0, "opd"), samples, start, gradients
