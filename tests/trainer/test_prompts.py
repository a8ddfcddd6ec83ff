"""Which prompts a step sees: every question once per epoch, in an order that only the seed decides."""
import dataclasses

import pytest

from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.trainer import prompts
from copd_megatron.trainer.prompts import PromptSource
from copd_megatron.types import UserError
from support.tiny_models import tiny_model
from support.toy_tasks import LetterTask


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(tiny_model("qwen3"))


def source(encoder, count, seed=0, longest=100):
    return PromptSource({"text": LetterTask(count=count)}, encoder, seed, longest)


def test_an_epoch_asks_every_question_once(encoder):
    prompts = source(encoder, 7)
    epochs = [[prompts.train("text", 7 * epoch + i).key for i in range(7)] for epoch in range(2)]
    everything = {f"a/train/{i}" for i in range(7)}
    assert set(epochs[0]) == set(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_alone(encoder):
    def order(*args):
        return [source(encoder, 9, *args).train("text", i).key for i in range(9)]

    assert order(0) == order(0) != order(1)


def test_an_endless_task_is_walked_by_number(encoder):
    assert source(encoder, None).train("text", 12345).key == "a/train/12345"


def test_held_out_is_the_same_at_every_evaluation_and_ends_with_the_split(encoder):
    prompts = source(encoder, 5)
    assert [p.key for p in prompts.held_out("text", 3)] == [f"a/held_out/{i}" for i in range(3)]
    assert len(prompts.held_out("text", 99)) == 5
    assert prompts.held_out("text", 1)[0] is prompts.held_out("text", 1)[0]  # encoded once


def test_a_prompt_that_is_too_long_is_refused(encoder):
    with pytest.raises(UserError, match=r"rollout\.max_prompt_tokens: prompt 'a/train/0' has \d+ tokens; allowed is 5"):
        source(encoder, None, longest=5).train("text", 0)


def test_long_prompts_are_left_out_of_both_splits_and_counted(encoder, one_rank, caplog):
    class Lengths(LetterTask):
        """Question i is longer the larger i is."""

        def item(self, split, index):
            item = super().item(split, index)
            return dataclasses.replace(item, messages=[{"role": "user", "content": "x" * (10 * index + 1)}])

    groups = one_rank("text")
    lengths = [len(encoder.encode(Lengths(count=6).item("train", i), "text").token_ids) for i in range(6)]
    source = PromptSource({"text": Lengths(count=6)}, encoder, 0, lengths[3])
    with caplog.at_level("INFO"):
        dropped = source.drop_long(groups)
    assert dropped["text", "train"] == 2 and source.size("text", "train") == 4
    assert "experts.text.task: 2 of the 6 questions of train are longer" in caplog.text
    epoch = [source.train("text", i) for i in range(4)]
    assert {prompt.key for prompt in epoch} == {f"a/train/{i}" for i in range(4)}
    assert all(len(prompt.token_ids) <= lengths[3] for prompt in (*epoch, *source.held_out("text", 99)))
    with pytest.raises(UserError, match="all 6 questions of train of expert text are longer than 3"):
        PromptSource({"text": Lengths(count=6)}, encoder, 0, 3).drop_long(groups)


def test_prompts_are_kept_within_a_byte_budget(monkeypatch):
    eyes = PromptEncoder(tiny_model("qwen3_vl"))
    source = PromptSource({"image": LetterTask(count=9, media="image")}, eyes, 0, 100)
    size = prompts._bytes_of(source.train("image", 0))
    monkeypatch.setattr(prompts, "CACHED_BYTES", 3 * size)
    assert size > 0
    for position in range(9):
        source.train("image", position)
    assert len(source._cache) == 3 and source._cached_bytes == 3 * size
