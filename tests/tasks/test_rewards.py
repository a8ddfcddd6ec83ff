"""Rewards are the weighted sum of parts, whatever form their functions have; a failing one is named."""
import asyncio
import functools
import math
import sys
import textwrap
import threading

import numpy as np
import pytest

from copd_megatron.config.tasks import ExpertConfig, RewardConfig
from copd_megatron.tasks.loading import build_task
from copd_megatron.tasks.rewards import Scored, Scorer
from copd_megatron.types import TaskItem, UserError


class Squares:
    """Asks for squares; answers are bare numbers."""

    def __init__(self, count=3):
        self.count = count

    def size(self, split):
        return self.count

    def item(self, split, index):
        messages = [{"role": "user", "content": f"{index}^2"}]
        return TaskItem(f"squares/{split}/{index}", messages, (), str(index**2), {"level": index})

    def verify(self, item, completion):
        accuracy = float(completion == item.answer)
        return {"accuracy": accuracy, "format": float(completion.isdigit()), "polite": 0.5}

    def extract(self, completion):
        return completion if completion.isdigit() else None


TASK = Squares()
ITEMS = [TASK.item("train", index) for index in range(3)]
COMPLETIONS = ["0", "7", "a four"]


def score(rewards, items=ITEMS, completions=COMPLETIONS):
    parts = {name: RewardConfig(weight=weight, function=part) for name, (weight, part) in rewards.items()}
    return Scorer(TASK, parts, "experts.squares.rewards").score(items, completions)


def test_default_is_mostly_accuracy():
    config = ExpertConfig(task=TASK)
    scores = Scorer(TASK, config.rewards).score(ITEMS, COMPLETIONS)
    assert scores == [Scored(1.0, {"accuracy": 1.0, "format": 1.0}, "0"),
                      Scored(0.1, {"accuracy": 0.0, "format": 1.0}, "7"),
                      Scored(0.0, {"accuracy": 0.0, "format": 0.0}, None)]


# ---- forms of functions: each returns the length of the completion ---------


def length(item, completion):
    return len(completion)


def length_by_position(question, text, scale=1):
    return scale * len(text)


def length_of_batch(items, completions):
    return np.array([len(completion) for completion in completions])


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert (data_source, ground_truth, extra_info) == ("squares", str(extra_info["level"]**2), extra_info)
    assert not kwargs
    return {"score": len(solution_str), "acc": solution_str == ground_truth, "pred": solution_str}


def compute_score_short(solution_str, ground_truth):
    return len(solution_str)


def compute_score_batched(data_sources, solution_strs, ground_truths, extra_infos):
    assert data_sources == ["squares"] * 3 and ground_truths == ["0", "1", "4"]
    return [{"score": len(text), "level": info["level"]} for text, info in zip(solution_strs, extra_infos)]


async def length_async(item, completion):
    await asyncio.sleep(0)
    return len(completion)


async def length_of_batch_async(items, completions):
    await asyncio.sleep(0)
    return [len(completion) for completion in completions]


class Length:
    async def __call__(self, item, completion):
        return len(completion)

    def method(self, item, completion):
        return np.float32(len(completion))


@pytest.mark.parametrize("function", [
    length, length_by_position, length_of_batch, compute_score, compute_score_short, compute_score_batched,
    length_async, length_of_batch_async, Length(), Length().method,
    functools.partial(length_by_position, scale=1),
    lambda item, completion: length_async(item, completion), lambda q, t: len(t)])
def test_every_form_of_function_gives_the_same_rewards(function):
    scores = score({"length": (0.5, function)})
    assert [scored.reward for scored in scores] == [0.5, 0.5, 3.0]
    assert [scored.parts["length"] for scored in scores] == [1.0, 1.0, 6.0]
    assert [scored.extracted for scored in scores] == ["0", "7", None]


def test_other_numbers_of_a_dict_are_parts_of_weight_zero():
    first = score({"verl": (1.0, compute_score)})[0]
    assert first == Scored(1.0, {"verl": 1.0, "verl/acc": 1.0}, "0")


