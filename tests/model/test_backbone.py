"""Shared-prefix evaluation is naive evaluation: hidden states and gradients, both scopes, any first layer."""
import numpy as np
import pytest
import torch

from copd_megatron.config.model import ModelConfig
from copd_megatron.model.attention import choose_attention
from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack, pack_tokens
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import UserError
from support.live_bytes import saved_by_autograd, storage_bytes
from support.random_backbone import SPEC, make_backbone, make_prompt, make_visual, one_rank_groups
from support.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups():
    made = one_rank_groups()
    yield made
    made.destroy()


def _lanes():
    """Two prompts (one with an image), ragged completions, lanes of two experts and the backbone."""
    first, second = make_prompt(1, 9, visual_tokens=4), make_prompt(2, 6)
    return [LeafGroup(first, [Leaf("a", [11, 12, 13]), Leaf("b", [11, 12, 13]), Leaf(None, [11, 12, 13]),
                              Leaf("b", [21])]),
            LeafGroup(second, [Leaf("b", [9, 8, 7, 36, 10]), Leaf("a", [9, 8]), Leaf("b", [9, 8])])]


def _run(groups, lanes=None, **options):
    backbone = make_backbone(groups, **options)
    lanes = lanes or _lanes()
    pack = build_pack(lanes, backbone.rules, CPU)
    hidden = backbone(pack, make_visual([g.prompt for g in lanes]))
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()
    (hidden * weights).sum().backward()
    grads = {(e, n): p.grad for e in ("a", "b") for n, p in backbone.bank.parameters_of(e).items()}
    return hidden.detach(), grads, pack


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["flash", "reference"])
@pytest.mark.parametrize("first_layer", [0, 1, 2])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_sharing_equals_naive(groups, scope, first_layer, attention, recompute):
    want, want_grads, naive = _run(groups, scope=scope, first_layer=first_layer, sharing=False,
                                   attention="reference")
    got, grads, pack = _run(groups, scope=scope, first_layer=first_layer, attention=attention, recompute=recompute)
    assert got.shape == (3 + 3 + 3 + 1 + 5 + 2 + 2, SPEC.hidden_size)
    assert pack.upper.tokens < naive.upper.tokens == naive.naive_tokens
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert want_grads.keys() == grads.keys()
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-9, msg=str(name))
        layer = int(name[1].split(".")[1])
        assert layer >= first_layer
    assert max(g.abs().max() for g in grads.values()) > 1e-2


@pytest.mark.parametrize("scope, first_layer", [("sequence", 0), ("completion", 1)])
def test_triton_attention_is_the_reference(groups, scope, first_layer):
    options = {"scope": scope, "first_layer": first_layer, "dtype": "float32"}
    (want, want_grads, _), (got, grads, _) = (_run(groups, attention=name, **options)
                                              for name in ("reference", "triton"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    largest = max(grad.abs().max() for grad in want_grads.values())
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=float(1e-5 * largest), msg=str(name))


@pytest.mark.parametrize("head_dim, dtype, why", [(8, torch.float64, "float64 is for"), (258, torch.float32, "258")])
def test_triton_attention_is_refused_where_it_cannot_run(head_dim, dtype, why):
    model = ModelConfig(path="-", attention="triton")
    with pytest.raises(UserError, match=rf"^model\.attention: triton: .*{why}.*; auto, flash and reference"):
        choose_attention(model, head_dim, dtype)


def test_without_a_gpu_attention_is_torchs():
    for name, chosen in (("auto", "flash"), ("flash", "flash"), ("reference", "reference"), ("triton", "triton")):
        assert choose_attention(ModelConfig(path="-", attention=name), 64, torch.bfloat16) == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, dtype, chosen", [(128, torch.bfloat16, "triton"), (64, torch.float32, "triton"),
                                                     (64, torch.float64, "flash"), (288, torch.bfloat16, "flash")])
def test_on_a_gpu_attention_is_tritons_where_that_runs(head_dim, dtype, chosen):
    assert choose_attention(ModelConfig(path="-"), head_dim, dtype) == chosen


def test_a_capture_keeps_keys_and_values_and_nothing_else_alive(groups):
    backbone, capture = make_backbone(groups), {}
    pack = build_pack(_lanes(), backbone.rules, CPU, trunks_only=True)
    with torch.no_grad():
        backbone(pack, make_visual([g.prompt for g in _lanes()]), capture)
    assert sorted(capture) == [1, 2, 3]
    held = [tensor for pair in capture.values() for tensor in pair]
    assert storage_bytes(held) == 3 * 2 * pack.upper.tokens * SPEC.num_kv_heads * SPEC.head_dim * 8


