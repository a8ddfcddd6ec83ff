"""Saves: what is read is what was written, on any layout; damage is skipped; a full disk is one error everywhere."""
from __future__ import annotations

import functools
import json
import logging
import os
import resource
import shutil
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from copd_megatron.checkpoint.manager import CheckpointManager, RunState
from copd_megatron.checkpoint.sharded import write_shards
from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.config.model import AdapterConfig
from copd_megatron.exchange.gather import gathered_adapters
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import UserError
from support.policies import make_bank, make_optimizers, noise
from support.ranks import run_ranks
from support.tiny_models import tiny_model

ADAPTER = AdapterConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
"""One column-parallel and one row-parallel linear, so that every kind of shard occurs."""

EXPERTS = ("text", "image", "video")
UPDATES = {"text": 7, "image": 5, "video": 0}
"""The video expert has not been updated yet, so it has no moments."""

ONE, TP2, PP2, TWO_REPLICAS = (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)
"""(TP, PP, replicas). On two replicas text and image share one, video has the other."""


@functools.cache
def _encoder() -> PromptEncoder:
    return PromptEncoder(tiny_model("qwen3", num_hidden_layers=2))


def _groups(layout: tuple[int, int, int], experts=EXPERTS) -> Groups:
    tp, pp, replicas = layout
    return Groups.create(Layout(tp=tp, pp=pp, replicas=replicas), Placement.build(experts, replicas))


def _manager(run_dir: Path, groups: Groups, encoder: PromptEncoder, keep_last: int = 3,
             backbone: Path | None = None) -> CheckpointManager:
    return CheckpointManager(run_dir, CheckpointConfig(keep_last=keep_last), groups, backbone or encoder.path, encoder)


def _state(groups: Groups, encoder: PromptEncoder, trained: bool, adapter: AdapterConfig = ADAPTER,
           step: int = 0) -> RunState:
    """Random adapters and moments, or what a run has before its first step."""
    bank = make_bank(groups, encoder.spec, adapter)
    if not trained:
        for parameter in bank.parameters():
            parameter.data.zero_()
    optimizers = make_optimizers(bank, UPDATES if trained else None)
    return RunState(bank, optimizers, '{"seed": 1}', step=step)


def _content(state: RunState) -> dict[str, torch.Tensor]:
    """Everything that training changes, on this rank."""
    content = {}
    for expert, optimizer in state.optimizers.items():
        content[f"{expert}/updates"] = torch.tensor(optimizer.updates)
        for name, parameter in state.bank.parameters_of(expert).items():
            content[f"{expert}/{name}"] = parameter.detach()
            for key, value in optimizer.state_dict().get(name, {}).items():
                content[f"{expert}/{name}/{key}"] = value
    return content


def _assert_same(state: RunState, want: RunState) -> None:
    got, expected = _content(state), _content(want)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


def _save(run_dir: Path, layout: tuple[int, int, int], encoder: PromptEncoder, step: int = 12) -> None:
    groups = _groups(layout)
    state = _state(groups, encoder, trained=True, step=step)
    state.best_accuracy, state.best_step, state.train_s = 0.625, 8, 100.0
    with gathered_adapters(state.bank, groups, EXPERTS):
        path = _manager(run_dir, groups, encoder).save(state, EXPERTS)
    assert path == run_dir / f"checkpoints/step_{step:06d}"
    assert state.updates == UPDATES


def _load(run_dir: Path, layout: tuple[int, int, int], encoder: PromptEncoder) -> None:
    groups = _groups(layout)
    state = _state(groups, encoder, trained=False)
    objects = {id(p) for p in state.bank.parameters()}
    _manager(run_dir, groups, encoder).load_latest(state)
    _assert_same(state, _state(groups, encoder, trained=True))
    assert {id(p) for p in state.bank.parameters()} == objects, "the optimizers would hold other parameters"
    assert (state.step, state.updates, state.best_accuracy, state.best_step) == (12, UPDATES, 0.625, 8)
    assert 100.0 <= state.train_s < 160.0


def _on(layout: tuple[int, int, int], fn, *args):
    return run_ranks(layout[0] * layout[1] * layout[2], fn, *args)


