"""The split of procedural questions: by content alone, and honest about how many questions there are."""
import numpy as np
import pytest

from copd_megatron.tasks.procedural import HELD_OUT_ONE_IN, ProceduralTask, Question, content_hash, split_of
from copd_megatron.types import Media, UserError

FEW = 40


class FewQuestions(ProceduralTask):
    """Forty questions in all."""

    domain = "few"
    kinds = {"echo": lambda rng, level: Question(f"say {rng.integers(FEW)}", "x")}
    answers = ("x",)


def test_a_family_can_be_used_up_exactly_but_not_beyond():
    held_out = {f"say {n}" for n in range(FEW) if split_of(Question(f"say {n}", "x")) == "held_out"}
    assert 0 < len(held_out) < FEW
    task = FewQuestions(held_out_size=len(held_out))
    asked = {task.item("held_out", index).messages[0]["content"] for index in range(len(held_out))}
    assert asked == held_out
    with pytest.raises(UserError, match=f"task_args.held_out_size: {FEW} was given; only about {len(held_out)} "):
        FewQuestions(held_out_size=FEW).item("held_out", 0)


def test_the_split_follows_wording_and_pixels_but_not_the_answer():
    pixels = np.zeros((4, 4, 3), np.uint8)
    other = pixels.copy()
    other[0, 0, 0] = 1
    image, changed = Media("image", pixels), Media("image", other)
    hashes = {content_hash(Question("a", "1", media)) for media in ((), (image,), (changed,), (image, changed))}
    assert len(hashes) == 4
    assert content_hash(Question("a", "1", (image,))) == content_hash(Question("a", "2", (image,)))
    assert content_hash(Question("a", "1")) != content_hash(Question("b", "1"))


def test_about_one_question_in_four_is_held_out():
    splits = [split_of(Question(f"number {n}", "")) for n in range(4000)]
    assert splits.count("held_out") == pytest.approx(4000 / HELD_OUT_ONE_IN, rel=0.1)
