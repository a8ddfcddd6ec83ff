"""Sampling parameters and requests refuse what cannot be meant."""
import pytest

from copd_megatron.rollout.engine import Request, SamplingParams
from copd_megatron.types import Segment
from support.random_backbone import make_prompt

PARAMS = SamplingParams(max_tokens=4, stop_token_ids=(2,))


@pytest.mark.parametrize("field,value", [("max_tokens", 0), ("temperature", 0.0), ("temperature", -1.0),
                                         ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1)])
def test_parameters_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}: {value}"):
        SamplingParams(**{"max_tokens": 4, "stop_token_ids": (), field: value})


def test_request_without_samples():
    with pytest.raises(ValueError, match="samples: 0 of prompt 'p1'"):
        Request(make_prompt(1, 5), None, 0, PARAMS, (0,))


def test_prior_tokens_are_counted_over_segments():
    prior = (Segment([1, 2, 3]), Segment([4], "environment"))
    assert Request(make_prompt(1, 5), None, 1, PARAMS, (0,), prior=prior).prior_tokens == 4
    assert Request(make_prompt(1, 5), None, 1, PARAMS, (0,)).prior_tokens == 0
