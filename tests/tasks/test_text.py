"""Text questions: the family's promises, and every answer worked out again from the wording."""
import re

import pytest

from copd_megatron.tasks.text import TextTask
from support.procedural_contract import ProceduralContract, seen_by_the_model


class TestText(ProceduralContract):
    family = TextTask


def solve(text: str) -> int:
    """An independent reading of the wording."""
    if counted := re.fullmatch(r"how many (\w) in ([\w ]+)\?", text):
        return counted[2].split().count(counted[1])
    story, thing, ending = re.fullmatch(r"(.*)\. how many (\w+) (in all|more)\?", text).groups()
    first, second = (int(number) for _, number, what in (clause.split() for clause in story.split(", "))
                     if what == thing)
    return first + second if ending == "in all" else first - second


@pytest.mark.parametrize("kind", TextTask.kinds)
def test_answers_follow_from_the_wording(kind):
    task = TextTask(kinds=[kind])
    for index in range(200):
        item = task.item("train", index)
        assert str(solve(seen_by_the_model(item)[0])) == item.answer


def test_higher_levels_tell_more():
    lengths = [len(seen_by_the_model(TextTask(kinds=["sum"], levels=[level]).item("train", 0))[0])
               for level in (1, 2, 3)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2]

