"""`copd filter` drops what teaches nothing, keeps rows as they are, and goes on after an interruption."""
from __future__ import annotations

import json
import os
import sys

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from copd_megatron.launch import cli
from copd_megatron.launch import filter as command
from support.ranks import run_ranks
from support.tiny_models import tiny_model

RECIPE = """
from copd_megatron.config.model import ModelConfig
from copd_megatron.config.rollout import RolloutConfig
from copd_megatron.config.run import RunConfig
from copd_megatron.config.tasks import ExpertConfig, RewardConfig
from copd_megatron.tasks.image import ImageTask

def grade(item, completion):
    # By the question, not by what a random model says: never, always, and by chance.
    return {{"never": 0.0, "always": 1.0}}.get(item.extra["kind"], float(sum(map(ord, completion)) % 2))

def recipe():
    reward = {{"accuracy": RewardConfig(function=grade)}}
    return RunConfig(
        model=ModelConfig(path={model!r}, dtype="float32"),
        rollout=RolloutConfig(max_completion_tokens=4, decode_lanes=16, max_prompt_tokens=60),
        experts={{
            "data": ExpertConfig(task="copd_megatron.tasks.dataset:DatasetTask", rewards=reward,
                                 task_args={{"path": {path!r}, "held_out": 0.3, "bad_rows": "skip"}}),
            "drawn": ExpertConfig(task=ImageTask)}})
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A recipe and its data: 30 rows of three kinds, one too long, one wrong."""
    kinds = ("never", "always", "chance")
    rows = [{"prompt": f"{n}?", "answer": "1", "kind": kinds[n % 3], "row": n} for n in range(30)]
    lines = [json.dumps(row) for row in rows]
    lines += [json.dumps({"prompt": "long " * 30, "answer": "1", "kind": "chance", "row": 30}), '{"prompt": "-"}']
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    recipe = tmp_path / "filter_recipe.py"
    recipe.write_text(RECIPE.format(model=str(tiny_model("qwen3")), path=str(source)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield recipe, source, tmp_path / "out.jsonl"
    sys.modules.pop("filter_recipe", None)
    parallel_state.destroy_model_parallel()


def run(recipe, out, *options):
    return cli.main(["filter", str(recipe), "--expert", "data", "--out", str(out), *options])


def test_it_drops_what_teaches_nothing_and_resumes(files, capsys, caplog, monkeypatch):
    recipe, source, out = files
    assert run(recipe, out, "-n", "0") == 0  # lengths alone
    by_length = out.read_text().splitlines()
    assert len(by_length) == 30 and set(by_length) < set(source.read_text().splitlines())
    assert run(recipe, out) == 2 and "exists; a new file" in capsys.readouterr().err
    out.unlink()

    rates = out.with_name(out.name + ".pass_rates.jsonl")
    assert run(recipe, out) == 2 and "was begun with samples 0, now it is 8" in capsys.readouterr().err
    add, calls = command.RatesFile.add, []

    def interrupted(self, *arguments):
        add(self, *arguments)
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.RatesFile, "add", interrupted)
        assert run(recipe, out, "--overwrite") == 130
    parallel_state.destroy_model_parallel()
    assert not out.exists() and len(rates.read_text().splitlines()) == 1 + 4
    rates.write_text(rates.read_text() + '{"row": 1')
    assert run(recipe, out) == 0
    printed = capsys.readouterr().out
    measured = {row["row"]: row["pass_rate"] for row in map(json.loads, rates.read_text().splitlines()[1:])}
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in kept] == sorted(row["row"] for row in kept)
    assert set(out.read_text().splitlines()) <= set(source.read_text().splitlines())
    for row in kept:  # numbers in the file count from 1; a row that was not measured is held out
        assert 0 < measured.get(row["row"] + 1, 0.5) < 1
    for number, rate in measured.items():
        kind = ("never", "always", "chance")[(number - 1) % 3]
        assert kind == "chance" or rate == {"never": 0, "always": 1}[kind]
        assert (number - 1 in {row["row"] for row in kept}) == (0 < rate < 1)
    never, always = (sum(rate == end for rate in measured.values()) for end in (0, 1))
    assert f"{never} never solved, {always} always" in printed and "longer than 60 tokens" in printed
    assert len(kept) + never + always == 30


def test_replicas_measure_the_same(files):
    recipe, _, out = files

    def rates_on(ranks, target):
        def work():
            os.environ["RANK"] = str(dist.get_rank())
            command.leave = lambda: None  # the harness parts from the ranks itself
            return run(recipe, target, "-n", "4", "--set", "model.dtype=float64")

        assert run_ranks(ranks, work) == [0] * ranks
        lines = target.with_name(target.name + ".pass_rates.jsonl").read_text().splitlines()
        return {row["row"]: row["pass_rate"] for row in map(json.loads, lines[1:])}

    one = rates_on(1, out)
    assert one == rates_on(2, out.with_name("two.jsonl")) and len(one) > 10
    assert out.read_text() == out.with_name("two.jsonl").read_text()


def test_questions_of_no_file_cannot_be_filtered(files, capsys):
    recipe, _, out = files
    assert cli.main(["filter", str(recipe), "--expert", "drawn", "--out", str(out)]) == 2
    assert "drawn has no data file" in capsys.readouterr().err
    assert cli.main(["filter", str(recipe), "--expert", "else", "--out", str(out)]) == 2
    assert run(recipe, out.with_suffix(".parquet")) == 2
    assert "a new file that ends in .jsonl" in capsys.readouterr().err