@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_prefixes_are_differentiated_in_scope_sequence_only(groups, scope, first_layer):
    """In scope completion layers evaluate them apart and without a graph, and autograd keeps none of their rows.

    What the leaves' attention reads of them it keeps with heads first.
    """
    backbone = make_backbone(groups, scope=scope, first_layer=first_layer, attention="reference")
    lanes = [LeafGroup(make_prompt(1, 103), [Leaf("a", [11, 12]), Leaf("b", [13])])]
    pack, calls = build_pack(lanes, backbone.rules, CPU), []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda module, given, out: calls.append((len(out[0]), out[0].grad_fn is not None)))
    with saved_by_autograd(backbone.parameters()) as saved:
        hidden = backbone(pack, make_visual([]))
    assert hidden.requires_grad
    leaves = 4 + 3 if scope == "completion" else 2 + 1
    trunk = 103 - (3 if scope == "completion" else 1)
    below = [(trunk + leaves, False)]
    above = [(trunk, False), (leaves, True)] if scope == "completion" else [(2 * trunk + leaves, True)]
    assert calls == below * first_layer + above * (SPEC.num_layers - first_layer)
    rows = {shape[0] for _, shape in saved.values() if shape}
    assert (max(rows) >= trunk) == (scope == "sequence")


@pytest.mark.parametrize("attention, recompute", [("flash", "none"), ("reference", "full"), ("flash", "selective")])
@pytest.mark.parametrize("first_layer", [0, 1])
def test_prefixes_from_outside_are_those_of_the_stream(groups, first_layer, attention, recompute):
    """Scope completion: keys and values of prefixes evaluated before, those of equal prompts once."""
    lanes = [*_lanes(), LeafGroup(make_prompt(2, 6), [Leaf("a", [30])]),
             LeafGroup(make_prompt(5, 3), [Leaf("b", [31])])]
    options = {"scope": "completion", "first_layer": first_layer, "attention": attention, "recompute": recompute}
    want, want_grads, inside = _run(groups, lanes, **options)
    backbone = make_backbone(groups, **options)
    pack = build_pack(lanes, backbone.rules, CPU, outside=True)
    assert [prompt.key for prompt in pack.outside] == ["p1", "p2"] and not len(pack.level(0).visual_index)
    assert pack.upper.tokens == inside.upper.tokens - (9 - 3) - 2 * (6 - 3) and pack.naive_tokens == inside.naive_tokens
    given = []
    for prompt in pack.outside:
        capture = {}
        with torch.no_grad():
            alone = build_pack([LeafGroup(prompt, [Leaf(None, ())])], backbone.rules, CPU, trunks_only=True)
            backbone(alone, make_visual([prompt]), capture)
        given.append(capture)
    hidden = backbone(pack, None, outside=given)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()
    (hidden * weights).sum().backward()
    torch.testing.assert_close(hidden, want, rtol=0, atol=1e-11)
    for (expert, name), grad in want_grads.items():
        torch.testing.assert_close(backbone.bank.parameters_of(expert)[name].grad, grad, rtol=0, atol=1e-9, msg=name)


def test_layers_evaluated_in_two_goes_are_all_layers(groups):
    backbone, prompt = make_backbone(groups, first_layer=2), make_prompt(1, 9, visual_tokens=4)
    pack = build_pack([LeafGroup(prompt, [Leaf("a", ())])], backbone.rules, CPU, trunks_only=True)
    whole, parts = {}, {}
    with torch.no_grad():
        backbone(pack, make_visual([prompt]), whole)
        border = backbone(pack, make_visual([prompt]), parts, layers=range(0, 2))
        assert parts.keys() == {1, 2}
        backbone.set_input_tensor(border)
        backbone(pack, make_visual([prompt]), parts, layers=range(2, SPEC.num_layers))
    assert all(torch.equal(a, b) for n, kv in whole.items() for a, b in zip(kv, parts[n], strict=True))


@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_lanes_do_not_see_each_other(groups, scope):
    """Each lane alone gives the rows it gives in company."""
    together, _, pack = _run(groups, scope=scope)
    rows = together.split(pack.leaf_lengths)
    number = 0
    for group in _lanes():
        for leaf in group.leaves:
            backbone = make_backbone(groups, scope=scope)
            alone = [LeafGroup(group.prompt, [leaf])]
            with torch.no_grad():
                hidden = backbone(build_pack(alone, backbone.rules, CPU), make_visual([group.prompt]))
            if not len(group.prompt.visual_index):
                torch.testing.assert_close(hidden, rows[number], rtol=0, atol=1e-11)
            number += 1


