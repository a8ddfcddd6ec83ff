"""What every procedural family promises; each family's test file runs these over its own task."""
from __future__ import annotations

from functools import cache

import pytest

from copd_megatron.tasks.base import Task
from copd_megatron.tasks.procedural import LEVELS, ProceduralTask
from copd_megatron.types import TaskItem, UserError


def seen_by_the_model(item: TaskItem) -> tuple:
    """Wording and pixels: two items with the same value are the same prompt."""
    content = item.messages[0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return text, *(media.pixels.tobytes() for media in item.media)


@cache
def _default_task(family: type[ProceduralTask]) -> ProceduralTask:
    """One instance for all tests: drawing the held-out questions takes a second."""
    return family()


class ProceduralContract:
    """Subclass as ``TestX`` with the class attribute ``family``."""

    family: type[ProceduralTask]

    @pytest.fixture
    def task(self) -> ProceduralTask:
        return _default_task(self.family)

    def test_is_a_task_whose_training_never_ends(self, task):
        assert isinstance(task, Task)
        assert task.size("train") is None
        assert task.size("held_out") >= 1000

    def test_items_are_pure(self):
        for split in ("train", "held_out"):
            first = self.family(seed=3, held_out_size=16).item(split, 11)
            other_order = self.family(seed=3, held_out_size=16)
            other_order.item(split, 2)
            second = other_order.item(split, 11)
            assert seen_by_the_model(first) == seen_by_the_model(second)
            assert (first.key, first.answer, first.extra) == (second.key, second.answer, second.extra)

    def test_held_out_questions_differ_and_never_occur_in_training_of_any_seed(self, task):
        held_out = {seen_by_the_model(task.item("held_out", i)) for i in range(task.size("held_out"))}
        assert len(held_out) == task.size("held_out")
        for seed in (0, 1):
            trained = {seen_by_the_model(self.family(seed=seed).item("train", i)) for i in range(600)}
            assert not trained & held_out
            assert len(trained) > 560, "training questions repeat too soon"

    def test_every_kind_level_and_answer_occurs_and_no_answer_dominates(self, task):
        items = [task.item("held_out", i) for i in range(task.size("held_out"))]
        assert {(item.extra["kind"], item.extra["level"]) for item in items} == {
            (kind, level) for kind in self.family.kinds for level in LEVELS}
        answers = [item.answer for item in items]
        assert set(answers) == set(task.answers)
        assert max(answers.count(answer) for answer in set(answers)) < 0.25 * len(answers)

    def test_right_wrong_and_malformed_answers(self, task):
        item = task.item("train", 0)
        wrong = next(answer for answer in task.answers if answer != item.answer)
        assert task.verify(item, f"answer: {item.answer}") == {"accuracy": 1.0, "format": 1.0}
        assert task.verify(item, f"well, answer: {item.answer}") == {"accuracy": 1.0, "format": 0.0}
        assert task.verify(item, f"answer: {wrong}") == {"accuracy": 0.0, "format": 1.0}
        assert task.verify(item, f"answer: {item.answer}answer: {wrong}") == {"accuracy": 0.0, "format": 0.0}
        for junk in ("", "answer:", "answer: ", str(item.answer), "\x00\ud800", "answer: \n" * 1000):
            assert task.verify(item, junk) == {"accuracy": 0.0, "format": 0.0}
            assert task.extract(junk) is None
        assert task.extract(f"answer: {wrong}") == wrong

    def test_levels_kinds_and_instruction_are_respected(self):
        kind = next(iter(self.family.kinds))
        task = self.family(levels=[2], kinds=[kind], instruction="End with answer: X.", held_out_size=5)
        for index in range(5):
            item = task.item("held_out", index)
            assert (item.extra["kind"], item.extra["level"]) == (kind, 2)
            assert seen_by_the_model(item)[0].endswith("End with answer: X.")
        with pytest.raises(IndexError):
            task.item("held_out", 5)
        with pytest.raises(IndexError):
            task.item("train", -1)

    @pytest.mark.parametrize("wrong, message", [
        ({"levels": [4]}, r"task_args.levels: \[4\] was given; allowed are some of \[1, 2, 3\]"),
        ({"kinds": []}, "task_args.kinds: .* name at least one"),
        ({"kinds": ["haiku"]}, r"task_args.kinds: .* remove \['haiku'\]"),
        ({"held_out_size": 0}, "task_args.held_out_size: 0 was given"),
    ])
    def test_wrong_arguments_are_refused(self, wrong, message):
        with pytest.raises(UserError, match=message):
            self.family(**wrong)