@pytest.mark.parametrize("there,back", [(ONE, ONE), (ONE, TP2), (TP2, PP2), (PP2, TWO_REPLICAS), (TWO_REPLICAS, ONE)],
                         ids=lambda layout: "tp{}-pp{}-replicas{}".format(*layout))
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, there, back):
    encoder = _encoder()
    _on(there, _save, tmp_path, there, encoder)
    _on(back, _load, tmp_path, back, encoder)
    folder = tmp_path / "checkpoints/step_000012"
    assert sorted(p.name for p in tmp_path.glob("checkpoints/*")) == ["step_000012"]
    assert {p.parent.name for p in folder.glob("adapters/*/adapter_model.safetensors")} == set(EXPERTS)


def test_layouts_larger_than_one_axis(tmp_path):
    encoder = _encoder()
    _on((2, 2, 1), _save, tmp_path, (2, 2, 1), encoder)
    _on((1, 1, 4), _load, tmp_path, (1, 1, 4), encoder)


def test_a_step_after_loading_is_the_step_not_stopped(one_rank, tmp_path):
    """The next update from a loaded state equals the next update of the run that went on, bit for bit."""
    groups, encoder = one_rank(*EXPERTS), _encoder()
    going_on, resumed = _state(groups, encoder, trained=True, step=1), _state(groups, encoder, trained=False)
    manager = _manager(tmp_path, groups, encoder)
    manager.save(going_on, ())
    manager.load_latest(resumed)
    for state in (going_on, resumed):
        for expert, optimizer in state.optimizers.items():
            for name, parameter in state.bank.parameters_of(expert).items():
                parameter.grad = noise(expert, name, "gradient", shape=parameter.shape)
            optimizer.step()
    _assert_same(resumed, going_on)
    assert resumed.optimizers["text"].updates == 8


def test_a_stage_without_adapters(tmp_path):
    """With first_layer at the second stage the first one has nothing to write or read."""
    encoder, adapter = _encoder(), ADAPTER.model_copy(update={"first_layer": 1})

    def on_rank():
        groups = _groups(PP2, ("only",))
        bank = make_bank(groups, encoder.spec, adapter)
        state = RunState(bank, make_optimizers(bank, {"only": 3}), "{}", step=3)
        before = {n: p.detach().clone() for n, p in bank.parameters_of("only").items()}
        manager = _manager(tmp_path, groups, encoder)
        manager.save(state, ("only",))
        for parameter in bank.parameters():
            parameter.data.zero_()
        manager.load_latest(state)
        assert all(torch.equal(p, before[n]) for n, p in bank.parameters_of("only").items())
        return len(before)

    assert run_ranks(2, on_rank) == [0, 4]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.checkpoint")
def test_megatron_reads_the_shards(one_rank, tmp_path):
    """The files are plain dist_checkpointing: full factors under their Hugging Face names."""
    groups, encoder = one_rank(*EXPERTS), _encoder()
    state = _state(groups, encoder, trained=True, step=1)
    folder = _manager(tmp_path, groups, encoder).save(state, ()) / "sharded"
    tensors = dist_checkpointing.load_plain_tensors(str(folder))
    for name, parameter in state.bank.parameters_of("image").items():
        assert torch.equal(tensors[f"adapters/image/{name}"], parameter)
    assert not any(key.startswith("optimizer/video") for key in tensors)


# --- damage -------------------------------------------------------------------------------------------------------

def _flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
    "no state": lambda save: (save / "state.json").unlink(),
    "torn state": lambda save: _truncate(save / "state.json"),
    "flipped bit in state": lambda save: _flip_byte(save / "state.json"),
    "other digits in state": lambda save: (save / "state.json").write_text(
        (save / "state.json").read_text().replace('"text": 7', '"text": 9')),
    "not an object": lambda save: (save / "state.json").write_text("[]"),
    "truncated shard": lambda save: _truncate(save / "sharded/__0_0.distcp"),
    "flipped bit in a shard": lambda save: _flip_byte(save / "sharded/__0_0.distcp"),
    "missing shard": lambda save: (save / "sharded/__0_0.distcp").unlink(),
    "flipped bit in the index": lambda save: _flip_byte(save / "sharded/.metadata"),
    "no shards": lambda save: shutil.rmtree(save / "sharded"),
}


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory) -> Path:
    """A run folder with saves of steps 2, 10 and 100, and a crash's leftovers of step 200."""
    run_dir, encoder = tmp_path_factory.mktemp("run"), _encoder()

    def save_all():
        for step in (2, 10, 100):
            groups = _groups(ONE)
            _manager(run_dir, groups, encoder).save(_state(groups, encoder, True, step=step), ())
            groups.destroy()

    run_ranks(1, save_all)
    shutil.copytree(run_dir / "checkpoints/step_000100", run_dir / "checkpoints/step_000200.tmp")
    return run_dir