def test_scope_completion_leaves_the_prompt_to_the_backbone(groups):
    """Trunk tokens of scope completion are computed once, whatever the number of experts."""
    _, _, completion = _run(groups, scope="completion")
    _, _, sequence = _run(groups, scope="sequence")
    trunk = completion.upper.parts[0].rows.stop
    assert trunk == (9 - 3) + (6 - 3)
    assert sequence.upper.tokens == 3 * 8 + 2 * 5 + (3 + 3 + 3 + 1 + 5 + 2 + 2)


def test_below_first_layer_equal_completions_are_one(groups):
    _, _, pack = _run(groups, first_layer=1)
    assert pack.lower.tokens == 8 + 5 + (3 + 1 + 5 + 2)


@pytest.mark.parametrize("scope", ["sequence", "completion"])
@pytest.mark.parametrize("sharing", [True, False])
def test_pack_tokens_counts_what_build_pack_lays_out(groups, scope, sharing):
    backbone = make_backbone(groups, scope=scope, sharing=sharing)
    assert pack_tokens(_lanes(), backbone.rules) == build_pack(_lanes(), backbone.rules, CPU).upper.tokens


def test_targets_and_rows_follow_the_leaves(groups):
    _, _, pack = _run(groups)
    assert pack.target_ids.tolist() == [t for g in _lanes() for leaf in g.leaves for t in leaf.token_ids]
    assert pack.leaf_lengths == (3, 3, 3, 1, 5, 2, 2)
    # The row that predicts the first token of a completion holds the prompt's last token.
    first_rows = pack.scored_rows[np.cumsum([0, *pack.leaf_lengths[:-1]])]
    assert pack.upper.token_ids[first_rows].tolist() == [int(g.prompt.token_ids[-1])
                                                         for g in _lanes() for _ in g.leaves]


def test_rank_concatenation_is_the_exact_mean(groups):
    backbone = make_backbone(groups)
    lanes = [LeafGroup(make_prompt(3, 5), [Leaf("mean", [9, 8, 7])])]
    backbone.bank.put_combination("mean", {"a": 0.5, "b": 0.5})
    merged = {n: p for n, p in backbone.bank.parameters_of("mean").items()}
    for name in backbone.bank.names():
        deltas = [backbone.bank.scaling_of(e) * backbone.bank.parameters_of(e)[f"{name}.lora_B"]
                  @ backbone.bank.parameters_of(e)[f"{name}.lora_A"] for e in ("a", "b")]
        torch.testing.assert_close(merged[f"{name}.lora_B"] @ merged[f"{name}.lora_A"], sum(deltas) / 2,
                                   rtol=0, atol=1e-14)
    with torch.no_grad():
        assert backbone(build_pack(lanes, backbone.rules, CPU)).isfinite().all()


def test_a_new_expert_is_the_backbone(groups):
    backbone = make_backbone(groups)
    backbone.bank.add_expert("new", seed=3)
    prompt = make_prompt(4, 6)
    lanes = [LeafGroup(prompt, [Leaf("new", [9, 8]), Leaf(None, [9, 8])])]
    with torch.no_grad():
        new, base = backbone(build_pack(lanes, backbone.rules, CPU)).split(2)
    torch.testing.assert_close(new, base, rtol=0, atol=1e-13)


def _checked_passes():
    """What a checked backbone on two tensor-parallel ranks says: as it is, and after two faults on rank 1."""
    groups = Groups.create(Layout(tp=2), Placement.build(("a", "b"), 1))
    backbone = make_backbone(groups, checked=True)
    lanes, said = _lanes(), []
    pack = build_pack(lanes, backbone.rules, CPU)
    with torch.no_grad():
        for fault in (None, backbone.final_norm.weight, backbone.bank.parameters_of("a")[FAULTY]):
            if fault is not None and groups.coords.tp == 1:
                fault.view(-1)[0] *= 1 + 1e-12
            try:
                said.append(backbone(pack, make_visual([g.prompt for g in lanes])).isfinite().all().item())
            except AssertionError as error:
                said.append(str(error))
    groups.destroy()
    return said


FAULTY = "layers.1.self_attn.o_proj.lora_B"


def test_debug_checks_name_the_layer_and_the_rank_that_went_astray():
    for rank, said in enumerate(run_ranks(2, _checked_passes)):
        assert said == [True, *(f"parallel.debug_checks: hidden states after {where} (seen by rank {rank}), "
                                "tensor-parallel group: group ranks [1] hold other bits than group rank 0"
                                for where in ("the final norm", "layer 1"))]
