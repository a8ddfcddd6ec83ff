"""The calculator computes, refuses everything else, and ends its episodes."""
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.tasks.base import Environment, Task, environment_of
from copd_megatron.tasks.calculator import CalculatorTask, evaluate
from copd_megatron.types import UserError


@pytest.mark.parametrize("expression, value", [
    ("12+30", 42), (" 2*(3-5) ", -4), ("7/2", Fraction(7, 2)), ("7//2", 3), ("7%4", 3), ("-3*-3", 9),
    ("0.1+0.2", Fraction(3, 10)),
    ("2*3+4", 10), ("1e3", 1000),
])
def test_value(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize("expression", [
    "", "1+", "1/0", "5%0", "2**100", "9**9**9", "__import__('os').system('x')", "x+1", "(1).real",
    "[1][0]", "True+1",
    "1 if 1 else 2", "lambda: 1", "'a'*9", "1j", "10**13", "9999999*9999999", "1e999",
    "(" * 50 + "1" + ")" * 50,
    "1+" * 60 + "1", "\x00", "1;2", "1\n2", "~1", "1<2", "nan", "0x" + "f" * 90])
def test_refused(expression):
    with pytest.raises(ValueError):
        evaluate(expression)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120), st.text(alphabet="0123456789+-*/%(). e", max_size=40))
def test_any_text_has_a_value_or_is_refused(anything, arithmetic):
    for text in (anything, arithmetic):
        try:
            assert isinstance(evaluate(text), Fraction)
        except ValueError:
            pass


def test_it_is_a_task_and_an_environment():
    task = CalculatorTask(digits=1, terms=2, held_out_size=40, seed=5)
    assert isinstance(task, Task) and isinstance(task, Environment) and environment_of(task) is task
    assert task.size("train") is None and task.size("held_out") == 40
    train = [task.item("train", index) for index in range(80)]
    held_out = [task.item("held_out", index) for index in range(40)]
    assert not {item.extra["expression"] for item in train} & {item.extra["expression"] for item in held_out}
    assert task.item("train", 3).messages == train[3].messages
    for item in train:
        assert item.answer == str(evaluate(item.extra["expression"]))
    with pytest.raises(IndexError):
        task.item("held_out", 40)


def test_an_episode():
    task = CalculatorTask(max_calls=2)
    item = task.item("train", 0)
    turns = ["I will compute.\ncalc: 12*30"]
    assert task.respond(item, turns) == "\n= 360\n"
    turns += ["\n= 360\n", "calc: 7/2\n  calc: 1/3"]
    assert task.respond(item, turns) == "\n= 0.333333\n"  # the last call counts
    turns += ["\n= 0.333333\n", "calc: 1+1"]
    assert task.respond(item, turns) is None  # both calls are used
    for last in ("answer: 5", "calc: 1+1\nanswer: 2", "hm", ""):
        assert task.respond(item, [last]) is None
    assert task.respond(item, ["calc: import os"]) == "\n= error\n"


def test_verifier():
    task = CalculatorTask()
    item = task.item("train", 1)
    right = f"calc: {item.extra['expression']}\n= {item.answer}\nanswer: {item.answer}"
    assert task.verify(item, right) == {"accuracy": 1.0, "format": 1.0}
    assert task.verify(item, f"calc: 1\n= {item.answer}\n") == {"accuracy": 0.0, "format": 0.0}
    assert task.verify(item, f"answer: {int(item.answer) + 1}") == {"accuracy": 0.0, "format": 1.0}
    assert task.verify(item, "answer: " + "9" * 5000) == {"accuracy": 0.0, "format": 0.0}
    assert task.extract("answer: 1 answer: 007") == "7" and task.extract("= 7") is None


@pytest.mark.parametrize("settings_", [{"digits": 0}, {"terms": 9}, {"max_calls": 0}, {"held_out_size": 0}])
def test_bad_settings(settings_):
    with pytest.raises(UserError, match=f"task_args.{next(iter(settings_))}: .* was given; allowed is"):
        CalculatorTask(**settings_)
