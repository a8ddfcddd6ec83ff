"""Edges of every topology are those on paper, in one order on all ranks; wrong ones are refused by name."""
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.reference import resolve_object
from copd_megatron.exchange.topology import Moment, edges, prompts_of
from copd_megatron.types import BACKBONE, Edge, UserError

EXPERTS = ("text", "image", "video")


def edges_of(topology, experts=EXPERTS, opd_step=0, hub=None, frozen=None, gap_cap=0.5, **opd):
    """``opd_step``: a number, or a ``Moment``."""
    config = ExchangeConfig(topology=topology, hub=hub, frozen_teachers=frozen or {}, gap_cap=gap_cap)
    return edges(config, OpdConfig(**opd), experts, opd_step, resolve_object)


def pairs_of(*arguments, **settings):
    return [(edge.teacher, edge.student) for edge in edges_of(*arguments, **settings)]


def test_hub_is_the_first_expert_unless_named():
    assert pairs_of("hub") == [("image", "text"), ("video", "text"), ("text", "image"), ("text", "video")]
    assert pairs_of("hub", hub="video") == [("video", "text"), ("video", "image"), ("text", "video"),
                                            ("image", "video")]


def test_full_ring_none():
    assert pairs_of("full") == [("image", "text"), ("video", "text"), ("text", "image"), ("video", "image"),
                                ("text", "video"), ("image", "video")]
    assert pairs_of("ring") == [("video", "text"), ("text", "image"), ("image", "video")]
    assert pairs_of("ring", experts=("a", "b")) == [("b", "a"), ("a", "b")]
    assert pairs_of("none") == []


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from(["hub", "full", "ring", "none"]))
def test_counts_and_invariants(count, topology):
    names = [f"e{number}" for number in range(count)]
    found = pairs_of(topology, experts=names)
    expected = {"hub": 2 * (count - 1), "full": count * (count - 1), "ring": count * (count > 1), "none": 0}
    assert len(found) == len(set(found)) == expected[topology]
    assert all(teacher != student for teacher, student in found)
    if topology == "hub":  # spokes never score each other
        assert all("e0" in pair for pair in found)


def test_beta_and_signal_are_the_default_unless_the_edge_says():
    assert edges_of("ring", experts=("a", "b"), beta=0.5, signal="full") == [
        Edge("b", "a", 0.5, "full"), Edge("a", "b", 0.5, "full")]
    given_edges = [["image", "video"], Edge("video", "text", 2.0, "full"),
                   {"teacher": "text", "student": "video", "beta": 0.25, "signal": "topk"}]
    assert edges_of(given_edges, beta=0.5) == [
        Edge("video", "text", 2.0, "full"), Edge("text", "video", 0.25, "topk"),
        Edge("image", "video", 0.5, "sampled")]


def star(experts, opd_step):
    centre = experts[opd_step % len(experts)]
    return {(centre, other) for other in experts if other != centre}  # a set: in another order on each rank


def test_callables_see_the_step_and_their_order_does_not_count():
    assert pairs_of(star, opd_step=1) == [("image", "text"), ("image", "video")]
    assert pairs_of(star, opd_step=3) == [("text", "image"), ("text", "video")]
    assert pairs_of(lambda experts, opd_step: iter([Edge("text", "image")])) == [("text", "image")]