def test_parts_mix_in_the_order_given():
    scores = score({"length": (-0.1, length), "accuracy": (1.0, None), "polite": (2.0, None)})
    assert list(scores[0].parts) == ["length", "accuracy", "polite"]
    assert [scored.reward for scored in scores] == pytest.approx([-0.1 + 1 + 1, -0.1 + 1, -0.6 + 1])


def test_verl_arguments_prefer_the_columns_of_the_row():
    item = TaskItem("k/1", [], (), "5", {"data_source": "gsm8k", "extra_info": {"index": 4}})
    seen = {}

    def record(data_source, solution_str, ground_truth, extra_info):
        seen.update(data_source=data_source, extra_info=extra_info)
        return 1

    score({"verl": (1.0, record)}, [item], ["x"])
    assert seen == {"data_source": "gsm8k", "extra_info": {"index": 4}}


def test_async_calls_run_together():
    """With one call at a time, nobody would ever see all three under way."""
    under_way = []

    async def wait_for_all(item, completion):
        under_way.append(item.key)
        while len(under_way) < 3:
            await asyncio.sleep(0.001)
        return 1.0

    assert [scored.reward for scored in score({"wait": (1.0, wait_for_all)})] == [1.0] * 3


def test_async_functions_work_inside_a_running_event_loop():
    async def notebook():
        return score({"length": (1.0, length_async)})

    assert [scored.reward for scored in asyncio.run(notebook())] == [1.0, 1.0, 6.0]
    assert threading.active_count() < 50


def test_empty_batch_calls_nothing():
    def never(items, completions):
        raise AssertionError("called")

    assert score({"never": (1.0, never), "accuracy": (1.0, None)}, [], []) == []


# ---- what goes wrong ------------------------------------------------------


def broken(item, completion):
    return 1 / (len(completion) - 6)


async def broken_async(item, completion):
    return broken(item, completion)


def broken_batch(items, completions):
    raise KeyError("x")


@pytest.mark.parametrize("function, message", [
    (broken, r"broken\): for squares/train/2 it raised ZeroDivisionError: .* at .*test_rewards.py:\d+; "),
    (broken_async, r"broken_async\): for squares/train/2 it raised ZeroDivisionError"),
    (broken_batch, r"broken_batch\): for squares/train/0 to squares/train/2 it raised KeyError"),
    (lambda item, completion: math.nan, "squares/train/0 it returned 'nan'; allowed is a finite number"),
    (lambda item, completion: None, "returned 'None'"), (lambda item, completion: "1.0", "returned '1.0'"),
    (lambda item, completion: float("inf"), "returned 'inf'"),
    (lambda item, completion: [1, 2], "returned"),
    (lambda item, completion: {"reward": 1}, r"a dict with \['reward'\]; allowed is one with 'score'"),
    (lambda item, completion: {"score": math.inf}, "returned 'inf'"),
    (lambda items, completions: [1.0], "returned 1 for 3 completions"),
    (lambda items, completions: 1.0, "returned a float for 3 completions"),
    (lambda items, completions: [1.0, 2.0, math.nan], "for squares/train/2 it returned 'nan'"),
])
def test_function_that_fails_is_named_with_its_item(function, message):
    with pytest.raises(UserError, match=r"experts\.squares\.rewards\.part\.function .*" + message):
        score({"part": (1.0, function)})


@pytest.mark.parametrize("rewards, message", [
    ({}, "rewards: no part was given"),
    ({"accuracy": (math.nan, None)}, "rewards.accuracy.weight: nan was given"),
    ({"brevity": (1.0, None)}, r"\['brevity'\] was given without a function; the task's verifier has \['acc"),
    ({"p": (1.0, 3)}, "rewards.p.function: a int was given"),
    ({"p": (1.0, "no_such_module_x:f")}, "rewards.p.function: .* there is no module 'no_such_module_x'"),
    ({"p": (1.0, "math:no_such")}, "math has no 'no_such'"),
    ({"p": (1.0, "math.sqrt")}, "allowed is 'pkg.module:Name'"),
    ({"p": (1.0, lambda completion: 1.0)}, "rewards.p.function .*allowed are"),
    ({"p": (1.0, lambda item, completion, judge: 1.0)}, "rewards.p.function .*give others a default"),
    ({"p": (1.0, lambda data_source, solution_str: 1.0)}, "allowed are"),
])
def test_bad_rewards_are_refused_before_training(rewards, message):
    with pytest.raises(UserError, match=message):
        score(rewards)


