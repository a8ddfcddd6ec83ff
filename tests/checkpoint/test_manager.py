"""What was saved is what is loaded, on any layout; what does not fit is refused."""
from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing

from copd_megatron.checkpoint.manager import RunState
from copd_megatron.exchange.gather import gathered_adapters
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.types import UserError
from support.policies import make_bank, make_optimizers, noise
from support.ranks import run_ranks
from support.saves import (
    ADAPTER,
    EXPERTS,
    ONE,
    PP2,
    TP2,
    TWO_REPLICAS,
    UPDATES,
    assert_same,
    content_of,
    encoder_of_saves,
    groups_of,
    manager_of,
    saved,
    state_of,
    write_three_saves,
)
from support.tiny_models import tiny_model


def _save(run_dir: Path, layout: tuple[int, int, int], encoder: PromptEncoder, step: int = 12) -> None:
    groups = groups_of(layout)
    state = state_of(groups, encoder, trained=True, step=step)
    state.best_accuracy, state.best_step, state.train_s = 0.625, 8, 100.0
    with gathered_adapters(state.bank, groups, EXPERTS):
        path = saved(manager_of(run_dir, groups, encoder), state, EXPERTS)
    assert path == run_dir / f"checkpoints/step_{step:06d}"
    assert state.updates == UPDATES


def _load(run_dir: Path, layout: tuple[int, int, int], encoder: PromptEncoder) -> None:
    groups = groups_of(layout)
    state = state_of(groups, encoder, trained=False)
    objects = {id(p) for p in state.bank.parameters()}
    manager_of(run_dir, groups, encoder).load_latest(state)
    assert_same(state, state_of(groups, encoder, trained=True))
    assert {id(p) for p in state.bank.parameters()} == objects, "the optimizers would hold other parameters"
    assert (state.step, state.updates, state.best_accuracy, state.best_step) == (12, UPDATES, 0.625, 8)
    assert 100.0 <= state.train_s < 160.0


def _on(layout: tuple[int, int, int], fn, *args):
    return run_ranks(layout[0] * layout[1] * layout[2], fn, *args)


@pytest.mark.parametrize("there,back", [(ONE, ONE), (ONE, TP2), (TP2, PP2), (PP2, TWO_REPLICAS), (TWO_REPLICAS, ONE)],
                         ids=lambda layout: "tp{}-pp{}-replicas{}".format(*layout))
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, there, back):
    encoder = encoder_of_saves()
    _on(there, _save, tmp_path, there, encoder)
    _on(back, _load, tmp_path, back, encoder)
    folder = tmp_path / "checkpoints/step_000012"
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*")) == ["step_000012"]
    assert {p.parent.name for p in folder.glob("adapters/*/adapter_model.safetensors")} == set(EXPERTS)


def test_layouts_larger_than_one_axis(tmp_path):
    encoder = encoder_of_saves()
    _on((2, 2, 1), _save, tmp_path, (2, 2, 1), encoder)
    _on((1, 1, 4), _load, tmp_path, (1, 1, 4), encoder)


def test_a_step_after_loading_is_the_step_not_stopped(one_rank, tmp_path):
    """The next update from a loaded state equals the next update of the run that went on, bit for bit."""
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    going_on, resumed = state_of(groups, encoder, trained=True, step=1), state_of(groups, encoder, trained=False)
    manager = manager_of(tmp_path, groups, encoder)
    saved(manager, going_on, ())
    manager.load_latest(resumed)
    for state in (going_on, resumed):
        for expert, optimizer in state.optimizers.items():
            for name, parameter in state.bank.parameters_of(expert).items():
                parameter.grad = noise(expert, name, "gradient", shape=parameter.shape)
            optimizer.step()
    assert_same(resumed, going_on)
    assert resumed.optimizers["text"].updates == 8


def test_a_stage_without_adapters(tmp_path):
    """With first_layer at the second stage the first one has nothing to write or read."""
    encoder, adapter = encoder_of_saves(), ADAPTER.model_copy(update={"first_layer": 1})

    def on_rank():
        groups = groups_of(PP2, ("only",))
        bank = make_bank(groups, encoder.spec, adapter)
        state = RunState(bank, make_optimizers(bank, {"only": 3}), "{}", step=3)
        before = {n: p.detach().clone() for n, p in bank.parameters_of("only").items()}
        manager = manager_of(tmp_path, groups, encoder)
        saved(manager, state, ("only",))
        for parameter in bank.parameters():
            parameter.data.zero_()
        manager.load_latest(state)
        assert all(torch.equal(p, before[n]) for n, p in bank.parameters_of("only").items())
        return len(before)

    assert run_ranks(2, on_rank) == [0, 4]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint")
def test_megatron_reads_the_shards(one_rank, tmp_path):
    """The files are plain dist_checkpointing: full factors under their Hugging Face names."""
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    state = state_of(groups, encoder, trained=True, step=1)
    folder = saved(manager_of(tmp_path, groups, encoder), state, ()) / "sharded"
    tensors = dist_checkpointing.load_plain_tensors(str(folder))
    for name, parameter in state.bank.parameters_of("image").items():
        assert torch.equal(tensors[f"adapters/image/{name}"], parameter)
    assert not any(key.startswith("optimizer/video") for key in tensors)


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory) -> Path:
    return run_ranks(1, write_three_saves, tmp_path_factory.mktemp("run"))[0]


