"""Signals that travelled equal signals that stayed, for every topology, placement and layout."""
from dataclasses import replace

import pytest
import torch

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.reference import resolve_object
from copd_megatron.exchange.answers import ROUND_BYTES
from copd_megatron.exchange.payload import Codec, Signal
from copd_megatron.exchange.request import HEADER, ID_BYTES, ScoreRequest
from copd_megatron.exchange.scatter import Exchange
from copd_megatron.exchange.topology import edges
from copd_megatron.exchange.wire import LENGTH_BYTES
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.ranks import RankError, run_ranks

EXPERTS = ("text", "image", "video")
PROMPTS, SAMPLES, TOPK, HIDDEN, VOCABULARY = 5, 2, 4, 3, 11
CODECS = {"sampled": Codec("sampled", "bfloat16"), "topk": Codec("topk", "bfloat16", topk=TOPK),
          "full": Codec("full", "bfloat16", hidden_size=HIDDEN)}
MIXED = [["text", "image"], {"teacher": "video", "student": "image", "signal": "topk"},
         {"teacher": "image", "student": "text", "signal": "full"}]


def all_requests(topology, signal):
    """Every request of a step by student and prompt, as one big replica would make them; lengths 0 to 4."""
    found = edges(ExchangeConfig(topology=topology), OpdConfig(signal=signal), EXPERTS, 0, resolve_object)
    requests = {}
    for number, edge in enumerate(found):
        for prompt in range(PROMPTS):
            for sample in range(SAMPLES):
                length = (3 * number + prompt + 2 * sample) % 5
                tokens = tuple(100 * number + 10 * prompt + place for place in range(length))
                asked = ScoreRequest(edge.teacher, edge.student, prompt, tokens, edge.signal)
                requests.setdefault((edge.student, prompt), []).append(asked)
    return requests


def score(request):
    """A made-up teacher: what it says depends on all that a request carries."""
    seed = EXPERTS.index(request.teacher) + 10 * EXPERTS.index(request.student) + 100 * request.prompt
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(600, VOCABULARY, generator=generator)[list(request.token_ids)]
    logprobs = (3 * noise).log_softmax(1)
    own = logprobs[:, 0]
    if request.kind == "topk":
        values, ids = logprobs.topk(TOPK)
        return Signal("topk", own, ids, values)
    return Signal("full", hidden_TH=noise[:, :HIDDEN]) if request.kind == "full" else Signal("sampled", own)


def key_of(request):
    return request.teacher, request.student, request.prompt, request.token_ids, request.kind


def step(layout, topology, signal):
    """One exchange on this rank: what it was asked to score, and each of its own requests with its answer."""
    groups = Groups.create(layout, Placement.build(EXPERTS, layout.replicas))
    here = groups.coords.replica
    asked = [request for (student, prompt), requests in all_requests(topology, signal).items()
             if prompt in groups.placement.share(student, here, PROMPTS) for request in requests]
    exchange = Exchange.open(asked, groups)
    to_score = exchange.to_score
    answers = []
    if groups.is_last_stage:
        returned = exchange.close([score(request) for request in to_score], CODECS)
        answers = [(key_of(request), vars(signal)) for request, signal in zip(asked, returned, strict=True)]
    groups.destroy()
    return groups.coords, groups.hosted, [key_of(request) for request in to_score], answers


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name
        else:
            assert value == right[name]


@pytest.mark.parametrize(("layout", "topology", "signal"), [
    *((Layout(replicas=replicas), *step_) for replicas in (1, 2, 3)
      for step_ in (("hub", "sampled"), ("full", "topk"), (MIXED, "sampled"))),
    (Layout(replicas=4), "full", "full"), (Layout(tp=2, replicas=2), MIXED, "sampled"),
    (Layout(pp=2, replicas=2), MIXED, "sampled")])
def test_every_layout_returns_what_scoring_at_home_would(layout, topology, signal):
    everything = [request for requests in all_requests(topology, signal).values() for request in requests]
    expected = {key_of(request): vars(CODECS[request.kind].round([score(request)])[0]) for request in everything}
    assert len(expected) == len(everything)
    cells = {}
    for coords, hosted, scored, answers in run_ranks(layout.world_size, step, layout, topology, signal):
        assert {teacher for teacher, *_ in scored} <= set(hosted)
        seen_scored, seen_answers = cells.setdefault((coords.pp, coords.tp), ([], {}))
        seen_scored += scored
        for key, signal_ in answers:
            assert_equal(signal_, expected[key])
            seen_answers[key] = signal_
    for (stage, _), (seen_scored, seen_answers) in cells.items():
        assert sorted(seen_scored) == sorted(expected)  # each request is scored once, on every stage
        assert seen_answers.keys() == (expected.keys() if stage == layout.pp - 1 else set())


