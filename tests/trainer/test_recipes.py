"""From the command line, with everything that a recipe may bring of its own: task, rewards, topology, losses.

The recipe and its modules lie in a folder outside the repository; nothing of the package is edited.
"""
import json
import os
import sys

import pyarrow.parquet as pq
import pytest
from megatron.core import parallel_state

from copd_megatron.launch import cli
from copd_megatron.parallel.groups import shutdown_distributed
from support.tiny_models import tiny_model

TASK = '''
from copd_megatron.types import TaskItem

class Echo:
    """Say the word again."""

    def __init__(self, words):
        self.words = words

    def size(self, split):
        return len(self.words) if split == "train" else 2

    def item(self, split, index):
        word = self.words[index] if split == "train" else f"w{index}"
        return TaskItem(f"echo/{split}/{index}", [{"role": "user", "content": word}], (), word,
                        {"data_source": "echo", "extra_info": {"index": index}})

    def verify(self, item, completion):
        return {"accuracy": float(completion == item.answer), "format": float(bool(completion))}

    def extract(self, completion):
        return completion or None
'''
REWARDS = '''
SEEN = []

def compute_score(data_source, solution_str, ground_truth, extra_info):
    SEEN.append((data_source, ground_truth, extra_info["index"]))
    return {"score": len(set(solution_str)) / (1 + len(solution_str)), "letters": float(len(solution_str))}

def brief(items, completions):
    return [1.0 / (1 + len(completion)) for completion in completions]

async def polite(item, completion):
    return float("a" in completion)
'''
GRAPH = '''
from copd_megatron.types import Edge

def one_way(experts, opd_step):
    return [Edge(experts[0], experts[1], beta=0.5)] if opd_step == 0 else []
'''
LOSSES = '''
import torch

def plain(policy_logprobs_T, old_logprobs_T, advantages_T, sequence_ids_T, loss_mask_T):
    return -advantages_T * torch.exp(policy_logprobs_T - old_logprobs_T.detach())

def average(policy_logprobs_T, old_logprobs_T, advantages_T, sequence_ids_T, loss_mask_T):
    return -(advantages_T * policy_logprobs_T).mean()

def signs(rewards_BG):
    return torch.sign(rewards_BG - rewards_BG.mean(1, keepdim=True))
'''
RECIPE = '''
from copd_megatron.config.run import RunConfig
from my_lab.graphs import one_way
from my_lab.tasks import Echo

def recipe():
    rewards = {"accuracy": {"weight": 0.5, "function": "my_lab.rewards:compute_score"},
               "brief": {"weight": 0.3, "function": "my_lab.rewards:brief"},
               "polite": {"weight": 0.2, "function": "my_lab.rewards:polite"}, "format": {"weight": 0.1}}
    return RunConfig(
        model={"path": MODEL, "dtype": "float32"},
        experts={"echo": {"task": Echo, "task_args": {"words": ["one", "two", "three"]}, "rewards": rewards},
                 "other": {"task": "my_lab.tasks:Echo", "task_args": {"words": ["four"]}}},
        adapter={"rank": 2}, exchange={"topology": one_way},
        rollout={"prompts_per_step": 2, "group_size": 3, "max_completion_tokens": 4},
        rlvr={"loss_function": "my_lab.losses:plain", "advantage_function": "my_lab.losses:signs"},
        optimizer={"lr": 1e-2}, schedule={"rl_steps": 1, "opd_steps": 2}, evaluation={"final_prompts": 2},
        metrics={"progress": "plain"})
'''


