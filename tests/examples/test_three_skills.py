"""The three text skills of the small language model: exact answers, disjoint splits, refusals of the family."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from copd_megatron.tasks.base import Task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def skills():
    sys.path.insert(0, str(EXAMPLES))
    import three_skills

    yield three_skills
    sys.path.remove(str(EXAMPLES))


def question(item) -> str:
    return item.messages[-1]["content"]


@pytest.mark.parametrize("name", ["Addition", "Reversing", "Comparing"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_answers_are_right_and_held_out_questions_are_never_trained_on(skills, name, level):
    task = getattr(skills, name)(levels=[level], held_out_size=40)
    assert isinstance(task, Task)
    held_out = [task.item("held_out", i) for i in range(40)]
    asked = {question(item) for item in held_out}
    assert len(asked) == 40
    assert not asked & {question(task.item("train", i)) for i in range(300)}
    numbers = {skills.in_words(n): n for n in range(1000)}
    for item in held_out:
        assert [m["role"] for m in item.messages] == ["system", "user", "assistant", "user"]
        if name == "Addition":
            assert item.answer == str(eval(question(item)))
        elif name == "Reversing":
            words = question(item).split(", ")
            assert len(words) == level + 1 and item.answer.split(", ") == words[::-1]
        else:
            both = [numbers[part] for part in question(item).split(" or ")]
            assert both[0] != both[1] and numbers[item.answer] == max(both) < (20, 100, 1000)[level - 1]
        assert set(task.verify(item, item.answer).values()) == {1.0}
        assert task.verify(item, f"It is {item.answer}.") == task.verify(item, item.answer) | {"format": 0.0}
        assert task.verify(item, item.answer.upper())["accuracy"] == 1.0
        for wrong in ("", "?", "I do not know", f"{item.answer} and {wrong_answer(name)}"):
            assert task.verify(item, wrong)["accuracy"] == 0.0, wrong


def wrong_answer(name: str) -> str:
    return {"Addition": "100000", "Reversing": "window, basket", "Comparing": "zero"}[name]


@pytest.mark.parametrize("reply, closeness", [("17", 1.0), ("It is 14", 0.7), ("20", 0.7), ("27", 0.0), ("99", 0.0),
                                              ("none", 0.0), ("", 0.0), ("9" * 5000, 0.0)])
def test_a_wrong_sum_is_worth_less_the_further_off_it_is(skills, reply, closeness):
    task = skills.Addition(held_out_size=1)
    item = replace(task.item("held_out", 0), answer="17")
    assert task.verify(item, reply)["closeness"] == pytest.approx(closeness)


def test_every_number_is_read_back_whole(skills):
    task = skills.Comparing(held_out_size=1)
    for number in range(1000):
        words = skills.in_words(number)
        assert task.extract(f"not two, but {words}!") == words
    assert len({skills.in_words(n) for n in range(1000)}) == 1000


def test_examples_are_right_and_of_the_format(skills):
    for family in (skills.Addition, skills.Reversing, skills.Comparing):
        asked, answered = family.example
        task = family(held_out_size=1)
        assert task.extract(answered) == answered
        assert answered in (str(17), "dog, car, hat", "eight") and asked not in {question(task.item("train", 0))}
