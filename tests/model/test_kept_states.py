"""States that are given where they enter ``first_layer``: the layers below see the rest, and nothing else changes."""
import pytest
import torch

from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from support.random_backbone import make_backbone, make_prompt, make_visual, one_rank_groups

CPU = torch.device("cpu")
IMAGE, TEXT, BARE = make_prompt(1, 9, visual_tokens=4), make_prompt(2, 6), make_prompt(5, 3)
LANES = [LeafGroup(IMAGE, [Leaf("a", [11, 12, 13]), Leaf("b", [11, 12, 13]), Leaf("b", [21])]),
         LeafGroup(TEXT, [Leaf("b", [9, 8, 7, 36, 10]), Leaf(None, [9, 8]), Leaf("a", [9, 8])]),
         LeafGroup(BARE, [Leaf("a", [30, 31])])]


@pytest.fixture(scope="module")
def groups():
    made = one_rank_groups()
    yield made
    made.destroy()


def _states(backbone):
    """All that enters ``first_layer``, each evaluated alone with its prompt."""
    found = {}
    for group in LANES:
        prefix = len(group.prompt.token_ids) - backbone.rules.forced(group.prompt)
        for leaf in group.leaves:
            entering = []
            pack = build_pack([LeafGroup(group.prompt, [Leaf(None, leaf.token_ids)])], backbone.rules, CPU)
            with torch.no_grad():
                backbone(pack, make_visual([IMAGE]), at_border=entering.append)
            if prefix:
                found[group.prompt.content_hash, None] = entering[0][:prefix]
            found[group.prompt.content_hash, tuple(leaf.token_ids)] = entering[0][prefix:]
    return found


def _run(backbone, pack, kept=None, outside=()):
    """(hidden states, gradients, rows that passed each layer)."""
    rows = []
    hooks = [layer.register_forward_pre_hook(lambda _, args, given: rows.append(len(given["hidden_states"])),
                                             with_kwargs=True) for layer in backbone.layers]
    for parameter in backbone.bank.parameters():
        parameter.grad = None
    hidden = backbone(pack, make_visual([IMAGE]), kept=kept, outside=outside)
    for hook in hooks:
        hook.remove()
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden).cos()).sum().backward()
    grads = {(e, n): p.grad for e in ("a", "b") for n, p in backbone.bank.parameters_of(e).items()}
    return hidden.detach(), grads, rows


KEPT = {"everything": lambda key: True, "nothing": lambda key: False, "completions": lambda key: key[1] is not None,
        "prompts": lambda key: key[1] is None, "all but a completion": lambda key: key[1] != (9, 8),
        "two completions and a prompt": lambda key: key in {("1", (21,)), ("2", (9, 8)), ("2", None)}}


@pytest.mark.parametrize("which", KEPT)
@pytest.mark.parametrize("scope, first_layer", [("sequence", 1), ("sequence", 2), ("completion", 1)])
def test_kept_states_change_nothing_but_the_work(groups, scope, first_layer, which):
    backbone = make_backbone(groups, scope=scope, first_layer=first_layer)
    states = _states(backbone)
    plain = build_pack(LANES, backbone.rules, CPU)
    want, want_grads, _ = _run(backbone, plain)
    kept = {key: 0 for key in states if KEPT[which](key)}
    pack = build_pack(LANES, backbone.rules, CPU, kept=kept)
    given = None if pack.kept is None else torch.cat([states[key] for key in pack.kept.keys[0]])
    got, grads, rows = _run(backbone, pack, given)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-11, msg=str(name))
    assert max(float(grad.abs().max()) for grad in want_grads.values()) > 1e-2
    # Every row of the plain lower stream is kept or evaluated; a prompt that a completion below needs is evaluated.
    assert pack.lower.tokens + (pack.kept.tokens if pack.kept else 0) == plain.lower.tokens
    prompts = sum(len(p.token_ids) - backbone.rules.forced(p) for p in (IMAGE, TEXT, BARE))
    evaluated = {"everything": 0, "nothing": plain.lower.tokens, "completions": prompts,
                 "prompts": plain.lower.tokens, "all but a completion": len(TEXT.token_ids) + 1}
    assert pack.lower.tokens == evaluated.get(which, pack.lower.tokens)
    assert pack.begins == (0 if pack.lower.tokens else first_layer)
    assert sum(rows) == first_layer * pack.lower.tokens + (3 - first_layer) * pack.upper.tokens


def test_prompts_from_outside_and_kept_completions_meet(groups):
    """Scope completion: keys and values of prompts from a store, completions from the rollout."""
    backbone = make_backbone(groups, scope="completion", first_layer=1)
    states = _states(backbone)
    want, want_grads, _ = _run(backbone, build_pack(LANES, backbone.rules, CPU))
    for left_out in ((), ("2", (9, 8))):
        pack = build_pack(LANES, backbone.rules, CPU, outside=True, kept={k: 0 for k in states if k != left_out})
        outside = []
        for prompt in pack.outside:
            alone = build_pack([LeafGroup(prompt, [Leaf(None, ())])], backbone.rules, CPU, trunks_only=True)
            outside.append({})
            with torch.no_grad():
                backbone(alone, make_visual([prompt]), outside[-1])
        assert all(ids is not None for _, ids in pack.kept.keys[0]), "no prompt is in any stream"
        assert pack.lower.tokens == (3 + 1 if left_out else 0)
        got, grads, _ = _run(backbone, pack, torch.cat([states[key] for key in pack.kept.keys[0]]), outside)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        for name, grad in want_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-11, msg=str(name))


def test_without_sharing_nothing_is_taken(groups):
    backbone = make_backbone(groups, first_layer=1, sharing=False)
    pack = build_pack(LANES, backbone.rules, CPU, kept={("2", (9, 8)): 0, ("2", None): 0})
    assert pack.kept is None and pack.lower.tokens == pack.naive_tokens
