"""The byte count that chooses the transport is what the collectives carry, and signals reach students only."""
import pytest
import torch

from copd_megatron.config.model import AdapterConfig
from copd_megatron.exchange.answers import ROUND_BYTES
from copd_megatron.exchange.gather import gathered_teachers
from copd_megatron.exchange.payload import Codec, Signal
from copd_megatron.exchange.request import HEADER, ID_BYTES, ScoreRequest
from copd_megatron.exchange.scatter import Exchange
from copd_megatron.exchange.transport import StepBytes, adapter_bytes, request_bytes
from copd_megatron.exchange.wire import LENGTH_BYTES, Wire
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Edge
from support.policies import make_bank
from support.random_backbone import SPEC
from support.ranks import run_ranks

EXPERTS = ("text", "image", "video")
K, HIDDEN, PROMPTS = 4, 6, 3
HUB = [Edge("text", "image", signal="topk"), Edge("text", "video", signal="student_topk"),
       Edge("image", "text", signal="full"), Edge("video", "text")]
CODECS = {kind: Codec(kind, "bfloat16", topk=K, hidden_size=HIDDEN)
          for kind in ("sampled", "topk", "student_topk", "full")}


def answer(request):
    tokens = len(request.token_ids)
    rows = torch.full((tokens, K), -3.0)
    ids = torch.arange(K).expand(tokens, K)
    own = torch.zeros(tokens)
    if request.kind in ("topk", "student_topk"):
        return Signal(request.kind, own, ids, rows)
    return Signal("full", hidden_TH=torch.zeros(tokens, HIDDEN)) if request.kind == "full" else Signal("sampled", own)


def one_step(layout, tokens, first_layer):
    """The count, what this rank sent by either transport, and to whom scatter sent it."""
    groups = Groups.create(layout, Placement.build(EXPERTS, layout.replicas))
    bank = make_bank(groups, SPEC, AdapterConfig(rank=2, alpha=3.0, first_layer=first_layer))
    asked = [ScoreRequest(e.teacher, e.student, prompt, tuple(range(tokens + prompt)), e.signal)
             for e in HUB if e.student in groups.hosted
             for prompt in groups.placement.share(e.student, groups.coords.replica, PROMPTS)]
    count = StepBytes.count(asked, HUB, groups, CODECS, adapter_bytes(bank))
    gathering = Wire(groups.exchange)
    with gathered_teachers(bank, groups, HUB, gathering):
        pass
    exchange = Exchange.open(asked, groups)
    if groups.is_last_stage:
        exchange, _ = exchange.tell_ids([torch.zeros(len(r.token_ids), K).long() if r.kind == "student_topk" else None
                                         for r in asked], K)
        exchange.close([answer(request) for request in exchange.to_score], CODECS)
    sent_to = exchange.wire.sent_to if exchange.wire else []
    return count, gathering.sent_bytes, sent_to, groups.coords, groups.is_last_stage


@pytest.mark.parametrize(("layout", "first_layer"), [
    (Layout(), 0), (Layout(replicas=2), 0), (Layout(replicas=4), 1), (Layout(tp=2, replicas=2), 0),
    (Layout(pp=2, replicas=2), 1)])
def test_the_count_is_what_the_collectives_carry(layout, first_layer):
    results = run_ranks(layout.world_size, one_step, layout, 5, first_layer)
    count = results[0][0]
    assert all(other == count for other, *_ in results)
    assert sum(gathered for _, gathered, *_ in results) == count.gather_adapters
    peers = layout.replicas - 1
    control = sum(peers * (LENGTH_BYTES + ROUND_BYTES * last) for *_, last in results)
    sent = sum(sum(sent_to) for _, _, sent_to, *_ in results)
    assert sent == count.scatter + (control if peers else 0)
    assert (count.scatter > 0) == (count.gather_adapters > 0) == (peers > 0)


def test_spokes_send_each_other_nothing():
    """Text is the hub; what image and video trade is how little they have to trade."""
    results = run_ranks(3, one_step, Layout(replicas=3), 5, 0)
    control = LENGTH_BYTES + ROUND_BYTES
    assert [row[2][1:] for row in results[1:]] == [[0, control], [control, 0]]
    assert all(row[2][0] > 100 for row in results[1:])


def test_bytes_of_a_request():
    request = ScoreRequest("text", "image", 0, tuple(range(10)), "student_topk")
    codec = Codec("student_topk", "bfloat16", topk=64)
    there, back = ID_BYTES * (HEADER + 10), ROUND_BYTES + 10 * (4 + 2 * 64 + 4) + 10 * 64 * ID_BYTES
    assert request_bytes(request, codec, Layout()) == there + back
    assert request_bytes(request, codec, Layout(tp=4, pp=2)) == 4 * (2 * there + back)


def test_the_cheaper_transport_is_taken_and_a_draw_is_scatter():
    assert StepBytes(10, 9).cheaper == "gather_adapters"
    assert StepBytes(9, 10).cheaper == StepBytes(9, 9).cheaper == "scatter"
