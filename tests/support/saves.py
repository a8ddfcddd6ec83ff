"""Runs with random adapters and moments, the same on every layout: what checkpoint tests save and compare."""
from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch

from copd_megatron.checkpoint.manager import CheckpointManager, RunState
from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.policies import make_bank, make_optimizers
from support.tiny_models import tiny_model

ADAPTER = AdapterConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
"""One column-parallel and one row-parallel linear, so that every kind of shard occurs."""

EXPERTS = ("text", "image", "video")
UPDATES = {"text": 7, "image": 5, "video": 0}
"""The video expert has not been updated yet, so it has no moments."""

ONE, TP2, PP2, TWO_REPLICAS = (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)
"""(TP, PP, replicas). On two replicas text and image share one, video has the other."""


@functools.cache
def encoder_of_saves() -> PromptEncoder:
    """With one key/value head, of which two tensor-parallel ranks have a copy each."""
    return PromptEncoder(tiny_model("qwen3", num_hidden_layers=2, num_key_value_heads=1))


def groups_of(layout: tuple[int, int, int], experts=EXPERTS) -> Groups:
    tp, pp, replicas = layout
    return Groups.create(Layout(tp=tp, pp=pp, replicas=replicas), Placement.build(experts, replicas))


def manager_of(run_dir: Path, groups: Groups, encoder: PromptEncoder, backbone: Path | None = None,
               **config: object) -> CheckpointManager:
    return CheckpointManager(run_dir, CheckpointConfig(**config), groups, backbone or encoder.path, encoder)


def state_of(groups: Groups, encoder: PromptEncoder, trained: bool, adapter: AdapterConfig = ADAPTER,
             step: int = 0) -> RunState:
    """Random adapters and moments, or what a run has before its first step."""
    bank = make_bank(groups, encoder.spec, adapter)
    if not trained:
        for parameter in bank.parameters():
            parameter.data.zero_()
    optimizers = make_optimizers(bank, UPDATES if trained else None)
    return RunState(bank, optimizers, '{"seed": 1}', step=step)


def saved(manager: CheckpointManager, state: RunState, policies) -> Path:
    """Save and wait until all of it is on disk."""
    path = manager.save(state, policies)
    assert manager.wait() == path
    return path


def content_of(state: RunState) -> dict[str, torch.Tensor]:
    """Everything that training changes, on this rank."""
    content = {}
    for expert, optimizer in state.optimizers.items():
        content[f"{expert}/updates"] = torch.tensor(optimizer.updates)
        for name, parameter in state.bank.parameters_of(expert).items():
            content[f"{expert}/{name}"] = parameter.detach()
            for key, value in optimizer.state_dict().get(name, {}).items():
                content[f"{expert}/{name}/{key}"] = value
    return content


def assert_same(state: RunState, want: RunState) -> None:
    got, expected = content_of(state), content_of(want)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


def write_three_saves(run_dir: Path) -> Path:
    """Saves of steps 2, 10 and 100, and a crash's leftovers of step 200. To be called on a rank of its own."""
    for step in (2, 10, 100):
        groups, encoder = groups_of(ONE), encoder_of_saves()
        saved(manager_of(run_dir, groups, encoder), state_of(groups, encoder, True, step=step), ())
        groups.destroy()
    shutil.copytree(run_dir / "checkpoints/step_000100", run_dir / "checkpoints/step_000200.tmp")
    return run_dir
