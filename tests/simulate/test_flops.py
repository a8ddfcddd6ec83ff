"""The closed form equals a count over real packs, and what torch counts on a real backbone."""
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.adapter_bank import projection_shape
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, PackRules, build_pack
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.model.vocab_parallel import score
from copd_megatron.simulate.flops import (
    LINEARS,
    WAYS,
    Flops,
    Stream,
    UpdateShape,
    group_streams,
    pass_streams,
    recomputed_flops,
    update_flops,
)
from support.random_backbone import MOE_SPEC, SPEC, make_prompt, one_rank_groups

CPU = torch.device("cpu")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = [UpdateShape(9, 4, group=3, experts=2, header=3), UpdateShape(3, 1, group=1, experts=3, header=3),
          UpdateShape(1, 6, group=2, experts=1, header=1), UpdateShape(20, 2, group=4, experts=3, header=2)]
QWEN3_4B = BackboneSpec(family="qwen3", num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_heads=32,
                        num_kv_heads=8, head_dim=128, vocab_size=151936, norm_eps=1e-6, rope=RopeSpec(1e6),
                        qk_norm=True, qkv_bias=False, o_bias=False, mlp_bias=False, tied_head=True,
                        deepstack_layers=0)


def _passes(way, shape, adapter):
    """(pack, backward) of every pass of the update, in order."""
    rules = PackRules(adapter.scope, adapter.first_layer, sharing=way != "naive")
    prompt = make_prompt(1, shape.prefix, header=shape.header)
    completions = [[7 + g] * shape.completion for g in range(shape.group)]
    experts = [f"e{n}" for n in range(shape.experts)]
    together = [experts] if way == "shared" else [[e] for e in experts]
    for lanes, backward in [*((some, False) for some in together), (experts[:1], True)]:
        leaves = [Leaf(e, ids) for e in lanes for ids in completions]
        yield build_pack([LeafGroup(prompt, leaves)], rules, CPU), backward


def _rows(rows):
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _count(pack, backward, spec, adapter):
    """FLOPs of one pass, read off the pack: every part of every layer's stream, span by span."""
    head = 2 * spec.hidden_size * spec.vocab_size * len(pack.scored_rows)
    total = Flops(head=head * (2 if backward else 1))
    for layer in range(spec.num_layers):
        parts = pack.level(layer).parts
        for number, part in enumerate(parts):
            tokens = sum(stop - start for start, stop, *_ in part.spans)
            assert tokens == _rows(part.rows)
            pairs = sum((b - a) * (b - a + 1) / 2 + (b - a) * (d - c) for a, b, c, d in part.spans)
            differentiated = backward and layer >= adapter.first_layer and number == len(parts) - 1
            has_gradient = layer > adapter.first_layer
            for linear in LINEARS:
                adapted = [p for p in linear if p in adapter.targets]
                for p in linear:
                    out, inp = projection_shape(spec, p)
                    total += Flops(linears=2 * tokens * out * inp * (1 + (differentiated and has_gradient)))
                if layer >= adapter.first_layer:
                    for p, (_, rows) in ((p, r) for p in adapted for r in part.routing):
                        out, inp = projection_shape(spec, p)
                        work = inp + out + differentiated * (inp + 2 * out + has_gradient * inp)
                        total += Flops(adapters=2 * adapter.rank * _rows(rows) * work)
                    has_gradient = has_gradient or bool(adapted)
                if linear == LINEARS[0]:
                    forward = 4 * spec.head_dim * spec.num_heads * pairs
                    total += Flops(attention=forward * (1 + 2.5 * (differentiated and has_gradient)))
    return total


def _close(got, want):
    for part in ("linears", "adapters", "attention", "head", "total"):
        assert getattr(got, part) == pytest.approx(getattr(want, part), rel=1e-12), part


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "down_proj"), ("gate_proj",)])
@pytest.mark.parametrize("first_layer", [0, 1, 2])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_count_over_real_packs(way, scope, first_layer, targets):
    adapter = AdapterConfig(rank=5, targets=targets, scope=scope, first_layer=first_layer)
    for shape in SHAPES:
        counted = sum((_count(*p, SPEC, adapter) for p in _passes(way, shape, adapter)), Flops())
        _close(update_flops(way, shape, SPEC, adapter), counted)


