"""Forward, loss and backward of a step never wait for the device: what the host asks is what it waits for."""
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.toy_run import randomise, toy_config, toy_trainer

ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
"""Operators of ATen whose result, or its shape, depends on values: .item(), bool(), masks as an index. (Copies to the
host and .tolist() are no operators on a CPU.)"""


ON_THE_HOST = ("_largest_ids", "_weigh", "torch/optim")
"""Where the host asks itself: what is done on a CPU only, weights of tokens, AdamW's count of updates."""


class Waiting(TorchDispatchMode):
    """Collects the operators that would make a CUDA stream's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        """Name and where it was called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in ASKS or masked:
            stack = "".join(traceback.format_stack(limit=8)[:-1])
            if not any(own in stack for own in ON_THE_HOST):
                self.found.append(f"{name} {stack}")
        return func(*args, **(kwargs or {}))

    def watch(self, work: Callable) -> Callable:
        """``work`` under this mode."""
        def watched(*given: Any) -> Any:
            with self:
                return work(*given)

        return watched


HALF_DEPTH = {"adapter": {"scope": "completion", "first_layer": 2}, "rollout": {"lower_states_bytes": 10**9}}
STORED = {"adapter": {"scope": "completion"}, "rollout": {"prefix_store_bytes": 10**9}}
SEVERAL = {"model": {"recompute": "full"}, "rlvr": {"minibatches_per_rollout": 2, "entropy_coef": 0.1, "kl_coef": 0.1}}


@pytest.mark.parametrize("family, signal, sections", [
    *(("qwen3", signal, {}) for signal in ("sampled", "topk", "student_topk", "full")), ("qwen3_vl", "topk", {}),
    ("qwen3", "topk", HALF_DEPTH), ("qwen3", "full", STORED), ("qwen3", "sampled", SEVERAL)], ids=str)
def test_scoring_and_update_do_not_wait(family, signal, sections, tmp_path):
    """Optimizers included."""
    config = toy_config(family, ("text", "image"), opd={"signal": signal},
                        schedule={"rl_steps": 0, "opd_steps": 1},
                        optimizer={"lr": 0.01, "microbatch_tokens": 120}, metrics={"rollouts": False}, **sections)
    waiting = Waiting()
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        runner, learner = trainer.learner.runner, trainer.learner
        learner.update, runner.score = waiting.watch(learner.update), waiting.watch(runner.score)
        before = {n: p.detach().clone() for n, p in trainer.learner.optimizers["text"].parameters.items()}
        trainer.train_step(0, "opd")
        after = trainer.learner.optimizers["text"].parameters
        assert any(not torch.equal(p, before[n]) for n, p in after.items())
    assert not waiting.found, waiting.found[0]


def test_the_watch_sees_what_waits():
    waiting, values = Waiting(), torch.arange(3.0)
    asks = (lambda: values[0].item(), lambda: bool((values < 4).all()), lambda: values[values > 1],
            lambda: torch.equal(values, values), lambda: (values > 1).nonzero())
    for number, ask in enumerate(asks, start=1):
        waiting.watch(ask)()
        assert len(waiting.found) == number
    waiting.watch(lambda: torch._assert_async(values.max() < 4, "large"))()
    assert len(waiting.found) == len(asks)