def test_the_newest_complete_save_is_loaded(one_rank, three_saves):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    state = _state(groups, encoder, trained=False)
    assert _manager(three_saves, groups, encoder).load_latest(state).name == "step_000100"
    assert state.step == 100


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_save_is_skipped_with_a_warning(one_rank, three_saves, tmp_path, caplog, damage):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    run_dir = shutil.copytree(three_saves, tmp_path / "run")
    DAMAGE[damage](run_dir / "checkpoints/step_000100")
    state = _state(groups, encoder, trained=False)
    with caplog.at_level(logging.WARNING):
        assert _manager(run_dir, groups, encoder).load_latest(state).name == "step_000010"
    assert [r.getMessage() for r in caplog.records if "step_000100 is damaged and was skipped" in r.getMessage()]
    _assert_same(state, _state(groups, encoder, trained=True))


def test_damage_is_skipped_by_all_ranks_together(three_saves, tmp_path):
    encoder = _encoder()
    run_dir = shutil.copytree(three_saves, tmp_path / "run")
    _flip_byte(run_dir / "checkpoints/step_000100/sharded/__0_0.distcp")

    def on_rank():
        groups = _groups(TP2)
        state = _state(groups, encoder, trained=False)
        path = _manager(run_dir, groups, encoder).load_latest(state)
        _assert_same(state, _state(groups, encoder, trained=True))
        return path.name, state.step

    assert run_ranks(2, on_rank) == [("step_000010", 10)] * 2


@pytest.mark.parametrize("left", ["nothing", "a crashed save", "damaged saves"])
def test_nothing_to_resume_from(one_rank, three_saves, tmp_path, left):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    run_dir = tmp_path / "run"
    if left != "nothing":
        shutil.copytree(three_saves, run_dir)
        for save in run_dir.glob("checkpoints/step_*[0-9]"):
            if left == "a crashed save":
                shutil.rmtree(save)
            else:
                (save / "state.json").unlink()
    with pytest.raises(UserError, match="holds no complete save; .*start without --resume"):
        _manager(run_dir, groups, encoder).load_latest(_state(groups, encoder, trained=False))


# --- what does not fit --------------------------------------------------------------------------------------------

def test_another_backbone_is_refused(one_rank, three_saves):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    other = tiny_model("qwen3", num_hidden_layers=2, seed=1)
    state = _state(groups, encoder, trained=False)
    with pytest.raises(UserError, match="model.path: .* is not the backbone of .*step_000100; "):
        _manager(three_saves, groups, encoder, backbone=other).load_latest(state)
    assert not any(p.any() for p in state.bank.parameters())


@pytest.mark.parametrize("change", [{"rank": 3}, {"alpha": 5.0}, {"first_layer": 1}, {"scope": "completion"},
                                    {"targets": ("q_proj",)}], ids=lambda change: next(iter(change)))
def test_other_adapter_settings_are_refused(one_rank, three_saves, change):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    state = _state(groups, encoder, trained=False, adapter=ADAPTER.model_copy(update=change))
    with pytest.raises(UserError, match=f"adapter.{next(iter(change))}: .*; .* has .*; set it to that"):
        _manager(three_saves, groups, encoder).load_latest(state)


@pytest.mark.parametrize("experts", [("text", "image"), ("text", "image", "audio"), (*EXPERTS, "audio")])
def test_other_experts_are_refused(one_rank, three_saves, experts):
    groups, encoder = one_rank(*experts), _encoder()
    with pytest.raises(UserError, match="experts: .*; .* has .*; use the same experts"):
        _manager(three_saves, groups, encoder).load_latest(_state(groups, encoder, trained=False))


# --- what is kept -------------------------------------------------------------------------------------------------

