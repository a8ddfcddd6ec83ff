"""Which prompts a step sees: every question once per epoch, in an order that only the seed decides."""
import pytest

from copd_megatron.model.prompt import PromptEncoder
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