@pytest.fixture(scope="module")
def groups():
    made = one_rank_groups()
    yield made
    made.destroy()


@pytest.mark.parametrize("scope, first_layer, sharing", [
    ("sequence", 0, True), ("sequence", 2, True), ("completion", 2, True), ("sequence", 2, False),
    ("completion", 0, False)])
def test_streams_of_ragged_lanes_are_those_of_the_pack(scope, first_layer, sharing):
    rules = PackRules(scope, first_layer, sharing)
    lanes = [Leaf("a", [7, 8]), Leaf("a", [7, 8]), Leaf("b", [7, 8]), Leaf(None, [9] * 5), Leaf("b", [11])]
    group = LeafGroup(make_prompt(1, 9), lanes)
    pack = build_pack([group], rules, CPU)
    streams = group_streams(group, rules)
    assert streams.scored == len(pack.target_ids) == 2 + 2 + 2 + 5 + 1
    above = streams.trunks + streams.lanes
    assert _in_level(pack.upper) == (above.tokens, above.pairs, above.adapted)
    if pack.lower is not None:
        assert _in_level(pack.lower) == (streams.below.tokens, streams.below.pairs, 0)
    if scope == "completion" and sharing:
        assert streams.trunks == Stream(6, 21)
        outside = build_pack([group], rules, CPU, outside=True)
        alone = group_streams(group, rules, outside=True)
        assert _in_level(outside.upper) == (alone.lanes.tokens, alone.lanes.pairs, alone.lanes.adapted)
        assert alone.trunks == Stream()
    if sharing and first_layer:
        whole = dict.fromkeys([("1", None), ("1", (7, 8)), ("1", (9,) * 5), ("1", (11,))], 0)
        for kept in ({("1", None): 0, ("1", (7, 8)): 0}, {k: 0 for k in whole if k[1]}, whole):
            below = group_streams(group, rules, kept=kept).below
            assert _in_level(build_pack([group], rules, CPU, kept=kept).lower) == (below.tokens, below.pairs, 0)
            assert below.tokens < streams.below.tokens
        assert below == Stream()
    if sharing:  # sampled lanes are decoded each on its own
        decoded = group_streams(group, rules, decoded=True)
        twin = group_streams(LeafGroup(group.prompt, lanes[:1]), rules, outside=True).lanes
        assert decoded.lanes.tokens == streams.lanes.tokens + twin.tokens
        assert decoded.below.tokens == streams.below.tokens + 2 * twin.tokens