def test_another_backbone_is_refused(one_rank, three_saves):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    other = tiny_model("qwen3", num_hidden_layers=2, seed=1)
    state = state_of(groups, encoder, trained=False)
    with pytest.raises(UserError, match="model.path: .* is not the backbone of .*step_000100; "):
        manager_of(three_saves, groups, encoder, backbone=other).load_latest(state)
    assert not any(p.any() for p in state.bank.parameters())


@pytest.mark.parametrize("change", [{"rank": 3}, {"alpha": 5.0}, {"first_layer": 1}, {"scope": "completion"},
                                    {"targets": ("q_proj",)}], ids=lambda change: next(iter(change)))
def test_other_adapter_settings_are_refused(one_rank, three_saves, change):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    state = state_of(groups, encoder, trained=False, adapter=ADAPTER.model_copy(update=change))
    with pytest.raises(UserError, match=f"adapter.{next(iter(change))}: .*; .* has .*; set it to that"):
        manager_of(three_saves, groups, encoder).load_latest(state)


@pytest.mark.parametrize("experts", [("text", "image"), ("text", "image", "audio"), (*EXPERTS, "audio")])
def test_other_experts_are_refused(one_rank, three_saves, experts):
    groups, encoder = one_rank(*experts), encoder_of_saves()
    which = "on_new_expert=init" if "audio" in experts else "on_missing_expert=drop"
    with pytest.raises(UserError, match=f"experts: .*which has .*; use the same experts, or set checkpoint.{which}"):
        manager_of(three_saves, groups, encoder).load_latest(state_of(groups, encoder, trained=False))


def test_experts_come_and_go_when_that_is_meant(one_rank, three_saves, caplog):
    """The ones that stay are as saved, a new one is as drawn, and all can train on and be saved again."""
    groups, encoder = one_rank("image", "audio", "text"), encoder_of_saves()
    bank = make_bank(groups, encoder.spec, ADAPTER)
    bank.add_expert("audio", seed=3)
    drawn = {name: p.detach().clone() for name, p in bank.parameters_of("audio").items()}
    state = RunState(bank, make_optimizers(bank), "{}")
    manager = manager_of(three_saves, groups, encoder, on_new_expert="init", on_missing_expert="drop")
    with caplog.at_level(logging.WARNING):
        manager.load_latest(state)
    assert "begun afresh ['audio'], dropped ['video']" in caplog.text
    assert state.updates == {"image": 5, "audio": 0, "text": 7}
    assert all(torch.equal(p, drawn[name]) for name, p in bank.parameters_of("audio").items())
    assert state.optimizers["audio"].state_dict() == {}
    want = make_bank(groups, encoder.spec, ADAPTER)
    want = content_of(RunState(want, make_optimizers(want, UPDATES), "{}"))
    got = content_of(state)
    for key in (key for key in want if key.startswith(("image/", "text/"))):
        assert torch.equal(got[key], want[key]), key


class Counter:
    """A part of the loop with a state of its own."""

    count = 0

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"]


def test_the_loop_and_the_generators_go_on_where_they_were(tmp_path):
    """Schedules and random generators of every rank are as they were when the save began."""
    encoder = encoder_of_saves()

    def on_rank():
        groups = groups_of(TP2)
        state = state_of(groups, encoder, trained=True, step=1)
        state.loop["counter"] = counter = Counter()
        counter.count = 5
        for _ in range(groups.rank + 1):  # every rank is elsewhere
            _draws()
        manager = manager_of(tmp_path, groups, encoder)
        manager.save(state, ())
        want = _draws()
        counter.count = 6
        assert manager.wait()
        manager.load_latest(state)
        return want, _draws(), counter.count

    first, second = run_ranks(2, on_rank)
    assert first[0] == first[1] != second[0] == second[1]
    assert first[2] == second[2] == 5

    def on_other_layout():
        groups = groups_of(ONE)
        manager, state, draws = manager_of(tmp_path, groups, encoder), state_of(groups, encoder, trained=False), []
        for load in (lambda: None, lambda: manager.load_latest(state)):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            load()
            draws.append(_draws())
        return draws[0] == draws[1]

    assert run_ranks(1, on_other_layout) == [True]


def _draws() -> tuple[float, ...]:
    return random.random(), random.gauss(), float(np.random.normal()), float(torch.randn(()))


def test_the_state_file_tells_a_reader_what_it_is(one_rank, tmp_path):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    folder = saved(manager_of(tmp_path, groups, encoder), state_of(groups, encoder, True, step=3), ("text", "image"))
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["updates"], state["config"]) == (3, UPDATES, {"seed": 1})
    assert state["adapter"]["rank"] == 2 and state["layout"].startswith("tp1-")
