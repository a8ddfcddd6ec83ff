"""A run that was killed, stopped or moved to another layout and resumed equals one that never stopped."""
import functools
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from copd_megatron.types import UserError
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.toy_run import adapters_of, toy_config, toy_trainer
from support.toy_tasks import LetterTask

STEPS = 4


class Interrupts(LetterTask):
    """Presses Ctrl-C ``times`` times while the answers to the ``at``-th batch are graded."""

    at, times, calls = 0, 1, 0

    def verify(self, item, completion):
        if completion:  # the scorer's check at the start has none
            Interrupts.calls += 1
            if Interrupts.calls == Interrupts.at:
                for _ in range(Interrupts.times):
                    os.kill(os.getpid(), signal.SIGINT)
        return super().verify(item, completion)


def interrupt(step: int, times: int = 1) -> None:
    """Arm ``Interrupts`` for the native batch (2 x 9 answers) of a step counted from 0."""
    Interrupts.at, Interrupts.times, Interrupts.calls = step * 18 + 5, times, 0


def make_config(**sections):
    return toy_config("qwen3", ("text", "image"), **{
        "schedule": {"rl_steps": 2, "opd_steps": 2}, "checkpoint": {"every": 2, "keep_last": 9, "export_merged": False},
        "optimizer": {"lr": 1e-2, "warmup_steps": 3, "microbatch_tokens": 200, "weight_decay": 0.1},
        "evaluation": {"final_prompts": 1}, "metrics": {"rollouts": True, "overlap_tokens": 9}, **sections})


def run(config, folder: Path, resume: bool = False) -> dict:
    """Train to the end with objects of their own; factors on the main rank."""
    with toy_trainer(config, folder, resume) as trainer:
        trainer.run()
        return {e: {n: f.clone() for n, f in own.items()} for e, own in adapters_of(trainer).items()}


def numbers(folder: Path) -> list[dict]:
    """The record, without what a clock or the memory says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "memory/")) and not k.endswith("_per_s")}
            for line in lines]


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(factor, other[e][n]) for e, own in one.items() for n, factor in own.items())


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """dtype -> (config, run folder, adapters) of runs to the end, made when first asked for."""

    @functools.cache
    def finished(dtype: str):
        folder = tmp_path_factory.mktemp(dtype)
        config = make_config(model={"dtype": dtype})
        return config, folder, run(config, folder)

    return finished


def killed(folder: Path, to: Path) -> Path:
    """A copy as if the machine had died after the last step's numbers, before its save."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "checkpoints" / f"step_{STEPS:06d}")
    for name in ("summary.json", "held_out.json", "evaluations.jsonl"):
        (to / name).unlink()
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "phase": "rl')
    return to


def test_killed_and_resumed_bit_for_bit(never_stopped, tmp_path):
    config, folder, want = never_stopped("float32")
    again = killed(folder, tmp_path / "run")
    assert equal(run(config, again, resume=True), want)
    assert [line["step"] for line in numbers(again)] == [1, 2, 3, 4]
    assert numbers(again) == numbers(folder)
    assert json.loads((again / "held_out.json").read_text()) == json.loads((folder / "held_out.json").read_text())
    summaries = [json.loads((path / "summary.json").read_text()) for path in (again, folder)]
    assert summaries[0]["policies"] == summaries[1]["policies"]


def test_stopped_by_ctrl_c_and_resumed_bit_for_bit(never_stopped, tmp_path, capsys):
    _, folder, want = never_stopped("float32")
    handler = signal.getsignal(signal.SIGINT)
    interrupt(step=0)
    config = make_config(model={"dtype": "float32"}, task=Interrupts,
                         metrics={"progress": "plain", "overlap_tokens": 9})
    with toy_trainer(config, tmp_path) as trainer:
        trainer.run()
        assert trainer.step == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert [line["step"] for line in numbers(tmp_path)] == [1]
    assert "stopped after step 1 of 4; saved" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "summary.json").exists()
    Interrupts.at = 0
    assert equal(run(config, tmp_path, resume=True), want)
    assert f"resumed from {tmp_path}/checkpoints/step_000001 (step 1)" in capsys.readouterr().out.replace("\n", "")
    assert numbers(tmp_path) == numbers(folder)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    interrupt(step=1, times=2)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with toy_trainer(make_config(task=Interrupts), tmp_path) as trainer, pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [line["step"] for line in numbers(tmp_path)] == [1]
    assert not (tmp_path / "checkpoints").exists()