def traffic(layout):
    """Bytes that leave this rank in a hub step: after the requests, and in all."""
    groups = Groups.create(layout, Placement.build(EXPERTS, layout.replicas))
    here = groups.coords.replica
    exchange = Exchange.open([r for (student, prompt), some in all_requests("hub", "topk").items()
                              if prompt in groups.placement.share(student, here, PROMPTS) for r in some], groups)
    if exchange.wire is None:
        return None
    requests = exchange.wire.sent_bytes
    exchange.close([score(request) for request in exchange.to_score], CODECS)
    return requests, exchange.wire.sent_bytes


def test_co_hosted_experts_exchange_nothing_and_others_what_the_codec_says():
    """Of three experts on two replicas, text and image live together, video alone; with text as hub only
    text <-> video crosses."""
    requests = [r for some in all_requests("hub", "topk").values() for r in some]

    def tokens(teacher, student):
        return sum(len(r.token_ids) for r in requests if (r.teacher, r.student) == (teacher, student))

    width = CODECS["topk"].bytes_per_token()
    count = PROMPTS * SAMPLES
    out, back = tokens("video", "text"), tokens("text", "video")
    results = run_ranks(2, traffic, Layout(replicas=2))
    for (asking, total), asked, answered in zip(results, (out, back), (back, out)):
        assert asking == LENGTH_BYTES + ID_BYTES * (HEADER * count + asked)
        # Then the number of rounds, the round of each answer, and the answers.
        assert total - asking == ROUND_BYTES * (1 + count) + width * answered
    assert run_ranks(1, traffic, Layout()) == [None]


def test_a_teacher_on_two_replicas_shares_its_work():
    """Four replicas: text has two. Each of them scores about half of what image and video ask."""
    results = run_ranks(4, step, Layout(replicas=4), "hub", "sampled")
    work = [sum(student != "text" for _, student, *_ in scored) for _, _, scored, _ in results[:2]]
    assert sum(work) == 2 * PROMPTS * SAMPLES and min(work) >= 2 * SAMPLES * (PROMPTS // 2)


def nothing_to_ask(layout):
    groups = Groups.create(layout, Placement.build(EXPERTS, layout.replicas))
    exchange = Exchange.open([], groups)
    empty = exchange.to_score, exchange.close([], CODECS), exchange.close([], {})
    one = [ScoreRequest("video", "text", 0, (1, 2))] if groups.coords.replica == 0 else []
    one_sided = Exchange.open(one, groups)
    scored = one_sided.to_score
    returned = one_sided.close([score(request) for request in scored], {"sampled": CODECS["sampled"]})
    groups.destroy()
    return empty, len(scored), [signal.tokens for signal in returned]


def test_empty_batches():
    first, second = run_ranks(2, nothing_to_ask, Layout(replicas=2))
    assert first == (([], [], []), 0, [2])
    assert second == (([], [], []), 1, [])


# ---- wrong input ----------------------------------------------------------

REQUEST = ScoreRequest("text", "image", 0, (1, 2, 3))


def test_wrong_signals_are_refused(one_rank):
    exchange = Exchange.open([REQUEST, replace(REQUEST, prompt=1)], one_rank(*EXPERTS))
    right = Signal("sampled", torch.zeros(3))
    codecs = {"sampled": CODECS["sampled"]}
    assert len(exchange.close([right, right], codecs)) == 2
    for signals, message in (
            ([right], "1 signals for 2 requests"),
            ([right, right, right], "3 signals for 2 requests"),
            ([right, Signal("sampled", torch.zeros(2))], r"1 is \('sampled', 2\), not \('sampled', 3\)"),
            ([replace(right, kind="full"), right], "number 0 is")):
        with pytest.raises(ValueError, match=message):
            exchange.close(signals, codecs)
    with pytest.raises(ValueError, match=r"no codec for signals of kind \['sampled'\]; there are \['topk'\]"):
        exchange.close([right, right], {"topk": CODECS["topk"]})


def test_unknown_teacher_is_refused(one_rank):
    with pytest.raises(KeyError, match="'audio' is no expert"):
        Exchange.open([replace(REQUEST, teacher="audio")], one_rank(*EXPERTS))


def disagree():
    """Rank 1 asks for nothing but scores as if it had been asked."""
    groups = Groups.create(Layout(replicas=2), Placement.build(EXPERTS, 2))
    exchange = Exchange.open([], groups)
    exchange.close([Signal("sampled", torch.zeros(3))] * groups.coords.replica, CODECS)


def test_a_rank_that_fails_shows_its_error():
    with pytest.raises(RankError, match="1 signals for 0 requests"):
        run_ranks(2, disagree, timeout_s=20)