def test_task_whose_verifier_fails_is_named():
    class Shaky(Squares):
        def verify(self, item, completion):
            if completion == "7":
                raise IndexError("shaky")
            return {"accuracy": math.nan if completion == "nan" else 1.0}

    scorer = Scorer(Shaky(), {"accuracy": RewardConfig()}, "rewards")
    with pytest.raises(UserError, match=r"Shaky.verify\): for squares/train/1 it raised IndexError: shaky"):
        scorer.score(ITEMS, COMPLETIONS)
    with pytest.raises(UserError, match="for squares/train/0 it returned 'nan'"):
        scorer.score(ITEMS[:1], ["nan"])
    with pytest.raises(ValueError, match="1 items for 2 completions"):
        scorer.score(ITEMS[:1], ["1", "2"])


# ---- tasks ----------------------------------------------------------------


def test_task_given_in_every_way():
    assert build_task(ExpertConfig(task=TASK), "e") is TASK
    assert build_task(ExpertConfig(task=Squares, task_args={"count": 5}), "e").count == 5
    assert build_task(ExpertConfig(task=lambda: Squares(2)), "e").count == 2
    assert build_task(ExpertConfig(task=functools.partial(Squares, 4)), "e").count == 4


@pytest.fixture
def outside_package(tmp_path, monkeypatch):
    """A user's package that is not part of the repository."""
    package = tmp_path / "my_lab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "broken.py").write_text("import no_such_dependency\n")
    (package / "cubes.py").write_text(textwrap.dedent('''
        from copd_megatron.types import TaskItem

        class Cubes:
            def __init__(self, *, offset=0):
                self.offset = offset
            def size(self, split):
                return None
            def item(self, split, index):
                messages = [{"role": "user", "content": "cube?"}]
                return TaskItem(f"cubes/{split}/{index}", messages, (), (index + self.offset)**3)
            def verify(self, item, completion):
                return {"accuracy": float(completion == str(item.answer))}
            def extract(self, completion):
                return completion

        READY = Cubes(offset=10)

        class Judge:
            @staticmethod
            def brevity(item, completion):
                return 1 / len(completion)
        '''))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_lab"
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_task_and_reward_from_a_package_outside(outside_package):
    rewards = {"accuracy": RewardConfig(),
               "brevity": RewardConfig(weight=0.5, function="my_lab.cubes:Judge.brevity")}
    config = ExpertConfig(task="my_lab.cubes:Cubes", task_args={"offset": 2}, rewards=rewards)
    task = build_task(config, "cubes")
    item = task.item("train", 0)
    scored, = Scorer(task, config.rewards).score([item], ["8"])
    assert scored == Scored(1.5, {"accuracy": 1.0, "brevity": 1.0}, "8")
    assert build_task(ExpertConfig(task="my_lab.cubes:READY"), "cubes").item("train", 0).answer == 1000
    # A fault of the package, not of the reference.
    with pytest.raises(UserError, match="experts.cubes.task: .*.*no_such_dependency.*mend the module"):
        build_task(ExpertConfig(task="my_lab.broken:Task"), "cubes")


@pytest.mark.parametrize("config, message", [
    ({"task": "my_lab.nothing:Task"}, "experts.cubes.task: .* there is no module 'my_lab.nothing'"),
    ({"task": "my_lab.cubes:Cube"}, r"my_lab.cubes has no 'Cube', it has \['Cubes', "),
    ({"task": "my_lab.cubes:Cubes", "task_args": {"ofset": 1}},
     r"experts.cubes.task_args: \{'ofset': 1\} was given; allowed is \(\*, offset=0\)"),
    ({"task": "my_lab.cubes:READY", "task_args": {"offset": 1}}, "takes no arguments"),
    ({"task": "my_lab.cubes:Judge"}, r"a Judge was given; a task has the methods .* add \['size', 'item'"),
    ({"task": 7}, "experts.cubes.task: a int was given"),
    ({"task": Squares, "task_args": {"count": 0}}, "it has no training question"),
])
def test_bad_tasks_are_refused(outside_package, config, message):
    with pytest.raises(UserError, match=message):
        build_task(ExpertConfig(**config), "cubes")
