"""Signals that travel in rounds, overlapping the scoring, are those of the plain blocking way, bit for bit."""
from dataclasses import replace

import pytest
import torch

from copd_megatron.exchange.answers import IN_FLIGHT
from copd_megatron.exchange.payload import Codec, Signal
from copd_megatron.exchange.request import ScoreRequest
from copd_megatron.exchange.scatter import Exchange
from copd_megatron.exchange.wire import CorruptPayload
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.ranks import run_ranks

EXPERTS = ("text", "image", "video")
K, HIDDEN, VOCABULARY = 4, 3, 11
KINDS = ("sampled", "topk", "student_topk", "full")


def codecs(wire="bfloat16"):
    return {kind: Codec(kind, wire, topk=K, hidden_size=HIDDEN) for kind in KINDS}


def requests_of(student):
    """A student's requests, of every kind and length 0 to 4, to every other expert."""
    return [ScoreRequest(teacher, student, prompt, tuple(range(10 * number, 10 * number + (number + prompt) % 5)), kind)
            for number, teacher in enumerate(EXPERTS) if teacher != student
            for prompt, kind in enumerate(KINDS * 2)]


def ids_of(request):
    """[T, K] ids that the student asks about."""
    generator = torch.Generator().manual_seed(len(request.token_ids) + 7 * request.prompt)
    rows = [torch.randperm(VOCABULARY, generator=generator)[:K] for _ in request.token_ids]
    return torch.stack(rows) if rows else torch.empty(0, K, dtype=torch.int64)


def score(request, ids=None):
    """A made-up teacher: what it says depends on all that a request carries."""
    seed = EXPERTS.index(request.teacher) + 10 * EXPERTS.index(request.student) + 100 * request.prompt
    noise = torch.randn(600, VOCABULARY, generator=torch.Generator().manual_seed(seed))[list(request.token_ids)]
    logprobs = (3 * noise).log_softmax(1)
    own = logprobs[:, 0]
    if request.kind == "topk":
        values, best = logprobs.topk(K)
        return Signal("topk", own, best, values)
    if request.kind == "student_topk":
        return Signal("student_topk", own, ids, logprobs.gather(1, ids))
    return Signal("full", hidden_TH=noise[:, :HIDDEN]) if request.kind == "full" else Signal("sampled", own)


def told(exchange):
    """The exchange that knows its students' ids, and the ids of what it must score."""
    return exchange.tell_ids([ids_of(r) if r.kind == "student_topk" else None for r in exchange.asked], K)


def asked_here(groups):
    here = groups.coords.replica
    return [r for student in groups.hosted for r in requests_of(student)
            if r.prompt in groups.placement.share(student, here, 2 * len(KINDS))]


def round_by_round(layout, checked, per_round):
    """This rank's answers in rounds of at most ``per_round`` requests, and in one; most rounds under way."""
    groups = Groups.create(layout, Placement.build(EXPERTS, layout.replicas))
    results, most = [], 0
    for size in (per_round, 10**6):
        exchange, ids = told(Exchange.open(asked_here(groups), groups, checked=checked))
        requests = exchange.to_score
        order = list(range(len(requests)))[::-1]  # microbatches need not keep the order of the requests
        rounds = [order[at:at + size] for at in range(0, len(order), size)]
        round_of = {index: number for number, held in enumerate(rounds) for index in held}
        answers = exchange.answers(codecs(), [round_of[i] for i in range(len(requests))])
        for held in rounds:
            answers.send({i: score(requests[i], ids[i]) for i in held})
            most = max(most, len(answers._flying))
        results.append([vars(signal) for signal in answers.finish()])
    groups.destroy()
    expected = [vars(codecs()[r.kind].round([score(r, ids_of(r) if r.kind == "student_topk" else None)])[0])
                for r in exchange.asked]
    return results, expected, most, len(requests)


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, name


@pytest.mark.parametrize(("layout", "checked", "per_round"), [
    (Layout(), False, 3), (Layout(replicas=2), True, 5), (Layout(replicas=3), False, 4), (Layout(replicas=4), True, 1),
    (Layout(tp=2, replicas=2), False, 7)])
def test_rounds_return_what_one_round_and_scoring_at_home_return(layout, checked, per_round):
    """Uneven on purpose: replicas have different numbers of requests, so of rounds."""
    counts = set()
    results = run_ranks(layout.world_size, round_by_round, layout, checked, per_round)
    for (rounds, once), expected, most, count in results:
        assert_same(rounds, expected)
        assert_same(once, expected)
        assert most == (IN_FLIGHT if layout.replicas > 1 else 0)
        counts.add(count)
    assert len(counts) > 1 or layout.replicas in (1, 3)


def damaged_answer():
    groups = Groups.create(Layout(replicas=2), Placement.build(EXPERTS[:2], 2))
    student, = groups.hosted
    asked = [r for r in requests_of(student) if r.teacher in EXPERTS[:2]]
    exchange, ids = told(Exchange.open(asked, groups, checked=True))
    answers = exchange.answers(codecs(), [0] * len(exchange.to_score))
    answers.send({i: score(r, ids[i]) for i, r in enumerate(exchange.to_score)})
    under_way = answers._flying[0][1]
    under_way._work.wait()
    under_way._received[20] ^= 4
    with pytest.raises(CorruptPayload):
        answers.finish()


def test_a_damaged_answer_is_not_learned_from():
    run_ranks(2, damaged_answer)


# ---- wrong input ----------------------------------------------------------

REQUEST = ScoreRequest("text", "image", 0, (1, 2, 3))


def test_wrong_rounds_and_ids_are_refused(one_rank):
    groups = one_rank(*EXPERTS)
    right = Signal("sampled", torch.zeros(3))
    exchange = Exchange.open([REQUEST, replace(REQUEST, prompt=1)], groups)
    with pytest.raises(ValueError, match="1 rounds for 2 requests"):
        exchange.answers(codecs(), [0])
    answers = exchange.answers(codecs(), [0, 1])
    with pytest.raises(ValueError, match=r"signals of requests \[0, 1\] for round 0, which has \[0\]"):
        answers.send({0: right, 1: right})
    with pytest.raises(ValueError, match="0 is"):
        answers.send({0: replace(right, kind="full")})
    answers.send({0: right})
    with pytest.raises(ValueError, match="finish after 1 of 2 rounds"):
        answers.finish()
    answers.send({1: right})
    assert len(answers.finish()) == 2
    asking = Exchange.open([replace(REQUEST, kind="student_topk"), REQUEST], groups)
    for ids in ([None, None], [torch.zeros(3, K + 1).long(), None], [torch.zeros(2, K).long(), None],
                [torch.zeros(3, K).long()] * 2):
        with pytest.raises(ValueError, match="student_ids"):
            asking.tell_ids(ids, K)