@pytest.fixture(autouse=True)
def nothing_left():
    """A command is a process of its own in life; here the next test must not find what an error left behind."""
    yield
    parallel_state.destroy_model_parallel()
    shutdown_distributed()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A package in a folder of its own with a recipe beside it, and the run that the recipe makes."""
    folder = tmp_path_factory.mktemp("lab")
    package = folder / "my_lab"
    package.mkdir()
    for name, text in (("__init__", ""), ("tasks", TASK), ("rewards", REWARDS), ("graphs", GRAPH), ("losses", LOSSES)):
        (package / f"{name}.py").write_text(text)
    recipe = folder / "echo_recipe.py"
    recipe.write_text(RECIPE.replace("MODEL", repr(str(tiny_model("qwen3")))))
    path, environ = list(sys.path), dict(os.environ)
    run = folder / "run"
    code = cli.main(["train", str(recipe), "--run-dir", str(run), "--set", "seed=3"])
    yield folder, recipe, run, code
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environ)
    for name in [n for n in sys.modules if n.split(".")[0] in ("my_lab", "echo_recipe")]:
        del sys.modules[name]


def lines(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_a_recipe_brings_its_own_task_and_rewards(lab):
    _, _, run, code = lab
    assert code == 0
    first = lines(run, "metrics.jsonl")[0]
    parts = {name: first[f"echo/reward/{name}"] for name in ("accuracy", "brief", "polite", "format")}
    weights = {"accuracy": 0.5, "brief": 0.3, "polite": 0.2, "format": 0.1}
    assert first["echo/reward"] == pytest.approx(sum(weights[name] * value for name, value in parts.items()))
    assert first["echo/reward/accuracy/letters"] > 0
    assert "other/reward/brief" not in first
    seen = sys.modules["my_lab.rewards"].SEEN
    assert {row for row in seen} >= {("echo", "one", 0), ("echo", "two", 1), ("echo", "three", 2)}


def test_a_recipe_brings_its_own_topology(lab):
    _, _, run, _ = lab
    edges = [{name.split("/")[1] for name in line if name.startswith("edge/")} for line in lines(run, "metrics.jsonl")]
    assert edges == [set(), {"echo->other"}, set()]


def test_a_recipe_brings_its_own_loss_and_advantage(lab):
    _, _, run, _ = lab
    advantages = pq.read_table(run / "rollouts" / "step_000001.parquet")["advantage"].to_pylist()
    assert {-1.0, 1.0} <= set(advantages) <= {-1.0, 0.0, 1.0}
    for line in lines(run, "metrics.jsonl"):
        assert line["echo/ratio_mean"] == pytest.approx(1)
        assert "echo/clip_fraction" not in line
        assert line["echo/grad_norm"] > 0


def test_the_run_folder_can_be_read_back(lab, tmp_path, capsys):
    _, recipe, run, _ = lab
    tree = json.loads((run / "config.json").read_text())
    assert tree["exchange"]["topology"] == "my_lab.graphs:one_way"
    assert tree["experts"]["echo"]["task"] == "my_lab.tasks:Echo"
    assert tree["seed"] == 3
    info = json.loads((run / "run.json").read_text())
    assert info["recipe"] == str(recipe)
    found = tmp_path / "found.json"
    assert cli.main(["eval", str(run), "--json", str(found)]) == 0
    out = capsys.readouterr().out
    assert "merged" in out and "greedy" in out
    assert json.loads(found.read_text())["policies"] == lines(run, "evaluations.jsonl")[-1]["policies"]


def test_eval_of_a_recipe_takes_samples(lab, tmp_path, capsys):
    _, recipe, _, _ = lab
    found = tmp_path / "found.json"
    options = ["--prompts", "1", "--samples", "2", "--sampled", "--json", str(found)]
    assert cli.main(["eval", str(recipe), *options]) == 0
    result = json.loads(found.read_text())
    assert (result["mode"], result["samples"], list(result["policies"])) == ("sampled", 2, ["base"])
    assert result["policies"]["base"]["echo"]["n"] == 1
    assert cli.main(["eval", str(recipe), "--samples", "2"]) == 2
    assert "evaluation.samples: more than 1 greedy sample" in capsys.readouterr().err


def test_preview_shows_prompts_answers_and_rewards(lab, capsys):
    _, recipe, _, _ = lab
    assert cli.main(["preview", str(recipe), "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("<|im_start|>user") == 4
    assert out.count("truth:") == 4
    assert all(word in out for word in ("polite", "extracted", "pass", "cut", "carries loss"))


def test_the_report_is_built(lab, capsys):
    _, _, run, _ = lab
    assert cli.main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out


def test_a_finished_run_resumes_to_the_same_numbers(lab):
    _, recipe, run, _ = lab
    before, summary = lines(run, "metrics.jsonl"), json.loads((run / "summary.json").read_text())
    assert cli.main(["train", str(recipe), "--run-dir", str(run), "--set", "seed=3", "--resume"]) == 0
    assert lines(run, "metrics.jsonl") == before
    assert json.loads((run / "summary.json").read_text())["policies"] == summary["policies"]


@pytest.mark.parametrize(("override", "message"), [
    ("rlvr.loss_function=my_lab.losses:missing", "rlvr.loss_function: 'my_lab.losses:missing' was given; "),
    ("rlvr.loss_function=3", "rlvr.loss_function: a int was given"),
    ("rlvr.loss_function=my_lab.losses:signs", "rlvr.loss_function: TypeError: "),
    ("rlvr.loss_function=my_lab.losses:average", "rlvr.loss_function: it returned () for "),
    ("rlvr.advantage_function=my_lab.losses:average", "rlvr.advantage_function: TypeError: "),
    ("rlvr.advantage_function=my_lab.tasks:Echo", "rlvr.advantage_function: it returned something else"),
    ("exchange.topology=my_lab.graphs:absent", "exchange.topology: 'my_lab.graphs:absent'"),
])
def test_own_functions_that_do_not_fit(lab, tmp_path, capsys, override, message):
    _, recipe, _, _ = lab
    assert cli.main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--set", override]) == 2
    assert message in capsys.readouterr().err
