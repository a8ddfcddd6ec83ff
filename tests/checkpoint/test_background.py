"""Saves beside training: what they hold, how their failures surface, what an exit leaves; a disk that refuses."""
from __future__ import annotations

import resource
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from copd_megatron.checkpoint.sharded import write_index, write_part
from copd_megatron.types import UserError
from support.ranks import run_ranks
from support.saves import (
    EXPERTS,
    TP2,
    assert_same,
    encoder_of_saves,
    groups_of,
    manager_of,
    saved,
    state_of,
)


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
    encoder = encoder_of_saves()

    def on_rank():
        groups = groups_of(TP2)
        manager, state = manager_of(tmp_path, groups, encoder), state_of(groups, encoder, trained=True, step=1)
        saved(manager, state, ("text",))
        before = (manager.folder / "step_000001/state.json").read_bytes()
        state.step = 2
        with _no_room() if groups.rank == failing else nullcontext(), pytest.raises(UserError) as error:
            saved(manager, state, ("text",))
        assert before == (manager.folder / "step_000001/state.json").read_bytes()
        assert [p.name for p in manager.folder.iterdir()] == ["step_000001"]
        dist.barrier()  # all have looked
        state.step = 3
        saved(manager, state, ("text",))  # once there is room again, the run goes on
        return str(error.value)

    first, second = run_ranks(2, on_rank)
    assert first == second
    assert "step_000002" in first and "could not be written" in first and f"rank {failing}" in first


def test_a_full_disk_while_the_adapters_are_written(one_rank, tmp_path, monkeypatch):
    """The shards are on disk already; the PEFT folder is not."""
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    manager, state = manager_of(tmp_path, groups, encoder), state_of(groups, encoder, trained=True, step=1)
    with ExitStack() as full:
        def write_then_fill(*args):
            files = write_index(*args)
            full.enter_context(_no_room())
            return files

        monkeypatch.setattr("copd_megatron.checkpoint.background.write_index", write_then_fill)
        with pytest.raises(UserError, match="adapters/text: the adapter could not be written .*free space"):
            saved(manager, state, ("text",))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_made(one_rank, tmp_path):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="step_000001: .*could not be written .*checkpoints"):
        saved(manager_of(tmp_path, groups, encoder), state_of(groups, encoder, True, step=1), ())


# --- beside training ----------------------------------------------------------------------------------------------

@contextmanager
def _held_back(monkeypatch):
    """Parts are written only when the yielded event is set: a slow disk."""
    go = threading.Event()

    def write_later(*args):
        assert go.wait(20.0)
        return write_part(*args)

    monkeypatch.setattr("copd_megatron.checkpoint.background.write_part", write_later)
    try:
        yield go
    finally:
        go.set()


def test_a_save_holds_the_moment_it_was_asked_for(one_rank, tmp_path, monkeypatch):
    """Training changes adapters, moments and step counts while the disk works; the save does not see it."""
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    manager, state = manager_of(tmp_path, groups, encoder), state_of(groups, encoder, trained=True, step=1)
    with _held_back(monkeypatch) as go:
        path = manager.save(state, ("text",))
        assert manager.poll() is None and not path.exists()
        for expert, optimizer in state.optimizers.items():
            for parameter in state.bank.parameters_of(expert).values():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        state.step = 2
        go.set()
        assert manager.wait() == path and manager.wait() is None
    again, want = state_of(groups, encoder, trained=False), state_of(groups, encoder, trained=True)
    manager.load_latest(again)
    assert again.step == 1
    assert_same(again, want)
    exported = load_file(path / "adapters/text/adapter_model.safetensors")
    name = "layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(exported[f"base_model.model.model.{name}.weight"], want.bank.parameters_of("text")[name])


def test_never_two_saves_at_once(one_rank, tmp_path, monkeypatch):
    groups, encoder = one_rank("text"), encoder_of_saves()
    manager = manager_of(tmp_path, groups, encoder)
    state = state_of(groups, encoder, trained=True, step=1)
    with _held_back(monkeypatch) as go:
        first = manager.save(state, ())
        threading.Timer(0.2, go.set).start()
        assert not first.exists()
        state.step = 2
        second = manager.save(state, ())
        assert first.exists() and manager.wait() == second


def test_a_failure_surfaces_when_training_looks(tmp_path):
    """Every rank hears of it in the same step, and the next save works."""
    encoder = encoder_of_saves()

    def on_rank():
        groups = groups_of(TP2)
        manager, state = manager_of(tmp_path, groups, encoder), state_of(groups, encoder, trained=True, step=1)
        with _no_room() if groups.rank == 1 else nullcontext():
            manager.save(state, ())
            looks = 0
            with pytest.raises(UserError, match="step_000001: the save could not be written .rank 1"):
                while True:
                    looks += 1
                    assert manager.poll() is None
                    time.sleep(0.01)
        state.step = 2
        assert saved(manager, state, ()).exists()
        return looks

    first, second = run_ranks(2, on_rank)
    assert first == second


@pytest.mark.parametrize("dead", [False, True], ids=["both leave", "the other was killed"])
def test_leaving_after_an_error_completes_the_save_if_it_can(tmp_path, monkeypatch, dead):
    """Ranks that leave wait for their own part; the main rank waits for the others' a while, without collectives."""
    encoder = encoder_of_saves()
    monkeypatch.setattr("copd_megatron.checkpoint.manager.EXIT_WAIT_S", 0.5 if dead else 20.0)

    def on_rank():
        groups = groups_of(TP2)
        manager, state = manager_of(tmp_path, groups, encoder), state_of(groups, encoder, trained=True, step=1)
        if groups.rank == 1:
            monkeypatch.setattr("copd_megatron.checkpoint.background.write_part",
                                lambda *args: sys.exit() if dead else (time.sleep(0.3), write_part(*args))[1])
        path = manager.save(state, ())
        manager.close()
        return path if groups.is_main else None

    path = run_ranks(2, on_rank)[0]
    assert path.exists() != dead