def test_callable_of_a_package_outside(tmp_path, monkeypatch):
    (tmp_path / "my_graphs.py").write_text("def pair(experts, opd_step):\n    return [experts[:2]]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert pairs_of("my_graphs:pair") == [("text", "image")]
        with pytest.raises(UserError, match="^exchange.topology: 'my_graphs:trio' .* has no 'trio'"):
            edges_of("my_graphs:trio")
    finally:
        sys.modules.pop("my_graphs", None)


@pytest.mark.parametrize(("topology", "message"), [
    ("star", "exchange.topology: 'star'; allowed are hub, full, ring, none"),
    ("expnder(3)", "'expnder(3)'; allowed are hub, full, ring, none, gossip, expander(d), adaptive(d), a list of"),
    ("expnder(3)", "nearest: expander"), ("gosip", "nearest: gossip"),
    ("expander", "'expander'; expander takes its number of teachers per student, 2 or more; ring has one"),
    ("expander(1)", "2 or more; ring has one teacher each; write expander(3)"), ("expander(two)", "2 or more"),
    ("adaptive()", "adaptive takes its number of teachers per student, 1 or more; write adaptive(3)"),
    ("gossip(2)", "gossip takes no degree; write gossip"),
    ([["backbone", "backbone"]], "student 'backbone'; experts are text, image, video; a frozen teacher learns nothing"),
    ([["text", "backbone"]], "turn the edge round or drop it"),
    ([["adapters/old", "text"]], "an adapter folder gets a name in exchange.frozen_teachers"),
    ([["txt", "image"]], "teacher 'txt'; experts are text, image, video; nearest: text"),
    ([{"teacher": "text", "student": "image", "prompts": "vidoe"}], "prompts 'vidoe'; experts are text, image, video; "
     "nearest: video"),
    (7, "exchange.topology: 7; allowed are"), (None, "exchange.topology: None; allowed are"),
    ({"teacher": "text", "student": "image"}, "allowed are hub"),
    (lambda experts, opd_step: None, "exchange.topology: None; allowed are"),
    ([["text"]], "['text'] is no edge; allowed is [teacher, student]"),
    ([["text", "image", "video"]], "is no edge"), ([7], "7 is no edge"),
    ([{"teacher": "text"}], "is no edge"),
    ([{"teacher": "text", "student": "image", "weight": 1}], "is no edge"),
    ([{"teacher": "text", "student": "image", "signal": "logits"}], "a signal of sampled, topk, student_topk, full"),
    ([{"teacher": "text", "student": "image", "beta": float("nan")}], "is no edge"),
    ([{"teacher": "text", "student": "image", "beta": "1"}], "is no edge"),
    ([["text", "audio"]], "student 'audio'; experts are text, image, video"),
    ([Edge("audio", "text")], "teacher 'audio'; experts are"),
    ([["text", "text"]], "'text' teaches itself"),
    ([["text", "image"], ["video", "text"], Edge("text", "image", 0.5)], "text -> image is given twice"),
])
def test_wrong_topologies_are_refused(topology, message):
    with pytest.raises(UserError, match=re.escape(message)):
        edges_of(topology)


def test_unknown_hub():
    with pytest.raises(UserError, match="exchange.hub: 'audio'; experts are text, image, video"):
        edges_of("hub", hub="audio")


def test_expander_by_name():
    assert pairs_of("expander(3)") == pairs_of("full")
    assert pairs_of(" expander( 2 ) ", experts=tuple("abcdef"))[:2] == [("c", "a"), ("f", "a")]
    many = edges_of("expander(3)", experts=[f"e{i}" for i in range(20)], beta=0.5)
    assert len(many) == 60 and {edge.beta for edge in many} == {0.5}


def test_gossip_depends_on_seed_and_step():
    def pairs(step, seed):
        return pairs_of("gossip", tuple("abcdefg"), Moment(step, seed))

    assert pairs(3, 1) == pairs(3, 1)
    assert len({str(pairs(step, 1)) for step in range(8)}) > 4
    assert pairs(0, 0) != pairs(0, 1) or pairs(1, 0) != pairs(1, 1)


def test_adaptive_follows_overlaps_given_in_either_order():
    moment = Moment(0, 0, {("image", "text"): 0.9, ("text", "video"): 0.7, ("video", "image"): 0.2})
    assert pairs_of("adaptive(1)", opd_step=moment) == [("video", "text"), ("text", "image"), ("text", "video")]
    assert pairs_of("adaptive(1)", opd_step=moment, gap_cap=0.9) == [
        ("video", "text"), ("video", "image"), ("image", "video")]
    assert pairs_of("adaptive(2)") == pairs_of("expander(2)")


def test_frozen_teachers_teach_and_whose_prompts_are_asked():
    found = edges_of([["old", "text"], [BACKBONE, "text"], ["image", "text"],
                      {"teacher": "old", "student": "video", "prompts": "image"},
                      {"teacher": "text", "student": "image", "prompts": "image"}], frozen={"old": "somewhere"})
    assert [(e.teacher, e.student, prompts_of(e, EXPERTS)) for e in found] == [
        ("image", "text", ("image",)), ("old", "text", ("text",)), (BACKBONE, "text", ("text",)),
        ("text", "image", ("image",)), ("old", "video", ("image",))]
    for whose, wanted in (("student", [("text",)] * 3 + [("image",)] * 2),
                          ("both", [("image", "text"), ("text",), ("text",), ("image",), ("image",)])):
        assert [prompts_of(edge, EXPERTS, whose) for edge in found] == wanted, "an edge's own prompts come first"