def _in_level(level):
    """(tokens, pairs, adapted tokens) of a level."""
    spans = [span for part in level.parts for span in part.spans]
    return (level.tokens, sum((b - a) * (b - a + 1) // 2 + (b - a) * (d - c) for a, b, c, d in spans),
            sum(_rows(rows) for part in level.parts for lane, rows in part.routing if lane is not None))


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_lanes_of_equal_length_take_the_closed_form(scope, sharing):
    adapter = AdapterConfig(scope=scope, rank=2, alpha=2.0)
    for shape in SHAPES:
        lanes = [Leaf(f"e{n}", [7 + g] * shape.completion) for n in range(shape.experts) for g in range(shape.group)]
        group = LeafGroup(make_prompt(1, shape.prefix, header=shape.header), lanes)
        streams = group_streams(group, PackRules(scope, 0, sharing))
        assert streams == pass_streams(shape, adapter, shape.experts, sharing)


def _run_and_count(groups, way, shape, adapter, attention, spec=SPEC, recompute="none"):
    """FLOPs by operator of one update on a real backbone."""
    spec = replace(spec, deepstack_layers=0, vocab_size=53)
    model = ModelConfig(path="-", dtype="float32", prefix_sharing=way != "naive", attention=attention,
                        recompute=recompute)
    backbone = Backbone(spec, groups, model, adapter)
    for expert in (f"e{n}" for n in range(shape.experts)):
        backbone.bank.add_expert(expert, seed=0)
    with FlopCounterMode(display=False) as counter:
        for pack, backward in _passes(way, shape, adapter):
            with torch.set_grad_enabled(backward):
                logprobs = score(backbone(pack), backbone.head, pack.target_ids).logprobs_T
                if backward:
                    logprobs.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return spec, {str(op).rsplit(".", 1)[-1]: n for op, n in counts.items()}


@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
@pytest.mark.parametrize("way", WAYS)
def test_equals_torchs_counter(groups, way, scope, first_layer):
    """Linears, adapters and head are plain products, and torch sees all of them, inside our own autograd
    functions too. It does not see the CPU's fused attention; the next test counts the plain one."""
    shape, adapter = SHAPES[0], AdapterConfig(rank=5, scope=scope, first_layer=first_layer)
    spec, counts = _run_and_count(groups, way, shape, adapter, "flash")
    assert set(counts) <= {"mm", "addmm", "bmm"}
    want = update_flops(way, shape, spec, adapter)
    assert sum(counts.values()) == want.linears + want.adapters + want.head


@pytest.mark.parametrize(("targets", "first_layer"), [(TARGETS, 0), (TARGETS, 1), (("v_proj",), 2), (("up_proj",), 0)])
def test_of_moe_layers_torch_counts_what_a_token_passes(groups, targets, first_layer):
    shape, adapter = SHAPES[0], AdapterConfig(rank=5, targets=targets, first_layer=first_layer)
    spec, counts = _run_and_count(groups, "shared", shape, adapter, "flash", MOE_SPEC)
    want = update_flops("shared", shape, spec, adapter)
    assert sum(counts.values()) == want.linears + want.adapters + want.head


@pytest.mark.parametrize("recompute,again", [("none", 0), ("selective", 1), ("full", 1)])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_torch_counts_the_attention_of_the_reference(groups, scope, recompute, again):
    """The plain reference scores full rectangles, masks the future, and keeps the scores for its backward:
    2x instead of 2.5x. So torch counts a little more than the closed form, and exactly this much."""
    shape, adapter = SHAPES[0], AdapterConfig(rank=5, scope=scope, first_layer=1)
    spec, counts = _run_and_count(groups, "shared", shape, adapter, "reference", recompute=recompute)
    want = update_flops("shared", shape, spec, adapter)
    want += recomputed_flops(spec, adapter, pass_streams(shape, adapter, 1, True), recompute)
    rectangles = 0
    for pack, backward in _passes("shared", shape, adapter):
        for layer in range(spec.num_layers):
            parts = pack.level(layer).parts
            for number, part in enumerate(parts):
                cells = sum((b - a) * (b - a + d - c) for a, b, c, d in part.spans)
                rectangles += cells * (3 + again if backward and layer >= 1 and number == len(parts) - 1 else 1)
    attention = 4 * spec.head_dim * spec.num_heads * rectangles
    assert sum(counts.values()) == want.linears + want.adapters + want.head + attention


@pytest.mark.parametrize("prefix, completion, gains", [
    (256, 32, (7.5, 4.5, 11, 7.5)), (4096, 1024, (4.6, 3.3, 7.1, 5.6)), (16384, 1024, (12, 5.7, 17, 9.4)),
    (1024, 8192, (1.1, 1.1, 1.9, 1.9))])
def test_linears_alone_give_the_known_gains(prefix, completion, gains):
    """The table that motivates sharing: linears only, states kept between scoring and update, against a naive
    update that differentiates every layer."""
    shape = UpdateShape(prefix, completion, group=8, experts=3, header=1)
    cases = (("completion", 0), ("sequence", 0), ("completion", 18), ("sequence", 18))
    for (scope, first_layer), gain in zip(cases, gains):
        naive = update_flops("naive", shape, QWEN3_4B, AdapterConfig(scope=scope))
        shared = update_flops("shared", shape, QWEN3_4B, AdapterConfig(scope=scope, first_layer=first_layer),
                              stored=True)
        assert naive.linears / shared.linears == pytest.approx(gain, rel=0.05)


def test_sharing_gains_most_for_long_prompts_and_little_for_long_completions():
    adapter = AdapterConfig(scope="completion")
    ratio = {}
    for prefix, completion in ((16384, 1024), (4096, 1024), (1024, 1024), (1024, 8192)):
        shape = UpdateShape(prefix, completion)
        costs = [update_flops(way, shape, QWEN3_4B, adapter).total for way in WAYS]
        assert costs[0] > costs[1] >= costs[2]
        ratio[prefix, completion] = costs[0] / costs[2]
    assert sorted(ratio.values(), reverse=True) == list(ratio.values())
    assert 1 < ratio[1024, 8192] < 1.2
