"""What every rollout engine must do, as tests over a harness; each engine's test file runs them on its own.

A test file subclasses ``EngineContract`` and provides a fixture ``harness`` (see ``Harness``).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest

from copd_megatron.rollout.engine import Request, RolloutEngine, SamplingParams, VisualSource
from copd_megatron.types import Completion, Prompt, Segment, UserError


class Harness(Protocol):
    """An engine to test, and the trainer to hold it against."""

    experts: tuple[str, ...]
    """At least two, whose answers differ from each other and from the backbone's."""
    vocab_size: int
    """Small enough that a third of it as stop tokens ends completions soon."""
    tolerance: float
    """Of log-probs, engine against trainer."""
    max_prompt_tokens: int
    visual: VisualSource | None
    """Features of prompts with media; None if the engine's model does not see."""

    def engine(self, **rollout: object) -> RolloutEngine:
        """A new engine with the same weights and seed; ``rollout`` changes fields of its `RolloutConfig`."""

    def prompt(self, number: int, visual: bool = False) -> Prompt:
        """The prompt of this number; lengths differ between numbers."""

    def logprobs(self, prompt: Prompt, expert: str | None, token_ids: Sequence[int],
                 temperature: float) -> np.ndarray:
        """[R, V]: the trainer's log-probs of every token in the place of each completion token."""


def answer(harness: Harness, requests: Sequence[Request], **rollout: object) -> list[list[Completion]]:
    return harness.engine(**rollout).generate(requests, harness.visual)


def tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in completions]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def nucleus(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """[V] log-probs renormalised over the fewest most likely tokens that reach ``top_p``; -inf elsewhere."""
    order = np.argsort(-logprobs, kind="stable")
    before = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
    kept = np.full(len(logprobs), -np.inf)
    kept[order[before < top_p]] = logprobs[order[before < top_p]]
    return log_softmax(kept)


class EngineContract:
    """The tests."""

    PARAMS = SamplingParams(max_tokens=6, stop_token_ids=())

    def mixed(self, harness: Harness, **params: object) -> list[Request]:
        """Requests of all policies over prompts of several lengths, with media where the model sees."""
        settings = replace(self.PARAMS, **params)
        policies = [*harness.experts, None]
        prompts = [harness.prompt(1), harness.prompt(2), harness.prompt(3, visual=harness.visual is not None)]
        return [Request(prompt, policy, 2, settings, noise_key=(4,))
                for prompt in prompts for policy in policies]

    def test_answers_come_in_order(self, harness):
        requests = self.mixed(harness)
        requests[1] = replace(requests[1], samples=3, sample_offset=5)
        groups = answer(harness, requests)
        assert [len(group) for group in groups] == [request.samples for request in requests]
        for request, group in zip(requests, groups):
            for number, completion in enumerate(group):
                assert completion.prompt is request.prompt
                assert completion.expert == request.expert
                assert completion.sample == request.sample_offset + number
                assert [segment.origin for segment in completion.segments] == ["policy"]
                assert all(0 <= token < harness.vocab_size for token in completion.token_ids)

    def test_nothing_asked_nothing_answered(self, harness):
        assert answer(harness, []) == []

    def test_without_stop_tokens_length_ends_it(self, harness):
        for request, group in zip(requests := self.mixed(harness), answer(harness, requests)):
            for completion in group:
                assert completion.finish == "length"
                assert len(completion.token_ids) == request.params.max_tokens

    def test_a_stop_token_ends_it_and_is_its_last_token(self, harness):
        stops = tuple(range(0, harness.vocab_size, 3))
        finished = {"stop": 0, "length": 0}
        for group in answer(harness, self.mixed(harness, stop_token_ids=stops)):
            for completion in group:
                *body, last = completion.token_ids
                assert not set(body) & set(stops)
                assert (last in stops) == (completion.finish == "stop")
                assert completion.finish == "stop" or len(completion.token_ids) == 6
                finished[completion.finish] += 1
        assert min(finished.values()) > 0, "this test saw one kind of end only"

    def test_a_stop_token_in_the_last_place_stops(self, harness):
        everything = tuple(range(harness.vocab_size))
        for group in answer(harness, self.mixed(harness, stop_token_ids=everything, max_tokens=1)):
            assert {completion.finish for completion in group} == {"stop"}
            assert {len(completion.token_ids) for completion in group} == {1}

    @pytest.mark.parametrize("training,sampling,top_p", [(1.0, 1.0, 1.0), (0.7, 0.7, 1.0), (1.0, 1.6, 1.0),
                                                          (1.0, 1.0, 0.6), (1.3, 0.8, 0.5)])
    def test_logprobs_are_the_trainers(self, harness, training, sampling, top_p):
        requests = self.mixed(harness, temperature=sampling, top_p=top_p, stop_token_ids=(3, 9))
        seen = 0
        for request, group in zip(requests, answer(harness, requests, temperature=training)):
            for completion in group:
                truth = harness.logprobs(request.prompt, request.expert, completion.token_ids, training)
                drawn = log_softmax(truth * (training / sampling))
                segment, = completion.segments
                for place, token in enumerate(completion.token_ids):
                    kept = nucleus(drawn[place], top_p)
                    assert abs(segment.logprobs[place] - truth[place, token]) < harness.tolerance
                    assert abs(segment.sampled_logprobs[place] - kept[token]) < harness.tolerance
                    seen += np.isinf(kept).any()
        assert seen or top_p == 1, "the nucleus never left a token out"

    def test_greedy_takes_the_most_likely(self, harness):
        requests = self.mixed(harness, greedy=True)
        for request, group in zip(requests, answer(harness, requests)):
            truth = harness.logprobs(request.prompt, request.expert, group[0].token_ids, 1.0)
            for completion in group:
                assert completion.token_ids == truth.argmax(1).tolist()
                assert completion.segments[0].sampled_logprobs == [0.0] * len(truth)
                np.testing.assert_allclose(completion.logprobs, truth.max(1), atol=harness.tolerance, rtol=0)

    def test_samples_follow_the_distribution(self, harness):
        """Pearson's chi-square over the first token: mean f and variance 2 f for f degrees of freedom."""
        prompt, expert, samples = harness.prompt(1), harness.experts[0], 4000
        request = Request(prompt, expert, samples, replace(self.PARAMS, max_tokens=1), (0,))
        first = [completion.token_ids[0] for completion in answer(harness, [request])[0]]
        expected = samples * np.exp(harness.logprobs(prompt, expert, [0], 1.0)[0])
        counts = np.bincount(first, minlength=harness.vocab_size)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = harness.vocab_size - 1
        assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5

    def test_same_noise_same_answer(self, harness):
        requests = self.mixed(harness)
        assert tokens(answer(harness, requests)) == tokens(answer(harness, requests))

    def test_other_noise_other_answer(self, harness):
        request = Request(harness.prompt(1), harness.experts[0], 8, self.PARAMS, (4,))
        here, = tokens(answer(harness, [request]))
        there, = tokens(answer(harness, [replace(request, noise_key=(5,))]))
        assert len({tuple(row) for row in here + there}) == 16

    def test_samples_of_a_group_may_be_asked_for_apart(self, harness):
        request = Request(harness.prompt(2), harness.experts[0], 6, self.PARAMS, (4,))
        whole, = tokens(answer(harness, [request]))
        late, early = replace(request, samples=2, sample_offset=4), replace(request, samples=4)
        parts = tokens(answer(harness, [late, early]))
        assert parts[1] + parts[0] == whole

    def test_neighbours_and_order_do_not_matter(self, harness):
        requests = self.mixed(harness, stop_token_ids=(3, 9))
        together = tokens(answer(harness, requests))
        assert tokens(answer(harness, requests[::-1]))[::-1] == together
        assert [tokens(answer(harness, [request]))[0] for request in requests] == together

    @pytest.mark.parametrize("decode_lanes", [3, 7])
    def test_lanes_per_wave_do_not_matter(self, harness, decode_lanes):
        requests = self.mixed(harness, stop_token_ids=(3, 9, 27))
        together = tokens(answer(harness, requests))
        assert tokens(answer(harness, requests, decode_lanes=decode_lanes)) == together

    def test_requests_keep_their_own_settings(self, harness):
        one, two, three, *_ = self.mixed(harness)
        requests = [replace(one, params=replace(self.PARAMS, greedy=True, max_tokens=2)),
                    replace(two, params=replace(self.PARAMS, temperature=0.3, max_tokens=9,
                                                stop_token_ids=(3,)), sample_offset=1),
                    replace(three, params=replace(self.PARAMS, top_p=0.4, max_tokens=1), noise_key=(1, 2))]
        assert tokens(answer(harness, requests)) == [tokens(answer(harness, [r]))[0] for r in requests]

    def test_policies_differ(self, harness):
        """Else the tests above would pass with one policy for all."""
        request = self.mixed(harness)[0]
        policies = [*harness.experts, None]
        first = [harness.logprobs(request.prompt, policy, [0], 1.0)[0] for policy in policies]
        for one in range(len(policies)):
            for other in range(one):
                assert abs(first[one] - first[other]).max() > 100 * harness.tolerance

    def test_a_completion_goes_on_after_the_environment(self, harness):
        """Earlier segments are part of the context, stay as they are, and need not be of equal length."""
        turns = [Segment([11, 12, 3], "policy", [-1.0] * 3, [-1.0] * 3), Segment([20, 21], "environment")]
        longer = [*turns, Segment([13], "policy", [-2.0], [-2.0]), Segment([22, 23, 24, 25], "environment")]
        plain = self.mixed(harness)
        requests = [replace(r, prior=tuple(p)) for r, p in zip(plain, [turns, longer, [], longer, turns] * 2)]
        together = answer(harness, requests)
        assert tokens(together) == [tokens(answer(harness, [request]))[0] for request in requests]
        for request, group in zip(requests, together):
            for completion in group:
                *earlier, new = completion.segments
                assert earlier == list(request.prior)
                assert (new.origin, len(new.token_ids)) == ("policy", request.params.max_tokens)
                truth = harness.logprobs(request.prompt, request.expert, completion.token_ids, 1.0)
                picked = truth[np.arange(len(truth)), completion.token_ids][request.prior_tokens:]
                np.testing.assert_allclose(new.logprobs, picked, atol=harness.tolerance, rtol=0)

    def test_work_is_counted(self, harness):
        engine, requests = harness.engine(), self.mixed(harness)
        groups = engine.generate(requests, harness.visual)
        counters = engine.counters
        assert counters.prompt_tokens_asked == sum(r.samples * len(r.prompt.token_ids) for r in requests)
        assert counters.decoded_tokens == sum(len(c.token_ids) for group in groups for c in group)
        assert 0 < counters.prompt_tokens_computed <= counters.prompt_tokens_asked

    def test_unknown_policy(self, harness):
        request = replace(self.mixed(harness)[0], expert="nobody")
        with pytest.raises(UserError, match="nobody"):
            answer(harness, [request])

    def test_prompt_too_long(self, harness):
        request = self.mixed(harness)[0]
        length = harness.max_prompt_tokens + 1
        long = replace(request.prompt, key="long", token_ids=np.full(length, 9), content_hash="long",
                       position_ids=np.broadcast_to(np.arange(length), (3, length)), next_position=length)
        with pytest.raises(UserError, match=r"rollout\.max_prompt_tokens: prompt 'long'"):
            answer(harness, [replace(request, prompt=long)])

    def test_stop_token_outside_the_vocabulary(self, harness):
        request = self.mixed(harness, stop_token_ids=(harness.vocab_size,))[0]
        with pytest.raises(ValueError, match="stop_token_ids"):
            answer(harness, [request])

    def test_media_need_features(self, harness):
        if harness.visual is None:
            pytest.skip("this engine's model does not see")
        with pytest.raises(ValueError, match="visual"):
            harness.engine().generate([self.mixed(harness)[-1]], None)