def test_the_oldest_saves_go(one_rank, tmp_path):
    groups, encoder = one_rank("text"), _encoder()
    manager = _manager(tmp_path, groups, encoder, keep_last=2)
    state = RunState(make_bank(groups, encoder.spec, ADAPTER), {}, "{}")
    state.optimizers = make_optimizers(state.bank)
    (tmp_path / "checkpoints/step_000099.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints/step_notes").mkdir()
    for step in (5, 999_999, 1_000_000):
        state.step = step
        manager.save(state, ())
    names = {"step_notes", "step_999999", "step_1000000"}
    assert {p.name for p in tmp_path.glob("checkpoints/*")} == names
    # A resume skipped the two newest, which were damaged: saves of the new attempt must not fall to them.
    for name in ("step_999999", "step_1000000"):
        (tmp_path / "checkpoints" / name / "state.json").unlink()
    for step in (6, 7, 8):
        state.step = step
        manager.save(state, ())
    assert {p.name for p in tmp_path.glob("checkpoints/*")} == names | {"step_000007", "step_000008"}
    assert manager.load_latest(state).name == "step_000008"


def test_saving_a_step_again_replaces_it(one_rank, tmp_path):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    manager, state = _manager(tmp_path, groups, encoder), _state(groups, encoder, trained=True, step=4)
    manager.save(state, EXPERTS)
    for parameter in state.bank.parameters():
        parameter.data.add_(1.0)
    manager.save(state, ("text",))
    again = _state(groups, encoder, trained=False)
    manager.load_latest(again)
    _assert_same(again, state)
    assert [p.name for p in tmp_path.glob("checkpoints/*")] == ["step_000004"]
    assert [p.name for p in tmp_path.glob("checkpoints/step_000004/adapters/*")] == ["text"]


# --- a disk that refuses ------------------------------------------------------------------------------------------

@contextmanager
def _no_room(limit: int = 1000):
    """The kernel refuses this process files beyond ``limit`` bytes, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("failing", [0, 1], ids=["on the main rank", "on another rank"])
def test_a_full_disk_is_one_error_on_all_ranks(tmp_path, failing):
    encoder = _encoder()

    def on_rank():
        groups = _groups(TP2)
        manager, state = _manager(tmp_path, groups, encoder), _state(groups, encoder, trained=True, step=1)
        manager.save(state, ("text",))
        before = (manager.folder / "step_000001/state.json").read_bytes()
        state.step = 2
        with _no_room() if groups.rank == failing else nullcontext(), pytest.raises(UserError) as error:
            manager.save(state, ("text",))
        assert before == (manager.folder / "step_000001/state.json").read_bytes()
        assert [p.name for p in manager.folder.iterdir()] == ["step_000001"]
        state.step = 3
        manager.save(state, ("text",))  # once there is room again, the run goes on
        return str(error.value)

    first, second = run_ranks(2, on_rank)
    assert first == second
    assert "step_000002" in first and "could not be written" in first and f"rank {failing}" in first


def test_a_full_disk_while_the_adapters_are_written(one_rank, tmp_path, monkeypatch):
    """The shards are on disk already; the PEFT folder is not."""
    groups, encoder = one_rank(*EXPERTS), _encoder()
    manager, state = _manager(tmp_path, groups, encoder), _state(groups, encoder, trained=True, step=1)
    with ExitStack() as full:
        def write_then_fill(*args):
            write_shards(*args)
            full.enter_context(_no_room())

        monkeypatch.setattr("copd_megatron.checkpoint.manager.write_shards", write_then_fill)
        with pytest.raises(UserError, match="adapters/text: the adapter could not be written .*free space"):
            manager.save(state, ("text",))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_made(one_rank, tmp_path):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="step_000001: .*could not be written .*checkpoints"):
        _manager(tmp_path, groups, encoder).save(_state(groups, encoder, True, step=1), ())


def test_the_state_file_tells_a_reader_what_it_is(one_rank, tmp_path):
    groups, encoder = one_rank(*EXPERTS), _encoder()
    folder = _manager(tmp_path, groups, encoder).save(_state(groups, encoder, True, step=3), ("text", "image"))
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["updates"], state["config"]) == (3, UPDATES, {"seed": 1})
    assert state["adapter"]["rank"] == 2 and state["layout"].startswith("tp1-")