def test_the_terminate_signal_of_a_cluster_is_heeded_too(tmp_path):
    assert threading.current_thread() is threading.main_thread()
    with toy_trainer(make_config(schedule={"rl_steps": 2, "opd_steps": 0}), tmp_path) as trainer:
        collect = trainer.collect

        def collect_and_get_the_signal(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return collect(*args)

        trainer.collect = collect_and_get_the_signal
        trainer.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


@pytest.fixture(scope="module")
def shared_rows(tmp_path_factory):
    """(config, run folder, adapters) of a run whose replica shares out rows: TP 2 x CP 2, sequence parallelism."""
    folder = tmp_path_factory.mktemp("shared_rows")
    config = make_config(parallel={"tensor": 2, "context": 2, "sequence_parallel": True})
    return config, folder, run_ranks(4, run, config, folder, timeout_s=240.0)[0]


def test_resumed_under_context_and_sequence_parallelism_bit_for_bit(shared_rows, tmp_path):
    config, folder, want = shared_rows
    again = killed(folder, tmp_path / "run")
    for got in run_ranks(4, run, config, again, resume=True, timeout_s=240.0):
        assert equal(got, want)
    assert numbers(again) == numbers(folder)


def test_resumed_under_another_layout_in_everything(shared_rows, never_stopped, tmp_path):
    """TP 2 x CP 2 with sequence parallelism, both experts on one replica -> PP 2, each on a replica of its own."""
    _, folder, _ = shared_rows
    _, _, want = never_stopped("float64")
    again = killed(folder, tmp_path / "run")
    shutil.rmtree(again / "rollouts")
    config = make_config(parallel={"pipeline": 2})
    for got in run_ranks(4, run, config, again, resume=True, timeout_s=240.0):
        for expert, factors in want.items():
            for name, factor in factors.items():
                torch.testing.assert_close(got[expert][name], factor, rtol=0, atol=1e-8)
    assert [line["step"] for line in numbers(again)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("family", "layers", "ranks", "parallel"), [
    ("qwen3_moe", 4, 2, ({"context": 2, "moe_expert": 2},
                         {"tensor": 2, "sequence_parallel": True, "moe_expert_tensor": 2})),
    ("qwen3", 7, 3, ({"pipeline": 3, "virtual_pipeline": 2}, {"pipeline": 3}))], ids=["moe", "virtual stages"])
def test_resumed_where_the_backbone_is_shared_out_otherwise(family, layers, ranks, parallel, tmp_path):
    """EP 2 over CP 2 -> ETP 2 over TP 2; chunks of layers -> runs of layers. Adapters' checkpoints know neither."""
    path = str(tiny_model(family, num_hidden_layers=layers))
    configs = [make_config(model={"path": path}, parallel=own) for own in parallel]
    want = run_ranks(ranks, run, configs[0], tmp_path / "first", timeout_s=240.0)[0]
    again = killed(tmp_path / "first", tmp_path / "again")
    shutil.rmtree(again / "rollouts")
    for got in run_ranks(ranks, run, configs[1], again, resume=True, timeout_s=240.0):
        for expert, factors in want.items():
            for name, factor in factors.items():
                torch.testing.assert_close(got[expert][name], factor, rtol=0, atol=1e-8)
    assert [line["step"] for line in numbers(again)] == [1, 2, 3, 4]


def test_resume_refuses_other_experts(never_stopped, tmp_path):
    config, folder, _ = never_stopped("float64")
    other = make_config().model_copy(update={"experts": {"text": config.experts["text"]}})
    with pytest.raises(UserError, match=r"^experts: \['image'\] only in .*, which has \['image', 'text'\]"), \
            toy_trainer(other, folder, resume=True):
        pass
