"""Whole saves are found, damaged ones skipped with a warning, old ones removed."""
from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from copd_megatron.checkpoint.manager import RunState
from copd_megatron.types import UserError
from support.policies import make_bank, make_optimizers
from support.ranks import run_ranks
from support.saves import (
    ADAPTER,
    EXPERTS,
    TP2,
    assert_same,
    encoder_of_saves,
    groups_of,
    manager_of,
    saved,
    state_of,
    write_three_saves,
)


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory) -> Path:
    return run_ranks(1, write_three_saves, tmp_path_factory.mktemp("run"))[0]


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


def test_the_newest_complete_save_is_loaded(one_rank, three_saves):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    state = state_of(groups, encoder, trained=False)
    assert manager_of(three_saves, groups, encoder).load_latest(state).name == "step_000100"
    assert state.step == 100


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_save_is_skipped_with_a_warning(one_rank, three_saves, tmp_path, caplog, damage):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    run_dir = shutil.copytree(three_saves, tmp_path / "run")
    DAMAGE[damage](run_dir / "checkpoints/step_000100")
    state = state_of(groups, encoder, trained=False)
    with caplog.at_level(logging.WARNING):
        assert manager_of(run_dir, groups, encoder).load_latest(state).name == "step_000010"
    assert [r.getMessage() for r in caplog.records if "step_000100 is damaged and was skipped" in r.getMessage()]
    assert_same(state, state_of(groups, encoder, trained=True))


def test_damage_is_skipped_by_all_ranks_together(three_saves, tmp_path):
    encoder = encoder_of_saves()
    run_dir = shutil.copytree(three_saves, tmp_path / "run")
    _flip_byte(run_dir / "checkpoints/step_000100/sharded/__0_0.distcp")

    def on_rank():
        groups = groups_of(TP2)
        state = state_of(groups, encoder, trained=False)
        path = manager_of(run_dir, groups, encoder).load_latest(state)
        assert_same(state, state_of(groups, encoder, trained=True))
        return path.name, state.step

    assert run_ranks(2, on_rank) == [("step_000010", 10)] * 2


@pytest.mark.parametrize("left", ["nothing", "a crashed save", "damaged saves"])
def test_nothing_to_resume_from(one_rank, three_saves, tmp_path, left):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    run_dir = tmp_path / "run"
    if left != "nothing":
        shutil.copytree(three_saves, run_dir)
        for save in run_dir.glob("checkpoints/step_*[0-9]"):
            if left == "a crashed save":
                shutil.rmtree(save)
            else:
                (save / "state.json").unlink()
    with pytest.raises(UserError, match="holds no complete save; .*start without --resume"):
        manager_of(run_dir, groups, encoder).load_latest(state_of(groups, encoder, trained=False))


def test_the_oldest_saves_go(one_rank, tmp_path):
    groups, encoder = one_rank("text"), encoder_of_saves()
    manager = manager_of(tmp_path, groups, encoder, keep_last=2)
    state = RunState(make_bank(groups, encoder.spec, ADAPTER), {}, "{}")
    state.optimizers = make_optimizers(state.bank)
    (tmp_path / "checkpoints/step_000099.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints/step_notes").mkdir()
    for step in (5, 999_999, 1_000_000):
        state.step = step
        saved(manager, state, ())
    names = {"step_notes", "step_999999", "step_1000000"}
    assert {p.name for p in tmp_path.glob("checkpoints/*")} == names
    # A resume skipped the two newest, which were damaged: saves of the new attempt must not fall to them.
    for name in ("step_999999", "step_1000000"):
        (tmp_path / "checkpoints" / name / "state.json").unlink()
    for step in (6, 7, 8):
        state.step = step
        saved(manager, state, ())
    assert {p.name for p in tmp_path.glob("checkpoints/*")} == names | {"step_000007", "step_000008"}
    assert manager.load_latest(state).name == "step_000008"


def test_multiples_of_keep_every_stay(one_rank, tmp_path):
    groups, encoder = one_rank("text"), encoder_of_saves()
    manager = manager_of(tmp_path, groups, encoder, keep_last=1, keep_every=4)
    bank = make_bank(groups, encoder.spec, ADAPTER)
    state = RunState(bank, make_optimizers(bank), "{}")
    for step in range(2, 11, 2):
        state.step = step
        saved(manager, state, ())
    assert {p.name for p in tmp_path.glob("checkpoints/*")} == {f"step_{n:06d}" for n in (4, 8, 10)}


def test_saving_a_step_again_replaces_it(one_rank, tmp_path):
    groups, encoder = one_rank(*EXPERTS), encoder_of_saves()
    manager, state = manager_of(tmp_path, groups, encoder), state_of(groups, encoder, trained=True, step=4)
    saved(manager, state, EXPERTS)
    for parameter in state.bank.parameters():
        parameter.data.add_(1.0)
    saved(manager, state, ("text",))
    again = state_of(groups, encoder, trained=False)
    manager.load_latest(again)
    assert_same(again, state)
    assert [p.name for p in tmp_path.glob("checkpoints/*")] == ["step_000004"]
    assert [p.name for p in tmp_path.glob("checkpoints/step_000004/adapters/*")] == ["text"]
